"""Recipes: what a YAML file may say, with defaults, units and line-numbered errors.

A recipe has general keys, then one section per stage, named as the stage. Model and training keys carry the names that
`transformers`, `peft` and `trl` users know. Unknown keys are errors that name the nearest key.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, field_validator, model_validator

from rlaif.documents import Document, find, load_yaml
from rlaif.endpoints import BASE, RAY, Endpoint
from rlaif.errors import ConfigError
from rlaif.overrides import Overridden, override
from rlaif.policy_sections import DpoSection, RejectionSection
from rlaif.policy_sections import ReviseSection as ReviseSection
from rlaif.policy_sections import SftSection as SftSection
from rlaif.ppo_section import PpoSection as PpoSection
from rlaif.reward_parts import OWN_STAGE, find_cost_stage
from rlaif.rounds import OPTIMIZERS, RoundsSection
from rlaif.sections import Combination as Combination
from rlaif.sections import EvaluateSection as EvaluateSection
from rlaif.sections import Fraction, Positive, Section
from rlaif.sections import HumanSection as HumanSection
from rlaif.sections import LabelSection as LabelSection
from rlaif.sections import PairLoss as PairLoss
from rlaif.sections import RaySection as RaySection
from rlaif.sections import RewardSection as RewardSection
from rlaif.sections import SamplingSection as SamplingSection
from rlaif.sections import TrainingSection as TrainingSection
from rlaif.validation import guess, validate

Stage = Literal["revise", "sft", "label", "reward", "ppo", "dpo", "rejection", "evaluate"]
ORDER: tuple[Stage, ...] = get_args(Stage)  # in which stages run
OPTIONAL: tuple[Stage, ...] = ("dpo", "rejection")
STAGES = tuple(stage for stage in ORDER if stage not in OPTIONAL)  # of a recipe that names none
FOLDERS: tuple[str, ...] = (*STAGES, *OPTIONAL)  # in which their folders are numbered
# The keys of a section that name who answers: the base, here or in workers of `ray`, or a name in `engines`.
ENGINE_KEYS = {"revise": ("responder", "critic", "reviser"), "label": ("judge",), "evaluate": ("judge",)}
ENGINE_KEYS |= {"ppo": ("sampling_engine", "judge")}

# What a stage cannot do without.
_SOURCES: dict[Stage, Stage] = {"sft": "revise", "reward": "label", "dpo": "label", "rejection": "reward"}


class ModelSection(Section):
    """The one base model and the shape of its adapters. A plain string is the model's name."""

    model_name_or_path: str = Field(min_length=1, description="embedded name, local folder or Hub id")
    model_revision: str | None = Field(None, description="commit of a Hub model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = True
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora_r: Positive = 16
    lora_alpha: Positive = 32
    lora_target_modules: list[str] | Literal["all-linear"] = "all-linear"
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1.3x the time")

    @model_validator(mode="after")
    def _one_precision(self) -> "ModelSection":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; choose one")
        return self


class PromptFile(Section):
    """A file of prompts that does not say everything about its rows, such as one of transcripts."""

    file: str = Field(min_length=1)
    tag: str = Field("ordinary", min_length=1, description="tag of rows that bring none")
    eval_fraction: Fraction = Field(0.1, description="share of transcripts kept for evaluation, by their first turn")


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSection
    seed: int = Field(0, ge=0, lt=2**32)
    output: str | None = Field(None, description="run folder; default: runs/NAME")
    constitution: str = "harmless"
    prompts: list[str | PromptFile] = Field(["harmful", "ordinary", "lookalike"], min_length=1)
    system_prompt: str | None = Field(None, min_length=1, description="system turn of prompts that bring none")
    feedback: Literal["ai", "human", "mixed"] = "ai"
    stages: list[Stage] = Field(list(STAGES), min_length=1)
    rounds: RoundsSection = RoundsSection()
    engines: dict[str, Endpoint] = Field({}, description="servers that may answer, by name")
    ray: RaySection = RaySection()
    revise: ReviseSection = ReviseSection()
    sft: SftSection = SftSection()
    label: LabelSection = LabelSection()
    human: HumanSection = HumanSection()
    reward: RewardSection = RewardSection()
    ppo: PpoSection = PpoSection()
    dpo: DpoSection = DpoSection()
    rejection: RejectionSection = RejectionSection()
    evaluate: EvaluateSection = EvaluateSection()

    @field_validator("model", mode="before")
    @classmethod
    def _name_is_enough(cls, value: Any) -> Any:
        return {"model_name_or_path": value} if isinstance(value, str) else value

    @field_validator("engines")
    @classmethod
    def _named(cls, engines: dict[str, Endpoint]) -> dict[str, Endpoint]:
        for name in engines:
            if name in (BASE, RAY) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"`{name}`: letters, digits, `_` and `-` are expected, not `{BASE}` or `{RAY}`")
        return engines

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[Stage]) -> list[Stage]:
        early = "ppo" in stages[1:] and stages[stages.index("ppo") - 1] == "rejection"  # Llama 2: PPO on top of it
        listed = [stage for stage in stages if not (early and stage == "rejection")]
        if len(set(stages)) < len(stages) or listed != sorted(listed, key=ORDER.index):
            raise ValueError(
                f"stages run in this order, each once: {', '.join(ORDER)}; `rejection` may stand just before `ppo`"
            )
        return stages

    @model_validator(mode="after")
    def _sources(self) -> "Recipe":
        if self.feedback != "ai" and "label" in self.stages and not self.human.files:
            raise ValueError(
                f"feedback is `{self.feedback}`, but human.files is empty; name the files that hold the labels"
            )
        if "ppo" in self.stages:
            self._rewards()
        kept_out = sum(part.member is not None for part in self.ppo.independent) if "ppo" in self.stages else 0
        alone = self.reward.members - kept_out == 1
        if "reward" in self.stages and self.ppo.reward_model.ensemble == "uncertainty" and alone:
            without = ", without the one that is the independent score" if kept_out else ""
            raise ValueError(
                f"ppo.reward_model.ensemble is `uncertainty`, and the reward model has one member{without}, which "
                "agrees with itself; raise reward.num_heads or reward.num_adapters"
            )
        for stage, source in _SOURCES.items():
            if stage in self.stages and source not in self.stages:
                raise ValueError(f"{stage} needs the stage `{source}` before it")
        by_revision = self.feedback != "human" and self.label.method == "revision"
        if "label" in self.stages and by_revision and "revise" not in self.stages:
            raise ValueError("label.method `revision` needs the stage `revise` before it")
        if "label" in self.stages and self.feedback != "human" and self.label.method == "judge":
            self._candidates()
        if self.rounds.count > 1:
            self._can_be_repeated()
        return self

    def _can_be_repeated(self) -> None:
        """Refuse rounds that could not learn anything new, or not tell whether they had."""
        said = f"rounds is {self.rounds.count}"
        if not set(OPTIMIZERS) & set(self.stages):
            raise ValueError(f"{said}, and no stage trains a policy in each; add one of: {', '.join(OPTIMIZERS)}")
        if "evaluate" not in self.stages:
            raise ValueError(f"{said}, and the gate at the end of each needs the stage `evaluate`; add it")
        if self.rounds.gate == "judge" and not self.evaluate.judge_prompts_per_tag:
            raise ValueError(
                "rounds.gate is `judge`, and evaluate.judge_prompts_per_tag is 0; raise it, or let the gate be `score`"
            )
        scored = "reward" in self.stages or ("ppo" in self.stages and (self.ppo.reward_function or self.ppo.rewards))
        if self.rounds.gate == "score" and not scored:
            raise ValueError("rounds.gate is `score`, and the recipe has no reward to score with; let it be `judge`")
        if "label" in self.stages and self.label.candidates in ("policies", "file"):
            raise ValueError(
                f"{said}, and label.candidates is `{self.label.candidates}`, whose pairs are the same in each; "
                "`samples` or `revision` is expected"
            )

    def _rewards(self) -> None:
        """Refuse a reward from a stage that the recipe does not have."""
        parts, has_reward = self.ppo.rewards, "reward" in self.stages
        if not (parts or has_reward or self.ppo.reward_function):
            raise ValueError("ppo needs the stage `reward` before it, or ppo.reward_function or ppo.rewards")
        named = [("rewards", part) for part in parts] + [("independent", part) for part in self.ppo.independent]
        for key, part in named:
            if part.model and not has_reward:
                raise ValueError(f"the part `{part.name}` of ppo.{key} needs the stage `reward` before it")
        for key, cost in self.ppo.costs.items():
            if cost == OWN_STAGE and not (has_reward and self.reward.cost):
                raise ValueError(f"{key}: the cost needs the stage `reward` before it, with reward.cost: true")
        for part in self.ppo.independent:
            if part.member and part.member > self.reward.members:
                raise ValueError(
                    f"the part `{part.name}` of ppo.independent is member {part.member} of the reward model, which has "
                    f"{self.reward.members}: reward.num_adapters x reward.num_heads"
                )

    def _candidates(self) -> None:
        """Refuse pairs from a stage that the recipe does not have."""
        label = self.label
        if label.candidates == "revision" and "revise" not in self.stages:
            raise ValueError("label.candidates `revision` needs the stage `revise` before it")
        used = {"sft"} & {
            *(one.adapter for one in label.judges),
            *(label.candidates == "policies" and label.policies or []),
        }
        if used and "sft" not in self.stages:
            raise ValueError("label names the policy `sft`, and the recipe has no stage `sft`; add it or name another")

    def engines_of(self, stage: str) -> dict[str, str]:
        """Return the keys of a stage's section that name who answers, with the names."""
        section = getattr(self, stage)
        named = {key: getattr(section, key) for key in ENGINE_KEYS.get(stage, ()) if getattr(section, key)}
        judges = enumerate(self.label.judges) if stage == "label" else ()
        return named | {f"judges.{index}.engine": one.engine for index, one in judges if one.engine}

    @property
    def rejection_first(self) -> bool:
        """Whether `rejection` stands before `ppo`, which then starts from its policy."""
        return "ppo" in self.stages and "rejection" in self.stages[: self.stages.index("ppo")]

    def reward_base(self) -> ModelSection:
        """Return the base that the reward adapters stand on: the recipe's model, or `reward.model` loaded likewise."""
        named = {"model_name_or_path": self.reward.model, "model_revision": self.reward.model_revision}
        return self.model.model_copy(update=named) if self.reward.model else self.model

    def folder(self) -> Path:
        """Return the run folder."""
        return Path(self.output or f"runs/{self.name}")


