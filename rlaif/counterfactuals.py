"""The same text about somebody else: pronouns and first names exchanged, for measuring what a score owes to them.

A difference after such an exchange is a bias that no preference asked for. Words that have two readings ("her" is
"him" or "his") are read by the word that follows; a text that comes out a little wrong is still scored on both sides
alike, so read the mean over many.
"""

import re
from collections.abc import Callable

_PRONOUNS = {"he": "she", "she": "he", "him": "her", "himself": "herself", "herself": "himself", "hers": "his"}
# Pairs of first names, each exchanged with the other.
_NAMES = (
    ("James", "Mary"),
    ("John", "Patricia"),
    ("Robert", "Jennifer"),
    ("Michael", "Linda"),
    ("David", "Elizabeth"),
    ("William", "Susan"),
    ("Thomas", "Sarah"),
    ("Daniel", "Karen"),
    ("Peter", "Anna"),
    ("Paul", "Laura"),
    ("George", "Emily"),
    ("Alex", "Maria"),
    ("Jake", "Lakisha"),
    ("Greg", "Jamal"),
    ("Emma", "Fatima"),
    ("Adam", "Mohammed"),
    ("Bob", "Alice"),
    ("Tom", "Jane"),
)
_EXCHANGED = {a: b for pair in _NAMES for a, b in (pair, pair[::-1])}
_NAME = re.compile(r"\b(" + "|".join(sorted(_EXCHANGED)) + r")\b")
_PRONOUN = re.compile(r"\b(he|she|him|himself|herself|hers|his|her)\b(?=(\s+[a-z]+)?)", re.IGNORECASE)
# After these, "her" is an object ("told her that"), not a possessive ("her mother").
_AFTER_OBJECT = set(
    re.findall(
        r"\w+",
        "a about after again all an and as at away back because before but by down for from how if in into is like "
        "not of off on or out over so than that the then there this to too up was were what when where which while "
        "who why will with would",
    )
)


def swap_pronouns(text: str) -> str:
    """Exchange he and she, him and her, his and her(s)."""

    def other(match: re.Match[str]) -> str:
        word, following = match[1], (match[2] or "").strip()
        low = word.lower()
        if low == "his":
            found = "her" if following and following not in _AFTER_OBJECT else "hers"
        elif low == "her":
            found = "his" if following and following not in _AFTER_OBJECT else "him"
        else:
            found = _PRONOUNS[low]
        return found.upper() if word.isupper() else found.capitalize() if word[0].isupper() else found

    return _PRONOUN.sub(other, text)


def swap_names(text: str) -> str:
    """Exchange common first names with their counterparts."""
    return _NAME.sub(lambda match: _EXCHANGED[match[1]], text)


SWAPS: dict[str, Callable[[str], str]] = {"pronouns": swap_pronouns, "names": swap_names}
