"""What every stage is given: the recipe, the run folder, the journal, the constitution and the prompts."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from rlaif import constitution as constitutions
from rlaif.constitution import Constitution, Principle, draw
from rlaif.documents import file_sha256, fingerprint
from rlaif.endpoints import BASE, RAY, Endpoint
from rlaif.engines.engine import Engine
from rlaif.engines.local import LocalEngine
from rlaif.engines.ray import Cluster, RayEngine, require
from rlaif.engines.server import ServerEngine
from rlaif.errors import ConfigError, DataError, StageError
from rlaif.journal import Journal
from rlaif.launch import process_count
from rlaif.model import builtin
from rlaif.model.roles import SharedBase
from rlaif.progress import Progress
from rlaif.prompt_sets import PromptSet, read_prompts, refuse_leaks
from rlaif.prompting import Template, load_template
from rlaif.recipe import ENGINE_KEYS, FOLDERS, Loaded, PromptFile, Recipe
from rlaif.records import Prompt, Split, with_system
from rlaif.rounds import ONCE, folder_name, round_folder
from rlaif.sections import TrainingSection

# Keys that decide whether or how a stage goes on, never what it writes: changing one repeats no work.
_NOT_DETERMINING = {
    "allow_weak_judge",
    "allow_weak_reward",
    "candidate_files",  # their content counts
    "health",
    "known",  # its content counts
    "independent",  # `independent_inputs`
    "constraint",  # counts where there is one (`constraint_inputs`)
    "max_logprob_gap",
    "min_heldout_accuracy",
    "min_judge_accuracy",
    "ptx_file",  # its content counts
    "reference",  # its content counts
    "report_to",
    "sampling_batch",  # rows at a time
    "save_steps",
    "save_every_updates",
}
# Keys that count only where they are not at their default, so that runs from before they counted stay up to date.
_LATER = {"critic", "final_entropy_coef", "final_temperature", "importance_cap", "reference_share"}
_LATER |= {"ptx_heldout", "skill_weights", "warmup_updates"}
# Keys that decide how many rows are computed at a time. They count as their defaults, so that memory which has run out
# costs no finished work.
_ROWS_AT_A_TIME = ("batch_size", "microbatch")


@dataclass
class Run:
    """One run in one of its rounds: its recipe, folder, journal and progress."""

    loaded: Loaded
    folder: Path
    journal: Journal
    progress: Progress
    round: int = 1
    fetches: ClassVar[bool] = True  # whether what is not on this machine may be fetched

    @property
    def recipe(self) -> Recipe:
        """The checked recipe."""
        return self.loaded.recipe

    @cached_property
    def constitution(self) -> Constitution:
        """The constitution that the recipe names."""
        return constitutions.load(self.loaded.constitution)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """All prompts of the recipe's prompt sets, in file order, under the recipe's system prompt.

        Raises:
            DataError: a broken row, an id that stands in two files, or a text that stands in both splits.
        """
        rows: list[Prompt] = []
        origin: dict[str, Path] = {}
        for source, path in zip(self.recipe.prompts, self.loaded.prompts, strict=True):
            about = PromptFile(file=source) if isinstance(source, str) else source
            found = read_prompts(path, tag=about.tag, eval_fraction=about.eval_fraction, seed=self.recipe.seed)
            self._tell_unused(path, found)
            for row in found.prompts:
                if row.id in origin:
                    raise DataError(f"{path}: the prompt id `{row.id}` stands already in {origin[row.id]}.")
                origin[row.id] = path
                messages = with_system(row.messages, self.recipe.system_prompt)
                rows.append(row.model_copy(update={"messages": messages}))
        refuse_leaks(rows, origin)
        return rows

    def _tell_unused(self, path: Path, found: PromptSet) -> None:
        if found.unused:
            reasons = Counter(row["reason"].partition(" of line ")[0] for row in found.unused)
            told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            lines = ", ".join(str(row["line"]) for row in found.unused[:5])
            more = "" if len(found.unused) <= 5 else ", ..."
            self.progress.say(
                f"{path.name}: {len(found.prompts)} prompts; {len(found.unused)} rows are none ({told}; lines {lines}"
                f"{more})"
            )

    def select(self, split: Split, per_tag: dict[str, int]) -> list[Prompt]:
        """Return a split's prompts: the first so many of each named tag, or all where no tag is named.

        Raises:
            DataError: the prompt sets hold fewer of a tag than asked for.
        """
        rows = [row for row in self.prompts if row.split == split]
        if per_tag:
            by_tag = {tag: [row for row in rows if row.tag == tag][:count] for tag, count in per_tag.items()}
            for tag, count in per_tag.items():
                if len(by_tag[tag]) < count:
                    raise DataError(
                        f"prompts_per_tag.{tag}: {count} asked for; the prompt sets hold {len(by_tag[tag])} with this "
                        f"tag and the split `{split}`. Ask for fewer, or add prompts."
                    )
            rows = [row for tag in per_tag for row in by_tag[tag]]
        if not rows:
            raise DataError(f"the prompt sets hold no prompts of the split `{split}`.")
        return rows

    def principle_for(self, prompt: Prompt, step: int = 0, *, tag: str = "") -> Principle:
        """Draw the principle for one step of a prompt; with `tag`, as if the prompt had this tag and no category."""
        return draw(
            self.constitution,
            seed=self.recipe.seed,
            prompt_id=prompt.id,
            step=step,
            tag=tag or prompt.tag,
            category="" if tag else prompt.category,
        )

    def in_round(self, number: int) -> "Run":
        """Return the same run in another round."""
        return self if number == self.round else replace(self, round=number)

    @property
    def earlier(self) -> "list[Run]":
        """The same run in each round before this one, from the first."""
        return [self.in_round(number) for number in range(1, self.round)]

    @property
    def round_folder(self) -> Path:
        """The folder that this round's stages stand in: the run folder in the first round."""
        return round_folder(self.folder, self.round)

    def stage_folder(self, stage: str) -> Path:
        """Return a stage's folder, such as ``1-revise``; stages that a recipe may do without have the last numbers."""
        parent = self.folder if stage in ONCE else self.round_folder
        return parent / f"{FOLDERS.index(stage) + 1}-{stage}"

    def output(self, stage: str, name: str) -> Path:
        """Return a file or folder that an earlier stage wrote.

        Raises:
            StageError: it is not there.
        """
        path = self.stage_folder(stage) / name
        if not path.exists():
            option = "" if self.round == 1 or stage in ONCE else f" --round {self.round}"
            raise StageError(
                f"{path}: not there yet. Run the stage `{stage}` first: rlaif {stage} {self.loaded.path}{option}"
            )
        return path

    def has_output(self, stage: str) -> bool:
        """Tell whether the recipe has this stage and it has finished."""
        return stage in self.recipe.stages and (self.stage_folder(stage) / "manifest.json").is_file()

    @property
    def processes(self) -> int:
        """How many processes train together: more than 1 under `accelerate launch`."""
        return process_count()

    def load_base(self) -> SharedBase:
        """Load the base model afresh: each stage adds its own roles to it."""
        import torch

        self._fetch()
        torch.manual_seed(self.recipe.seed)
        return SharedBase.load(self.recipe.model)

    def load_reward_base(self) -> SharedBase:
        """Load the base that the reward adapters stand on: the recipe's model, or `reward.model`."""
        if self.recipe.reward.model is None:
            return self.load_base()
        return SharedBase.load(self.recipe.reward_base(), classifier=True)

    def _fetch(self) -> None:
        if self.fetches and self.recipe.model.model_name_or_path in builtin.EMBEDDED:
            builtin.fetch(self.recipe.model.model_name_or_path, self.progress.say)

    # --- who answers --------------------------------------------------------------------------------------------

    def engine(self, name: str, load: Callable[[], SharedBase], *, batch_size: int, chooses: bool = False) -> Engine:
        """Return the engine of a name in the recipe.

        Args:
            name: `base`, `ray`, or a name in the recipe's `engines`.
            load: returns the shared base; not called where a server or a cluster answers.
            batch_size: conversations in a forward pass of the base.
            chooses: whether it is asked to choose between options.

        Raises:
            ConfigError: the recipe describes no such engine, or its key is not in the environment.
        """
        if name == BASE:
            return LocalEngine(load(), BASE, batch_size=batch_size)
        if name == RAY:
            self._fetch()
            model, kind = self.recipe.model, self.recipe.ray.kind
            return RayEngine(model, self._cluster, kind=kind, batch_size=batch_size, fetch=self.fetches)
        return ServerEngine(name, self._endpoint(name), chooses=chooses, say=self.progress.say)

    @property
    def rater(self) -> str:
        """The name of the engine whose rating is PPO's reward, where the judge gives it."""
        return self.recipe.ppo.judge or self.recipe.label.judge

    def model_of(self, name: str) -> str:
        """Return the name of the model that an engine asks."""
        return self.recipe.model.model_name_or_path if name in (BASE, RAY) else self._endpoint(name).model

    def asked(self, *names: str, chooses: bool = False) -> list[Any]:
        """Return what the answers of engines depend on besides the questions; of the recipe's model, see `inputs`."""
        own = {BASE: BASE, RAY: [RAY, self.recipe.ray.kind]}
        return [own[name] if name in own else self._endpoint(name).identity(chooses=chooses) for name in names]

    def check_keys(self, stages: Sequence[str]) -> None:
        """Look whether all keys and packages that these stages need are there, before hours of work and not after.

        Raises:
            ConfigError: a key is not in the environment, or Ray or a tracker is not installed.
            DeviceError: workers of `ray` cannot compute as the recipe says.
        """
        for stage in stages:
            section = getattr(self.recipe, stage)
            if isinstance(section, TrainingSection) and section.report_to != "none":
                from rlaif.stages.training import refuse_trackers

                refuse_trackers(stage, section.report_to)
            for name in self._engines_of(stage):
                if name == RAY:
                    require(self.recipe.model, self.recipe.ray)
                elif name != BASE:
                    self._endpoint(name).key(name)

    def _engines_of(self, stage: str) -> set[str]:
        """Return the engines that a stage may ask; `evaluate` asks the judges of `label` where it names none."""
        evaluate = self.recipe.evaluate
        borrows = stage == "evaluate" and evaluate.judge is None and evaluate.judge_prompts_per_tag > 0
        scores = stage == "ppo" or (stage == "evaluate" and "ppo" in self.recipe.stages)
        rated = {self.rater} if scores and self.recipe.ppo.is_judged else set()
        return rated | set(self.recipe.engines_of("label" if borrows else stage).values())

    @cached_property
    def _cluster(self) -> Cluster:
        return Cluster(self.recipe.ray, self.progress.say)

    def release(self) -> None:
        """Stop what was started to answer a stage's questions; what is asked later starts it again."""
        if "_cluster" in vars(self):
            self._cluster.stop()

    def _endpoint(self, name: str) -> Endpoint:
        if name not in self.recipe.engines:
            raise ConfigError(f"engines: `{name}` is not described there; known: {', '.join(self.recipe.engines)}.")
        return self.recipe.engines[name]

    def seed(self, *parts: str | int) -> int:
        """Return a seed that depends on the run's seed, on the round, on what it is for, and on nothing else."""
        later = () if self.round == 1 else (folder_name(self.round),)
        digest = hashlib.sha256(repr((self.recipe.seed, *later, *parts)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    # --- what a stage's result depends on ---------------------------------------------------------------------

    def inputs(self, *sections: BaseModel, files: dict[str, Path] | None = None, **named: Any) -> dict[str, str]:
        """Return fingerprints of all that a stage's result depends on, by name."""
        model = self.recipe.model.model_dump() | {"gradient_checkpointing": False}  # gradients are the same with it
        result = {"seed": str(self.recipe.seed), "model": fingerprint(model)}
        for section in sections:
            fields = type(section).model_fields
            name = type(section).__name__.removesuffix("Section").lower()
            unset = {key for key in _LATER & fields.keys() if getattr(section, key) == fields[key].get_default()}
            # What an engine is asked with counts (`Run.asked`), and not what the recipe calls it.
            content = section.model_dump(exclude=_NOT_DETERMINING | set(ENGINE_KEYS.get(name, ())) | unset)
            content |= {key: fields[key].default for key in _ROWS_AT_A_TIME if key in content}
            result[f"recipe.{name}"] = fingerprint(content)
        result |= {name: fingerprint(value) for name, value in named.items()}
        result |= {name: path_sha256(path) for name, path in (files or {}).items()}
        return result

    def prompts_hash(self, prompts: list[Prompt]) -> str:
        """Return the fingerprint of a selection of prompts."""
        rows = [prompt.model_dump(exclude=None if prompt.is_conversation else {"messages"}) for prompt in prompts]
        return fingerprint(rows)


def reconciled(stage: str, total: int, **parts: int) -> dict[str, int]:
    """Return the counts of a stage's rows, having checked that each row that came in went somewhere."""
    told = " + ".join(f"{name} {count}" for name, count in parts.items())
    assert total == sum(parts.values()), f"{stage}: in {total} = {told} does not hold: a row was lost or doubled"
    return {"in": total, **parts}


def path_sha256(path: Path) -> str:
    """Hash a file, or a folder's safetensors and JSON files by name and content; ``absent`` where there is none."""
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return "absent"
    files = sorted(file for suffix in ("*.safetensors", "adapter_config.json") for file in path.glob(suffix))
    return fingerprint({file.name: file_sha256(file) for file in files})


def templates(*names: str) -> dict[str, Template]:
    """Load prompt templates by name."""
    return {name: load_template(name) for name in names}
