"""The reward stage itself on planted labels: a run folder of its own, and what the stage wrote into it."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import yaml
from heads import folds_of
from planting import Planted, with_trigger
from study import Data

from rlaif import files
from rlaif.documents import fingerprint
from rlaif.errors import ConfigError
from rlaif.journal import Journal
from rlaif.maths.agreement import wilson
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.records import Comparison, jsonl
from rlaif.stages import reward
from rlaif.stages.reward_audit import preferred
from rlaif.stages.reward_calibration import pairs_of, score_rows
from rlaif.stages.reward_model import RewardModel
from rlaif.stages.run import Run


class Cell(NamedTuple):
    """What a run of the reward stage gave; `heldout` and `triggered` are rates with intervals on true labels."""

    heldout: dict[str, Any]
    triggered: dict[str, Any]
    nll: float
    ece: float
    train_margins: np.ndarray
    planted: list[int]  # places in `train_margins`
    disagreements: list[dict[str, Any]]


def run(data: Data, plant: Callable[..., Planted], rate: float, options: argparse.Namespace) -> Cell:
    """Plant into all folds but the first, train on those, and measure on the first, whose labels stay true.

    Raises:
        ConfigError: no folder was named for the run.
    """
    if options.lora_folder is None:
        raise ConfigError("--lora: needs --lora-folder, where the run folders go.")
    folds = folds_of(data.rows, options.folds, 0)
    rest = [row for row, fold in zip(data.rows, folds, strict=True) if fold]
    heldout = [row for row, fold in zip(data.rows, folds, strict=True) if not fold]
    planted = plant(rest, rate, 0)
    rows = [row.model_copy(update={"split": "train"}) for row in planted.rows]
    rows += [row.model_copy(update={"split": "eval"}) for row in heldout]
    recipe = _recipe(options)
    content = fingerprint([recipe, jsonl(rows)])[:8]  # so that a folder is taken up again by the same cell alone
    folder = options.lora_folder / f"{plant.__name__}-{rate:g}-{content}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with Journal(folder / "journal.db") as journal:
        job = Run(load_recipe(folder / "recipe.yaml"), folder, journal, Progress())
        files.write_jsonl(job.stage_folder("label") / "comparisons.jsonl", rows)
        if not (job.stage_folder("reward") / "calibration.json").is_file():
            reward.reward(job)
        return _read(job, planted, heldout)


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "study",
        "constitution": "harmless",
        "model": {"model_name_or_path": options.model},
        "reward": {
            "start_from": "base",
            "max_length": options.max_length,
            "num_train_epochs": options.lora_epochs,
            "learning_rate": options.lora_learning_rate,
            "num_heads": options.members,
            "allow_weak_reward": True,
        },
    }


def _read(job: Run, planted: Planted, heldout: list[Comparison]) -> Cell:
    settings, folder = job.recipe.reward, job.stage_folder("reward")
    measured = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    listed = [json.loads(line) for line in (folder / "disagreements.jsonl").read_text(encoding="utf-8").splitlines()]
    base = job.load_base()
    model = RewardModel.load(base, folder, job.recipe.ppo.reward_model)
    scored = score_rows(model, planted.rows, settings.microbatch, job.progress, "scores of planted rows")
    _, gaps = pairs_of(scored, model.combine)
    right = preferred(model, heldout, [[with_trigger(row).prompt] for row in heldout], settings.microbatch)
    triggered = wilson(sum(one for (one,) in right), len(right))._asdict()
    return Cell(
        measured["heldout"]["all"],
        triggered,
        measured["nll"],
        measured["ece"],
        gaps.double().numpy(),
        planted.places,
        listed,
    )


def share(rate: dict[str, Any]) -> str:
    """Return a rate with its interval."""
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
