"""Stage `sft`: supervised fine-tuning of a LoRA adapter on the demonstrations, with TRL's `SFTTrainer`.

Only the tokens of the answer are learned. An answer that ended by itself, or was trimmed to whole sentences, is closed
by the token that ends a turn; the loss is the mean over all answer tokens of a batch.

Writes ``adapter/`` (a plain PEFT folder) and ``metrics.jsonl``.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from rlaif.errors import DataError
from rlaif.model.roles import SharedBase
from rlaif.policy_sections import RejectionSection, SftSection
from rlaif.recipe import ModelSection
from rlaif.records import Demonstration, Messages, read_rows, text_of
from rlaif.stages.cards import write_policy_card
from rlaif.stages.processes import SharingTrainer, exchange_trainable, order, share, together
from rlaif.stages.run import Run
from rlaif.stages.training import (
    Recorder,
    arguments,
    last_metrics,
    make_ready,
    resume_point,
    step_of,
    steps_of,
    train_to,
)

NAME = "sft"
ROLE = "policy"


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    path = run.stage_folder("revise") / "demonstrations.jsonl"
    return run.inputs(run.recipe.sft, files={"demonstrations": path})


def sft(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.sft, run.stage_folder(NAME)
    path = run.output("revise", "demonstrations.jsonl")
    if not path.stat().st_size:
        raise DataError(
            f"{path}: no demonstration; every answer was set aside. Read {path.parent / 'quarantine.jsonl'} for the "
            "reasons; raise revise.sampling.max_new_tokens, use more prompts or a stronger model, or fewer filters."
        )
    rows = read_rows(path, Demonstration)
    base = run.load_base()
    base.add_role(ROLE, trainable=True)
    sides = split(base, [Answered(row.prompt, text_of(row.completion)) for row in rows], settings)
    if not sides.train:
        raise DataError(
            f"{folder}: no demonstration is left to train on; of {len(rows)} rows {sides.too_long} are longer "
            f"than {sides.longest} tokens and {len(sides.heldout)} are held out. Raise sft.max_length, lower "
            "sft.heldout_fraction, or revise more prompts."
        )
    steps = fit(run, base, NAME, settings, sides)
    base.save_role(ROLE, folder / "adapter")
    loss = last_metrics(folder).get("sft/heldout_loss")
    facts = [f"Fine-tuned on {len(sides.train)} demonstrations in {steps} steps."]
    facts += [] if loss is None else [f"Loss on {len(sides.heldout)} held-out demonstrations: {loss:.3f} nats a token."]
    write_policy_card(run, base, folder / "adapter", facts)
    return {
        "demonstrations": len(rows),
        "too_long": sides.too_long,
        "train": len(sides.train),
        "heldout": len(sides.heldout),
        "steps": steps,
        "heldout_loss": loss,
    }


class Answered(NamedTuple):
    """A prompt and the answer to learn; one that has not ended is learned without an end."""

    prompt: Messages
    text: str
    ended: bool = True


class Sides(NamedTuple):
    """Encoded rows to train on and to measure with, and how many were longer than `longest` tokens."""

    train: list[dict[str, list[int]]]
    heldout: list[dict[str, list[int]]]
    too_long: int
    longest: int


def split(base: SharedBase, rows: list[Answered], settings: SftSection | RejectionSection) -> Sides:
    """Encode rows, leave out those that are too long and hold out a share of the prompts."""
    encoded = [(row, encode(base, row)) for row in rows]
    longest = min(settings.max_length, base.max_length)
    short = [pair for pair in encoded if len(pair[1]["input_ids"]) <= longest]
    heldout = [e for row, e in short if _held_out(row.prompt, settings.heldout_fraction)]
    train = [e for row, e in short if not _held_out(row.prompt, settings.heldout_fraction)]
    return Sides(train, heldout, len(rows) - len(short), longest)


def encode(base: SharedBase, row: Answered) -> dict[str, list[int]]:
    """Encode a prompt and its answer; only the answer's tokens carry labels."""
    prompt = base.tokenizer.prompt(row.prompt)
    answer = base.tokenizer.response(row.text, ended=row.ended)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def _held_out(prompt: Messages, fraction: float) -> bool:
    """Choose held-out rows by their prompt, so that two revisions of one answer stay on one side."""
    digest = hashlib.sha256(f"heldout/{text_of(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def fit(
    run: Run,
    base: SharedBase,
    stage: str,
    settings: SftSection | RejectionSection,
    sides: Sides,
    start: Path | None = None,
) -> int:
    """Train the policy of a stage, from the beginning or from its newest complete checkpoint; return the steps taken.

    Args:
        run: the run.
        base: the shared base, which has the role `policy` and no other.
        stage: whose folder the metrics and checkpoints stand in.
        settings: its section of the recipe.
        sides: what is learned, and what is measured with.
        start: the adapter that the role was loaded from, so that other processes can add it alike.
    """
    folder = run.stage_folder(stage)
    steps = steps_of(settings, len(sides.train), run.processes)
    checkpoint = resume_point(run, folder)
    own = {"max_length": settings.max_length, "loss_type": "nll", "eval_strategy": "no"}
    options = arguments(run, settings, folder) | own
    plan = Plan(sides.train, sides.heldout, options, checkpoint, steps, str(start) if start else None)
    with run.progress.task("training", steps - step_of(checkpoint)) as task, together():
        order(NAME, model=run.recipe.model.model_dump(), **plan._asdict())
        _train(base, plan, [Recorder(folder, stage, task)])
    return steps


