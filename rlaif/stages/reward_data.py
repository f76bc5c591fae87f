"""What the reward and cost adapters learn from: comparisons, rankings and ratings as examples of token ids.

An example is one prompt with its answers, 1 of a rating, 2 of a comparison, K of a ranking. All rows are accounted
for: those that cannot be used are set aside with a reason, and those that reverse another one are counted.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rlaif import files
from rlaif.documents import fingerprint
from rlaif.errors import ConfigError, DataError
from rlaif.human.quality import measure, weighed
from rlaif.maths.preference import standardize_by_annotator
from rlaif.model.roles import SharedBase
from rlaif.recipe import PairLoss, RewardSection
from rlaif.records import Comparison, Messages, Ranking, Rating, Source, text_of
from rlaif.validation import unknown_name

Kind = Literal["pair", "ranking", "rating", "cost"]
Labelled = Comparison | Ranking | Rating
EMPTY, IDENTICAL, LONG = "empty answer", "identical answers", "longer than max_length"
TIED, WEIGHTLESS = "all ranks tie", "weight 0"
REASONS = (EMPTY, IDENTICAL, LONG, TIED, WEIGHTLESS)


@dataclass(frozen=True)
class Example:
    """One prompt with its answers, and what the labels say of them.

    For a pair the first answer is the chosen one; `preference` is P(chosen is better) and `loss` says how it counts.
    For `cost` the first answer is again the chosen one; `preference` is P(chosen is the *more harmful* one), None where
    the row does not say, and `signs` are +1 unsafe, -1 safe, 0 unknown.
    """

    kind: Kind
    id: str
    prompt: list[int]
    responses: list[list[int]]
    weight: float = 1.0
    preference: float | None = 1.0
    margin: float = 0.0
    loss: PairLoss = field(default_factory=PairLoss)
    ranks: list[int] = field(default_factory=list)
    rating: float = 0.0
    signs: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        """Return the number of tokens that a forward pass computes."""
        return len(self.prompt) + sum(map(len, self.responses))


class Split(NamedTuple):
    """Rows to train on, to stop training by, and to measure with."""

    train: Sequence[Labelled]
    dev: Sequence[Labelled]
    heldout: Sequence[Labelled]


class Known(NamedTuple):
    """Prompts, by `prompt_key`, whose side earlier rounds have settled."""

    train: frozenset[str] = frozenset()
    heldout: frozenset[str] = frozenset()


NOTHING_KNOWN = Known()


class Usable(NamedTuple):
    """Rows that can be used, those that cannot (``{"id", "reason"}``), and how many say the reverse of another one."""

    rows: list[Labelled]
    unused: list[dict[str, str]]
    reversed: int


def answers_of(row: Labelled) -> list[Messages]:
    """Return a row's answers, the chosen or best one first where the row is a comparison or a ranking in order."""
    if isinstance(row, Comparison):
        return [row.chosen, row.rejected]
    return row.responses if isinstance(row, Ranking) else [row.response]


def weight_of(row: Labelled, weights: Mapping[str, float]) -> float:
    """Return what a row counts: its own weight times that of its annotator, else of its source."""
    return row.weight * weights.get(row.annotator, weights.get(row.source, 1.0))


def refuse_unknown_names(settings: RewardSection, rows: Iterable[Labelled]) -> None:
    """Stop where the recipe weighs, or gives a loss to, an annotator or a source that no row has.

    Raises:
        ConfigError: a name, most likely misspelt, would change nothing.
    """
    names = {name for row in rows for name in (row.annotator, row.source)}
    problems = [
        unknown_name(f"reward.{key}", name, "no row has the annotator or source", names)
        for key, given in (("weights", settings.weights), ("pair_losses", settings.pair_losses))
        for name in given
        if name not in names and name not in get_args(Source)
    ]
    if problems:
        raise ConfigError(*problems)