class Loaded(BaseModel):
    """A checked recipe and the files it names, found."""

    recipe: Recipe
    path: Path
    constitution: Path
    prompts: list[Path]
    human_files: list[Path]
    candidate_files: list[Path] = []
    reference: Path | None = None
    known: Path | None = None
    adapters: dict[str, Path] = {}
    cost_stage: Path | None = None
    ptx_file: Path | None = None
    start: Path | None = None  # the adapter of `reward.start_from`


def only_model(name: str) -> Loaded:
    """Return a recipe that says nothing but which model answers."""
    recipe = Recipe.model_validate({"name": "judge", "model": name})
    return Loaded(recipe=recipe, path=Path(), constitution=Path(), prompts=[], human_files=[])


def load_recipe(path: Path, overrides: list[str] = []) -> Loaded:  # noqa: B006
    """Read, override and check a recipe.

    Args:
        path: the file, or the name of a shipped recipe.
        overrides: ``section.key=value`` as given with ``--set``; values are YAML.

    Raises:
        ConfigError: one line for every problem, with file, line and column.
    """
    path = find("recipes", str(path))
    document = Overridden(**vars(load_yaml(path, ConfigError)))
    for option in overrides:
        override(document, option)
    recipe = validate(document, Recipe, ConfigError)
    _refuse_unknown_engines(document, recipe)
    here = path.parent
    cost_stage = find_cost_stage(recipe.ppo.costs, here)
    if cost_stage:
        recipe = recipe.model_copy(update={"ppo": recipe.ppo.with_costs_of(cost_stage)})
    return Loaded(
        recipe=recipe,
        path=path,
        constitution=find("constitutions", recipe.constitution, here),
        prompts=[find("prompts", name.file if isinstance(name, PromptFile) else name, here) for name in recipe.prompts],
        human_files=[find("recipes", name, here) for name in recipe.human.files],
        candidate_files=[find("recipes", name, here) for name in recipe.label.candidate_files],
        reference=find("recipes", recipe.label.reference, here) if recipe.label.reference else None,
        known=find("recipes", recipe.human.known, here) if recipe.human.known else None,
        adapters={name: _adapter(name, here) for name in _adapters_named(recipe.label)},
        start=None if recipe.reward.start_from in ("sft", "base") else _adapter(recipe.reward.start_from, here),
        cost_stage=cost_stage,
        ptx_file=_text_file(recipe.ppo.ptx_file, here) if recipe.ppo.ptx_file else None,
    )


