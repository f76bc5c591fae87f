"""Training one adapter with a head on the shared base, by `transformers.Trainer` with the losses of this package."""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlaif.launch import process_count
from rlaif.model.groups import Group, score_groups
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection, PairLoss, RewardSection
from rlaif.stages.processes import SharingTrainer, exchange_trainable, order, share, together, totals
from rlaif.stages.reward_data import Example
from rlaif.stages.reward_losses import example_losses, head_weights
from rlaif.stages.run import Run
from rlaif.stages.training import (
    Recorder,
    arguments,
    load_state,
    logged_step,
    resume_point,
    save_state,
    step_of,
    steps_of,
    train_to,
)


@dataclass(frozen=True)
class Job:
    """One adapter to train: its role, the folder it is written to, and what it learns from and is watched on."""

    role: str
    folder: Path
    train: Sequence[Example]
    watched: Sequence[Example]  # measured every `eval_steps`
    seed: int


class Scorer(nn.Module):
    """The shared base as a module that `Trainer` can hold: examples in, scores of all their answers out."""

    def __init__(self, base: SharedBase, role: str):
        super().__init__()
        self.lm, self.heads = base.lm, base.heads
        self.role = role
        self._base = [base]  # in a list, so that it is not taken for a submodule

    @property
    def base(self) -> SharedBase:
        """The shared base."""
        return self._base[0]

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Return the scores ``[N, H]`` of all answers, example by example."""
        scores = score_groups(self.base, self.role, [Group(e.prompt, e.responses) for e in examples])
        return scores if scores.dim() == 2 else scores.unsqueeze(1)


class RewardTrainer(SharingTrainer):
    """`Trainer` with the losses of labels; its checkpoints hold the role alone."""

    def __init__(self, *args: Any, settings: RewardSection, scorer: Scorer, watched: Sequence[Example], **kwargs: Any):
        super().__init__(*args, model=scorer, **kwargs)
        self._settings, self._scorer, self._watched = settings, scorer, watched
        self._seen: list[Tensor] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the weighted mean loss of a batch of examples, of which this process has a share.

        `Trainer` reports the mean over processes, and its gradients are theirs: hence a sum over the share, divided by
        the size of the whole batch, times the number of processes.
        """
        examples: list[Example] = inputs["examples"]
        scores = model(examples)
        found = example_losses(scores, examples, self._settings)
        heads = found.losses.shape[1]
        counts = [[e.weight * w for w in head_weights(e.id, heads, self.args.seed)] for e in examples]
        whole = inputs["whole"] * heads
        loss = (found.losses * found.losses.new_tensor(counts)).sum() / whole * process_count()
        self._seen.append(found.gaps if any(e.weight for e in examples) else found.gaps[:0])
        return (loss, {"scores": scores}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy and margin on the training pairs since the last entry."""
        if self._seen and "loss" in logs:
            gaps = torch.cat(self._seen)
            pairs, right, margins = totals(len(gaps), (gaps > 0).sum().item(), gaps.sum().item())
            if pairs:
                logs = {**logs, "accuracy": right / pairs, "margin": margins / pairs}
            self._seen = []
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the loss and the accuracy on the watched examples."""
        own, size = share(self._watched), self.args.per_device_eval_batch_size
        loss, right, pairs = 0.0, 0.0, 0.0
        with torch.no_grad():
            for start in range(0, len(own), size):
                part = own[start : start + size]
                found = example_losses(self._scorer(part), part, self._settings)
                weights = found.losses.new_tensor([e.weight for e in part])
                loss += (found.losses.mean(1) * weights).sum().item()
                right, pairs = right + (found.gaps > 0).sum().item(), pairs + len(found.gaps)
        loss, right, pairs = totals(loss, right, pairs)  # alike in all processes, so that they stop together
        metrics = {"eval_loss": loss / len(self._watched)}
        if pairs:
            metrics["eval_accuracy"] = right / pairs
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_state(self._scorer.base, self._scorer.role, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self._scorer.base, self._scorer.role, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_global_step:  # by its number: the run folder may have been moved since
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"))

    def stopped_early(self, checkpoint: str | None) -> bool:
        """Tell whether a training had already been stopped when it wrote this checkpoint; then load its best weights.

        `Trainer` would train on: it forgets that it was told to stop.
        """
        patience = self._settings.early_stopping_patience
        if checkpoint is None or patience is None:
            return False
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        counted = self.state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]
        stopped: bool = counted["early_stopping_patience_counter"] >= patience
        if stopped:
            self._load_best_model()
        return stopped


def train(run: Run, base: SharedBase, job: Job, settings: RewardSection, start: Path | None = None) -> int:
    """Train a role of the base, from the beginning or from its newest complete checkpoint; return the steps taken.

    Args:
        run: the run.
        base: the shared base, which has the role.
        job: what is trained, and on what.
        settings: the recipe's section.
        start: the adapter that the role was loaded from, so that other processes can add it alike.
    """
    steps = steps_of(settings, len(job.train), run.processes)
    checkpoint = resume_point(run, job.folder, measured_at_end=False)
    options = arguments(run, settings, job.folder) | {"seed": job.seed} | _watching(settings)
    title = f"training {job.role}" if job.role != "reward" else "training"
    with run.progress.task(title, steps - step_of(checkpoint)) as task, together():
        order(
            "reward_training",
            model=(run.recipe.reward_base() if settings.model else run.recipe.model).model_dump(),
            settings=settings.model_dump(),
            added={"head": True, "outputs": len(base.head_weight(job.role)), "adapter": start and str(start)},
            job=asdict(job) | {"folder": str(job.folder)},
            round=run.round,
            options=options,
            checkpoint=checkpoint,
            steps=steps,
        )
        recorder = Recorder(job.folder, job.role, task, section="reward")
        return _train(base, job, settings, options, checkpoint, steps, [recorder])


def _train(
    base: SharedBase,
    job: Job,
    settings: RewardSection,
    options: dict[str, Any],
    checkpoint: str | None,
    steps: int,
    callbacks: list[TrainerCallback],
) -> int:
    with base.acting_as(job.role, training=True):
        scorer = Scorer(base, job.role)
        exchange_trainable(scorer)
        trainer = RewardTrainer(
            args=TrainingArguments(**options),
            train_dataset=list(job.train),
            eval_dataset=list(job.watched),
            data_collator=_collate,
            callbacks=callbacks,
            settings=settings,
            scorer=scorer,
            watched=job.watched,
        )
        trainer.remove_callback(PrinterCallback)
        if settings.early_stopping_patience:
            trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
        if not trainer.stopped_early(checkpoint):
            train_to(trainer, checkpoint, steps)
        return int(trainer.state.global_step)


def follow(told: dict[str, Any]) -> None:
    """Take part in the training of one role that the first of several processes orders."""
    base = _base(json.dumps(told["model"]), bool(told["settings"]["model"]), told["round"])
    job, added = told["job"], told["added"]
    rows = {name: [_example(row) for row in job[name]] for name in ("train", "watched")}
    base.add_role(job["role"], trainable=True, **added | {"adapter": added["adapter"] and Path(added["adapter"])})
    _train(
        base,
        Job(job["role"], Path(job["folder"]), **rows, seed=job["seed"]),
        RewardSection(**told["settings"]),
        told["options"] | {"report_to": "none"},
        told["checkpoint"],
        told["steps"],
        [],
    )
    base.freeze(job["role"])


@functools.lru_cache(maxsize=1)
def _base(model: str, classifier: bool, round_number: int) -> SharedBase:
    """Keep the base that roles were trained on before, for a further one of the same round."""
    return SharedBase.load(ModelSection(**json.loads(model)), classifier=classifier)


def _example(row: dict[str, Any]) -> Example:
    return Example(**row | {"loss": PairLoss(**row["loss"]), "signs": tuple(row["signs"])})


def _collate(rows: Sequence[Example]) -> dict[str, Any]:
    """Keep a process's share of the examples as they are, one that counts nothing where a short batch has none for it.

    The tensor beside them tells `accelerate` the size of the batch.
    """
    own = share(rows) or [replace(rows[0], weight=0.0)]
    return {"size": torch.zeros(len(own)), "examples": list(own), "whole": len(rows)}


def _watching(settings: RewardSection) -> dict[str, Any]:
    """Return the arguments that let a training be measured on its way, and stopped by what is found."""
    if settings.eval_steps is None:
        return {}
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": settings.eval_steps}
    if settings.early_stopping_patience:
        measured = logged_step(settings, settings.eval_steps)  # with a checkpoint each time
        options |= {
            "eval_steps": measured,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "save_steps": measured,
            "restore_callback_states_from_checkpoint": True,  # how long it has been patient
        }
    return options
