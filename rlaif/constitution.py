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
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rlaif.documents import Document, canonical_json, fingerprint, load_yaml, shipped, validate
from rlaif.errors import ConstitutionError

_ID = r"[a-z0-9]+(-[a-z0-9]+)*"
Part = Literal["principles", "examples", "comparisons", "tests"]


def _written(text: str) -> str:
    """Drop the white space around a text, which YAML's block styles add and prompts should not carry."""
    if not text.strip():
        raise ValueError("an empty text; at least one word is expected")
    return text.strip()


def _identifier(text: str) -> str:
    if not re.fullmatch(_ID, text):
        raise ValueError("lower-case letters and digits with single hyphens are expected, as in `no-harm`")
    return text


Text = Annotated[str, AfterValidator(_written), Field(json_schema_extra={"pattern": r"\S"})]
Id = Annotated[str, AfterValidator(_identifier), Field(json_schema_extra={"pattern": f"^{_ID}$"})]


class _Entry(BaseModel):
    """Base of all entries: unknown keys are errors, and an entry does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Principle(_Entry):
    """One statement of what a good answer does, and how a model is asked about it."""

    id: Id = Field(description="Short stable name, unique in the file: lower-case words joined by hyphens.")
    title: Text = Field(description="A few words for people; never shown to a model.")
    text: Text = Field(description="What a good answer does, in one or two sentences.")
    critique: Text | None = Field(
        default=None, description="Wording of the request for a critique; built from `text` where absent."
    )
    revision: Text | None = Field(
        default=None, description="Wording of the request for a revision; built from `text` where absent."
    )
    comparison: Text | None = Field(
        default=None, description="Wording of the question put to a judge; built from `text` where absent."
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        strict=True,
        description="How often this principle is drawn, relative to the others that apply; above 0.",
    )
    tags: list[Text] = Field(default=[], description="Free labels for people; never shown to a model.")
    applies_to: list[Text] = Field(
        default=[],
        description="Tags and categories of the prompts it may be drawn for; an empty list means every prompt. "
        "Principles that name a prompt's category are drawn before those that name its tag only.",
    )

    def critique_request(self) -> str:
        """Return the words that ask for a critique of an answer under this principle."""
        return self.critique or (
            f"Compare the answer above with this principle: {self.text}\n"
            "Name each place where the answer falls short of the principle and say why. "
            "If it falls short nowhere, say that nothing has to change."
        )

    def revision_request(self) -> str:
        """Return the words that ask for a revision of an answer after its critique."""
        return self.revision or (
            f"Write the answer again so that it follows this principle: {self.text}\n"
            "Mend what the reviewer names and keep the rest. "
            "If nothing has to change, repeat the answer as it is."
        )

    def comparison_question(self) -> str:
        """Return the question that asks a judge which of two answers follows this principle better."""
        return self.comparison or (
            f"A good answer follows this principle: {self.text}\nWhich of the two answers follows it better?"
        )

    def applies(self, tag: str) -> bool:
        """Tell whether this principle may be drawn for a prompt with this tag."""
        return not self.applies_to or tag in self.applies_to

    @property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of the id and of every word of this principle that a model can be shown.

        The three requests count as they are sent, so writing out a built wording changes nothing. Title, tags, `weight`
        and `applies_to` do not count; the last two decide what is drawn, and count in `Constitution.hash`.
        """
        requests = [self.critique_request(), self.revision_request(), self.comparison_question()]
        return fingerprint([self.id, self.text, *requests])


class Example(_Entry):
    """A worked critique and revision, shown to the model before its own."""

    id: Id = Field(description="Short stable name, unique among the examples.")
    principle: Id = Field(description="Id of the principle whose requests are shown.")
    prompt: Text = Field(description="What the person asks.")
    response: Text = Field(description="The answer that is criticized.")
    critique: Text = Field(description="What the critique should say; that nothing has to change, where so.")
    revision: Text = Field(description="The revised answer; equal to `response` where nothing has to change.")


