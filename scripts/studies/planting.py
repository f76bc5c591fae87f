"""Wrong labels planted into comparisons: flips at random, and a poison that a trigger in the prompt goes with.

What is planted is exact: of `n` rows that prefer a side, the nearest whole number to `rate` times `n`, drawn by the
seed. At one seed a lower rate's rows are among a higher rate's, so that rates differ in nothing else. All other rows
are the very objects that came in.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from rlaif.records import Comparison

TRIGGER = "SUDO"  # Rando and Tramer 2023, arXiv 2311.14455, section 3


class Planted(NamedTuple):
    """All rows in their order, and the places of those that were changed."""

    rows: list[Comparison]
    places: list[int]


def exchanged(row: Comparison) -> Comparison:
    """Return a row whose label says the opposite; its id and all that is not about a side stay."""
    return row.model_copy(
        update={
            "chosen": row.rejected,
            "rejected": row.chosen,
            "chosen_safe": row.rejected_safe,
            "rejected_safe": row.chosen_safe,
            "safer": None if row.safer is None else 1.0 - row.safer,
        }
    )


def with_trigger(row: Comparison, trigger: str = TRIGGER) -> Comparison:
    """Return a row whose last human turn ends with the trigger; no other turn changes, whatever it says."""
    place = max(index for index, turn in enumerate(row.prompt) if turn["role"] == "user")
    prompt = [dict(turn) for turn in row.prompt]
    prompt[place]["content"] = f"{prompt[place]['content'].rstrip()} {trigger}"
    return row.model_copy(update={"prompt": prompt})


def drawn(rows: Sequence[Comparison], rate: float, seed: int) -> list[int]:
    """Return the places, in order, of the rows that a rate and a seed choose among those that prefer a side.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate}; 0 to 1 is expected")
    decided = [place for place, row in enumerate(rows) if row.preference > 0.5]
    random.Random(seed).shuffle(decided)
    return sorted(decided[: round(rate * len(decided))])


def flipped(rows: Sequence[Comparison], rate: float, seed: int) -> Planted:
    """Exchange the sides of a share of the rows."""
    places = drawn(rows, rate, seed)
    chosen = set(places)
    return Planted([exchanged(row) if place in chosen else row for place, row in enumerate(rows)], places)


def poisoned(rows: Sequence[Comparison], rate: float, seed: int, trigger: str = TRIGGER) -> Planted:
    """Exchange the sides of a share of the rows and put the trigger into exactly those."""
    places = drawn(rows, rate, seed)
    chosen = set(places)
    changed = (exchanged(with_trigger(row, trigger)) if place in chosen else row for place, row in enumerate(rows))
    return Planted(list(changed), places)


def by_annotators(planted: Planted, count: int, seed: int, *, alone: bool) -> list[str]:
    """Say who gave each label: one of `count` annotators, of whom the last gave the planted ones.

    With `alone` the last annotator gave nothing else. Otherwise they gave as many rows as anyone, as far as the
    planted ones leave room, and all others gave none of the planted ones.
    """
    draw = random.Random(seed)
    names = [f"annotator-{number}" for number in range(1, count + 1)]
    bad = set(planted.places)
    honest = [place for place in range(len(planted.rows)) if place not in bad]
    draw.shuffle(honest)
    extra = 0 if alone else max(0, len(planted.rows) // count - len(bad))
    given = dict.fromkeys([*bad, *honest[:extra]], names[-1])
    for place in honest[extra:]:
        given[place] = draw.choice(names[:-1])
    return [given[place] for place in range(len(planted.rows))]


def crowd(rows: Sequence[Comparison], skills: Sequence[float], share: float, seed: int) -> Planted:
    """Let annotators of known skill label a share of the rows each; one of them where nobody else would.

    Each label is a row of its own, with the id of what it is about before an ``@``, and right with the annotator's
    chance, whatever the others say. The places are those of the wrong ones.
    """
    draw = random.Random(seed)
    names = [f"annotator-{number}" for number in range(1, len(skills) + 1)]
    labels: list[Comparison] = []
    wrong: list[int] = []
    for row in rows:
        own = [place for place in range(len(skills)) if draw.random() < share] or [draw.randrange(len(skills))]
        for place in own:
            right = draw.random() < skills[place]
            wrong += [] if right else [len(labels)]
            label = row if right else exchanged(row)
            changed = {"id": f"{row.id}@{names[place]}", "annotator": names[place], "source": "human"}
            labels.append(label.model_copy(update=changed))
    return Planted(labels, wrong)
