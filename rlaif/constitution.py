"""A constitution: the principles that answers are judged by, with worked examples and tests of a judge.

`load` reads a file, merges what it extends and reports every problem with its position. `draw` picks the
principle for one step of one prompt. No model and no torch is needed for anything here.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from rlaif.documents import (
    Document,
    Problem,
    Severity,
    canonical_json,
    fingerprint,
    load_yaml,
    shipped,
)
from rlaif.errors import ConstitutionError
from rlaif.principles import ID, Entry, Example, Id, JudgeTest, Principle, Text, WorkedComparison
from rlaif.validation import describe

__all__ = [
    "Constitution",
    "Difference",
    "Example",
    "JudgeTest",
    "Placed",
    "Principle",
    "Reading",
    "WorkedComparison",
    "diff",
    "draw",
    "json_schema",
    "load",
    "read",
]

Part = Literal["principles", "examples", "comparisons", "tests"]
KINDS: dict[Part, type[Principle | Example | WorkedComparison | JudgeTest]] = {
    "principles": Principle,
    "examples": Example,
    "comparisons": WorkedComparison,
    "tests": JudgeTest,
}


class Constitution(Entry):
    """Principles, worked examples, worked comparisons and judge tests: one file, or several merged."""

    name: Id = Field(description="Name of the constitution: lower-case words joined by hyphens.")
    version: Text = Field(description="Version in quotes, for example '1.0'; for people.")
    description: Text = Field(description="What the constitution is for; for people.")
    extends: Text | None = Field(
        default=None,
        description="A constitution file beside this one (or a shipped one) to start from. An entry with the "
        "same id replaces the one there, in its place; all others are added after those there.",
    )
    principles: list[Principle] = Field(min_length=1, description="What good answers do; at least one.")
    examples: list[Example] = Field(default=[], description="Worked critiques and revisions.")
    comparisons: list[WorkedComparison] = Field(default=[], description="Decided comparisons for the judge.")
    tests: list[JudgeTest] = Field(default=[], description="Comparisons that measure the judge.")

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of all that can change what a model is shown, trained on or measured by.

        That is `hash_of` all four parts. Not included, because no model sees them: comments, key order,
        `name`, `version`, `description`, how `extends` splits the files, titles and tags of principles.
        """
        return self.hash_of("principles", "examples", "comparisons", "tests")

    def hash_of(self, *parts: Part) -> str:
        """Return the SHA-256 (hexadecimal) of some parts, for a stage that reads no others.

        Of a principle, its `hash`, `weight` and `applies_to` count. The order of entries counts too: it is
        the order in which they may be shown.
        """
        content = self.model_dump(include={str(part) for part in parts})
        if "principles" in content:
            content["principles"] = [[p.hash, *_frequency(p)] for p in self.principles]
        return fingerprint(content)

    def principle(self, identifier: str | None) -> Principle:
        """Return the principle with this id; the first where None.

        Raises:
            ConstitutionError: there is none.
        """
        known = {p.id: p for p in self.principles}
        if identifier is not None and identifier not in known:
            raise ConstitutionError(f"{self.name}: no principle `{identifier}`; there are: {', '.join(known)}.")
        return known[identifier] if identifier is not None else self.principles[0]


class Difference(NamedTuple):
    """Ids of principles that differ between two constitutions."""

    added: list[str]
    removed: list[str]
    reworded: list[str]
    reweighted: list[str]


class Placed(NamedTuple):
    """One entry of a constitution and where it stands; of `unread` fields, the entry holds no value that counts."""

    document: Document
    part: Part
    number: int
    entry: Principle | Example | WorkedComparison | JudgeTest
    unread: frozenset[str] = frozenset()

    def has(self, *keys: str) -> bool:
        """Tell whether these fields could be read."""
        return self.unread.isdisjoint(keys)

    def problem(self, key: str, code: str, message: str, severity: Severity = "error") -> Problem:
        """Return a problem at one key of the entry; with an empty key, at the entry."""
        keys = (self.part, self.number, *([key] if key else []))
        return self.document.problem(keys, code, message, severity)

    def warning(self, key: str, code: str, message: str) -> Problem:
        """Return a warning at one key of the entry, which its message names; with an empty key, at the entry."""
        where = f"{self.part}.{self.number}" + (f".{key}" if key else "")
        return self.problem(key, code, f"{where}: {message}", "warning")


