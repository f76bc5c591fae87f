"""The items of a JSON file with the lines they stand on, for files whose layout is not known before they are read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.errors import ConstitutionError


class Item(NamedTuple):
    """One item of a list, or one key of an object with its value, and its line."""

    key: str | int
    value: Any
    line: int


def parse(path: Path, text: str) -> tuple[Any, list[Item]]:
    """Parse JSON or JSON lines; return the data and its items with their lines."""
    try:
        start = len(text) - len(text.lstrip())
        data, end = json.JSONDecoder().raw_decode(text, start)
        rest = text[end:].strip()
        if not rest:
            return data, list(items(text, start))
        if isinstance(data, dict) and rest.startswith("{"):
            rows = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
            return [row for _, row in rows], [Item(n, row, line) for n, (line, row) in enumerate(rows)]
        raise json.JSONDecodeError("more text after the end", text, end)
    except json.JSONDecodeError as problem:
        message = f"not readable as JSON: {problem.msg}. Check commas, quotes and brackets."
        raise ConstitutionError(f"{path}:{problem.lineno}:{problem.colno}: {message}") from None
    except RecursionError:
        raise ConstitutionError(f"{path}: values stand inside values too deep to read. Flatten it.") from None


def items(text: str, start: int) -> Iterator[Item]:
    """Yield the items of the JSON list or object that begins at an offset, each with its line."""
    decoder, is_object, index = json.JSONDecoder(), text[start] == "{", 0
    position = _skip(text, start + 1)
    while text[position] not in "]}":
        line = text.count("\n", 0, position) + 1
        key: str | int = index
        if is_object:
            key, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
        value, position = decoder.raw_decode(text, position)
        yield Item(key, value, line)
        position, index = _skip(text, position), index + 1


def _skip(text: str, position: int) -> int:
    while text[position] in " \t\r\n,:":
        position += 1
    return position


def inner(path: Path, text: str, item: Item) -> list[Item]:
    """Return the items of a list or object that is a value itself; lines are searched from its own."""
    if not isinstance(item.value, list | dict) or not item.value:
        raise ConstitutionError(
            f"{path}:{item.line}: `{item.key}` holds {kind(item.value)}; a list of principles is expected."
        )
    lines = text.split("\n")
    before = sum(len(line) + 1 for line in lines[: item.line - 1])
    quoted = text.index(json.dumps(item.key), before) if json.dumps(item.key) in text else before
    begin = re.compile(r"[\[{]").search(text, quoted + len(json.dumps(item.key)))
    assert begin is not None, "a list or an object begins with a bracket"
    return list(items(text, begin.start()))


def bare(key: str) -> str:
    """Return the letters of a key in lower case, so that `CritiqueRequest` and `critique_request` are one."""
    return re.sub(r"[^a-z]", "", key.casefold())


def kind(value: Any) -> str:
    """Say what a value is, for an error message."""
    if isinstance(value, dict):
        return f"an object with {', '.join(f'`{key}`' for key in list(value)[:6]) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {str: "a text", bool: "a truth value", int: "a number", float: "a number"}.get(type(value), "null")
