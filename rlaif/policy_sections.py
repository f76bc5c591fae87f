"""Sections of a recipe: revisions, and fine-tuning a policy on them, on comparisons, or on its best samples."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlaif.endpoints import BASE
from rlaif.filters import REASONS
from rlaif.sections import (
    Fraction,
    Positive,
    PositiveFloat,
    SamplingSection,
    Section,
    TrainingSection,
    WarmSamplingSection,
)


class ReviseSection(Section):
    """Response, critique, revision."""

    sampling: SamplingSection = SamplingSection()
    prompts_per_tag: dict[str, Positive] = Field({}, description="how many train prompts of each tag; absent: all")
    revise_tags: list[str] = Field(["harmful"], description="tags whose responses are critiqued and revised")
    rounds: Positive = Field(1, description="critique-revision steps per chain")
    critique: bool = Field(True, description="False: revise at once, without a critique before it")
    helpful_samples: Positive = Field(1, description="responses to each prompt whose answer is not revised")
    keep_unchanged: bool = Field(False, description="keep an answer whose critique finds nothing to change")
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="share of common word triples from which a demonstration is one that is there already"
    )
    demonstrations: Literal["all", "last"] = Field("all", description="which rounds' revisions become demonstrations")
    few_shot: int = Field(3, ge=0, description="worked examples of the constitution shown before each request")
    must_refuse_tags: list[str] = Field([], description="tags whose revision must decline, else it is set aside")
    filters: list[str] = Field(list(REASONS), description="what sets a text aside; see rlaif/filters.py")
    responder: str = Field(BASE, description="who writes responses: `base`, `ray` or a name in `engines`")
    critic: str = Field(BASE, description="who writes critiques")
    reviser: str = Field(BASE, description="who writes revisions")
    batch_size: Positive = 32

    @field_validator("filters")
    @classmethod
    def _known_filters(cls, names: list[str]) -> list[str]:
        unknown = sorted(set(names) - set(REASONS))
        if unknown:
            raise ValueError(f"no filter `{unknown[0]}`; filters: {', '.join(REASONS)}")
        return names

    @model_validator(mode="after")
    def _refusals_are_revisions(self) -> "ReviseSection":
        never = sorted(set(self.must_refuse_tags) - set(self.revise_tags))
        if never:
            raise ValueError(f"must_refuse_tags names `{never[0]}`, which revise_tags does not; name it in both")
        return self


class SftSection(TrainingSection):
    """Supervised fine-tuning on demonstrations."""

    heldout_fraction: Fraction = Field(0.1, description="share of demonstrations kept for the held-out loss")


class DpoSection(TrainingSection):
    """Direct preference optimization on the comparisons."""

    learning_rate: PositiveFloat = 1e-5
    beta: PositiveFloat = Field(0.1, description="price of leaving the reference")
    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down", "sigmoid_norm"
    ] = Field("sigmoid", description="as TRL's DPOTrainer names it")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed rate of wrong labels, for `robust` and `exo_pair`"
    )
    min_preference: Annotated[float, Field(ge=0.5, le=1)] = Field(
        0.5, description="comparisons whose labeller is less sure are left out; ties always are"
    )
    heldout_fraction: Fraction = Field(0.2, description="share of prompts kept for evaluation, drawn per tag")
    microbatch: Positive = Field(8, description="pairs per forward pass when the reference is asked")

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> "DpoSection":
        if self.label_smoothing and self.loss_type not in ("robust", "exo_pair"):
            raise ValueError(
                f"label_smoothing is read by the losses `robust` and `exo_pair`, and loss_type is `{self.loss_type}`"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type `exo_pair` needs a label_smoothing above 0, such as 0.001")
        return self


class RejectionSection(TrainingSection):
    """Rejection sampling: fine-tuning on the best of several samples of each prompt."""

    sampling: WarmSamplingSection = WarmSamplingSection()
    prompts_per_tag: dict[str, Positive] = {}
    samples_per_prompt: int = Field(8, ge=2, description="responses to a prompt, of which the best is learned")
    heldout_fraction: Fraction = Field(0.1, description="share of prompts kept for the held-out loss")
    batch_size: Positive = 32
    microbatch: Positive = Field(8, description="responses per forward pass when they are scored")

    @model_validator(mode="after")
    def _samples_differ(self) -> "RejectionSection":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0, so all samples of a prompt are the same; give one above 0")
        return self