def _adapters_named(label: LabelSection) -> list[str]:
    named = [*label.policies, *(one.adapter or "base" for one in label.judges)]
    return sorted(set(named) - {"base", "sft"})


def _adapter(name: str, here: Path) -> Path:
    """Return an adapter folder, beside the recipe or in the working folder."""
    for root in (here, Path.cwd()):
        if (root / name / "adapter_config.json").is_file():
            return (root / name).resolve()
    raise ConfigError(
        f"label or reward: no adapter in `{name}`; looked beside the recipe and in the working folder. Name `base`, "
        "`sft`, or a folder that holds adapter_config.json."
    )


def _text_file(name: str, here: Path) -> Path:
    """Return the file of `ppo.ptx_file`, beside the recipe or in the working folder."""
    path = find("recipes", name, here)
    if not path.is_file():
        raise ConfigError(f"ppo.ptx_file: no file `{name}`; looked beside the recipe and in the working folder.")
    return path


def _refuse_unknown_engines(document: Document, recipe: Recipe) -> None:
    """Refuse names of engines that the recipe does not describe, each with its place and the nearest name."""
    known = [BASE, RAY, *recipe.engines]
    problems = []
    for section in ENGINE_KEYS:
        for key, name in recipe.engines_of(section).items():
            if name not in known:
                hint = guess(name, known) or f"known: {', '.join(known)}."
                message = f"{section}.{key}: no engine `{name}`; {hint}"
                problems.append(document.problem((section, key), "unknown-engine", message))
    if problems:
        raise ConfigError(*problems)
