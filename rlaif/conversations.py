"""Files of conversations whose answers are to be scored, in the forms that this package and others write.

A row is one of: a comparison (`chosen` and `rejected`, with a `prompt` or as transcripts of whole conversations), a
ranking (`prompt` and `responses`), a demonstration or a rating (`prompt` with `completion` or `response`), or a
conversation (`messages`, the answer last). Prompts and answers are texts or lists of turns.
"""

from pathlib import Path
from typing import Any, NamedTuple

from rlaif.errors import DataError
from rlaif.records import Messages, assistant, read_jsonl
from rlaif.transcripts import OPEN_TRANSCRIPT, Unusable, conversation, refuse_odd_turns, transcript

ANSWERS = ("completion", "response")
_SHOWN = 20


class Answers(NamedTuple):
    """One row: where it stands, as it came, its prompt, and the answers to it by the column they stand in."""

    line: int
    row: dict[str, Any]
    prompt: Messages
    answers: dict[str, list[Messages]]


def read_answers(path: Path) -> list[Answers]:
    """Read a file of JSON lines.

    Raises:
        DataError: says of every row that is none of the forms what is wrong with it and what to do.
    """
    rows: list[Answers] = []
    problems: list[str] = []
    for line, row in read_jsonl(path):
        try:
            prompt, answers = answers_of(row)
            rows.append(Answers(line, row, prompt, answers))
        except Unusable as reason:
            problems.append(f"{path}:{line}: {reason}")
    refuse(problems)
    if not rows:
        raise DataError(f"{path}: no rows; at least one JSON object is expected.")
    return rows


def refuse(problems: list[str]) -> None:
    """Raise a DataError of the problems of a file's rows, if there are any; of many, the first ones."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError("\n".join(problems[:_SHOWN] + more))


def answers_of(row: dict[str, Any]) -> tuple[Messages, dict[str, list[Messages]]]:
    """Return a row's prompt and its answers by column.

    Raises:
        Unusable: the row is of none of the forms, or a part of it is empty or no conversation.
    """
    if "chosen" in row or "rejected" in row:
        sides = {name: _whole(row, name) for name in ("chosen", "rejected")}
        if sides["chosen"][:-1] != sides["rejected"][:-1]:
            raise Unusable("`chosen` and `rejected` answer different prompts. Give the prompt in a column `prompt`.")
        return sides["chosen"][:-1], {name: [turns[-1:]] for name, turns in sides.items()}
    if "responses" in row:
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise Unusable("`responses` is no list of answers. Give a list of texts or of turns.")
        found = [_joined(row, "responses", one) for one in responses]
        return found[0][:-1], {"responses": [turns[-1:] for turns in found]}
    name = next((name for name in ANSWERS if row.get(name) is not None), "messages")
    if name == "messages" and row.get(name) is None:
        raise Unusable(
            f"has the columns {', '.join(row) or 'of nothing'}. Expected: `messages`; or `prompt` with `completion`, "
            "`response` or `responses`; or `chosen` and `rejected`."
        )
    turns = _whole(row, name)
    return turns[:-1], {name: [turns[-1:]]}


def _whole(row: dict[str, Any], name: str) -> Messages:
    """Return a column as the whole conversation that ends with its answer."""
    value = row.get(name)
    if value is None:
        raise Unusable(f"`{name}` is missing. Add it.")
    if name != "messages" and row.get("prompt") is not None:
        return _joined(row, name, value)
    if name in ANSWERS:
        raise Unusable(f"`{name}` without a `prompt`. Add the prompt, as a text or a list of turns.")
    return _checked(name, _read(name, value))


def _joined(row: dict[str, Any], name: str, value: Any) -> Messages:
    """Return prompt and answer as one conversation; an answer of turns may repeat the prompt."""
    prompt = row.get("prompt")
    if prompt is None:
        raise Unusable(f"`{name}` without a `prompt`. Add the prompt, as a text or a list of turns.")
    if isinstance(prompt, str) and OPEN_TRANSCRIPT.match(prompt):
        before = transcript(prompt)[:-1]
    elif isinstance(prompt, str):
        before = [{"role": "user", "content": prompt}]
    else:
        before = _read("prompt", prompt)
    after = assistant(value) if isinstance(value, str) else _read(name, value)
    repeated = len(after) > len(before) and after[: len(before)] == before
    return _checked(name, after if repeated else before + after)


def _read(name: str, value: Any) -> Messages:
    try:
        return transcript(value) if isinstance(value, str) else conversation(value)
    except Unusable as reason:
        raise Unusable(f"`{name}`: {reason}. Give a list of turns, each with a `role` and a text `content`.") from None


def _checked(name: str, turns: Messages) -> Messages:
    """Return a conversation that ends with a written answer of the assistant."""
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise Unusable(f"`{name}` does not end with an answer of the assistant. Give one that is not empty.")
    try:
        refuse_odd_turns(turns[:-1])
    except Unusable as reason:
        raise Unusable(
            f"`{name}`: {reason} before the answer. User and assistant by turns are expected, the user first and "
            "last, after at most one system turn."
        ) from None
    return turns
