"""Stage `dpo`: direct preference optimization of the policy adapter on the comparisons, with TRL's `DPOTrainer`.

The loss of a pair is -log sigmoid(beta x (log-ratio of chosen - log-ratio of rejected)), with log-ratios of policy to
reference summed over an answer's tokens (Rafailov et al. 2023, arXiv 2305.18290, equation 7), or what `loss_type`
names. It takes hard labels: ties, and rows whose labeller is less sure than the recipe wants, are left out and counted.

The policy starts as the SFT adapter, which is the reference as well. So the reference's log-probabilities are those of
the policy before its first step: they are computed once and written down, and no second adapter is kept in memory. In a
later round the policy starts as the one that was kept; the reference is the same as ever.

Writes ``policy/`` (a plain PEFT folder), ``metrics.jsonl``, ``reference.jsonl`` (the log-probabilities of both answers
under the reference) and ``unused.jsonl`` (rows left out, with the reason).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from rlaif import files
from rlaif.errors import DataError
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.policy_sections import DpoSection
from rlaif.records import Comparison, read_jsonl, read_rows, text_of
from rlaif.stages.cards import write_policy_card
from rlaif.stages.gate import first_policy, starting_policy
from rlaif.stages.replay import known_sides, replayed
from rlaif.stages.reward_data import NOTHING_KNOWN, split_rows, usable
from rlaif.stages.run import Run
from rlaif.stages.training import (
    Recorder,
    arguments,
    last_metrics,
    load_state,
    make_ready,
    resume_point,
    save_state,
    step_of,
    steps_of,
    train_to,
)

NAME = "dpo"
ROLE = "policy"
COMPARISONS, REFERENCE = "comparisons.jsonl", "reference.jsonl"
REFERENCE_ROLE = "reference"
TIE, UNSURE = "tie", "below min preference"


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    paths = {"comparisons": run.stage_folder("label") / COMPARISONS}
    earlier = {f"comparisons.{before.round}": before.stage_folder("label") / COMPARISONS for before in run.earlier}
    return run.inputs(
        run.recipe.dpo,
        files=paths
        | {"sft": run.stage_folder("sft") / "adapter"}
        | starting_policy(run, NAME).as_input("start")
        | earlier,
        **({"replay": run.recipe.rounds.replay} if earlier else {}),
    )


def dpo(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest.

    Raises:
        DataError: no comparison is left to train on.
    """
    settings, folder = run.recipe.dpo, run.stage_folder(NAME)
    rows, again, known = read_rows(run.output("label", COMPARISONS), Comparison), [], NOTHING_KNOWN
    base = run.load_base()
    base.add_role(ROLE, trainable=True, adapter=starting_policy(run, NAME).found(run))
    if run.round > 1:
        before = [read_rows(one.output("label", COMPARISONS), Comparison) for one in run.earlier]
        earlier = [_decided(base, part, settings)[0] for part in before]
        again, known = replayed(run, earlier, rows), known_sides(earlier, settings.heldout_fraction)
    pairs, unused = _decided(base, [*rows, *again], settings)
    files.write_jsonl(folder / "unused.jsonl", unused)
    sides = split_rows(pairs, settings.heldout_fraction, known=known)
    reasons = Counter(row["reason"] for row in unused)
    if not sides.train:
        told = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "none left out"
        raise DataError(
            f"{folder}: no comparison is left to train on; of {len(rows)} rows {len(unused)} are left out ({told}) and "
            f"{len(sides.heldout)} are held out. Lower dpo.min_preference or dpo.heldout_fraction, raise "
            "dpo.max_length, or label more."
        )
    examples = _examples(run, base, pairs)
    train, heldout = ([examples[row.id] for row in part] for part in (sides.train, sides.heldout))
    steps = steps_of(settings, len(train), 1)
    checkpoint = resume_point(run, folder)
    with run.progress.task("training", steps - step_of(checkpoint)) as task:
        plan = Plan(train, heldout, _options(run), checkpoint, steps)
        _train(base, plan, [Recorder(folder, NAME, task)])
    base.save_role(ROLE, folder / "policy")
    last = last_metrics(folder)
    measured = {key: last.get(f"dpo/{key}") for key in ("heldout_loss", "heldout_accuracy", "heldout_reward_margin")}
    facts = [f"DPO (`{settings.loss_type}`, beta {settings.beta:g}) on {len(train)} comparisons in {steps} steps."]
    if heldout:
        share = f"{measured['heldout_accuracy']:.1%} of {len(heldout)} held-out comparisons"
        facts.append(f"The implicit reward, beta times the log-ratio to the reference, orders {share} as labelled.")
    write_policy_card(run, base, folder / "policy", facts)
    return {
        "comparisons": len(rows),
        **({"replayed": len(again)} if run.round > 1 else {}),
        **{f"unused_{reason.replace(' ', '_')}": count for reason, count in sorted(reasons.items())},
        "train": len(train),
        "heldout": len(heldout),
        "steps": steps,
        **measured,
    }


