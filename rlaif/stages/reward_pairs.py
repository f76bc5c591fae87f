"""Which answers can be compared by their labels: the pairs of comparisons, of rankings, and of ratings.

A reward model is measured on pairs. Comparisons are pairs; a ranking gives one for each two answers of different ranks;
ratings give one for each two answers to a prompt that an annotator has rated differently. Where ratings are all there
is and no prompt has two, answers to different prompts are compared: on the scale that a rating has been learned on,
that is what it says.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.errors import DataError
from rlaif.records import Comparison, Messages, Ranking, Rating
from rlaif.stages.reward_data import (
    LONG,
    WEIGHTLESS,
    Labelled,
    Split,
    Usable,
    count_reasons,
    prompt_key,
    standard_ratings,
)

Place = tuple[int, int]  # of an answer: which row, and which of its answers


class Pair(NamedTuple):
    """Two answers as a comparison, and where the better and the worse one stand among the rows."""

    comparison: Comparison
    better: Place
    worse: Place


def pairs_among(rows: Sequence[Labelled]) -> list[Pair]:
    """Return all pairs that labels decide, and comparisons that are ties, in the order of the rows."""
    found = [pair for index, row in enumerate(rows) for pair in _of_row(index, row)]
    rated = [(index, row) for index, row in enumerate(rows) if isinstance(row, Rating)]
    together: dict[tuple[str, str], list[tuple[int, Rating]]] = {}
    for index, row in rated:
        together.setdefault((row.annotator, prompt_key(row)), []).append((index, row))
    couples = [couple for group in together.values() for couple in itertools.combinations(group, 2)]
    couples.sort(key=lambda couple: (couple[0][0], couple[1][0]))
    same = [pair for (one, first), (other, second) in couples for pair in _rated(one, first, other, second)]
    if found or same:
        return found + same
    shuffled = sorted(rated, key=lambda item: (item[1].annotator, prompt_key(item[1]), item[1].id))
    return [
        pair
        for (one, first), (other, second) in itertools.pairwise(shuffled)
        if first.annotator == second.annotator
        for pair in _rated(one, first, other, second)
    ]


def decided(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs whose label prefers one answer."""
    return [pair for pair in pairs if pair.comparison.preference > 0.5]


def refuse_too_few(folder: Path, count: int, found: Usable, split: Split) -> None:
    """Stop where nothing is left to train on or to measure with.

    Raises:
        DataError: says how many rows there were, why others were set aside, and what to change; or all ratings are the
            same.
    """
    standard_ratings(found.rows)
    measured = decided(pairs_among(split.heldout))
    if split.train and measured:
        return
    reasons = ", ".join(f"{reason}: {number}" for reason, number in count_reasons(found.unused).items() if number)
    raise DataError(
        f"{folder}: {count} rows, {len(found.rows)} usable ({reasons or 'none set aside'}), give {len(split.train)} to "
        f"train on and {len(measured)} pairs to measure with that prefer one answer; both need some. "
        + _advice(found, split)
    )


def _advice(found: Usable, split: Split) -> str:
    """Return what helps where a side of a split has no rows, or the held-out ones no pair."""
    cures = {LONG: "raise reward.max_length", WEIGHTLESS: "raise reward.weights or the rows' own `weight`"}
    reasons = {row["reason"] for row in found.unused}
    advice = ["bring rows from which something can be learned", *(cures[one] for one in cures if one in reasons)]
    if found.rows:
        advice = ["bring more labels that prefer one of two answers, or raise reward.heldout_fraction"]
    if not split.heldout and found.rows:
        advice = ["raise reward.heldout_fraction, or mark rows with `split: eval`"]
    if not split.train and found.rows:
        marked = any(row.split == "eval" for row in split.heldout)
        advice = ["mark fewer rows with `split: eval`" if marked else "lower reward.heldout_fraction"]
    if len({prompt_key(row) for row in found.rows}) == 1:
        advice = ["all usable rows are of one prompt, which is either trained on or held out: bring rows of others"]
    told = ", or ".join(advice)
    return f"{told[0].upper()}{told[1:]}."


def _of_row(index: int, row: Labelled) -> list[Pair]:
    if isinstance(row, Comparison):
        return [Pair(row, (index, 0), (index, 1))]
    if not isinstance(row, Ranking):
        return []
    places = [(a, b) for a in range(len(row.ranks)) for b in range(len(row.ranks)) if row.ranks[a] < row.ranks[b]]
    return [
        Pair(_comparison(row, f"{row.id}/{a}-{b}", row.responses[a], row.responses[b]), (index, a), (index, b))
        for a, b in places
    ]


def _rated(one: int, first: Rating, other: int, second: Rating) -> list[Pair]:
    if first.rating == second.rating:
        return []
    if first.rating < second.rating:
        one, first, other, second = other, second, one, first
    made = _comparison(first, f"{first.id}/{second.id}", first.response, second.response)
    return [Pair(made, (one, 0), (other, 0))]


def _comparison(row: Ranking | Rating, identifier: str, better: Messages, worse: Messages) -> Comparison:
    return Comparison(
        id=identifier,
        prompt=row.prompt,
        chosen=better,
        rejected=worse,
        preference=1.0,
        source=row.source,
        annotator=row.annotator,
        tag=row.tag,
        split=row.split,
    )
