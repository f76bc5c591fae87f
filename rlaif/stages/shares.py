"""PPO in several processes: each samples, reads and scores its share of the rows, and all know all of them.

Every process holds the same weights and moments and goes through the same loop. What costs time is shared out by rows:
sampling, forward passes, the reward model, the gradients of a minibatch. What each finds is put together again at once
(`whole`), so everything between, means and whitening, advantages and the price of KL, is computed by each on all rows,
as one process would. Gradients are added up before they are clipped; terms are weighted by their tokens' share in the
whole minibatch, so the sum is the gradient of one process. A row's draws depend on its own seed, so which process has
it changes nothing. A registered function, or the judge, is asked by the first process alone, which alone writes.

Outside of such a training, and in one process, everything here hands on what it is given.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlaif.errors import ConfigError
from rlaif.journal import Journal
from rlaif.launch import leads, process_count
from rlaif.model import sampling
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch, Sample
from rlaif.progress import Progress
from rlaif.recipe import Loaded
from rlaif.stages import processes
from rlaif.stages.run import Run

Given = ParamSpec("Given")
Result = TypeVar("Result")
Item = TypeVar("Item")


class _Now:
    """Whether several processes are in one training now; the stages before and after it are the first one's alone."""

    together = False


def count() -> int:
    """Return how many processes take part in what this one does."""
    return process_count() if _Now.together else 1


# --- taking part -----------------------------------------------------------------------------------------------------


def shared(module: str) -> Callable[[Callable[[Run], Result]], Callable[[Run], Result]]:
    """Let all processes run a stage's function: the first orders the others to call ``follow`` of its module."""

    def decorate(stage: Callable[[Run], Result]) -> Callable[[Run], Result]:
        @functools.wraps(stage)
        def lead(run: Run) -> Result:
            if process_count() == 1:
                return stage(run)
            _refuse_few_rows(run)
            with processes.together():
                processes.order(
                    module, loaded=run.loaded.model_dump(mode="json"), folder=str(run.folder), round=run.round
                )
                return _together(stage, run)

        return lead

    return decorate


def follow(stage: Callable[[Run], Any], told: dict[str, Any]) -> None:
    """Take part in the stage that the first process has ordered; what is written down is written by that one."""
    whole_stage: Callable[[Run], Any] = stage.__wrapped__  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch) / "journal.db") as book:
        run = Run(
            Loaded.model_validate(told["loaded"]), Path(told["folder"]), book, Progress(quiet=True), told["round"]
        )
        _together(whole_stage, run)


def _together(stage: Callable[[Run], Result], run: Run) -> Result:
    _Now.together = True
    try:
        return stage(run)
    finally:
        _Now.together = False


def _refuse_few_rows(run: Run) -> None:
    if run.recipe.ppo.minibatch < process_count():
        raise ConfigError(
            f"ppo.minibatch: {run.recipe.ppo.minibatch} responses cannot be shared out over {process_count()} "
            "processes. Raise it, or launch fewer."
        )


def first_then_others(act: Callable[[], Result]) -> Result:
    """Do something in the first process, then in the others, which find what it left."""
    if leads():
        result = act()
        _meet()
        return result
    _meet()
    return act()


def _meet() -> None:
    if count() > 1:
        processes.add_up(torch.zeros(1))


# --- rows ------------------------------------------------------------------------------------------------------------


def own_rows(rows: int) -> Tensor:
    """Return which of so many rows are this process's, ``[share]``; none where there are fewer than processes."""
    return torch.tensor(own(range(rows)), dtype=torch.long)


def own(items: Sequence[Item]) -> Sequence[Item]:
    """Return what this process computes of a list that all have."""
    return processes.share(items) if count() > 1 else items


def whole(part: Tensor, rows: int) -> Tensor:
    """Return all rows, of which each process has found its own: ``[share, ...]`` to ``[rows, ...]``."""
    if count() == 1:
        return part
    found = torch.zeros(rows, *part.shape[1:], dtype=part.dtype)
    found[own_rows(rows)] = part.cpu()
    return processes.add_up(found).to(part.device)


def sample(
    base: SharedBase, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int], **options: Any
) -> list[Sample]:
    """Draw one response to each prompt with the acting role, as `sampling.sample` does; each process draws its own."""
    mine: list[Sample] = []  # of the reference there may be fewer rows than processes
    if own(prompts):
        mine = sampling.sample(base, own(prompts), max_new_tokens=max_new_tokens, seeds=own(seeds), **options)
    if count() == 1:
        return mine
    return _samples(whole(_table(mine, max_new_tokens), len(prompts)), max_new_tokens)


def samples_of_first(ask: Callable[[], list[Sample]], rows: int, max_new_tokens: int) -> list[Sample]:
    """Return samples that the first process has somebody draw for all; the others do not ask."""
    if count() == 1:
        return ask()
    found = _table(ask() if leads() else [Sample([], [], False)] * rows, max_new_tokens)
    return _samples(processes.add_up(found), max_new_tokens)


def _table(samples: Sequence[Sample], max_new_tokens: int) -> Tensor:
    """Write samples as numbers, ``[rows, 2 * max_new_tokens + 2]``."""
    table = torch.zeros(len(samples), 2 * max_new_tokens + 2, dtype=torch.float64)  # holds ids and fp32 exactly
    for row, one in enumerate(samples):
        length = len(one.ids)
        table[row, :2] = torch.tensor([length, one.ended], dtype=torch.float64)
        table[row, 2 : 2 + length] = torch.tensor(one.ids, dtype=torch.float64)
        table[row, 2 + max_new_tokens : 2 + max_new_tokens + length] = torch.tensor(one.logprobs, dtype=torch.float64)
    return table


def _samples(table: Tensor, max_new_tokens: int) -> list[Sample]:
    return [_sample(values, max_new_tokens) for values in table.tolist()]


def _sample(values: list[float], max_new_tokens: int) -> Sample:
    length, ids, logprobs = int(values[0]), values[2 : 2 + max_new_tokens], values[2 + max_new_tokens :]
    return Sample([int(token) for token in ids[:length]], logprobs[:length], bool(values[1]))


def by_rows(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let each process call a function with its own rows of the `Batch` and of the lists among its arguments.

    The function returns a tensor or a tuple of tensors whose first dimension is the batch's.
    """

    @functools.wraps(function)
    def shared_out(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if count() == 1:
            return function(*args, **kwargs)
        rows = next(len(value.ids) for value in args if isinstance(value, Batch))
        mine: Any = [_own(value, rows) for value in args]
        found: Any = function(*mine, **kwargs)
        together: Any = whole(found, rows) if isinstance(found, Tensor) else tuple(whole(part, rows) for part in found)
        result: Result = together
        return result

    return shared_out


def _own(value: Any, rows: int) -> Any:
    if isinstance(value, Batch):
        return Batch(*(part[own_rows(rows).to(part.device)] for part in value))
    if isinstance(value, list) and len(value) == rows:
        return own(value)
    return value


def from_first(ask: Callable[[], list[float]], rows: int) -> list[float]:
    """Return a number a row that the first process finds for all; the others do not ask."""
    if count() == 1:
        return ask()
    found = torch.tensor(ask(), dtype=torch.float64) if leads() else torch.zeros(rows, dtype=torch.float64)
    numbers: list[float] = processes.add_up(found).tolist()
    return numbers


# --- sums ------------------------------------------------------------------------------------------------------------


def add_gradients(trainable: dict[str, Any]) -> None:
    """Put the sum of all processes' gradients in the place of each one's."""
    if count() == 1:
        return
    gradients = [parameter.grad for group in trainable.values() for parameter in group if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)  # over NCCL between GPUs
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, summed in zip(gradients, parts, strict=True):
        gradient.copy_(summed.view_as(gradient))


def added(totals: dict[str, float]) -> dict[str, float]:
    """Return sums of figures over all processes; all have the same keys in the same order."""
    return totals if count() == 1 else dict(zip(totals, processes.totals(*totals.values()), strict=True))
