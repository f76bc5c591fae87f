"""What a later round learns again of earlier ones: a share of their rows, each on the side where its prompt stood.

A reward model that starts from the last round's has been trained on that round's prompts. So a prompt that was trained
on is never measured with in a later round, nor the other way round, whatever else is labelled meanwhile.
"""

from collections.abc import Sequence
from typing import TypeVar

from rlaif.stages.reward_data import NOTHING_KNOWN, Known, Labelled, prompt_key, split_rows
from rlaif.stages.run import Run

R = TypeVar("R", bound=Labelled)


def replays(run: Run, number: int, row_id: str) -> bool:
    """Tell whether this round learns a row of an earlier one again: `rounds.replay` of them, drawn by a hash."""
    return run.seed("replay", number, row_id) / 2**63 < run.recipe.rounds.replay


def replayed(run: Run, earlier: Sequence[Sequence[R]], own: Sequence[Labelled]) -> list[R]:
    """Return the rows of earlier rounds, from the first, that this one learns again; none that it has itself."""
    seen = {row.id for row in own}
    found: list[R] = []
    for number, rows in enumerate(earlier, start=1):
        for row in rows:
            if row.id not in seen and replays(run, number, row.id):
                seen.add(row.id)
                found.append(row)
    return found


def known_sides(earlier: Sequence[Sequence[Labelled]], fraction: float) -> Known:
    """Return on which side the prompts of earlier rounds stand, by their usable rows in the order of the rounds."""
    known = NOTHING_KNOWN
    for rows in earlier:
        split = split_rows(rows, fraction, known=known)
        trained, heldout = ({prompt_key(row) for row in part} for part in (split.train, split.heldout))
        known = Known(known.train | trained, known.heldout | heldout)
    return known
