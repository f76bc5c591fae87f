"""Stage `reward`: a LoRA adapter and an fp32 scalar head on the shared base, trained on comparisons.

Loss: Bradley-Terry with soft labels and an optional margin (Bai et al. 2022, section 4; Llama-2, arXiv 2307.09288,
section 3.2.2), plus a small penalty that keeps scores centred (Eisenstein et al. 2023, arXiv 2312.09244). The score is
read at the last token of the answer.

Writes ``adapter/`` (PEFT, sequence classification), ``metrics.jsonl`` and ``evaluation.json``: accuracy on held-out
pairs for each tag beside trivial baselines, and the shift and scale that `ppo` applies.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from rlaif import files, filters
from rlaif.errors import DataError
from rlaif.maths import agreement
from rlaif.maths.losses import bradley_terry, centering_penalty
from rlaif.model.groups import Group, score_groups
from rlaif.model.roles import SharedBase
from rlaif.records import Comparison, read_rows, text_of
from rlaif.stages.run import Run
from rlaif.stages.training import Recorder, arguments, resume_point, step_of, steps_of, train_to

NAME = "reward"
ROLE = "reward"
_STATE = "role.safetensors"


class Split(NamedTuple):
    """Comparisons to train on and to measure with."""

    train: list[Comparison]
    heldout: list[Comparison]


class PairScorer(nn.Module):
    """The shared base as a module that `Trainer` can hold; scores the responses of groups."""

    def __init__(self, base: SharedBase):
        super().__init__()
        self.lm, self.heads = base.lm, base.heads
        self._base = [base]  # in a list, so that it is not taken for a submodule

    @property
    def base(self) -> SharedBase:
        """The shared base."""
        return self._base[0]

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """Return the score of each response, in the groups' order."""
        return score_groups(self.base, ROLE, groups)


class RewardTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` with the preference loss; its checkpoints hold the reward role alone."""

    def __init__(self, *args: Any, centering: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._centering = centering
        self._seen: list[tuple[float, float]] = []

    def compute_loss(self, model: PairScorer, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean loss of a batch of pairs."""
        scores = model(inputs["groups"])
        chosen, rejected = sides(scores)
        loss = bradley_terry(chosen, rejected, inputs["preference"], inputs["margin"])
        loss = loss + self._centering * centering_penalty(chosen, rejected)
        gap = (chosen - rejected).detach()
        self._seen.append(((gap > 0).float().mean().item(), gap.mean().item()))
        return (loss.mean(), {"scores": scores}) if return_outputs else loss.mean()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy and margin on the training pairs since the last entry."""
        if self._seen and "loss" in logs:
            accuracy, margin = (sum(column) / len(self._seen) for column in zip(*self._seen, strict=True))
            logs = {**logs, "accuracy": accuracy, "margin": margin}
            self._seen = []
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.detach().cpu().contiguous() for name, p in self.model.base.named_parameters_of(ROLE)}
        save_file(state, folder / _STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / _STATE)
        with torch.no_grad():
            for name, parameter in self.model.base.named_parameters_of(ROLE):
                parameter.copy_(state[name])


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    path = run.stage_folder("label") / "comparisons.jsonl"
    start = starting_adapter(run)
    return run.inputs(run.recipe.reward, files={"comparisons": path} | ({"sft": start} if start else {}))


def starting_adapter(run: Run) -> Path | None:
    """Return the adapter that training starts from: SFT's (Ouyang et al. 2022, section 3.5), if the recipe has one."""
    wanted = run.recipe.reward.start_from == "sft" and "sft" in run.recipe.stages
    return run.stage_folder("sft") / "adapter" if wanted else None


def reward(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings, folder = run.recipe.reward, run.stage_folder(NAME)
    comparisons = read_rows(run.output("label", "comparisons.jsonl"), Comparison)
    base = run.load_base()
    start = run.output("sft", "adapter") if starting_adapter(run) else None
    base.add_role(ROLE, trainable=True, head=True, adapter=start)
    head = dict(base.named_parameters_of(ROLE))[f"heads.{ROLE}.weight"]
    nn.init.normal_(head, std=(base.hidden_size + 1) ** -0.5)  # Huang et al. 2024, detail 11
    fitting = [row for row in comparisons if _length(base, row) <= min(settings.max_length, base.max_length)]
    split = split_pairs(fitting, settings.heldout_fraction)
    decided = [row for row in split.heldout if row.preference > 0.5]
    if not split.train or not decided:
        raise DataError(
            f"{folder}: {len(comparisons)} comparisons, {len(fitting)} of them short enough, give {len(split.train)} "
            f"to train on and {len(decided)} to measure with that prefer one answer; both need some. Label more, or "
            "raise reward.max_length or reward.heldout_fraction."
        )
    steps = steps_of(settings, len(split.train))
    checkpoint = resume_point(run, folder)
    with run.progress.task("training", steps - step_of(checkpoint)) as task, base.acting_as(ROLE, training=True):
        trainer = RewardTrainer(
            model=PairScorer(base),
            args=TrainingArguments(**arguments(run, settings, folder)),
            train_dataset=Dataset.from_list([encode(base, row) for row in split.train]),
            data_collator=lambda rows: collate(base, rows),
            callbacks=[Recorder(folder, NAME, task)],
            centering=settings.center_rewards_coefficient,
        )
        trainer.remove_callback(PrinterCallback)
        train_to(trainer, checkpoint, steps)
    base.save_role(ROLE, folder / "adapter")
    result = evaluate(base, split, settings.microbatch)
    result |= {"min_heldout_accuracy": settings.min_heldout_accuracy, "train_pairs": len(split.train)}
    files.write_json(folder / "evaluation.json", result)
    return {
        "comparisons": len(comparisons),
        "too_long": len(comparisons) - len(fitting),
        "train": len(split.train),
        "heldout": len(split.heldout),
        "steps": steps,
        "heldout_accuracy": result["heldout"]["all"]["rate"],
    }


def encode(base: SharedBase, row: Comparison) -> dict[str, Any]:
    """Encode a comparison: ids of the prompt and of both answers, each closed by the end of a turn."""
    tokenizer = base.tokenizer
    return {
        "prompt": tokenizer.prompt(row.prompt),
        "chosen": tokenizer.response(text_of(row.chosen)),
        "rejected": tokenizer.response(text_of(row.rejected)),
        "preference": row.preference,
        "margin": row.margin or 0.0,
    }


def collate(base: SharedBase, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a group of each pair: its prompt with the chosen and the rejected answer."""
    return {
        "groups": [Group(row["prompt"], (row["chosen"], row["rejected"])) for row in rows],
        "preference": torch.tensor([row["preference"] for row in rows], device=base.device),
        "margin": torch.tensor([row["margin"] for row in rows], device=base.device),
    }


def sides(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores ``[B, ...]`` of the chosen and of the rejected answers, from those of groups of two."""
    chosen, rejected = scores.view(-1, 2, *scores.shape[1:]).unbind(1)
    return chosen, rejected


def split_pairs(rows: Sequence[Comparison], fraction: float) -> Split:
    """Hold out pairs by prompt, for each tag: those marked ``eval``, else a share chosen by a hash of the prompt.

    All pairs of a prompt stand on one side, whatever their tags and marks: measured is what was never trained on.
    """
    out: set[str] = set()
    for tag in sorted({row.tag for row in rows}):
        group = [row for row in rows if row.tag == tag]
        marked = {_prompt_key(row) for row in group if row.split == "eval"}
        prompts = sorted({_prompt_key(row) for row in group})
        out |= marked or set(prompts[: math.ceil(fraction * len(prompts))])
    ordered = sorted(rows, key=lambda row: row.tag)  # stable: within a tag as in the file
    train = [row for row in ordered if _prompt_key(row) not in out]
    return Split(train, [row for row in ordered if _prompt_key(row) in out])


def _prompt_key(row: Comparison) -> str:
    return hashlib.sha256(repr(row.prompt).encode()).hexdigest()


def _length(base: SharedBase, row: Comparison) -> int:
    pair = encode(base, row)
    return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))


@torch.no_grad()
def evaluate(base: SharedBase, split: Split, microbatch: int) -> dict[str, Any]:
    """Measure the reward role on held-out pairs, beside rules that need no model."""
    rows = split.heldout
    gaps: list[float] = []
    scores: list[float] = []
    for start in range(0, len(rows), microbatch):
        batch = collate(base, [encode(base, row) for row in rows[start : start + microbatch]])
        with base.acting_as(ROLE):
            values = score_groups(base, ROLE, batch["groups"])
        chosen, rejected = sides(values)
        gaps += (chosen - rejected).tolist()
        scores += values.tolist()
    decided = [index for index, row in enumerate(rows) if row.preference > 0.5]
    tags = sorted({rows[index].tag for index in decided if rows[index].tag})
    gap = torch.tensor(gaps)
    preference = torch.tensor([row.preference for row in rows])
    values = torch.tensor(scores)
    return {
        "heldout": {"all": _rate([gaps[i] > 0 for i in decided])}
        | {tag: _rate([gaps[i] > 0 for i in decided if rows[i].tag == tag]) for tag in tags},
        "nll": bradley_terry(gap, torch.zeros_like(gap), preference).mean().item(),
        "baselines": baselines([rows[index] for index in decided]),
        "heldout_pairs": len(rows),
        "offset": values.mean().item(),
        "scale": max(values.std(correction=0).item(), 1e-6),
    }


def baselines(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Return the accuracy of rules that look at length or at refusal words only; a tie counts as half right."""

    def accuracy(feature: Any) -> dict[str, Any]:
        pairs = [(feature(text_of(row.chosen)), feature(text_of(row.rejected))) for row in rows]
        wins = sum(chosen > rejected for chosen, rejected in pairs)
        return agreement.win_rate(wins, sum(a == b for a, b in pairs), len(pairs))._asdict()

    return {
        "longer": accuracy(len),
        "shorter": accuracy(lambda text: -len(text)),
        "refusal_words": accuracy(filters.is_refusal),
    }


def _rate(right: Sequence[bool]) -> dict[str, Any]:
    return agreement.wilson(sum(right), len(right))._asdict()