def usable(base: SharedBase, rows: Iterable[Labelled], max_length: int, weights: Mapping[str, float]) -> Usable:
    """Set aside rows that nothing can be learned from, each with its reason.

    Args:
        base: for its tokenizer and the length of its context.
        rows: comparisons, rankings and ratings.
        max_length: tokens of a prompt and an answer.
        weights: by annotator or source; rows that come to weight 0 are neither trained on nor measured with.
    """
    kept: list[Labelled] = []
    unused: list[dict[str, str]] = []
    limit = min(max_length, base.max_length)
    for row in rows:
        texts = [text_of(answer).strip() for answer in answers_of(row)]
        prompt = len(base.tokenizer.prompt(row.prompt))
        longest = max(len(base.tokenizer.response(text_of(answer))) for answer in answers_of(row))
        if not all(texts):
            unused.append({"id": row.id, "reason": EMPTY})
        elif len(set(texts)) < len(texts):
            unused.append({"id": row.id, "reason": IDENTICAL})
        elif prompt + longest > limit:
            unused.append({"id": row.id, "reason": LONG})
        elif isinstance(row, Ranking) and len(set(row.ranks)) == 1:
            unused.append({"id": row.id, "reason": TIED})
        elif not weight_of(row, weights):
            unused.append({"id": row.id, "reason": WEIGHTLESS})
        else:
            kept.append(row)
    return Usable(kept, unused, reversals(kept))


def reversals(rows: Sequence[Labelled]) -> int:
    """Count comparisons whose two answers another row has the other way round.

    Whoever gave them: people do disagree. They are kept, and together they say that the answers are about equally good.
    What one annotator says against themselves is `rlaif.human.contradictions`.
    """
    pairs = {
        (fingerprint(row.prompt), text_of(row.chosen), text_of(row.rejected))
        for row in rows
        if isinstance(row, Comparison) and row.preference > 0.5
    }
    return sum((prompt, rejected, chosen) in pairs for prompt, chosen, rejected in pairs)


def split_rows(
    rows: Sequence[Labelled], fraction: float, *, dev_fraction: float = 0.0, known: Known = NOTHING_KNOWN
) -> Split:
    """Hold out rows by prompt, for each tag: those marked ``eval``, else a share chosen by a hash of the prompt.

    All rows of a prompt stand on one side, whatever their tags, kinds and marks: measured is what was never trained
    on. Rows to stop training by are taken from those to train on, so that the measure stays untouched. A known prompt
    stays on its side, and the share is one of the others.
    """
    out: set[str] = set()
    dev: set[str] = set()
    ordered = sorted(((row, prompt_key(row)) for row in rows), key=lambda one: one[0].tag)  # stable: as in the file
    for _, group in itertools.groupby(ordered, key=lambda one: one[0].tag):
        keyed = list(group)
        marked = {key for row, key in keyed if row.split == "eval"} - known.train
        prompts = sorted({key for _, key in keyed})
        new = [prompt for prompt in prompts if prompt not in known.train and prompt not in known.heldout]
        chosen = (marked or set(new[: math.ceil(fraction * len(new))])) | (known.heldout & set(prompts))
        rest = [prompt for prompt in prompts if prompt not in chosen]
        out |= chosen
        dev |= set(rest[: math.ceil(dev_fraction * len(rest))])
    dev -= out
    return Split(
        [row for row, key in ordered if key not in out and key not in dev],
        [row for row, key in ordered if key in dev],
        [row for row, key in ordered if key in out],
    )


def prompt_key(row: Labelled) -> str:
    """Return a hash of a row's prompt."""
    return hashlib.sha256(repr(row.prompt).encode()).hexdigest()


def weighed_by_skill(
    folder: Path, rows: Sequence[Labelled], known: Sequence[Labelled], split: Split, unused: list[dict[str, str]]
) -> Split:
    """Weigh what is trained on, and what training is stopped by, with the skill of annotators; write who they are.

    Held-out rows stay as they were labelled. Rows whose annotators are no better than a coin are set aside.

    Args:
        folder: of the stage, for ``annotators.json``.
        rows: all labels there are, of which the split has the usable ones.
        known: labels taken for the truth about annotators.
        split: the rows to train on and the others.
        unused: rows set aside, which is added to.

    Raises:
        DataError: no pair has labels of two annotators or a known answer, or nobody is better than a coin.
    """
    quality = measure(rows, known)
    if quality is None:
        raise DataError(
            f"{folder}: reward.skill_weights needs pairs of answers that two annotators have judged, which tell who is "
            f"right how often; none of {len(rows)} rows is about the answers of another annotator's. Bring such rows, "
            "or known answers to some (human.known), or set reward.weights by hand."
        )
    files.write_json(folder / "annotators.json", quality.row())
    weights = quality.weights
    train, dev = ([weighed(row, weights) for row in part] for part in (split.train, split.dev))
    for what, part in (("to train on", train), ("to stop training by", dev)):
        if part and not any(row.weight for row in part):
            raise DataError(
                f"{folder}: on {quality.shared} pairs that several annotators judged, nobody who gave a row {what} is "
                "right more often than a coin, and reward.skill_weights leaves none of their rows (annotators.json). "
                "Ask the annotators why they disagree, or set reward.skill_weights: false."
            )
    unused += [{"id": row.id, "reason": WEIGHTLESS} for row in (*train, *dev) if not row.weight]
    return split._replace(train=[row for row in train if row.weight], dev=[row for row in dev if row.weight])


