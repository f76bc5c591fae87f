"""Rows in which one annotator says opposite things of the same answers.

Both are kept, because nothing tells which one was meant; together they say that the annotator is not sure, and a loss
on both learns that. They are marked and counted, so that nobody takes the pair for two independent opinions.
"""

from collections.abc import Sequence

from rlaif.documents import fingerprint
from rlaif.records import Comparison, Messages, Ranking, Rating

FLAG = "contradictory"
WHY = "one annotator said the opposite of the same answers elsewhere"


def mark(rows: Sequence[Comparison | Rating | Ranking]) -> dict[str, str]:
    """Flag the comparisons that contradict another row; return the id of each such row and of the first other one."""
    groups: dict[str, list[Comparison | Rating | Ranking]] = {}
    for row in rows:
        groups.setdefault(_subject(row), []).append(row)
    found: dict[str, str] = {}
    for group in groups.values():
        for row in group if len(group) > 1 else ():
            other = next((other for other in group if other is not row and _opposed(row, other)), None)
            if other is None:
                continue
            found[row.id] = other.id
            if isinstance(row, Comparison) and FLAG not in row.flags:
                row.flags.append(FLAG)
    return found


def _subject(row: Comparison | Rating | Ranking) -> str:
    """Return a hash of what a row is about and of who says it."""
    about: list[Messages] = []
    if isinstance(row, Comparison):
        about = sorted((row.chosen, row.rejected), key=fingerprint)
    elif isinstance(row, Rating):
        about = [row.response]
    return fingerprint([type(row).__name__, row.annotator, row.prompt, about])


def _opposed(row: Comparison | Rating | Ranking, other: Comparison | Rating | Ranking) -> bool:
    """Tell whether two rows of one subject say opposite things."""
    if isinstance(row, Rating) and isinstance(other, Rating):
        return row.rating != other.rating
    if isinstance(row, Ranking) and isinstance(other, Ranking):
        places, others = _places(row), _places(other)
        both = [name for name in places if name in others]
        return any((places[a] - places[b]) * (others[a] - others[b]) < 0 for a in both for b in both)
    assert isinstance(row, Comparison) and isinstance(other, Comparison), "rows of one subject are of one kind"
    turned = row.chosen != other.chosen
    orders = [(row.preference, other.preference), (row.safer, other.safer)]
    if any(one is not None and two is not None and _against(one, two, turned) for one, two in orders):
        return True
    signs = [other.chosen_safe, other.rejected_safe]
    here = [row.chosen_safe, row.rejected_safe]
    return any(
        one is not None and two is not None and one != two
        for one, two in zip(here, signs[::-1] if turned else signs, strict=True)
    )


def _against(one: float, two: float, turned: bool) -> bool:
    return (one - 0.5) * ((1 - two if turned else two) - 0.5) < 0


def _places(row: Ranking) -> dict[str, int]:
    return {fingerprint(response): rank for response, rank in zip(row.responses, row.ranks, strict=True)}
