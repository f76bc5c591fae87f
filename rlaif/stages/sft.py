"""Stage `sft`: supervised fine-tuning of a LoRA adapter on the demonstrations, with TRL's `SFTTrainer`.

Only the tokens of the answer are learned. An answer that ended by itself, or was trimmed to whole sentences, is closed
by the token that ends a turn; the loss is the mean over all answer tokens of a batch.

Writes ``adapter/`` (a plain PEFT folder) and ``metrics.jsonl``.
"""

import hashlib
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rlaif.errors import DataError
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection
from rlaif.records import Demonstration, read_rows, text_of
from rlaif.stages.cards import write_policy_card
from rlaif.stages.processes import SharingTrainer, exchange_trainable, order, share, together
from rlaif.stages.run import Run
from rlaif.stages.training import Recorder, arguments, last_metrics, resume_point, step_of, steps_of, train_to

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
    encoded = [(row, encode(base, row)) for row in rows]
    longest = min(settings.max_length, base.max_length)
    short = [pair for pair in encoded if len(pair[1]["input_ids"]) <= longest]
    heldout = [e for row, e in short if _held_out(row, settings.heldout_fraction)]
    train = [e for row, e in short if not _held_out(row, settings.heldout_fraction)]
    if not train:
        raise DataError(
            f"{folder}: no demonstration is left to train on; of {len(rows)} rows {len(rows) - len(short)} are longer "
            f"than {longest} tokens and {len(heldout)} are held out. Raise sft.max_length, lower sft.heldout_fraction, "
            "or revise more prompts."
        )
    steps = steps_of(settings, len(train), run.processes)
    checkpoint = resume_point(run, folder)
    plan = Plan(train, heldout, _options(run), checkpoint, steps)
    with run.progress.task("training", steps - step_of(checkpoint)) as task, together():
        order(NAME, model=run.recipe.model.model_dump(), **plan._asdict())
        _train(base, plan, [Recorder(folder, NAME, task)])
    base.save_role(ROLE, folder / "adapter")
    last = last_metrics(folder)
    loss = last.get("sft/heldout_loss")
    facts = [f"Fine-tuned on {len(train)} demonstrations in {steps} steps."]
    facts += [] if loss is None else [f"Loss on {len(heldout)} held-out demonstrations: {loss:.3f} nats a token."]
    write_policy_card(run, base, folder / "adapter", facts)
    return {
        "demonstrations": len(rows),
        "too_long": len(rows) - len(short),
        "train": len(train),
        "heldout": len(heldout),
        "steps": steps,
        "heldout_loss": last.get("sft/heldout_loss"),
    }


def encode(base: SharedBase, row: Demonstration) -> dict[str, list[int]]:
    """Encode a demonstration; only the answer's tokens carry labels."""
    prompt = base.tokenizer.prompt(row.prompt)
    answer = base.tokenizer.response(text_of(row.completion))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def _held_out(row: Demonstration, fraction: float) -> bool:
    """Choose held-out rows by their prompt, so that two revisions of one answer stay on one side."""
    digest = hashlib.sha256(f"heldout/{text_of(row.prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


class Plan(NamedTuple):
    """A training as each process is told it: encoded rows, arguments of `SFTConfig`, where from and how far."""

    train: list[dict[str, list[int]]]
    heldout: list[dict[str, list[int]]]
    options: dict[str, Any]
    checkpoint: str | None
    steps: int


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


def _options(run: Run) -> dict[str, Any]:
    settings = run.recipe.sft
    own = {"max_length": settings.max_length, "loss_type": "nll", "eval_strategy": "no"}
    return arguments(run, settings, run.stage_folder(NAME)) | own


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
    trainer.remove_callback(PrinterCallback)
    for _, parameter in base.named_parameters_of(ROLE):
        parameter.data = parameter.data.to(torch.float32)  # on a quantized base SFTTrainer casts them to bf16
    exchange_trainable(base.peft)
    return trainer


def follow(told: dict[str, Any]) -> None:
    """Take part in the training that the first of several processes orders."""
    base = SharedBase.load(ModelSection(**told.pop("model")))
    base.add_role(ROLE, trainable=True)
    _train(base, Plan(**told)._replace(options=told["options"] | {"report_to": "none"}), [])
