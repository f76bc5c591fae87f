"""Several processes of one command, as `accelerate launch` or `torchrun` starts them: the first leads, others follow.

The first process is the run: it reads the recipe, holds the lock, writes and speaks, exactly as if it were alone. The
others read no command line and write nothing. They wait for orders: a stage that trains sends them its rows and
settings (`order`), they load the base, take part in that training (``follow`` of the stage's module), and wait again.
However the first process ends, the others end with its exit code. Losing any process ends all of them.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
import transformers
from accelerate.data_loader import BatchSamplerShard
from pydantic import BaseModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer

from rlaif.errors import ConfigError, RlaifError, StageError
from rlaif.launch import leads, process_count, process_rank
from rlaif.model.base import default_device

TRAIN_TOGETHER = (
    "sft",
    "reward",
    "rejection",
    "ppo",
)  # the stages that several processes share; the first one does all others alone
_PATIENCE = timedelta(days=365)  # followers wait while the first process labels, or trains alone
_GRACE_SECONDS = 5.0
_END = "rlaif/end/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
_REFUSED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}

Row = TypeVar("Row")


class _Joined(NamedTuple):
    group: Any  # over gloo, whatever the training itself uses, and patient
    store: Any  # a `TCPStore`: a connection of its own, since waiting on one blocks all who use it


@functools.cache
def _join() -> _Joined:
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    return _Joined(dist.new_group(backend="gloo", timeout=_PATIENCE), store)


def lead_or_follow(main: Callable[[], None]) -> None:
    """Run a command in the first process and follow it in the others, each of which ends with its exit code."""
    if not leads():
        _follow()
    code = 1
    try:
        _join()
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        _announce(code)


def _announce(code: int) -> None:
    """Tell the others how this process ends, and wait until they know."""
    store = _join().store
    with suppress(dist.DistError):
        store.set(_END, str(code))
        store.wait([f"{_END}/{rank}" for rank in range(1, process_count())], timedelta(seconds=_GRACE_SECONDS))


def _follow() -> NoReturn:
    """Do what the first process orders until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one answers it
    warnings.simplefilter("ignore")  # the first process is given the same ones
    transformers.logging.set_verbosity_error()
    threading.Thread(target=_end_with_the_first, args=(_join().store,), daemon=True).start()
    try:
        while True:
            order = _receive()
            importlib.import_module(f"rlaif.stages.{order.pop('module')}").follow(order)
    except RlaifError as problem:
        _leave(f"rlaif: process {process_rank()}: {problem}", 2)
    except RuntimeError as problem:
        if not _is_loss(problem):
            raise
        time.sleep(_GRACE_SECONDS)  # the thread ends this process within it, if the first one said how it ended
        _leave(f"rlaif: process {process_rank()}: another process of this run was killed. Run the command again.", 2)


def _end_with_the_first(store: Any) -> None:
    """End this process, whatever it is doing, as soon as the first one says that it ends."""
    try:
        store.wait([_END], _PATIENCE)
        code = int(store.get(_END))
        store.set(f"{_END}/{process_rank()}", "")
    except RuntimeError:  # the store went with the first process
        _leave(f"rlaif: process {process_rank()}: the first process was killed. Run the command again.", 2)
    os._exit(code)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _is_loss(problem: RuntimeError) -> bool:
    """Tell whether a collective failed because another process is gone; gloo says so in words only."""
    return isinstance(problem, dist.DistError) or "gloo" in str(problem)


@contextmanager
def together() -> Iterator[None]:
    """Train with the other processes, in the first one.

    Raises:
        StageError: another process ended meanwhile.
    """
    try:
        yield
    except RuntimeError as problem:
        if process_count() == 1 or not _is_loss(problem):
            raise
        raise StageError(
            "another process of this training has ended; it has said why, unless it was killed. Run the command again: "
            "training goes on from its newest complete checkpoint."
        ) from None


def refuse_unsupported(stages: Sequence[str] = ()) -> None:
    """Refuse what `accelerate` can be configured to do and this package, or one of these stages, cannot.

    Raises:
        ConfigError: FSDP or DeepSpeed is switched on, or `dpo` would run in several processes.
    """
    if "dpo" in stages and process_count() > 1:
        raise ConfigError(
            f"dpo: trains in one process, and this command was launched in {process_count()}. Launch the stages before "
            "it with `--until` the last one of them, then run the same command without the launcher."
        )
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{name}: not supported; every process holds the whole base, which is frozen and may have 4 bits. "
                f"Launch with plain data parallelism (`accelerate launch --multi_gpu`), without {name}; for a base "
                "that fits no GPU, `rlaif export` writes PPO for verl or OpenRLHF."
            )


# --- orders ----------------------------------------------------------------------------------------------------------


def order(module: str, **content: Any) -> None:
    """Let other processes, if there are any, call ``rlaif.stages.MODULE.follow`` with values that JSON can hold.

    A recipe's sections among them arrive as what `model_dump` gives.
    """
    if process_count() > 1:
        data = json.dumps({"module": module, **content}, default=BaseModel.model_dump).encode()
        group = _join().group
        dist.broadcast(torch.tensor([len(data)]), 0, group=group)
        dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=group)


def _receive() -> dict[str, Any]:
    group, size = _join().group, torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0, group=group)
    found: dict[str, Any] = json.loads(data.numpy().tobytes())
    return found


# --- training --------------------------------------------------------------------------------------------------------


def share(rows: Sequence[Row]) -> Sequence[Row]:
    """Return what this process computes of a batch that all have; none where a batch has fewer rows than processes."""
    return rows[process_rank() :: process_count()]


def totals(*numbers: float) -> list[float]:
    """Add numbers up over all processes, in fp64."""
    result: list[float] = add_up(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return result


def add_up(found: torch.Tensor) -> torch.Tensor:
    """Add a tensor on the CPU up over all processes, in place, however long one of them is waited for."""
    if process_count() > 1:
        dist.all_reduce(found, group=_join().group)
    return found


def options() -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` for training in several processes; none for one."""
    if process_count() == 1:
        return {}
    # Only the acting role's parameters are trainable, and every batch uses all of them.
    return {"ddp_find_unused_parameters": False, "use_cpu": default_device().type == "cpu"}


def exchange_trainable(module: nn.Module) -> None:
    """Let processes exchange what is trained and nothing else: each has loaded the frozen base by itself."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, frozen + buffers)


class SharingTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` whose processes all draw the same whole batches, of which each computes its `share`.

    `accelerate` would give each its own batches and fill up the last ones with rows that stand twice. The first process
    alone writes checkpoints; nothing random happens in a training step, so the others have no states to keep.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return whole batches."""
        return _whole(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return all held-out rows: every process measures them."""
        return _whole(super().get_eval_dataloader(eval_dataset))

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)


def _whole(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let the sampler that `accelerate` put around another one pass its batches on."""
    sampler = loader.batch_sampler
    if isinstance(sampler, BatchSamplerShard):
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader
