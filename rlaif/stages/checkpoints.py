"""PPO's checkpoints: weights and moments as safetensors, counters as JSON, nothing pickled.

Everything random in PPO is a function of (seed, update), so there are no random states to keep: a run stopped after an
update and resumed is the run that was not stopped.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlaif import files
from rlaif.launch import leads
from rlaif.maths.kl import AdaptiveKl, FixedKl
from rlaif.model.roles import SharedBase
from rlaif.records import read_jsonl
from rlaif.stages.run import Run
from rlaif.stages.training import CHECKPOINTS, close_checkpoint, resume_point, step_of

STAGE = "ppo"
POLICY, CRITIC, COST_CRITIC = "policy", "critic", "cost_critic"
SAMPLES = "samples.jsonl"
_KEPT = 2
Kl = AdaptiveKl | FixedKl


class Stateful(Protocol):
    """What is neither weights nor moments, and changes from update to update."""

    def state_dict(self) -> dict[str, Any]:
        """Return its numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from them."""


def save(
    run: Run,
    base: SharedBase,
    optimizer: torch.optim.Optimizer,
    kl: Kl,
    update: int,
    scale: dict[str, Any],
    constraint: Stateful | None = None,
) -> None:
    """Write a checkpoint after an update and drop all but the newest two."""
    if not leads():
        return
    parent = run.stage_folder(STAGE) / CHECKPOINTS
    tensors: dict[str, Tensor] = {}
    for role in (POLICY, CRITIC, COST_CRITIC):
        for name, parameter in base.named_parameters_of(role):
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    with files.fresh_folder(parent / f"checkpoint-{update}") as fresh:
        save_file(tensors, fresh / "state.safetensors")
        counters = {"update": update, "kl": kl.state_dict(), "scale": scale}
        if constraint:
            counters["constraint"] = constraint.state_dict()
        (fresh / "counters.json").write_text(json.dumps(counters))
        close_checkpoint(fresh, parent.parent)
    for old in sorted(parent.glob("checkpoint-*"), key=step_of)[:-_KEPT]:
        files.remove_folder(old)


def restore(
    run: Run, base: SharedBase, optimizer: torch.optim.Optimizer, kl: Kl, constraint: Stateful | None = None
) -> tuple[int, dict[str, Any]]:
    """Load the newest complete checkpoint, if there is one; return how many updates are done and the reward's scale."""
    folder = run.stage_folder(STAGE)
    if leads():
        checkpoint = resume_point(run, folder, measured_at_end=False)
        _cut_samples(folder / SAMPLES, step_of(checkpoint))
    else:  # the first process has cleared away what is not complete
        newest = files.newest_complete(folder / CHECKPOINTS, "checkpoint-*")
        checkpoint = str(newest) if newest else None
    if checkpoint is None:
        return 0, {}
    tensors = load_file(Path(checkpoint) / "state.safetensors", device=str(base.device))
    for role in (POLICY, CRITIC, COST_CRITIC):
        for name, parameter in base.named_parameters_of(role):
            with torch.no_grad():
                parameter.copy_(tensors.pop(f"weight/{name}"))
            if f"step/{name}" in tensors:  # absent for a parameter that never had a gradient
                moments = {key: tensors.pop(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": tensors.pop(f"step/{name}").cpu(), **moments}
    counters = json.loads((Path(checkpoint) / "counters.json").read_text(encoding="utf-8"))
    kl.load_state_dict(counters["kl"])
    if constraint:
        constraint.load_state_dict(counters["constraint"])
    return int(counters["update"]), counters["scale"]


def _cut_samples(samples: Path, step: int) -> None:
    """Keep the samples up to a step."""
    kept: list[dict[str, Any]] = []
    if step and samples.exists():
        files.repair_jsonl(samples)
        kept = [row for _, row in read_jsonl(samples) if row["step"] <= step]
    files.write_jsonl(samples, kept)
