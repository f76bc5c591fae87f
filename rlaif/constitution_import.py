"""Constitutions of other projects as constitutions of this one: `rlaif constitution import`.

What is known, told apart by content and not by the file's name:

- ``llm-swarm``: ``{constitutions: [{critic, revision}], system_chat: [...]}``; chats become examples where they fit;
- ``pairs``: a list of request pairs, ``{critique_request, revision_request}`` in any usual spelling, with or without a
  name, as LangChain's lists have; or a mapping of names to such pairs;
- ``paper``: ``{id: {prompt: [...], edit_request: ...}}``, as in the repository of Bai et al. 2022;
- ``principles``: ``{"constitution": [...]}`` or a list of statements, as inverse constitutional AI writes them;
- ``text``: numbered or bulleted lines, or Markdown headings with paragraphs.

Wordings are kept as they are. What has no place is reported, and nothing is dropped silently.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.constitution import Constitution
from rlaif.documents import MAX_BYTES, file_sha256, read_text
from rlaif.errors import ConstitutionError
from rlaif.json_items import Item, bare, inner, kind, parse
from rlaif.markdown import Statement, statements
from rlaif.principles import Example, Principle

CRITIQUE = {"critic", "critics", "critique", "critiquerequest", "critiqueprompt", "critiqueinstruction"}
REVISION = {"revision", "revise", "revisionrequest", "revisionprompt", "revisioninstruction", "edit", "editrequest"}
NAME = {"name", "id", "title", "key"}
TEXT = {"text", "principle", "statement", "rule", "constitution"}
_LABELS = re.compile(r"\s*(?:Critique ?Request|Revision ?Request|Edit ?Request)\s*:\s*", re.IGNORECASE)
_ANSWER = re.compile(r"\s*\n\s*(?:Critique|Revision)\s*:?\s*\Z", re.IGNORECASE)
_CHOOSE = re.compile(r"(?:please )?(?:select|choose|prefer|pick) the (?:response|output|answer) (?:that|which) ", re.I)
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """about and answer any anything are argument assistant assistants can carefully comment could critic critique
        did discuss does explain for from give has have how human identify its last look may not out output please point
        preceding read request response responses revise rewrite said say should some specific strongest take that the
        their them they this user users was way ways were what whats when where whether which who will with would you
        your""",
    )
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\ufeff\ufffe\uffff]")


class Imported(NamedTuple):
    """A constitution, the format it came in, and what could not be carried over."""

    constitution: Constitution
    format: str
    left: list[str]


@dataclass
class _Source:
    """A file while it is read: its text, what was found in it and what has no place."""

    path: Path
    text: str
    format: str = ""
    name: str = ""
    principles: list[Principle] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def clean(self, text: str) -> str:
        """Take characters out that no YAML file may hold, and say so."""
        if _CONTROL.search(text.replace("\r\n", "\n")):
            self.left.append(f"control characters in `{text.strip()[:40]}`")
        return _CONTROL.sub("", text).strip()

    def identifier(self, words: str, *, part: str = "principles") -> str:
        """Return a new id made of a name or of the first words of a text."""
        taken = {entry.id for entry in (self.principles if part == "principles" else self.examples)}
        slug = slugged(words) or part.removesuffix("s")
        number = 2
        chosen = slug
        while chosen in taken:
            chosen, number = f"{slug}-{number}", number + 1
        return chosen


def slugged(words: str, most: int = 6) -> str:
    """Return the first words of a text as an id: lower case, joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", words.casefold().replace("'", ""))[:most])


def import_constitution(path: Path) -> Imported:
    """Read a constitution of any known format.

    Raises:
        ConstitutionError: the file cannot be read, or is of no known format; what was seen is told with its line.
    """
    source = _Source(path, read_text(path, ConstitutionError, MAX_BYTES))
    stripped = source.text.lstrip()
    if not stripped:
        raise ConstitutionError(f"{path}: the file is empty; a constitution is expected.")
    if stripped[0] in "[{" and not re.match(r"\[[^\]\n]*\]\(", stripped):
        _from_json(source)
    else:
        _from_text(source)
    if not source.principles:
        raise ConstitutionError(f"{path}: no principle was found; a list of them is expected.{_expected()}")
    name = slugged(source.name) or slugged(path.stem) or "imported"
    constitution = Constitution(
        name=name,
        version="1",
        description=f"Imported from {path.name} (SHA-256 {file_sha256(path)[:16]}, format {source.format}).",
        principles=source.principles,
        examples=source.examples,
    )
    return Imported(constitution, source.format, list(dict.fromkeys(source.left)))


