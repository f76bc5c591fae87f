"""The parts that PPO's reward may be put together from, as a recipe lists them: `ppo.rewards` and how they combine."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlaif.errors import ConfigError
from rlaif.sections import Fraction, Positive, PositiveFloat, Section

SOURCES = ("model", "cost", "function", "judge", "length", "repetition")
OWN_STAGE = "reward"  # the value of `cost` that means this run's own adapter
_LOGITS = ("model", "cost", "function")


class RewardPart(Section):
    """One part of a composite reward: a name and exactly one source."""

    sources: ClassVar[tuple[str, ...]] = SOURCES
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="stands in metrics and samples")
    model: bool = Field(False, description="scores: the reward model of the stage `reward`")
    cost: str | None = Field(
        None, description="scores: minus the cost; `reward`: of this run's stage, else a `4-reward` folder"
    )
    function: str | None = Field(None, description="scores: a registered scoring function")
    judge: bool = Field(False, description="scores: the judge's rating, from -1 to 1")
    length: Positive | None = Field(None, description="taken off: each token of a response above so many")
    repetition: Positive | None = Field(None, description="taken off: share of repeated n-grams of so many tokens")
    weight: PositiveFloat = Field(1.0, description="what the part counts")

    @model_validator(mode="after")
    def _one_source(self) -> "RewardPart":
        given = [source for source in dict.fromkeys((*SOURCES, *self.sources)) if getattr(self, source)]
        if len(given) != 1 or given[0] not in self.sources:
            raise ValueError(
                f"the part `{self.name}` has {' and '.join(given) or 'no source'}; exactly one of "
                f"{', '.join(self.sources)} is expected"
            )
        return self

    @property
    def source(self) -> str:
        """The key that says where the part comes from."""
        return next(source for source in self.sources if getattr(self, source))

    @property
    def is_penalty(self) -> bool:
        """Whether the part is taken off what the scores combine to, instead of being one of them."""
        return self.source in ("length", "repetition")


class IndependentPart(RewardPart):
    """One part of the score that the policy does not optimize."""

    sources: ClassVar[tuple[str, ...]] = ("member", "model", "cost", "function", "judge")
    member: Annotated[int, Field(ge=2)] | None = Field(
        None, description="scores: this output of the reward model, which the reward then does without"
    )


class CompositeSection(Section):
    """Keys of `ppo` that put a reward together."""

    rewards: list[RewardPart] = Field([], description="parts of the reward; absent: one reward model or function")
    combine: Literal["sum", "worst", "gate"] = Field("sum", description="what the parts that score become")
    gate_safety: str | None = Field(None, description="the part that scores safety, for `gate`")
    gate_helpfulness: str | None = Field(None, description="the part that scores helpfulness, for `gate`")
    gate_threshold: Fraction = Field(0.15, description="probability of safety below which safety decides")
    gate_tags: list[str] = Field([], description="tags of prompts for which safety always decides")

    @field_validator("rewards")
    @classmethod
    def _in_one_order(cls, parts: list[RewardPart]) -> list[RewardPart]:
        """Sort the parts, so that the order in which a recipe lists them changes nothing, not even a rounding."""
        return sorted(parts, key=lambda part: part.name)

    @model_validator(mode="after")
    def _parts_fit(self) -> "CompositeSection":
        parts = self.rewards
        if not parts:
            given = sorted({"combine", "gate_safety", "gate_helpfulness", "gate_threshold", "gate_tags"} & self.changed)
            if given:
                raise ValueError(f"{given[0]} says how parts combine, but `rewards` lists none")
            return self
        _refuse_twice([part.name for part in parts], "the name")
        _refuse_twice([part.source for part in parts if part.source in ("model", "cost", "judge")], "the source")
        scoring = [part for part in parts if not part.is_penalty]
        if not scoring:
            raise ValueError("rewards has penalties alone; add a part that scores: model, cost, function or judge")
        weighted = [part.name for part in scoring if part.weight != 1]
        if self.combine != "sum" and weighted:
            raise ValueError(
                f"the part `{weighted[0]}` has a weight, which `{self.combine}` does not read: only a `sum` weighs "
                "what scores; penalties always have one"
            )
        if self.combine == "gate":
            self._gate_fits(scoring)
        elif given := sorted({"gate_safety", "gate_helpfulness", "gate_threshold", "gate_tags"} & self.changed):
            raise ValueError(f"{given[0]} is read where combine is `gate`, and it is `{self.combine}`")
        return self

    @property
    def changed(self) -> set[str]:
        """Keys whose values are not the defaults."""
        fields = type(self).model_fields
        return {key for key in fields if getattr(self, key) != fields[key].get_default()}

    def _gate_fits(self, scoring: list[RewardPart]) -> None:
        named = [self.gate_safety, self.gate_helpfulness]
        if sorted(part.name for part in scoring) != sorted(name or "" for name in named):
            raise ValueError(
                f"gate_safety is `{named[0]}`, gate_helpfulness `{named[1]}`, and the parts that score are "
                f"{', '.join(f'`{part.name}`' for part in scoring)}; a gate needs two, one named by each key"
            )
        wrong = [part for part in scoring if part.source not in _LOGITS]
        if wrong:
            raise ValueError(
                f"the part `{wrong[0].name}` is a rating, which is no logit; a gate reads {', '.join(_LOGITS)}"
            )


def find_cost_stage(costs: dict[str, str], here: Path) -> Path | None:
    """Return another run's folder that is named for its cost adapter, by the key that names it; None where none is.

    Raises:
        ConfigError: it holds none, neither beside the recipe (`here`) nor in the working folder.
    """
    for key, name in costs.items():
        if name == OWN_STAGE:
            continue
        for root in (here, Path.cwd()):
            if (root / name / "cost" / "adapter" / "adapter_config.json").is_file():
                return (root / name).resolve()
        raise ConfigError(
            f"{key}: no cost adapter in `{name}`; looked for cost/adapter in it, beside the recipe and in the "
            f"working folder. Name `{OWN_STAGE}` for this run's own, or a folder such as runs/NAME/4-reward."
        )
    return None


def _refuse_twice(values: list[str], what: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"rewards: {what} `{twice[0]}` stands in two parts; once is expected")
