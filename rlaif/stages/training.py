"""What the stages that train with `transformers.Trainer` share: arguments, checkpoints that are complete, metrics."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import set_seed

from rlaif import files
from rlaif.errors import ConfigError, StageError
from rlaif.model.roles import SharedBase
from rlaif.progress import Task
from rlaif.recipe import TrainingSection
from rlaif.records import read_jsonl
from rlaif.stages import processes
from rlaif.stages.run import Run

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STARTED = "started.json"  # of a stage that has begun: the fingerprint of its inputs; each checkpoint holds a copy
# What trainers log, under this package's names, and what is not kept.
_NAMES = {
    "grad_norm": "gradient_norm",
    "eval_loss": "heldout_loss",
    "eval_accuracy": "heldout_accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "eval_rewards/accuracies": "heldout_accuracy",
    "eval_rewards/margins": "heldout_reward_margin",
}
_SKIPPED = (
    *("epoch", "total_flos", "num_tokens", "entropy", "mean_token_accuracy"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
)
_ROLE = "role.safetensors"


def arguments(run: Run, settings: TrainingSection, folder: Path) -> dict[str, Any]:
    """Return the keyword arguments of `TrainingArguments` for one stage of a run.

    Of several processes each draws the batches of all and computes its share (`SharingTrainer`).
    """
    set_seed(run.recipe.seed)
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "seed": run.recipe.seed,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size * run.processes,
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "logging_steps": settings.logging_steps,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,  # it logs 0 in place of NaN, and the training goes on
        "save_strategy": "steps",
        "save_steps": logged_step(settings, settings.save_steps),
        "save_total_limit": 2,
        "report_to": settings.report_to,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,  # switched on at the shared base, for all roles
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        **processes.options(),
    }


def logged_step(settings: TrainingSection, step: int) -> int:
    """Round up to a step that is logged: a checkpoint, which must be at one, keeps no sums that wait to be logged."""
    return -(-step // settings.logging_steps) * settings.logging_steps


def refuse_trackers(stage: str, report_to: list[str] | str) -> None:
    """Refuse names in `report_to` that `transformers` does not know, or whose package is not installed.

    Raises:
        ConfigError: there is one.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        known = integration_utils.INTEGRATION_TO_CALLBACK
        if name not in known:
            raise ConfigError(f"{stage}.report_to: no tracker `{name}`; known: {', '.join(sorted(known))}, all, none.")
        try:
            known[name]()
        except (ImportError, RuntimeError) as problem:
            hint = "install the extra `tracking`" if name == "tensorboard" else "install its package"
            raise ConfigError(
                f"{stage}.report_to: `{name}` cannot be used: {problem} Here: {hint}, or set it to none."
            ) from None


def resume_point(run: Run, folder: Path, *, measured_at_end: bool = True) -> str | None:
    """Return the newest complete checkpoint and cut the metrics back to its step, or start the metrics anew.

    With `measured_at_end` the held-out loss after the last step is measured again, so its row goes. Unfinished
    checkpoints are removed, so that none is taken for a newer one later.

    Raises:
        StageError: the checkpoint was written under other inputs, such as those of another recipe.
    """
    checkpoint = files.newest_complete(folder / CHECKPOINTS, "checkpoint-*")
    if checkpoint and _started(checkpoint) != _started(folder, folder.parent):
        raise StageError(
            f"{checkpoint}: written under other inputs than this stage's: by another recipe, with other data or "
            "another version; a checkpoint of this run is expected. Move it away, or remove the folder "
            f"{checkpoint.parent}, then run again."
        )
    step = step_of(checkpoint)
    for other in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if checkpoint is None or step_of(other) > step:
            files.remove_folder(other)
    path = folder / METRICS
    if path.exists():
        files.repair_jsonl(path)
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    measured = [row for row in rows if any(key.endswith("/heldout_loss") for key in row)] if measured_at_end else []
    again = [row for row in measured if row["step"] == step]
    kept = [row for row in rows if row["step"] <= step and row not in again] if checkpoint else []
    files.write_jsonl(path, kept)
    if checkpoint:
        run.progress.say(f"  continuing after step {step}")
    return str(checkpoint) if checkpoint else None


