"""YAML files whose every error has a line number, and the files that ship with the package.

YAML is read by the 1.2 rules (``yes`` is a word, not a truth value; a key is text as written) and safely:
tags beyond plain values, duplicate keys, anchors and files over one mebibyte are refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from rlaif.errors import RlaifError

MAX_BYTES = 1 << 20
Key = str | int
Severity = Literal["error", "warning"]
_PLAIN_TAGS = {"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"}
_NUMBERS = YAML(typ="safe", pure=True).constructor


def shipped(kind: str) -> Path:
    """Return the folder of ``constitutions``, ``prompts`` or ``recipes`` that came with this package."""
    package = Path(__file__).resolve().parent
    installed = package / "_shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def find(kind: str, name: str, beside: Path | None = None) -> Path:
    """Find a file named in a recipe: absolute, beside the recipe, in the working folder, or shipped.

    Args:
        kind: ``constitutions``, ``prompts`` or ``recipes``.
        name: a path, or the name of a shipped file with or without its suffix.
        beside: the folder of the file that names it.

    Returns:
        The first existing candidate; where none exists, the path as given, so that the reader's error names
        it.
    """
    suffix = {"constitutions": ".yaml", "recipes": ".yaml", "prompts": ".jsonl"}[kind]
    roots = [root for root in (beside, Path.cwd(), shipped(kind), shipped(kind).parent) if root is not None]
    for root in roots:
        for candidate in (root / name, root / f"{name}{suffix}"):
            if os.path.isfile(candidate):  # unlike Path.is_file, also no for a name that is too long
                return candidate.resolve()
    return Path(name)


def canonical_json(value: Any) -> str:
    """Serialize to JSON that depends on the value alone: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (hexadecimal) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Problem(NamedTuple):
    """One thing that is wrong with a file, as text ``file:line:column: message``; `code` names its kind to programs."""

    file: str
    line: int | None
    column: int | None
    code: str
    message: str
    severity: Severity = "error"

    @property
    def place(self) -> str:
        """``file:line:column``, as far as it is known."""
        return ":".join(str(part) for part in self[:3] if part is not None)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass
class Document:
    """A parsed YAML file: plain Python data, and where each key stands."""

    path: Path
    data: Any
    _marks: dict[tuple[Key, ...], tuple[int, int]] = field(default_factory=dict)

    def position(self, keys: Sequence[Key]) -> tuple[int, int]:
        """Return line and column (from 1) of a key path, or of its nearest existing ancestor."""
        path = tuple(keys)
        while path and path not in self._marks:
            path = path[:-1]
        return self._marks.get(path, (1, 1))

    def problem(self, keys: Sequence[Key], code: str, message: str, severity: Severity = "error") -> Problem:
        """Return a problem that stands at a key path."""
        return Problem(str(self.path), *self.position(keys), code, message, severity)


def load_yaml(path: Path, error: type[RlaifError]) -> Document:
    """Read one YAML 1.2 document.

    Raises:
        RlaifError: of the class ``error``: missing, not UTF-8, too large, a syntax error, a duplicate key,
            an anchor, a tag, or a document that is not a mapping.
    """
    text = read_text(path, error, MAX_BYTES)
    try:
        root, version = _composed(text)
    except MarkedYAMLError as problem:
        raise error(_syntax_problem(path, problem)) from None
    except ReaderError as problem:
        message = f"the control character #x{problem.character:04x}; text is expected. Remove it."
        place = text.count("\n", 0, problem.position) + 1, problem.position - text.rfind("\n", 0, problem.position)
        raise error(Problem(str(path), *place, "not-yaml", message)) from None
    except RecursionError:
        raise error(f"{path}: values stand inside values too deep to read. Flatten the file.") from None
    except (YAMLError, ValueError, OverflowError) as problem:  # the last two: escapes out of range
        raise error(f"{path}: not readable as YAML: {problem}. Check escapes such as `\\U0001F600`.") from None
    if version not in (None, (1, 2)):
        message = "a `%YAML` line asks for another version than 1.2. Remove it."
        raise error(Problem(str(path), 1, 1, "not-yaml", message))
    if not isinstance(root, MappingNode):
        found = "nothing" if root is None else "a list" if isinstance(root, SequenceNode) else "a plain value"
        found = f"the file holds {found}; keys with values are expected (`name: ...`)."
        raise error(Problem(str(path), 1, 1, "not-yaml", found))
    document = Document(path, None)
    document.data = _plain(root, (), document, error, set())
    return document


