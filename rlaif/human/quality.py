"""How good annotators are, from the pairs that several of them judged, and what their labels should count.

A comparison is a judgement of its annotator, or of those who voted on it; a ranking is one of each two answers that it
puts in an order, and two ratings of answers to one prompt by the same annotator are one. Judgements of the same two
answers by different annotators tell how often each is right (`rlaif.maths.consensus`). Nobody's skill can be told from
pairs that they alone judged: they are taken to be as good as the others of their source, people or models.

An annotator who is right with the chance p counts ``2 p - 1``: 1 for one who never errs, 0 for a coin. Where labels are
+1 and -1, that is what a label of theirs says of the truth on average, and labels of like spread are best summed with
weights in that proportion.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import bdtr

from rlaif.documents import fingerprint
from rlaif.human.importers import Labelled
from rlaif.human.pairs import is_probability, turned
from rlaif.maths import agreement
from rlaif.maths.consensus import dawid_skene
from rlaif.records import Comparison, Messages, Ranking, Rating, text_of

RATE = 0.05  # of false finds among the finds
FEWEST = 10  # shared pairs, below which nothing is said of an annotator
_NEAR = 20  # ratings of one prompt by one annotator that are compared with each other, so that pairs stay countable
STRENGTH = 10.0  # labels that the average of the source counts beside an annotator's own
AGAINST, WEAKER, FEW, ALONE = "against the others", "weaker than the others", "few shared pairs", "no shared pair"


class Judgement(NamedTuple):
    """What one annotator says of two answers, in an order without meaning: P(the first is the better one)."""

    pair: str
    annotator: str
    source: str
    first: float


class Pair(NamedTuple):
    """Which of two answers each annotator prefers, 0 the first or 1 the second, ties left out; and the known one."""

    sides: dict[str, int]
    known: int | None


class Agreed(NamedTuple):
    """On how many of `n` shared pairs an annotator sides with the others."""

    right: int
    n: int


class Annotator(NamedTuple):
    """How good one annotator is.

    Attributes:
        annotator: their name.
        source: where their labels come from.
        labels: on how many pairs they said something.
        both_ways: on how many of them they said one thing and its opposite.
        shared: on how many they and another took a side, or have a known answer.
        agreement: the share of the shared ones on which they have the known side, or the one that the others point to.
        q: the least share of false finds at which they are among those found to agree less than the others do.
        skill: the chance that they are right, by `rlaif.maths.consensus`.
        finding: what stands out, or why nothing can be said; empty otherwise.
    """

    annotator: str
    source: str
    labels: int
    both_ways: int
    shared: int
    agreement: agreement.Rate | None
    q: float | None
    skill: float
    finding: str

    @property
    def weight(self) -> float:
        """What their labels should count."""
        return max(0.0, 2 * self.skill - 1)

    @property
    def stands_out(self) -> bool:
        """Whether they agree less with the others than the others do among themselves."""
        return self.finding in (AGAINST, WEAKER)

    def row(self) -> dict[str, Any]:
        """Return it as it is stored."""
        agreed = self.agreement and self.agreement._asdict()
        return {**self._asdict(), "agreement": agreed, "weight": self.weight, "stands_out": self.stands_out}


class Quality(NamedTuple):
    """How good annotators are.

    Attributes:
        pairs: how many pairs of answers were judged.
        shared: how many of them by several annotators, or with a known answer.
        known: how many have a known answer.
        alpha: Krippendorff's alpha over all pairs, a tie being a label of its own; None where it is not defined.
        annotators: the weakest first.
    """

    pairs: int
    shared: int
    known: int
    alpha: float | None
    annotators: list[Annotator]

    @property
    def weights(self) -> dict[str, float]:
        """What the labels of each annotator should count."""
        return {one.annotator: one.weight for one in self.annotators}

    def row(self) -> dict[str, Any]:
        """Return it as it is stored."""
        return {**self._asdict(), "annotators": [one.row() for one in self.annotators]}


def judgements(rows: Sequence[Labelled]) -> Iterator[Judgement]:
    """Yield what each annotator says of each pair of answers."""
    rated: dict[tuple[str, str], list[Rating]] = {}
    for row in rows:
        if isinstance(row, Rating):
            rated.setdefault((fingerprint(row.prompt), row.annotator), []).append(row)
        elif isinstance(row, Ranking):
            for (one, rank), (other, below) in itertools.combinations(zip(row.responses, row.ranks, strict=True), 2):
                first = 0.5 if rank == below else float(rank < below)
                yield _judgement(row.prompt, one, other, row.annotator, row.source, first)
        else:
            for annotator, preference in voters(row) or [(row.annotator, row.preference)]:
                yield _judgement(row.prompt, row.chosen, row.rejected, annotator, row.source, preference)
    for ratings in rated.values():
        yield from _of_ratings(ratings)


def _of_ratings(ratings: Sequence[Rating]) -> Iterator[Judgement]:
    """Compare one annotator's ratings of answers to one prompt with each other, each with the nearest by a hash.

    The hash is that of the texts, so that all annotators of the same answers have the same pairs.
    """
    known = sorted(((_text(row.response), row) for row in ratings), key=lambda one: one[0])
    for place, (text, row) in enumerate(known):
        for other_text, other in known[place + 1 : place + _NEAR]:
            if text != other_text:  # and not one answer rated twice
                first = 0.5 if row.rating == other.rating else float(row.rating > other.rating)
                yield _judgement(row.prompt, row.response, other.response, row.annotator, row.source, first)


def voters(row: Comparison) -> list[tuple[str, float]]:
    """Return the people who voted on a comparison with what each said, P(chosen is better); none for a model's votes.

    The votes of a panel of models are put together by their own weights, and the panel is the annotator.
    """
    if row.source != "human":
        return []
    said = [(vote.get("annotator"), vote.get("preference")) for vote in row.votes]
    return [(str(name), float(value)) for name, value in said if name and is_probability(value)]


def _judgement(
    prompt: Messages, one: Messages, other: Messages, annotator: str, source: str, first: float
) -> Judgement:
    texts = [fingerprint([prompt, _text(answer)]) for answer in (one, other)]
    pair = fingerprint(sorted(texts))
    return Judgement(pair, annotator, source, first if texts[0] < texts[1] else 1 - first)


def _text(answer: Messages) -> str:
    """Return a hash of an answer, whatever white space is around it."""
    return fingerprint(text_of(answer).strip())


def measure(rows: Sequence[Labelled], known: Sequence[Labelled] = ()) -> Quality | None:
    """Tell how good the annotators of rows are.

    Args:
        rows: labels, of any kinds and sources.
        known: labels that are taken for the truth, such as an expert's.

    Returns:
        None where no pair has a side from two annotators, or from one and from `known`: then nothing can be told.
    """
    said: dict[str, dict[str, list[float]]] = {}
    sources: dict[str, str] = {}
    for one in judgements(rows):
        said.setdefault(one.pair, {}).setdefault(one.annotator, []).append(one.first)
        sources.setdefault(one.annotator, one.source)
    answers: dict[str, list[float]] = {}
    for one in judgements(known):
        answers.setdefault(one.pair, []).append(one.first)
    truth = {pair: _side(values) for pair, values in answers.items()}
    sides = {pair: {name: _side(values) for name, values in by.items()} for pair, by in said.items()}
    pairs = [
        Pair({name: side for name, side in by.items() if side is not None}, truth.get(pair))
        for pair, by in sides.items()
    ]
    shared = [pair for pair in pairs if len(pair.sides) + (pair.known is not None) > 1]
    if not shared:
        return None
    skills = _skills(shared, sources)
    agreed = _with_others(shared, skills)
    p_values = _p_values(agreed)
    q_values = dict(zip(p_values, agreement.false_discovery_rates(list(p_values.values())), strict=True))
    labels = Counter(name for by in said.values() for name in by)
    both_ways = Counter(name for by in said.values() for name, values in by.items() if min(values) < 0.5 < max(values))
    found = [
        Annotator(
            annotator=name,
            source=source,
            labels=labels[name],
            both_ways=both_ways[name],
            shared=agreed[name].n,
            agreement=agreement.wilson(*agreed[name]) if agreed[name].n else None,
            q=q_values.get(name),
            skill=skills[name],
            finding=_finding(agreed[name], q_values.get(name)),
        )
        for name, source in sources.items()
    ]
    alpha = agreement.krippendorff_alpha(
        [["tie" if side is None else str(side) for side in by.values()] for by in sides.values()]
    )
    known_pairs = sum(pair.known is not None for pair in shared)
    return Quality(
        len(said), len(shared), known_pairs, alpha, sorted(found, key=lambda one: (one.skill, one.annotator))
    )


def _side(values: Sequence[float]) -> int | None:
    """Return which answer is the better one, 0 the first and 1 the second; None for a tie."""
    mean = sum(values) / len(values)
    return None if mean == 0.5 else int(mean < 0.5)


def _skills(shared: Sequence[Pair], sources: Mapping[str, str]) -> dict[str, float]:
    """Return the chance of each annotator to be right, drawn towards the average of their source, and that to all."""
    names, groups = list(sources), sorted(set(sources.values()))
    place = {name: index for index, name in enumerate(names)}
    given = [(item, place[name], side) for item, pair in enumerate(shared) for name, side in pair.sides.items()]
    items, who, sides = (list(column) for column in zip(*given, strict=True))
    known = [-1 if pair.known is None else pair.known for pair in shared]
    group = [groups.index(source) for source in sources.values()]
    consensus = dawid_skene(items, who, sides, 2, known=known, groups=group, alike=True, strength=STRENGTH)
    return dict(zip(names, consensus.skill.tolist(), strict=True))


def _with_others(shared: Sequence[Pair], skills: Mapping[str, float]) -> dict[str, Agreed]:
    """Count the pairs on which each annotator has the known side, or else the one that the others point to.

    The others' sides count as their skills say, in logits, so that one who is always wrong points to the other side.
    """
    logits = {name: math.log(skill / (1 - skill)) for name, skill in skills.items()}
    right, counted = Counter[str](), Counter[str]()
    for pair in shared:
        for name, side in pair.sides.items():
            others = [logits[other] * (1 - 2 * said) for other, said in pair.sides.items() if other != name]
            first = math.fsum(others)
            expected = pair.known if pair.known is not None else int(first < 0) if first else None
            if expected is not None:
                counted[name] += 1
                right[name] += side == expected
    return {name: Agreed(right[name], counted[name]) for name in skills}


def _p_values(agreed: Mapping[str, Agreed]) -> dict[str, float]:
    """Return, where enough is known, the chance of so few agreements if an annotator agreed as often as all others."""
    right, n = (sum(column) for column in zip(*agreed.values(), strict=True))
    # One agreement more and one less keep the share of the others off 0 and 1, which no share of a few rows shows.
    return {
        name: float(bdtr(one.right, one.n, (right - one.right + 1) / (n - one.n + 2)))
        for name, one in agreed.items()
        if one.n >= FEWEST
    }


def _finding(agreed: Agreed, q: float | None) -> str:
    if not agreed.n:
        return ALONE
    if q is None:
        return FEW
    if agreement.wilson(*agreed).high < 0.5:
        return AGAINST
    return WEAKER if q <= RATE else ""


def summary(quality: Quality) -> str:
    """Say how good annotators are, as a table."""
    heads = ("annotator", "source", "pairs", "shared", "with the others", "skill", "weight", "")
    rows = [heads, *(_columns(one) for one in quality.annotators)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    left = (0, 1, len(heads) - 1)
    lines = [
        "  ".join(
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    alpha = "not defined" if quality.alpha is None else f"{quality.alpha:.3f}"
    about = f"{quality.pairs} pairs of answers, {quality.shared} of them shared; Krippendorff's alpha {alpha}"
    return "\n".join([about, "", *lines])


def _columns(one: Annotator) -> tuple[str, ...]:
    found = one.agreement
    agreed = f"{found.rate:.1%} [{found.low:.1%}, {found.high:.1%}]" if found else "-"
    notes = [one.finding, f"both ways on {one.both_ways}" if one.both_ways else ""]
    numbers = (str(one.labels), str(one.shared), agreed, f"{one.skill:.3f}", f"{one.weight:.3f}")
    name = "".join(char for char in one.annotator if char.isprintable())
    return (name, one.source, *numbers, "; ".join(filter(None, notes)))


# --- what labels count --------------------------------------------------------------------------------------------


def weighed(row: Labelled, weights: Mapping[str, float]) -> Labelled:
    """Return a row that counts what its annotator does.

    Votes of several people are put together anew, each counting what its voter does, and the row what they do on
    average; where that turns the preference, the answers change places.

    Args:
        row: a label.
        weights: `Quality.weights` of labels among which this one was.
    """
    if isinstance(row, Comparison) and (votes := voters(row)):
        return _recounted(row, votes, weights)
    return row.model_copy(update={"weight": row.weight * weights[row.annotator]})


def _recounted(row: Comparison, votes: Sequence[tuple[str, float]], weights: Mapping[str, float]) -> Comparison:
    counts = [weights[name] for name, _ in votes]
    total = sum(counts)
    preference = (
        sum(c * value for c, (_, value) in zip(counts, votes, strict=True)) / total if total else row.preference
    )
    found = row.model_copy(update={"weight": row.weight * total / len(counts), "preference": preference})
    return turned(found) if preference < 0.5 else found
