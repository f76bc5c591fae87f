"""Constitutions as YAML that a person reads: for files that a program wrote and people go on editing."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.constitution import Constitution

SCHEMA_LINE = "# yaml-language-server: $schema=./constitution.schema.json"
WIDTH = 116
# Begins and contains nothing that means something in YAML, and reads back as a text.
_PLAIN = re.compile(r"[A-Za-z(][^\n\t:#]*(?:(?::(?! )|(?<! )#)[^\n\t:#]*)*")
_WORDS = re.compile(r"(?i)true|false|null|yes|no|on|off|\.inf|\.nan|y|n")


def as_yaml(constitution: Constitution, comments: Sequence[str] = (), notes: Mapping[str, str] | None = None) -> str:
    """Write a constitution; keys that have their default are left out.

    Args:
        constitution: what to write.
        comments: lines that stand below the first one, each as a comment.
        notes: a comment above a principle, by its id.
    """
    data = constitution.model_dump(exclude_defaults=True)
    lines = [SCHEMA_LINE, *(f"# {line}".rstrip() for line in comments)]
    for key in ("name", "version", "description", "extends"):
        if key in data:
            lines += _entry(key, data[key], 0)
    for part in ("principles", "examples", "comparisons", "tests"):
        if data.get(part):
            lines += ["", f"{part}:"]
        for number, entry in enumerate(data.get(part, [])):
            note = (notes or {}).get(entry.get("id", "")) if part == "principles" else None
            lines += [""] if number else []
            lines += [f"  # {note}"] if note else []
            rows = [row for key, value in entry.items() for row in _entry(key, value, 4)]
            lines += ["  - " + rows[0].lstrip(), *rows[1:]]
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, indent: int) -> list[str]:
    """Return the lines of one key with its value."""
    head = " " * indent + f"{key}:"
    if isinstance(value, list):
        return [f"{head} [{', '.join(_inline(item, flow=True) for item in value)}]"]
    if not isinstance(value, str):
        return [f"{head} {json.dumps(value)}"]
    if key == "version":
        return [f"{head} {json.dumps(value)}"]
    single = _inline(value)
    if "\n" not in value and len(head) + len(single) < WIDTH:
        return [f"{head} {single}"]
    return _block(head, value, indent + 2) or [f"{head} {json.dumps(value, ensure_ascii=False)}"]


def _inline(text: str, *, flow: bool = False) -> str:
    plain = _PLAIN.fullmatch(text) and not _WORDS.fullmatch(text) and not text.endswith((" ", ":"))
    if plain and not (flow and re.search(r"[\[\]{},]", text)):
        return text
    return json.dumps(text, ensure_ascii=False)


def _block(head: str, text: str, indent: int) -> list[str]:
    """Return a block of lines: folded where the text is one paragraph of single spaces, else literal.

    Nothing is returned for a text that no block can hold as it is: one that begins with a space.
    """
    space = " " * indent
    if "\n" not in text and "  " not in text and "\t" not in text:
        folded = textwrap.wrap(text, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
        if " ".join(folded) == text:
            return [f"{head} >-", *(space + line for line in folded)]
    if text.startswith((" ", "\t", "\n")):
        return []
    return [f"{head} |-", *(space + line if line else "" for line in text.split("\n"))]