def _expected() -> str:
    return (
        " Known: JSON with `constitutions`, with `constitution`, a list of critique and revision requests, a list of "
        "texts, or names with `prompt` and `edit_request`; numbered or bulleted text; Markdown headings."
    )


# --- JSON ---------------------------------------------------------------------------------------------------------


def _from_json(source: _Source) -> None:
    data, items = parse(source.path, source.text)
    keys = {bare(str(item.key)): item for item in items} if isinstance(data, dict) else {}
    if "constitutions" in keys:
        source.format = "llm-swarm"
        rows = inner(source.path, source.text, keys.pop("constitutions"))
        for item in rows:
            _pair(source, item)
        chats = keys.pop("systemchat", None)
        for item in inner(source.path, source.text, chats) if chats else []:
            _chat(source, item)
        source.left += [f"the key `{item.key}` (line {item.line})" for item in keys.values()]
    elif "constitution" in keys or "principles" in keys:
        source.format = "principles"
        wanted = keys.pop("constitution", None) or keys.pop("principles")
        for item in inner(source.path, source.text, wanted):
            _statement(source, item)
        source.left += [f"the key `{item.key}` (line {item.line})" for item in keys.values()]
    elif items and all(isinstance(item.value, str) for item in items):
        source.format = "principles"
        for item in items:
            _statement(source, item)
    elif items and all(isinstance(item.value, dict) for item in items):
        is_paper = any("editrequest" in map(bare, item.value) and "prompt" in item.value for item in items)
        source.format = "paper" if is_paper else "pairs"
        for item in items:
            if any(bare(key) in CRITIQUE | {"prompt"} for key in item.value):
                _pair(source, item)
            else:
                _statement(source, item)
    else:
        kinds = ", ".join(f"`{item.key}`: {kind(item.value)} (line {item.line})" for item in items[:6])
        shape = "an object" if isinstance(data, dict) else "a list"
        raise ConstitutionError(f"{source.path}: {shape} of {kinds or 'nothing'}.{_expected()}")


def _pair(source: _Source, item: Item) -> None:
    """Add a principle that is a request for a critique and one for a revision."""
    value = item.value
    if not isinstance(value, dict):
        raise ConstitutionError(
            f"{source.path}:{item.line}: principle {item.key} is {kind(value)}; an object with a critique and a "
            "revision request is expected."
        )
    found: dict[str, Any] = {}
    kinds = {"critique": CRITIQUE | {"prompt"}, "revision": REVISION, "name": NAME, "text": TEXT}
    for key, content in value.items():
        part = next((part for part, names in kinds.items() if bare(key) in names), None)
        if part is None or part in found:
            source.left.append(f"the key `{key}` of principle {item.key} (line {item.line})")
        else:
            found[part] = content
    for part in ("critique", "revision"):
        found[part] = _request(source, found.get(part), part, item)
    named = found.get("name", item.key)
    named = source.clean(named) if isinstance(named, str) else ""
    text = found.get("text")
    if not isinstance(text, str) or not text.strip():
        # The request stands for the principle itself, so that comparisons, which have no wording here, can be built.
        text = f"The answer leaves nothing to do for somebody who is asked this: {found['revision']}"
        source.left.append(
            "`text` and `comparison`: the source has none, so `text` was written around each revision request; say in "
            "your own words what a good answer does"
        )
    source.principles.append(
        Principle(
            id=source.identifier(named or _telling(found["critique"])),
            title=named or _title(found["critique"]),
            text=source.clean(text),
            critique=found["critique"],
            revision=found["revision"],
        )
    )


def _request(source: _Source, value: Any, part: str, item: Item) -> str:
    """Return a request without the labels that a transcript puts around it; of several texts, the last turn."""
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        value = "\n".join(value)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else kind(value)
        raise ConstitutionError(
            f"{source.path}:{item.line}: principle {item.key}: {found} as its {part} request; a text is expected. "
            f"Its keys: {', '.join(f'`{key}`' for key in item.value)}."
        )
    parts = _LABELS.split(value)
    if len(parts) > 1 and parts[-2].strip():
        source.left.append(f"what stands before the {part} request of principle {item.key} (line {item.line})")
    return source.clean(_ANSWER.sub("", parts[-1]))


