"""Conversations as other projects write them: transcripts with ``Human:`` and ``Assistant:``, and lists of turns.

A row of a file that is no conversation raises `Unusable`, whose text is the reason; who reads the file keeps the row
aside under it.
"""

import re
from typing import Any

from rlaif.documents import fingerprint
from rlaif.records import Message, Messages, Split

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
OPEN_TRANSCRIPT = re.compile(r"\s*(?:Human|Assistant):.*\n\nAssistant:\s*\Z", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Unusable(Exception):
    """A row cannot be used; its text is the reason."""


def transcript(text: Any) -> Messages:
    """Split a transcript at ``Human:`` and ``Assistant:`` after a blank line, and nowhere else.

    Raises:
        Unusable: not a text, no turn, or text before the first turn.
    """
    if not isinstance(text, str):
        raise Unusable("not a text or a conversation")
    marks = list(TURN.finditer(text))
    if not marks:
        raise Unusable("no assistant turn")
    if text[: marks[0].start()].strip():
        raise Unusable("text before the first turn")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _ROLES[mark.group(1)], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def conversation(value: Any) -> Messages:
    """Return a turn, or a list of turns, as a conversation.

    Raises:
        Unusable: something else than turns of a role and a text.
    """
    turns = value if isinstance(value, list) else [value]
    for turn in turns:
        told = {key for key, part in turn.items() if part is not None} if isinstance(turn, dict) else set()
        if told != {"role", "content"} or not all(isinstance(turn[key], str) for key in told):
            raise Unusable("not a text or a conversation")
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def refuse_odd_turns(prompt: Messages) -> None:
    """Check that a prompt is user and assistant by turns, the user last, after at most one system turn.

    Raises:
        Unusable: it is not, or a turn is empty.
    """
    spoken = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    turn_about = all(turn["role"] == ("user", "assistant")[place % 2] for place, turn in enumerate(spoken))
    if len(spoken) % 2 == 0 or not turn_about:
        raise Unusable("odd roles")
    if not all(turn["content"].strip() for turn in prompt):
        raise Unusable("empty turn")


def split_of(prompt: Messages, eval_fraction: float, seed: int) -> Split:
    """Choose the side of the split by a hash of the first user turn, whatever its case and spaces."""
    first = next(turn["content"] for turn in prompt if turn["role"] == "user")
    share = int(fingerprint([seed, " ".join(first.casefold().split())])[:13], 16) / 16**13
    return "eval" if share < eval_fraction else "train"
