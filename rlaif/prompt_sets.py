"""Files of prompts: our own rows, and the transcripts of hh-rlhf; what may not stand in both splits.

A file whose first row has the column `chosen` (or `transcript`) holds transcripts: the last turn of the assistant is
dropped, and what is left is the prompt. Of such a file, rows that are no prompts are kept aside with a reason; a wrong
row of our own form is an error.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.documents import fingerprint
from rlaif.errors import DataError
from rlaif.prompting import Template, load_template
from rlaif.records import Messages, Prompt, read_jsonl, read_rows
from rlaif.transcripts import Unusable, refuse_odd_turns, split_of, transcript

TRANSCRIPTS = ("chosen", "transcript")  # the columns that hold one, the first of them that is there
_OPTIONAL = {"rejected", "id", "tag", "category", "split"}


class PromptSet(NamedTuple):
    """The prompts of a file, and ``{"line", "reason"}`` of each row that is none."""

    prompts: list[Prompt]
    unused: list[dict[str, Any]]


def read_prompts(path: Path, *, tag: str = "ordinary", eval_fraction: float = 0.1, seed: int = 0) -> PromptSet:
    """Read a file of prompts (JSON lines, or a ``.gz`` of them).

    Args:
        path: the file.
        tag: the tag of rows that name none.
        eval_fraction: the share of transcripts that are for evaluation, where they name no split.
        seed: chooses which those are, by their first user turn.

    Raises:
        DataError: a file that cannot be read, a wrong row of our own form, or a column that no form has.
    """
    first: dict[str, Any] = {}
    with suppress(DataError):  # a first line that is broken is named below, with all others
        _, first = next(read_jsonl(path), (0, first))
    column = next((name for name in TRANSCRIPTS if name in first), None)
    if column is None:
        rows = read_rows(path, Prompt)
        untagged = [row for row in rows if "tag" not in row.model_fields_set]
        for row in untagged:
            row.tag = tag
        found = PromptSet(rows, [])
    else:
        found = _read_transcripts(path, column, tag, eval_fraction, seed)
    return PromptSet([row.model_copy(update={"prompt": as_text(row.messages)}) for row in found.prompts], found.unused)


def _read_transcripts(path: Path, column: str, tag: str, eval_fraction: float, seed: int) -> PromptSet:
    prompts: list[Prompt] = []
    unused: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for line, row in read_jsonl(path):
        if column not in row or (unknown := sorted(row.keys() - {column} - _OPTIONAL)):
            wrong = f"the column `{column}` is missing" if column not in row else f"the unknown column `{unknown[0]}`"
            raise DataError(
                f"{path}:{line}: {wrong}; rows of transcripts have `{column}`, and may have "
                f"{', '.join(sorted(_OPTIONAL))}. Add, rename or remove it."
            )
        try:
            messages = _without_answer(row[column])
            content = fingerprint(messages)
            if content in seen:
                raise Unusable(f"duplicate of line {seen[content]}")
            seen[content] = line
        except Unusable as reason:
            unused.append({"line": line, "reason": str(reason)})
            continue
        named = {key: row[key] for key in ("id", "tag", "category", "split") if row.get(key) is not None}
        known = {"id": _id_of(messages), "tag": tag, "split": split_of(messages, eval_fraction, seed), **named}
        try:
            prompts.append(Prompt(messages=messages, **known))
        except ValueError as problem:
            raise DataError(f"{path}:{line}: id, tag, category or split: {str(problem).splitlines()[2]}") from None
    if not prompts:
        raise DataError(f"{path}: none of {len(unused)} rows is a prompt; the first: {unused[0]['reason']}.")
    return PromptSet(prompts, unused)


def line_of(path: Path, prompt_id: str) -> int | None:
    """Return the line on which a prompt stands, or None where it does not stand in this file."""
    for line, row in read_jsonl(path):
        if str(row.get("id")) == prompt_id:
            return line
        column = next((name for name in TRANSCRIPTS if name in row), None)
        if column is not None and "id" not in row:
            with suppress(Unusable):
                if _id_of(_without_answer(row[column])) == prompt_id:
                    return line
    return None


def _id_of(messages: Messages) -> str:
    return f"hh-{fingerprint(messages)[:12]}"


def _without_answer(text: Any) -> Messages:
    """Return a transcript without the assistant's last turn."""
    turns = transcript(text)
    prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    refuse_odd_turns(prompt)
    return prompt


def as_text(messages: Messages) -> str:
    """Return a conversation as the text that stands for the prompt in requests to a critic or a judge.

    One user turn is its own text. Turns after it, and a system turn, are told by the templates `continue` and
    `instruct`, each of which closes and opens the quotation marks that stand around the prompt in the other templates.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    spoken = [turn["content"] for turn in messages if turn["role"] != "system"]
    text = spoken[0]
    if system:
        text = _template("instruct").render(prompt=text, instructions=system)
    for response, prompt in zip(spoken[1::2], spoken[2::2], strict=True):
        text = _template("continue").render(conversation=text, response=response, prompt=prompt)
    return text


@cache
def _template(name: str) -> Template:
    return load_template(name)


def beginnings(prompt: Prompt) -> Iterator[str]:
    """Yield, for each turn of the user, the conversation up to it, whatever its case, spaces and system turn."""
    spoken = [" ".join(t["content"].casefold().split()) for t in prompt.messages if t["role"] != "system"]
    for end in range(1, len(spoken) + 1, 2):
        yield "\n".join(spoken[:end])


def refuse_leaks(prompts: list[Prompt], origin: dict[str, Path]) -> None:
    """Check that what is trained on cannot measure.

    Raises:
        DataError: a prompt of one split has the text of one of the other, or goes on from it.
    """
    whole: dict[str, Prompt] = {}
    for row in prompts:
        *_, text = beginnings(row)
        twin = whole.setdefault(text, row)
        if twin.split != row.split:
            _leak(row, twin, "has", origin)
    for row in prompts:
        for text in beginnings(row):
            start = whole.get(text, row)
            if start.split != row.split:
                _leak(row, start, "begins with", origin)


def _leak(row: Prompt, twin: Prompt, how: str, origin: dict[str, Path]) -> None:
    raise DataError(
        f"{origin[row.id]}: `{row.id}` ({row.split}) {how} the text of `{twin.id}` ({twin.split}) in "
        f"{origin[twin.id]}; what is trained on cannot measure. Remove one, or give both one split."
    )