@lru_cache(maxsize=8)  # the parser is slow, and one command may read a file several times
def _composed(text: str) -> tuple[Node | None, tuple[int, int] | None]:
    yaml = YAML(typ="safe", pure=True)
    return yaml.compose(text), yaml.resolver.processing_version


def read_text(path: Path, error: type[RlaifError], max_bytes: int | None = None) -> str:
    """Read a UTF-8 file.

    Raises:
        RlaifError: of the class ``error``: it does not exist, is a folder, is not readable, is larger than
            ``max_bytes``, or is not UTF-8 (with the line).
    """
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise error(f"{path}: {size} bytes; a file of at most {max_bytes} is expected. Split it.")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file. Check the path; it is taken from the working folder.") from None
    except IsADirectoryError:
        raise error(f"{path}: is a folder; a file is expected.") from None
    except PermissionError:
        raise error(f"{path}: may not be read. Check its permissions.") from None
    except (OSError, ValueError) as problem:  # the latter: a path with a null character
        raise error(f"{path}: cannot be read: {problem}. Check the path.") from None
    return decode_text(raw, path, error)


def decode_text(raw: bytes, path: Path, error: type[RlaifError]) -> str:
    """Decode UTF-8, with or without a byte-order mark; ``path`` is only named in the error.

    Raises:
        RlaifError: of the class ``error``, naming the line of the first byte that is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        # With a byte-order mark, positions count from behind it.
        start = problem.start + (len(raw) - len(problem.object))
        line = raw[:start].count(b"\n") + 1
        message = f"byte {raw[start]:#04x} is not UTF-8 text. Save the file as UTF-8."
        raise error(Problem(str(path), line, None, "not-text", message)) from None


def _plain(node: Node, keys: tuple[Key, ...], document: Document, error: type[RlaifError], seen: set[int]) -> Any:
    """Turn a node tree into plain data, noting positions; refuse anchors (shared nodes) and tags."""
    position = _mark(node)
    document._marks.setdefault(keys, position)
    if id(node) in seen or node.anchor:
        raise error(_at(node, document, "an anchor or alias (`&`, `*`); write the value out instead."))
    seen.add(id(node))
    if str(node.tag).removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
        raise error(_at(node, document, f"the tag `{node.tag}` is not allowed; plain values only."))
    if isinstance(node, MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, document, error)
            if key in result:
                first = document.position((*keys, key))[0]
                message = f"the key `{key}` stands twice (first in line {first}). Remove one."
                raise error(_at(key_node, document, message))
            document._marks[(*keys, key)] = _mark(key_node)
            result[key] = _plain(value_node, (*keys, key), document, error, seen)
        return result
    if isinstance(node, SequenceNode):
        return [_plain(item, (*keys, index), document, error, seen) for index, item in enumerate(node.value)]
    return _scalar(node, document, error)


def _key(node: Node, document: Document, error: type[RlaifError]) -> str:
    """Return a key as the text that was written, so that `1`, `true` and `on` are words like any other."""
    if node.anchor:
        raise error(_at(node, document, "an anchor or alias (`&`, `*`); write the key out instead."))
    if not isinstance(node, ScalarNode) or not node.value:
        raise error(_at(node, document, "a key must be a plain word."))
    return _text(node, document, error)


def _scalar(node: Node, document: Document, error: type[RlaifError]) -> Any:
    kind = str(node.tag).rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool" and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    try:
        if kind == "int":
            if (number := int(_NUMBERS.construct_yaml_int(node))).bit_length() > 63:  # Python refuses to print it
                raise ValueError
            return number
        if kind == "float":
            return float(_NUMBERS.construct_yaml_float(node))
    except ValueError:
        raise error(_at(node, document, f"`{node.value:.40}` is not a number that can be read.")) from None
    return _text(node, document, error)


def _text(node: Node, document: Document, error: type[RlaifError]) -> str:
    try:
        return str(node.value).encode().decode()
    except UnicodeEncodeError:
        raise error(_at(node, document, "half of a `\\u` pair is no character. Write the character itself.")) from None


def _at(node: Node, document: Document, message: str) -> Problem:
    return Problem(str(document.path), *_mark(node), "not-plain", message)


def _mark(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _syntax_problem(path: Path, problem: MarkedYAMLError) -> Problem:
    mark = problem.problem_mark or problem.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
    found = f"not readable as YAML: {problem.problem or problem.context}"
    return Problem(str(path), line, column, "not-yaml", f"{found}. Check indentation, quotes and colons.")
