"""Single values of other projects' rows: each is read as what it must be, or the row is unusable for it."""

from collections.abc import Sequence

from rlaif.human.json_objects import Fields
from rlaif.records import LARGEST
from rlaif.transcripts import Unusable


def number(row: Fields, column: str) -> float | None:
    """Return a number that can be computed with, at most 1e12 on either side of 0, or None where the column is empty.

    Raises:
        Unusable: something else stands there.
    """
    return _between(row, column, -LARGEST, LARGEST, f"not finite, or beyond {LARGEST:g}")


def probability(row: Fields, column: str) -> float | None:
    """Return a number from 0 to 1, or None where the column is empty.

    Raises:
        Unusable: something else stands there.
    """
    return _between(row, column, 0.0, 1.0, "outside [0, 1]")


def _between(row: Fields, column: str, low: float, high: float, otherwise: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"{column} not a number")
    if not low <= value <= high:
        raise Unusable(f"{column} {otherwise}")
    return float(value)


def weight(row: Fields) -> float:
    """Return how much a row counts, 1 where it does not say.

    Raises:
        Unusable: not a number from 0 to 1e12.
    """
    try:
        found = number(row, "weight")
    except Unusable:
        found = -1.0
    if found is not None and found < 0:
        raise Unusable(f"weight not a number from 0 to {LARGEST:g}")
    return 1.0 if found is None else found


def sign(row: Fields, column: str) -> bool | None:
    """Return a truth value, which may be written 0 or 1, or None where the column is empty.

    Raises:
        Unusable: something else stands there.
    """
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise Unusable(f"{column} not true or false")
    return bool(value)


def choice(row: Fields, column: str, among: Sequence[int]) -> int:
    """Return the number of a response that somebody chose.

    Raises:
        Unusable: none of those that can be chosen.
    """
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in among:
        raise Unusable(f"{column} not one of {', '.join(map(str, among))}")
    return int(value)


def word(row: Fields, column: str, default: str) -> str:
    """Return a name, given as text or a whole number, or the default where the row gives none.

    Raises:
        Unusable: it is something else.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, str | int):
        raise Unusable("a name that is not text")
    return ("" if value is None else str(value).strip()) or default