class Reading(NamedTuple):
    """A file and all that it extends, as far as they can be read.

    Attributes:
        documents: the files; the one that extends nothing comes first.
        entries: the entries as far as they can be read, file by file.
        problems: everything that is wrong.
        complete: whether all files were found and each holds a list of principles.
    """

    documents: list[Document]
    entries: list[Placed]
    problems: list[Problem]
    complete: bool


def load(path: Path) -> Constitution:
    """Read a constitution, merge what it extends, and check it as a whole.

    Raises:
        ConstitutionError: one line ``file:line:column: key: problem`` for each problem of its files: what
            `documents.load_yaml` refuses, an unknown or missing key, a wrong value; then, over all files, an
            id used twice, a principle that is named and does not exist, a chain of `extends` that comes back.
    """
    reading = read(path)
    if reading.problems:
        raise ConstitutionError(*reading.problems)
    contents = [Constitution.model_validate(document.data) for document in reading.documents]
    # Assigning to a key that a dict has keeps its place: an override stands where the parent's entry stood.
    principles = {principle.id: principle for content in contents for principle in content.principles}
    examples = {example.id: example for content in contents for example in content.examples}
    return contents[-1].model_copy(
        update={
            "principles": list(principles.values()),
            "examples": list(examples.values()),
            "comparisons": [comparison for content in contents for comparison in content.comparisons],
            "tests": [test for content in contents for test in content.tests],
        }
    )


def read(path: Path) -> Reading:
    """Read a constitution and what it extends, and collect every problem instead of stopping at the first."""
    documents, problems = _chain(path)
    complete = not problems and all(isinstance(one.data.get("principles"), list) for one in documents)
    entries: list[Placed] = []
    for document in documents:
        try:
            Constitution.model_validate(document.data)
        except ValidationError as invalid:
            problems += describe(document, Constitution, invalid)
        for part, kind in KINDS.items():
            rows = document.data.get(part)
            for index, row in enumerate(rows if isinstance(rows, list) else []):
                entries.append(Placed(document, part, index, *_entry(kind, row)))
    problems += [*_repeated(entries), *_unknown(documents, entries)]
    return Reading(documents, entries, problems, complete)


def _entry(kind: type[Principle | Example | WorkedComparison | JudgeTest], row: Any) -> tuple[Any, frozenset[str]]:
    """Return an entry, and the fields of it that are missing or have a fault."""
    given = row if isinstance(row, dict) else {}
    values: dict[str, Any] = {}
    unread = {key for key, field in kind.model_fields.items() if key not in given and field.is_required()}
    for key in given.keys() & kind.model_fields.keys():
        try:
            values[key] = TypeAdapter(kind.model_fields[key].rebuild_annotation()).validate_python(given[key])
        except ValidationError:
            unread.add(key)
    return kind.model_construct(**values), frozenset(unread)


def _chain(path: Path) -> tuple[list[Document], list[Problem]]:
    """Read a file and everything it extends; the file that extends nothing comes first."""
    documents: list[Document] = []
    seen: list[Path] = []
    while True:
        try:
            document = load_yaml(path, ConstitutionError)
        except ConstitutionError as refusal:
            return documents, [_problem(path, said) for said in refusal.args]
        documents.insert(0, document)
        seen.append(path.resolve())
        parent = document.data.get("extends")
        if not isinstance(parent, str) or not parent.strip():
            return documents, []
        candidates = [folder / parent.strip() for folder in (path.parent, shipped("constitutions"))]
        files = [candidate for candidate in candidates if os.path.isfile(candidate)]
        if not files:
            message = f"extends: no file {candidates[0]}. Give a path beside this file."
            return documents, [document.problem(["extends"], "no-parent", message)]
        path = files[0]
        if path.resolve() in seen:
            names = " -> ".join(file.name for file in [*seen, path.resolve()])
            message = f"extends: the chain comes back: {names}. Remove a link."
            return documents, [document.problem(["extends"], "circle", message)]


def _problem(path: Path, said: Problem | str) -> Problem:
    if isinstance(said, Problem):
        return said
    return Problem(str(path), None, None, "unreadable", said.removeprefix(f"{path}: "))


def _repeated(entries: Sequence[Placed]) -> Iterator[Problem]:
    first: dict[tuple[int, str, str], Placed] = {}
    for placed in entries:
        if isinstance(placed.entry, Principle | Example) and placed.has("id"):
            before = first.setdefault((id(placed.document), placed.part, placed.entry.id), placed)
            if before is not placed:
                line = before.problem("id", "", "").line
                name = f"{placed.part}.{placed.number}.id"
                message = f"{name}: `{placed.entry.id}` stands already in line {line}. Choose another id."
                yield placed.problem("id", "repeated-id", message)