class WorkedComparison(_Entry):
    """A decided comparison, shown to the judge before its own."""

    prompt: Text = Field(description="What the person asks.")
    first: Text = Field(description="The answer shown first.")
    second: Text = Field(description="The answer shown second; another text than `first`.")
    better: Literal["first", "second"] = Field(description="Which of the two answers is the better one.")
    principle: Id | None = Field(default=None, description="Id of the principle to judge by; the first if absent.")

    @field_validator("second")
    @classmethod
    def _differs(cls, text: str, info: ValidationInfo) -> str:
        return _unlike(text, "first", info)


class JudgeTest(_Entry):
    """A comparison with a known outcome, which a judge under this constitution must find."""

    prompt: Text = Field(description="What the person asks.")
    better: Text = Field(description="The answer the judge must prefer.")
    worse: Text = Field(description="The answer the judge must not prefer; another text than `better`.")
    principle: Id | None = Field(default=None, description="Id of the principle to judge by; the first if absent.")
    tag: Text | None = Field(default=None, description="Tag of the prompt, for results by tag.")

    @field_validator("worse")
    @classmethod
    def _differs(cls, text: str, info: ValidationInfo) -> str:
        return _unlike(text, "better", info)


def _unlike(text: str, other: str, info: ValidationInfo) -> str:
    if info.data.get(other) == text:
        raise ValueError(f"the same text as `{other}`; two different answers are expected")
    return text


class Constitution(_Entry):
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


def load(path: Path) -> Constitution:
    """Read a constitution, merge what it extends, and check it as a whole.

    Raises:
        ConstitutionError: one line ``file:line:column: key: problem`` for each problem of a file: what
            `documents.load_yaml` refuses, an unknown or missing key, a wrong value; then, over all files, an
            id used twice, a principle that is named and does not exist, a chain of `extends` that comes back.
    """
    files = chain(path)
    contents = [content for _, content in files]
    known = {principle.id for content in contents for principle in content.principles}
    problems = [line for file in files for line in (*_repeated(*file), *_unknown(*file, known))]
    if problems:
        raise ConstitutionError("\n".join(problems))
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


def chain(path: Path) -> list[tuple[Document, Constitution]]:
    """Read a file and everything it extends; the file that extends nothing comes first."""
    files: list[tuple[Document, Constitution]] = []
    seen: list[Path] = []
    while True:
        document = load_yaml(path, ConstitutionError)
        content = validate(document, Constitution, ConstitutionError)
        files.insert(0, (document, content))
        seen.append(path.resolve())
        if content.extends is None:
            return files
        where = document.where("extends")
        candidates = [folder / content.extends for folder in (path.parent, shipped("constitutions"))]
        found = [candidate for candidate in candidates if os.path.isfile(candidate)]
        if not found:
            raise ConstitutionError(f"{where}: extends: no file {candidates[0]}. Give a path beside this file.")
        path = found[0]
        if path.resolve() in seen:
            names = " -> ".join(file.name for file in [*seen, path.resolve()])
            raise ConstitutionError(f"{where}: extends: the chain comes back: {names}. Remove a link.")


def _repeated(document: Document, content: Constitution) -> Iterator[str]:
    parts: dict[str, Sequence[Principle | Example]] = {"principles": content.principles, "examples": content.examples}
    for part, entries in parts.items():
        first: dict[str, int] = {}
        for index, entry in enumerate(entries):
            if first.setdefault(entry.id, index) != index:
                line = document.position((part, first[entry.id], "id"))[0]
                where = f"{document.where(part, index, 'id')}: {part}.{index}.id"
                yield f"{where}: `{entry.id}` stands already in line {line}. Choose another id."


def _unknown(document: Document, content: Constitution, known: set[str]) -> Iterator[str]:
    for part in ("examples", "comparisons", "tests"):
        entries: Sequence[Example | WorkedComparison | JudgeTest] = getattr(content, part)
        for index, entry in enumerate(entries):
            if entry.principle is not None and entry.principle not in known:
                where = f"{document.where(part, index, 'principle')}: {part}.{index}.principle"
                yield f"{where}: no principle `{entry.principle}`; there are: {', '.join(sorted(known))}."


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
