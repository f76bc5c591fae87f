"""The entries of a constitution: principles, worked examples, worked comparisons, tests of a judge."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rlaif.documents import fingerprint

ID = r"[a-z0-9]+(-[a-z0-9]+)*"


def _written(text: str) -> str:
    """Drop the white space around a text, which YAML's block styles add and prompts should not carry."""
    if not text.strip():
        raise ValueError("an empty text; at least one word is expected")
    return text.strip()


def _identifier(text: str) -> str:
    if not re.fullmatch(ID, text):
        raise ValueError("lower-case letters and digits with single hyphens are expected, as in `no-harm`")
    return text


Text = Annotated[str, AfterValidator(_written), Field(json_schema_extra={"pattern": r"\S"})]
Id = Annotated[str, AfterValidator(_identifier), Field(json_schema_extra={"pattern": f"^{ID}$"})]


class Entry(BaseModel):
    """Base of all entries: unknown keys are errors, and an entry does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Principle(Entry):
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
    tags: list[Text] = Field(
        default=[],
        description="Free labels, never shown to a model; a recipe with `label.safety` tells principles of helpfulness "
        "from those of harmlessness by them.",
    )
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


class Example(Entry):
    """A worked critique and revision, shown to the model before its own."""

    id: Id = Field(description="Short stable name, unique among the examples.")
    principle: Id = Field(description="Id of the principle whose requests are shown.")
    prompt: Text = Field(description="What the person asks.")
    response: Text = Field(description="The answer that is criticized.")
    critique: Text = Field(description="What the critique should say; that nothing has to change, where so.")
    revision: Text = Field(description="The revised answer; equal to `response` where nothing has to change.")


class WorkedComparison(Entry):
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


class JudgeTest(Entry):
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