def _unknown(documents: Sequence[Document], entries: Sequence[Placed]) -> Iterator[Problem]:
    """Yield entries that name a principle that does not exist; none while the id of a principle is unreadable."""
    lists = [document.data.get("principles") for document in documents]
    rows = [row for rows in lists if isinstance(rows, list) for row in rows]
    known = {row["id"].strip() for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)}
    if not known or not all(isinstance(row, dict) and re.fullmatch(ID, str(row.get("id", ""))) for row in rows):
        return
    for placed in entries:
        if isinstance(placed.entry, Principle) or not placed.has("principle"):
            continue
        named = placed.entry.principle
        if named is not None and named not in known:
            where = f"{placed.part}.{placed.number}.principle"
            message = f"{where}: no principle `{named}`; there are: {', '.join(sorted(known))}."
            yield placed.problem("principle", "unknown-principle", message)


def applying(constitution: Constitution, tag: str, category: str = "") -> list[Principle]:
    """Return the principles whose `applies_to` names the category; where none does, those that apply to the tag.

    Raises:
        ConstitutionError: no principle applies to the tag.
    """
    specific = [p for p in constitution.principles if category and category in p.applies_to]
    found = specific or [p for p in constitution.principles if p.applies(tag)]
    if not found:
        raise ConstitutionError(
            f"{constitution.name}: no principle applies to prompts tagged `{tag}`. "
            "Add the tag to the `applies_to` of a principle, or empty that list."
        )
    return found


def tagged(constitution: Constitution, tags: Sequence[str]) -> Constitution:
    """Return the part of a constitution whose principles have one of these tags.

    Raises:
        ConstitutionError: no principle has one.
    """
    part = [p for p in constitution.principles if set(p.tags) & set(tags)]
    wanted = " or ".join(f"`{tag}`" for tag in tags)
    if not part:
        known = sorted({tag for p in constitution.principles for tag in p.tags})
        raise ConstitutionError(
            f"{constitution.name}: no principle is tagged {wanted}; its tags: {', '.join(known) or 'none'}. Add the "
            "tag to the `tags` of a principle, or name another tag in the recipe."
        )
    return constitution.model_copy(update={"name": f"{constitution.name} (tagged {wanted})", "principles": part})


def draw(
    constitution: Constitution, *, seed: int, prompt_id: str, step: int, tag: str, category: str = ""
) -> Principle:
    """Return the principle for one step of one prompt, by weighted rendezvous hashing.

    Each of those that `applying` returns gets ``u`` in (0, 1) from the SHA-256 of ``(seed, prompt_id, step, id)`` and
    the score ``-weight / ln(u)``; the highest wins, with probability proportional to its weight. A score depends on no
    other principle, so order and wording change no draw, and a new or heavier principle only takes draws for itself.

    Rendezvous hashing: Thaler and Ravishankar 1998 (IEEE/ACM ToN 6); weights: Schindelhauer and Schomaker, SPAA 2005.

    `step` is the number of the revision within a chain, or of the comparison within a prompt.
    """
    candidates = applying(constitution, tag, category)
    return max(candidates, key=lambda p: (_log_score(p.weight, [seed, prompt_id, step, p.id]), p.id))


def _log_score(weight: float, key: list[str | int]) -> float:
    """Return ln(-weight / ln(u)), which orders as the score does and cannot overflow."""
    digest = hashlib.sha256(canonical_json(key).encode()).digest()
    # The upper 52 bits and a half: never 0 nor 1, and exact as a double.
    u = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return math.log(weight) - math.log(-math.log(u))


def diff(old: Constitution, new: Constitution) -> Difference:
    """Compare the principles of two constitutions by id.

    Returns:
        Ids, in the order of `new`, and of `old` for the removed. Reworded: their `hash` differs; reweighted: their
        `weight` or `applies_to`.
    """
    before, after = ({p.id: p for p in constitution.principles} for constitution in (old, new))
    both = [i for i in after if i in before]
    return Difference(
        added=[i for i in after if i not in before],
        removed=[i for i in before if i not in after],
        reworded=[i for i in both if before[i].hash != after[i].hash],
        reweighted=[i for i in both if _frequency(before[i]) != _frequency(after[i])],
    )


def _frequency(principle: Principle) -> tuple[float, list[str]]:
    return principle.weight, sorted(set(principle.applies_to))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a constitution file, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Constitution.model_json_schema()}
