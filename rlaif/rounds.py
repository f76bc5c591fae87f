"""Rounds: sample, label, reward, optimize and evaluate again, each time from the policy that was kept so far.

`revise` and `sft` run once. All other stages of a recipe run in each round, the first in the run folder, later ones in
``round-2/``, ``round-3/``, and so on. A place in a run is written as its folder is: ``ppo``, ``round-2/ppo``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rlaif.errors import ConfigError
from rlaif.sections import Fraction, Positive, Section

ONCE = ("revise", "sft")
GATE, LABELS = "gate.json", "labels.jsonl"
OPTIMIZERS = ("ppo", "dpo", "rejection")


class RoundsSection(Section):
    """How often stages are repeated, and with what of earlier rounds. A plain number is `count`."""

    count: Positive = Field(1, description="rounds of all stages after `sft`")
    replay: Fraction = Field(1.0, description="share of earlier rounds' comparisons and best responses learned again")
    gate: Literal["judge", "score"] = Field("judge", description="what compares a new policy with the kept one")
    human_pairs: int | None = Field(
        None, ge=0, description="pairs of a later round that people label; absent: all for `human`, none for `mixed`"
    )

    @model_validator(mode="before")
    @classmethod
    def _number_is_enough(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Step(NamedTuple):
    """One stage in one round."""

    round: int
    stage: str

    def __str__(self) -> str:
        """Return the step as a command line names it."""
        return self.stage if self.round == 1 else f"{folder_name(self.round)}/{self.stage}"


def folder_name(number: int) -> str:
    """Return the name of the folder that a later round's stages stand in."""
    return f"round-{number}"


def round_folder(run_folder: Path, number: int) -> Path:
    """Return the folder that a round's stages stand in: the run folder in the first round."""
    return run_folder if number == 1 else run_folder / folder_name(number)


def newest_of(run_folder: Path, stage_folder: str) -> Path:
    """Return a stage's folder, such as ``4-reward``, in the last round that has finished it; else in the first."""
    found, number = run_folder / stage_folder, 2
    while ((later := round_folder(run_folder, number)) / stage_folder / "manifest.json").is_file():
        found, number = later / stage_folder, number + 1
    return found


def gates(run_folder: Path, count: int) -> list[Path]:
    """Return the gate files of the rounds that have ended, from the first."""
    return [path for k in range(1, count + 1) if (path := round_folder(run_folder, k) / GATE).is_file()]


def steps_of(stages: Sequence[str], count: int) -> list[Step]:
    """Return all stages of all rounds in the order in which they run."""
    again = [stage for stage in stages if stage not in ONCE]
    return [Step(1, stage) for stage in stages] + [Step(k, stage) for k in range(2, count + 1) for stage in again]


def step_named(name: str, steps: Sequence[Step], where: object) -> Step:
    """Return the step that a command line names.

    Raises:
        ConfigError: there is no such step.
    """
    found = next((step for step in steps if str(step) == name), None)
    if found is None:
        raise ConfigError(f"{where}: has no stage `{name}`; its stages: {', '.join(map(str, steps))}.")
    return found


def chosen(
    steps: Sequence[Step], where: object, first: str | None, last: str | None, only: str | None = None
) -> tuple[list[Step], list[Step]]:
    """Return the steps up to `last`, or `only` one, and those of them from `first` on, which run again.

    Raises:
        ConfigError: a name is that of no step.
    """
    begin, end, alone = (step_named(name, steps, where) if name else None for name in (first, last, only))
    wanted = list(steps) if end is None else list(steps[: steps.index(end) + 1])
    wanted = [alone] if alone else wanted
    return wanted, [step for step in wanted if begin and steps.index(step) >= steps.index(begin)]