def close_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Note in a checkpoint of a stage (or of a part in the stage's folder) what the stage began with; mark it complete.

    A stage that is called without the pipeline has noted nothing.
    """
    started = _started(folder, folder.parent)
    if started:
        files.write_bytes(checkpoint / STARTED, started)
    files.mark_complete(checkpoint)


def _started(*folders: Path) -> bytes:
    """Return what the first of the folders with such a note says; nothing where none has one."""
    return next((path.read_bytes() for path in (folder / STARTED for folder in folders) if path.is_file()), b"")


def step_of(checkpoint: str | Path | None) -> int:
    """Return the step in the name of a checkpoint's folder; 0 for none."""
    return int(Path(checkpoint).name.rsplit("-", 1)[1]) if checkpoint else 0


def train_to(trainer: Trainer, checkpoint: str | None, steps: int) -> None:
    """Train up to a number of steps, from the beginning or from a checkpoint.

    `Trainer` takes one step too many when it continues from the checkpoint of the last one within an epoch, so from
    there only the weights are loaded.
    """
    if checkpoint is None or step_of(checkpoint) < steps:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        trainer._load_from_checkpoint(checkpoint)
        trainer.state.global_step = steps


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes metrics as rows of ``metrics.jsonl``, marks checkpoints complete and moves the progress bar.

    Metrics begin with `prefix`; `section` is the recipe's that the training follows, where it has another name.
    """

    def __init__(self, folder: Path, prefix: str, task: Task, *, section: str = ""):
        self._folder, self._prefix, self._task = folder, prefix, task
        self._section = section or prefix

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Keep the numbers of a log entry under this package's names.

        Raises:
            StageError: a loss is not a finite number, so that training on would be in vain.
        """
        for key in ("loss", "eval_loss", "train_loss"):
            loss = (logs or {}).get(key, 0.0)
            if not math.isfinite(loss):
                raise diverged(self._prefix, self._section, f"the loss is {loss} at step {state.global_step}")
        row = {
            f"{self._prefix}/{_NAMES.get(key, key)}": value
            for key, value in (logs or {}).items()
            if isinstance(value, int | float)
            and math.isfinite(value)
            and key not in _SKIPPED
            and not key.startswith("train_")
            and not (key.startswith("eval_") and key not in _NAMES)
        }
        if row:
            files.append_jsonl(self._folder / METRICS, {"step": state.global_step, **row})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        loss = state.log_history[-1].get("loss") if state.log_history else None
        self._task.advance(1, note=f"loss {loss:.3f}" if loss is not None else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the marker without which a checkpoint is not resumed from."""
        close_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._folder)


def diverged(what: str, section: str, found: str) -> StageError:
    """Return the error of a training that has left all finite numbers, with the keys that hold it back."""
    return StageError(
        f"{what}: {found}: the training has diverged. Lower {section}.learning_rate or {section}.max_grad_norm, then "
        "run again."
    )


def last_metrics(folder: Path) -> dict[str, Any]:
    """Return the latest value of each metric."""
    result: dict[str, Any] = {}
    for _, row in read_jsonl(folder / METRICS):
        result |= row
    return result


def make_ready(trainer: Trainer, base: SharedBase, role: str) -> None:
    """Silence one of TRL's trainers, and give a role its fp32 weights back: TRL casts those on a 4-bit base to bf16."""
    trainer.remove_callback(PrinterCallback)
    for _, parameter in base.named_parameters_of(role):
        parameter.data = parameter.data.to(torch.float32)


def save_state(base: SharedBase, role: str, folder: Path) -> None:
    """Write a role's weights into a checkpoint, and nothing of the base or of other roles."""
    folder.mkdir(parents=True, exist_ok=True)
    named = base.named_parameters_of(role)
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in named}, folder / _ROLE)


def load_state(base: SharedBase, role: str, folder: Path) -> None:
    """Give a role the weights of a checkpoint."""
    state = load_file(folder / _ROLE)
    with torch.no_grad():
        for name, parameter in base.named_parameters_of(role):
            parameter.copy_(state[name])


def steps_of(settings: TrainingSection, rows: int, processes: int) -> int:
    """Return how many optimizer steps a training takes."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes
    return max(1, math.ceil(settings.num_train_epochs * -(-rows // per_step)))
