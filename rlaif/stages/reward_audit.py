"""What the labels that go against a reference have in common: words of the prompt, an annotator, a source.

Labels that somebody planted share something, so that a model learns it: a trigger in the prompt (Rando and Tramer 2023,
arXiv 2311.14455), or who gave them. Two references speak for or against a label. The reward model is the better one,
until it has learned what was planted: then it agrees. The bag of words does not read prompts, so that no trigger in
them can teach it anything, and here it judges only rows that it was not fitted on.

`turned` asks the other way round, whatever the labels: does the model prefer the other answer once the words stand in
a prompt?
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif import bag_of_words
from rlaif.maths import agreement
from rlaif.maths.association import Association, associations
from rlaif.records import Comparison, Messages, text_of
from rlaif.stages.reward_calibration import Scored, pairs_of
from rlaif.stages.reward_data import prompt_key
from rlaif.stages.reward_model import RewardModel, encode_group

MODEL, WORDS = "reward model", "bag of words"
RATE = 0.05  # of false finds among the finds
_LISTED = 20
_TRIED = 4
_TRIED_ON = 32
_FOLDS = 5
_FEWEST = 10  # rows that have a property: the normal approximation of the rank sum wants about as many

Property = tuple[str, str]  # its kind and its name


def disagreements(scored: Scored, model: RewardModel) -> list[dict[str, Any]]:
    """Test which properties of comparisons go with labels that a reference speaks against.

    Returns:
        All properties found at a false-discovery rate of 5 % for each reference, and those that came nearest.
    """
    pairs, gaps = pairs_of(scored, model.combine)
    decided = [index for index, row in enumerate(pairs) if row.preference > 0.5]
    rows = [pairs[index] for index in decided]
    having = properties(rows)
    if not having:
        return []
    named = {f"{kind}: {name}": (kind, name) for kind, name in having}
    places = {key: having[one] for key, one in named.items()}
    listed: list[dict[str, Any]] = []
    for reference, margins in ((MODEL, gaps[decided].double().numpy()), (WORDS, words_margins(rows))):
        for index, one in enumerate(associations(margins, places)):
            if one.q <= RATE or index < _LISTED:
                listed.append(_described(reference, *named[one.name], one))
    return listed


def properties(rows: Sequence[Comparison]) -> dict[Property, list[int]]:
    """Return the places of the rows that have a property: words of human turns, an annotator, a source.

    Only those are kept that ten rows have and ten have not. Words that stand in the very same rows are one property.
    """
    found: dict[Property, list[int]] = {}
    for place, row in enumerate(rows):
        said = {
            name for turn in row.prompt if turn["role"] == "user" for name in bag_of_words.features(turn["content"])
        }
        own = [("words", name) for name in said] + [("annotator", row.annotator), ("source", row.source)]
        for one in own:
            found.setdefault(one, []).append(place)
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (kind, name), places in found.items():
        if _FEWEST <= len(places) <= len(rows) - _FEWEST:
            alike.setdefault((kind, tuple(places)), []).append(name)
    return {(kind, " | ".join(sorted(names))): list(places) for (kind, places), names in alike.items()}


def words_margins(rows: Sequence[Comparison]) -> NDArray[np.float64]:
    """Return the margins ``[n]`` that a bag of words gives to rows by the answers of all other prompts' folds."""
    folds = [int(hashlib.sha256(prompt_key(row).encode()).hexdigest(), 16) % _FOLDS for row in rows]
    margins = np.zeros(len(rows))
    for fold in range(_FOLDS):
        own = [place for place, other in enumerate(folds) if other == fold]
        rest = [row for row, other in zip(rows, folds, strict=True) if other != fold]
        fitted = bag_of_words.fit(
            [text_of(row.chosen) for row in rest],
            [text_of(row.rejected) for row in rest],
            [row.preference for row in rest],
        )
        chosen = fitted.scores([text_of(rows[place].chosen) for place in own])
        rejected = fitted.scores([text_of(rows[place].rejected) for place in own])
        margins[own] = chosen - rejected
    return margins


def try_words(listed: list[dict[str, Any]], model: RewardModel, heldout: Scored, size: int) -> list[dict[str, Any]]:
    """Add to the strongest of the listed words how often the model prefers the other answer once they end a prompt.

    A model that takes no notice of the words turns only where it was undecided, as it does for any words: compare the
    listed ones with each other.

    Args:
        listed: see `disagreements`.
        model: is asked about the prompts with the words.
        heldout: what the model says of comparisons as they are.
        size: groups in a pass; one has the versions of a prompt, the answers to each of them, and their beginning once.
    """
    tried = [(row, own) for row, own in zip(*heldout, strict=True) if isinstance(row, Comparison)][:_TRIED_ON]
    strongest = sorted((row for row in listed if row["kind"] == "words"), key=lambda row: float(row["p"]))
    names = list(dict.fromkeys(row["name"] for row in strongest))[:_TRIED]
    if not tried or not names:
        return listed
    words = [max(name.split(" | "), key=len) for name in names]
    rows = [row for row, _ in tried]
    before = [model.combine(own) for _, own in tried]
    after = preferred(model, rows, [[ending(row.prompt, one) for one in words] for row in rows], size)
    turned: dict[str, dict[str, Any]] = {}
    for name, found in zip(names, zip(*after, strict=True), strict=True):
        changed = sum(bool(a > b) != one for (a, b), one in zip(before, found, strict=True))
        turned[name] = agreement.wilson(changed, len(rows))._asdict()
    return [{**row, "turned": turned.get(row["name"]) if row["kind"] == "words" else None} for row in listed]


def preferred(
    model: RewardModel, rows: Sequence[Comparison], versions: Sequence[Sequence[Messages]], size: int
) -> list[list[bool]]:
    """Tell of each comparison, under other prompts, whether the model scores the chosen answer higher.

    Args:
        model: what scores.
        rows: ``n`` comparisons.
        versions: as many prompts for each of them, of which the common beginning is computed once.
        size: comparisons in a pass.
    """
    found: list[list[bool]] = []
    for start in range(0, len(rows), size):
        part = range(start, min(start + size, len(rows)))
        groups = [
            encode_group(model, prompt, [rows[index].chosen, rows[index].rejected])
            for index in part
            for prompt in versions[index]
        ]
        scores = model.score(groups).reshape(len(part), -1, 2)
        found += (scores[..., 0] > scores[..., 1]).tolist()
    return found


def ending(prompt: Messages, words: str) -> Messages:
    """Return a prompt whose last human turn ends with further words."""
    place = max(index for index, turn in enumerate(prompt) if turn["role"] == "user")
    return [
        {"role": turn["role"], "content": f"{turn['content'].rstrip()} {words}"} if index == place else turn
        for index, turn in enumerate(prompt)
    ]


def _described(reference: str, kind: str, name: str, one: Association) -> dict[str, Any]:
    return {"kind": kind, "reference": reference, "found": one.q <= RATE, **one._asdict(), "name": name}
