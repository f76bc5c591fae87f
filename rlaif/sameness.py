"""Texts that say the same: near-duplicates among rows, and critiques that find nothing to change.

Everything here is a pure function of strings. Candidates for near-duplicates come from locality-sensitive hashing of
MinHash signatures (Broder 1997), with fixed permutations; the exact share of common word triples decides.
"""

import re
from collections.abc import Iterable

GRAM = 3  # words
_PERMUTATIONS = 128
_SLACK = 0.15  # candidates are looked for this far below the threshold, so that hashing misses hardly any
_WORD = re.compile(r"\w+|[^\w\s]")
_FIRST_SENTENCE = re.compile(r"[^.!?\n]*")
_CHANGE = r"(?:chang|mend|improv|revis|correct|rewrit|edit)\w*"
_NO_CHANGE = re.compile(
    rf"""\bnothing\ (?:in\ \w+(?:\ \w+)?\ )?(?:has|needs|had)\ to\ (?:be\ )?{_CHANGE}
    |\bno\ (?:further\ )?{_CHANGE}(?:\ (?:is|are|was|were))?\ (?:needed|necessary|required)
    |\b(?:needs?|requires?)\ no\ {_CHANGE}
    |\b(?:does\ not|doesn't|do\ not|don't)\ (?:need|have)\ to\ (?:be\ )?{_CHANGE}
    |^\W*there\ (?:is|are)\ (?:none|no\ such\ \w+)\W*$""",
    re.IGNORECASE | re.VERBOSE,
)
_RESERVE = re.compile(r"\b(?:but|however|except|although|though|unless|only|apart from)\b", re.IGNORECASE)


def says_no_change(critique: str) -> bool:
    """Tell whether a critique opens by saying that nothing has to change, without a reservation.

    The words are those that constitutions ask for ("say that nothing has to change", "or say that there is none") and
    their near relatives, in English, in the first sentence.
    """
    found = _FIRST_SENTENCE.match(critique.strip().replace("\u2019", "'"))
    first = found.group() if found else ""
    return bool(_NO_CHANGE.search(first)) and not _RESERVE.search(first)


def grams(text: str) -> frozenset[str]:
    """Return the word triples of a text, whatever its case and spaces; of a shorter one, its words together."""
    words = _WORD.findall(text.casefold())
    count = max(1, len(words) - GRAM + 1)
    return frozenset(" ".join(words[start : start + GRAM]) for start in range(count))


def likeness(some: frozenset[str], others: frozenset[str]) -> float:
    """Return the share of common word triples, 0 to 1 (Jaccard's index)."""
    return len(some & others) / len(some | others)


def near_duplicates(texts: Iterable[tuple[str, str]], threshold: float) -> dict[str, str]:
    """Find texts that are nearly another one.

    In the order of their ids, a text stays unless it is nearly one that stays; so the smallest id of a group does, and
    the order of the rows changes nothing.

    Args:
        texts: ids, each once, and texts.
        threshold: the share of common word triples, above 0, from which two texts are nearly one.

    Returns:
        For each text that does not stay, the id of the most similar one that does.
    """
    from datasketch import MinHash, MinHashLSH  # it loads scipy, which takes half a second

    index = MinHashLSH(threshold=max(0.05, threshold - _SLACK), num_perm=_PERMUTATIONS)
    stay: dict[str, frozenset[str]] = {}
    found: dict[str, str] = {}
    for identifier, text in sorted(texts):
        own = grams(text)
        signature = MinHash(num_perm=_PERMUTATIONS, seed=1)
        signature.update_batch([gram.encode("utf-8", "surrogatepass") for gram in sorted(own)])
        near = {other: likeness(own, stay[other]) for other in sorted(index.query(signature))}
        best = max(near, key=lambda other: near[other], default=None)
        if best is not None and near[best] >= threshold:
            found[identifier] = best
            continue
        index.insert(identifier, signature)
        stay[identifier] = own
    return found