class Plan(NamedTuple):
    """A training as each process is told it: encoded rows, arguments of `SFTConfig`, where from and how far."""

    train: list[dict[str, list[int]]]
    heldout: list[dict[str, list[int]]]
    options: dict[str, Any]
    checkpoint: str | None
    steps: int
    start: str | None


class _Trainer(SharingTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; each process collates its share of a batch."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        collate: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = lambda rows: collate(share(rows) or [_unlabelled(rows[0])])
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate


def _unlabelled(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return a row that adds nothing to the loss, for a process that a short batch has none for."""
    return {**row, "labels": [-100] * len(row["input_ids"])}


def _train(base: SharedBase, plan: Plan, callbacks: list[TrainerCallback]) -> None:
    """Train the role from the beginning or from a checkpoint, measuring the held-out loss before and after."""
    with base.acting_as(ROLE, training=True):
        trainer = _trainer(base, plan, callbacks)
        if plan.checkpoint is None and plan.heldout:
            trainer.evaluate()
            trainer.accelerator.free_memory()  # else `accelerate` takes the model for one that exchanges gradients
            base.peft._is_accelerate_prepared = False
        train_to(trainer, plan.checkpoint, plan.steps)
        if plan.heldout:
            trainer.evaluate()


def _trainer(base: SharedBase, plan: Plan, callbacks: list[TrainerCallback]) -> SFTTrainer:
    disable_progress_bars()
    trainer = _Trainer(
        model=base.peft,
        args=SFTConfig(**plan.options),
        train_dataset=Dataset.from_list(plan.train),
        eval_dataset=Dataset.from_list(plan.heldout) if plan.heldout else None,
        processing_class=base.tokenizer.raw,
        callbacks=callbacks,
    )
    make_ready(trainer, base, ROLE)
    exchange_trainable(base.peft)
    return trainer


def follow(told: dict[str, Any]) -> None:
    """Take part in the training that the first of several processes orders."""
    base = SharedBase.load(ModelSection(**told.pop("model")))
    plan = Plan(**told)
    base.add_role(ROLE, trainable=True, adapter=Path(plan.start) if plan.start else None)
    _train(base, plan._replace(options=plan.options | {"report_to": "none"}), [])