def standard_ratings(rows: Sequence[Labelled]) -> dict[str, float]:
    """Return the rating of each rating's id, standardized for each annotator, since one's 4 is another's 3.

    Raises:
        DataError: all ratings are the same, so that they tell no answer from another.
    """
    ratings = [row for row in rows if isinstance(row, Rating)]
    if not ratings:
        return {}
    try:
        standard = standardize_by_annotator([row.rating for row in ratings], [row.annotator for row in ratings])
    except ValueError as problem:
        raise DataError(f"reward: {problem}. Bring ratings that differ, or leave them out.") from None
    return {row.id: value for row, value in zip(ratings, standard, strict=True)}


def examples(
    base: SharedBase, rows: Sequence[Labelled], settings: RewardSection, rated: dict[str, float]
) -> list[Example]:
    """Encode rows for the reward adapter; their weights are brought to an average of 1.

    Args:
        base: for its tokenizer.
        rows: comparisons, rankings and ratings.
        settings: the losses and weights by source and annotator.
        rated: see `standard_ratings`, which looks at all rows.
    """
    return _weighted([_example(base, row, settings, rated) for row in rows])


def _example(base: SharedBase, row: Labelled, settings: RewardSection, rated: dict[str, float]) -> Example:
    common = _common(base, row, settings)
    if isinstance(row, Ranking):
        return Example("ranking", ranks=row.ranks, **common)
    if isinstance(row, Rating):
        return Example("rating", rating=rated[row.id], **common)
    loss = settings.pair_losses.get(row.annotator) or settings.pair_losses.get(row.source) or settings.pair_loss
    return Example("pair", preference=row.preference, margin=row.margin or 0.0, loss=loss, **common)


def cost_examples(base: SharedBase, rows: Sequence[Labelled], settings: RewardSection) -> list[Example]:
    """Encode the comparisons that say which answer is the safer one, or whether an answer is safe."""
    found = [
        Example(
            "cost",
            preference=None if row.safer is None else 1.0 - row.safer,
            signs=(_sign(row.chosen_safe), _sign(row.rejected_safe)),
            **_common(base, row, settings),
        )
        for row in rows
        if isinstance(row, Comparison) and has_safety(row)
    ]
    return _weighted(found)


def has_safety(row: Comparison) -> bool:
    """Tell whether a comparison says anything of safety."""
    return row.safer is not None or row.chosen_safe is not None or row.rejected_safe is not None


def _sign(safe: bool | None) -> float:
    return 0.0 if safe is None else -1.0 if safe else 1.0


def _common(base: SharedBase, row: Labelled, settings: RewardSection) -> dict[str, Any]:
    tokenizer = base.tokenizer
    return {
        "id": row.id,
        "prompt": tokenizer.prompt(row.prompt),
        "responses": [tokenizer.response(text_of(answer)) for answer in answers_of(row)],
        "weight": weight_of(row, settings.weights),
    }


def _weighted(found: list[Example]) -> list[Example]:
    """Bring weights, which are above 0, to an average of 1."""
    mean = sum(example.weight for example in found) / max(1, len(found))
    return [replace(example, weight=example.weight / mean) for example in found]


def count_reasons(unused: Sequence[dict[str, str]]) -> dict[str, int]:
    """Return how many rows were set aside for each reason, all reasons named."""
    counts = Counter(row["reason"] for row in unused)
    return {reason: counts[reason] for reason in REASONS}