def _chat(source: _Source, item: Item) -> None:
    """Add a chat of six turns as an example, where its requests are those of a principle."""
    where = f"chat {item.key} of `system_chat` (line {item.line})"
    turns = item.value if isinstance(item.value, list) else []
    if [turn.get("role") if isinstance(turn, dict) else None for turn in turns] != ["user", "assistant"] * 3:
        source.left.append(f"{where}: not a prompt, a response, and a critique and a revision with their requests")
        return
    prompt, response, asked, critique, wanted, revision = (source.clean(str(turn["content"])) for turn in turns)
    match = next((p for p in source.principles if (p.critique, p.revision) == (asked, wanted)), None)
    match = match or next((p for p in source.principles if asked == p.critique or wanted == p.revision), None)
    if match is None:
        source.left.append(f"{where}: its requests are those of no principle")
        return
    if (match.critique, match.revision) != (asked, wanted):
        source.left.append(f"{where}: one of its two requests differs from those of `{match.id}`, which are shown now")
    source.examples.append(
        Example(
            id=source.identifier(prompt, part="examples"),
            principle=match.id,
            prompt=prompt,
            response=response,
            critique=critique,
            revision=revision,
        )
    )


def _statement(source: _Source, item: Item) -> None:
    """Add a principle that is one statement."""
    value, name = item.value, item.key if isinstance(item.key, str) and not item.key.isdigit() else ""
    if isinstance(value, dict):
        texts = [content for key, content in value.items() if bare(key) in TEXT and isinstance(content, str)]
        name = next((str(content) for key, content in value.items() if bare(key) in NAME), name)
        if not texts:
            raise ConstitutionError(f"{source.path}:{item.line}: principle {item.key} is {kind(value)}.{_expected()}")
        others = [key for key in value if bare(key) not in TEXT | NAME]
        source.left += [f"the key `{key}` of principle {item.key} (line {item.line})" for key in others]
        value = texts[0]
    if not isinstance(value, str) or not value.strip():
        raise ConstitutionError(
            f"{source.path}:{item.line}: principle {item.key} is {kind(value)}; a text is expected."
        )
    _add(source, Statement(name, value, [], item.line))


def _add(source: _Source, statement: Statement) -> None:
    text = source.clean(re.sub(r"^\s*\d+[.)]\s+", "", statement.text))
    named = source.clean(statement.title)
    comparison = None
    choice = _CHOOSE.match(text)
    if choice:  # an instruction to a judge: it stays the question, and what it asks for becomes the principle
        comparison, text = text, f"The answer {text[choice.end() :]}"
    source.principles.append(
        Principle(
            id=source.identifier(named or _telling(text)),
            title=named or _title(text),
            text=text,
            comparison=comparison,
            tags=statement.headings,
        )
    )


def _telling(text: str) -> str:
    """Return the words of a text that may tell it from others, for an id."""
    words = re.findall(r"[a-z0-9]+", text.casefold().replace("'", ""))
    return " ".join([word for word in words if len(word) > 2 and word not in _COMMON][:4]) or text


def _title(text: str, most: int = 9) -> str:
    words = text.split()
    return " ".join(words[:most]).rstrip(".,;:") + (" …" if len(words) > most else "")


# --- text ---------------------------------------------------------------------------------------------------------


def _from_text(source: _Source) -> None:
    source.format = "text"
    yaml = re.search(r"^(principles|constitutions?):", source.text, re.MULTILINE)
    if yaml:
        line = source.text.count("\n", 0, yaml.start()) + 1
        raise ConstitutionError(
            f"{source.path}:{line}: the key `{yaml[1]}`, so this looks like YAML. A constitution of this package needs "
            "no import: try `rlaif constitution check`. YAML of other projects is not known; convert it to JSON."
        )
    source.name, found, left = statements(source.text)
    if not found:
        first = next(line for line in source.text.splitlines() if line.strip())
        raise ConstitutionError(
            f"{source.path}:1: text that begins `{first.strip()[:60]}`, without a list.{_expected()}"
        )
    for statement in found:
        _add(source, statement)
    source.left += left