def _decided(
    base: SharedBase, rows: Sequence[Comparison], settings: DpoSection
) -> tuple[list[Comparison], list[dict[str, str]]]:
    """Return the comparisons that prefer one answer clearly enough, and the others with the reason."""
    found = usable(base, rows, settings.max_length, {})
    kept: list[Comparison] = []
    unused = list(found.unused)
    for row in found.rows:
        assert isinstance(row, Comparison)
        reason = TIE if row.preference == 0.5 else UNSURE if row.preference < settings.min_preference else None
        if reason:
            unused.append({"id": row.id, "reason": reason})
        else:
            kept.append(row)
    return kept, unused


def _examples(run: Run, base: SharedBase, rows: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Return each row by its id as `DPOTrainer` reads it: token ids, and what the reference says of both answers."""
    tokenizer = base.tokenizer
    encoded = {
        row.id: {
            "prompt_ids": tokenizer.prompt(row.prompt),
            "chosen_ids": tokenizer.response(text_of(row.chosen)),
            "rejected_ids": tokenizer.response(text_of(row.rejected)),
        }
        for row in rows
    }
    path = run.stage_folder(NAME) / REFERENCE
    if not path.is_file():  # else of this very run: other inputs would have emptied the stage's folder
        files.write_jsonl(path, _reference_logprobs(run, base, encoded))
    known = {row.pop("id"): row for _, row in read_jsonl(path)}
    return {name: example | known[name] for name, example in encoded.items()}


@torch.no_grad()
def _reference_logprobs(run: Run, base: SharedBase, encoded: dict[str, dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Return the log-probability of each whole answer under the reference, which the policy starts as in round 1."""
    role = ROLE
    if not starting_policy(run, NAME).is_first:
        first = first_policy(run).found(run)
        role = REFERENCE_ROLE if first else BASE
        if first:
            base.add_role(role, adapter=first)
    names = list(encoded)
    found: dict[str, dict[str, Any]] = {}
    lengths = [sum(map(len, encoded[name].values())) for name in names]
    with run.progress.task("reference", len(names)) as task:
        for indices in sampling.batches_by_length(lengths, run.recipe.dpo.microbatch):
            part = [(names[index], encoded[names[index]]) for index in indices]
            for side in ("chosen", "rejected"):
                batch = sampling.pack(base, [e["prompt_ids"] for _, e in part], [e[f"{side}_ids"] for _, e in part])
                with base.acting_as(role):
                    values = sampling.response_logprobs(base, batch)
                for (name, _), value in zip(part, values.tolist(), strict=True):
                    found.setdefault(name, {"id": name})[f"ref_{side}_logps"] = value
            task.advance(len(part))
    return [found[name] for name in names]


class Plan(NamedTuple):
    """A training: rows as `DPOTrainer` reads them, arguments of `DPOConfig`, where from and how far."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    options: dict[str, Any]
    checkpoint: str | None
    steps: int


def _options(run: Run) -> dict[str, Any]:
    settings = run.recipe.dpo
    own = {
        "beta": settings.beta,
        "loss_type": settings.loss_type,
        "label_smoothing": settings.label_smoothing,
        "max_length": None,  # longer rows are left out already
        "precompute_ref_log_probs": True,
        "eval_strategy": "no",
    }
    return arguments(run, settings, run.stage_folder(NAME)) | own


class _Trainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are encoded and know the reference; its checkpoints hold the role alone."""

    def __init__(self, base: SharedBase, **options: Any):
        self._base = base
        self._sizes: dict[str, list[int]] = {"train": [], "eval": []}
        super().__init__(model=base.lm, **options)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, and note how many pairs it has."""
        self._sizes["train" if model.training else "eval"].append(len(inputs["input_ids"]) // 2)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log means over pairs; TRL's are over batches, of which the last one may be short."""
        mode = "train" if self.model.training else "eval"
        sizes, self._sizes[mode] = self._sizes[mode], []
        for key, values in self._metrics[mode].items():
            if len(values) == len(sizes):
                self._metrics[mode][key] = [sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)]
        super().log(logs, *args)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_state(self._base, ROLE, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self._base, ROLE, Path(resume_from_checkpoint))


def _train(base: SharedBase, plan: Plan, callbacks: list[TrainerCallback]) -> None:
    """Train the role from the beginning or from a checkpoint, measuring held-out pairs before and after."""
    with base.acting_as(ROLE, training=True):
        trainer = _trainer(base, plan, callbacks)
        if plan.checkpoint is None and plan.heldout:
            trainer.evaluate()
        train_to(trainer, plan.checkpoint, plan.steps)
        if plan.heldout:
            trainer.evaluate()


def _trainer(base: SharedBase, plan: Plan, callbacks: list[TrainerCallback]) -> DPOTrainer:
    disable_progress_bars()
    # `DPOTrainer` copies the adapter of a `PeftModel` behind the back of `base`; it is given the model in which the
    # adapters stand, and `Trainer` wants to be told of them before it trains a quantized one.
    base.lm._hf_peft_config_loaded = True
    trainer = _Trainer(
        base,
        args=DPOConfig(**plan.options),
        train_dataset=Dataset.from_list(plan.train),
        eval_dataset=Dataset.from_list(plan.heldout) if plan.heldout else None,
        processing_class=base.tokenizer.raw,
        callbacks=callbacks,
    )
    make_ready(trainer, base, ROLE)
    return trainer
