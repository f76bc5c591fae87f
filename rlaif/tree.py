"""A row's ancestry as a tree: the nodes, and the tree as lines of text or plain data."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 160  # characters of a text in the tree


@dataclass
class Node:
    """A row, an answer, a principle or an adapter, with what is known of it and where it came from."""

    what: str
    id: str = ""
    where: str = ""  # file and line, or the key in the journal
    facts: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    note: str = ""  # what is not as it was
    sources: list["Node"] = field(default_factory=list)


def as_json(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """Return nodes as plain data."""
    return [asdict(node) for node in nodes]


def as_lines(nodes: Iterable[Node], indent: str = "") -> Iterator[str]:
    """Draw nodes as a tree, texts cut to a line; control characters are left out."""
    for node in nodes:
        yield from _lines(node, indent, indent)


def _lines(node: Node, first: str, rest: str) -> Iterator[str]:
    head = " ".join(part for part in (node.what, node.id) if part)
    yield _printable(first + head + (f"  ({node.where})" if node.where else ""))
    inner = rest + ("│  " if node.sources else "   ")
    if node.facts:
        yield _printable(inner + ", ".join(f"{key} {_short(value)}" for key, value in node.facts.items()))
    if node.text:
        yield _printable(f"{inner}“{_short(node.text)}”")
    if node.note:
        yield _printable(f"{inner}! {node.note}")
    for index, source in enumerate(node.sources):
        last = index == len(node.sources) - 1
        yield from _lines(source, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable())
