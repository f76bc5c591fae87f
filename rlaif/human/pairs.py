"""Pairs of answers of which one was preferred, as hh-rlhf, TRL, PKU-SafeRLHF, PandaLM and LLMBar write them."""

import os
import re
from typing import Any, NamedTuple, TypeGuard, TypeVar

from rlaif.human.answers import answered, checked, refuse_empty, user
from rlaif.human.json_objects import Fields
from rlaif.human.values import choice, number, probability, sign
from rlaif.records import Comparison, Messages, assistant
from rlaif.transcripts import Unusable, conversation, transcript

AGAINST_SIGNS = "safer against the signs"
SWAPPED = "sides swapped"
VOTERS = ("annotator1", "annotator2", "annotator3")
"""The columns of PandaLM's three annotators."""


class Pair(NamedTuple):
    """What a row says of two answers; the columns of `records.Comparison`, but `preference` is from 0 to 1.

    `first` is the column that `chosen` stood in, where the columns have numbers.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    preference: float = 1.0
    margin: float | None = None
    safer: float | None = None
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    votes: tuple[dict[str, Any], ...] = ()
    flags: tuple[str, ...] = ()
    first: str = ""


P = TypeVar("P", Pair, Comparison)


def turned(pair: P) -> P:
    """Return the same judgement with the answers in each other's place."""
    changed: dict[str, Any] = {
        "chosen": pair.rejected,
        "rejected": pair.chosen,
        "preference": 1 - pair.preference,
        "margin": None if pair.margin is None else 0.0 - pair.margin,
        "safer": None if pair.safer is None else 1 - pair.safer,
        "chosen_safe": pair.rejected_safe,
        "rejected_safe": pair.chosen_safe,
        "votes": type(pair.votes)(
            {**vote, "preference": 1 - vote["preference"]} if is_probability(vote.get("preference")) else vote
            for vote in pair.votes
        ),
    }
    return pair._replace(**changed) if isinstance(pair, Pair) else pair.model_copy(update=changed)


def is_probability(value: Any) -> TypeGuard[float]:
    """Whether a vote's preference is a number from 0 to 1; a file of this package may hold anything there."""
    return isinstance(value, int | float) and 0 <= value <= 1


def against_signs(pair: Pair | Comparison) -> bool:
    """Whether one answer is called the safer one, and it alone of the two is called unsafe."""
    if pair.safer is None or pair.chosen_safe is None or pair.rejected_safe is None:
        return False
    return (pair.safer - 0.5) * (pair.chosen_safe - pair.rejected_safe) < 0


def hh_rlhf(row: Fields) -> Pair:
    """Read a pair of transcripts; turns begin with ``Human:`` or ``Assistant:`` after a blank line."""
    refuse_empty(_sides(row))
    prompt, (chosen, rejected) = checked([(name, transcript(text)) for name, text in _sides(row)])
    return _named(row, Pair(prompt, chosen, rejected))


def trl(row: Fields) -> Pair:
    """Read two texts or conversations, after a `prompt` or what both begin with."""
    sides = _sides(row)
    if row.get("prompt") is not None:
        prompt, (chosen, rejected) = answered(row["prompt"], sides)
        return _named(row, Pair(prompt, chosen, rejected))
    refuse_empty(sides)
    texts = [value for _, value in sides if isinstance(value, str)]
    if len(texts) == len(sides):
        parted = zip(("chosen", "rejected"), _shared_prefix(*texts), strict=True)
        prompt, (chosen, rejected) = checked(list(parted))
        return _named(row, Pair(prompt, chosen, rejected, flags=("prompt from the shared beginning",)))
    prompt, (chosen, rejected) = checked([(name, conversation(value)) for name, value in sides])
    return _named(row, Pair(prompt, chosen, rejected))


def pku_saferlhf(row: Fields) -> Pair:
    """Read two numbered responses with a helpfulness order, a safety order and a sign for each.

    Ji et al. 2024 (arXiv 2406.15513): `better_response_id` and `safer_response_id` are 0 or 1.
    """
    names = ("response_0", "response_1")
    prompt, (chosen, rejected) = answered(row.get("prompt"), [(name, row.get(name)) for name in names])
    better = choice(row, "better_response_id", (0, 1))
    pair = Pair(
        prompt,
        chosen,
        rejected,
        preference=float(better == 0),
        safer=None if row.get("safer_response_id") is None else float(choice(row, "safer_response_id", (0, 1)) == 0),
        chosen_safe=sign(row, "is_response_0_safe"),
        rejected_safe=sign(row, "is_response_1_safe"),
    )
    return pair._replace(first=names[better])


def pandalm(row: Fields) -> Pair:
    """Read two responses and three people's votes: 1 or 2 for the better one, 0 for a tie, which is half for each."""
    parts = [row.get("instruction"), row.get("input") or ""]  # many instructions need no input
    written = [part.strip() for part in parts if isinstance(part, str)]
    if len(written) < len(parts):
        raise Unusable("not a text or a conversation")
    text = "\n\n".join(filter(None, written))
    names = ("response1", "response2")
    prompt, (chosen, rejected) = answered(text, [(name, row.get(name)) for name in names])
    said = {voter: (0.5, 1.0, 0.0)[choice(row, voter, (0, 1, 2))] for voter in VOTERS}
    votes = tuple({"annotator": voter, "preference": vote, "first": "chosen"} for voter, vote in said.items())
    preference = sum(said.values()) / len(said)
    return Pair(prompt, chosen, rejected, preference=preference, votes=votes, first=names[preference < 0.5])


def llmbar(row: Fields) -> Pair:
    """Read two numbered outputs of which `label` names the better one (Zeng et al. 2024, arXiv 2310.07641)."""
    names = ("output_1", "output_2")
    prompt, (chosen, rejected) = answered(row.get("input"), [(name, row.get(name)) for name in names])
    better = choice(row, "label", (1, 2))
    return Pair(prompt, chosen, rejected, preference=float(better == 1), first=names[better - 1])


def _sides(row: Fields) -> list[tuple[str, Any]]:
    return [(name, row.get(name)) for name in ("chosen", "rejected")]


def _named(row: Fields, pair: Pair) -> Pair:
    """Add what columns of a comparison's own names say."""
    preference = probability(row, "preference")
    return pair._replace(
        preference=1.0 if preference is None else preference,
        margin=number(row, "margin"),
        safer=probability(row, "safer"),
        chosen_safe=sign(row, "chosen_safe"),
        rejected_safe=sign(row, "rejected_safe"),
    )


def _shared_prefix(chosen: str, rejected: str) -> tuple[Messages, Messages]:
    """Split two texts where they part, at the last space before: what they share is the prompt."""
    chosen, rejected = chosen.strip(), rejected.strip()
    if chosen == rejected:
        raise Unusable("identical answers")
    shared = os.path.commonprefix([chosen, rejected])
    words = re.match(r"(.*\S)\s", shared, re.DOTALL)
    if words is None:
        raise Unusable("contexts differ")
    cut = words.end(1)
    before = user(chosen[:cut])
    return [before, *assistant(chosen[cut:].strip())], [before, *assistant(rejected[cut:].strip())]
