"""Ray Data as an engine: workers on many machines, each with a copy of the recipe's model, answer batches.

The driver makes a dataset with one row for each batch, maps it over a pool of workers and hands over every row when it
is finished, in any order. `ask` commits it to the journal, which alone says what has been answered: Ray keeps no
checkpoint, and a killed run asks again what was under way. Inside of a worker the local engine answers.

Rows hold JSON, so what travels between machines are texts and numbers; Ray moves them in its own format. A worker
raises nothing that it can put into words: a question that cannot be answered is an `Answer` with an error, and what
stops the run is a row as well. A worker that dies is started again, `RESTARTS` times at most, and asked again.
"""

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from rlaif.engines.engine import Answered, Question
from rlaif.engines.local import ROUNDS, batched
from rlaif.engines.workers import Worker, packed, unpacked
from rlaif.errors import ConfigError, EngineError
from rlaif.model.base import compute_dtype, identity_of, resolve
from rlaif.recipe import ModelSection, RaySection

RESTARTS = 3  # of one worker; a batch that kills every worker must end the run, and not go round for ever
_SPARE_CPUS = 2  # of a cluster that is started here: workers that hold all CPUs starve whoever feeds them
_STORE_BYTES = 256 << 20  # of texts in shared memory; Ray writes more than that to its folder
_SILENT = logging.CRITICAL + 1
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
Row = dict[str, Any]


class Rows(Protocol):
    """Whatever lets workers answer rows."""

    def rows(self, rows: Sequence[Row], task: str) -> Iterator[Row]:
        """Return a row with the key `result` for each row with the key `questions`, as soon as it is finished."""
        ...


class RayEngine:
    """Answers with the recipe's model in workers of a Ray cluster.

    Args:
        model: the recipe's model.
        cluster: where the workers are.
        kind: what a worker computes on, ``cpu`` or ``cuda``.
        batch_size: conversations in one forward pass; a batch has as many as the local engine's.
        fetch: whether the model's configuration may be fetched.
    """

    def __init__(self, model: ModelSection, cluster: Rows, *, kind: str, batch_size: int, fetch: bool = True):
        self._model, self._cluster, self._kind, self._batch_size = model, cluster, kind, batch_size
        self._fetch = fetch

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model, its precision and the kind of device; neither the cluster nor how many workers it has.

        Raises:
            ModelError: there is no such model.
            DeviceError: a precision that such a device cannot use.
        """
        return identity_of(self._model, self._kind, fetch=self._fetch) | {"adapter": "", "device": self._kind}

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Group questions of the same kind and settings by their number of characters; no model is read for it."""

        def characters(question: Question) -> int:
            return sum(len(message["content"]) for message in question.messages)

        return batched(questions, characters, ROUNDS * self._batch_size)

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        """Answer batches; each comes when it is finished.

        Raises:
            EngineError: there is no cluster, or a worker failed. What came before has been handed over.
        """
        rows = [{"number": number, "questions": packed(batch)} for number, batch in enumerate(batches)]
        if not rows:
            return
        folder = Path(self._model.model_name_or_path).is_dir()
        name = resolve(self._model.model_name_or_path) if folder else self._model.model_name_or_path
        task = {
            "model": self._model.model_dump() | {"model_name_or_path": name},
            "identity": self.identity,
            "batch_size": self._batch_size,
        }
        for row in self._cluster.rows(rows, json.dumps(task)):
            batch = batches[int(row["number"])]
            yield list(zip(batch, unpacked(row["result"]), strict=True))


# --- the cluster --------------------------------------------------------------------------------------------------


def require(model: ModelSection, settings: RaySection) -> None:
    """Look whether Ray Data is installed, and whether workers can compute as the recipe says.

    Raises:
        ConfigError: it is not installed.
        DeviceError: they cannot.
    """
    compute_dtype(model.dtype, torch.device(settings.kind))
    if not all(importlib.util.find_spec(name) for name in ("ray", "pyarrow", "pandas")):
        raise ConfigError(
            "the recipe names the engine `ray`, and Ray Data is not installed. Install it here and on every machine of "
            "the cluster: pip install 'rlaif-toolkit[ray]'"
        )


class Cluster:
    """A Ray cluster: one that is there, or one that is started on this machine and stopped again.

    Args:
        settings: the recipe's section `ray`.
        say: takes the lines that a user should see.
    """

    def __init__(self, settings: RaySection, say: Callable[[str], None] = lambda line: None):
        self._settings, self._say = settings, say
        self._ours = self._told = False
        self._folder: str | None = None

    def rows(self, rows: Sequence[Row], task: str) -> Iterator[Row]:
        """Let workers answer rows; see `Rows`.

        Raises:
            EngineError: no cluster, no room in it, or a worker failed.
        """
        data, settings = self._connect(), self._settings
        workers = min(settings.workers, len(rows), self._room())
        with warnings.catch_warnings():
            # Ray Data 2.60 warns of every option of an actor, and names no other way to limit how often one restarts.
            warnings.simplefilter("ignore")
            dataset = data.from_items(list(rows), override_num_blocks=len(rows)).map_batches(
                Worker,
                fn_constructor_args=(task,),
                batch_size=1,
                batch_format="numpy",
                compute=data.ActorPoolStrategy(size=workers),
                num_cpus=settings.cpus_per_worker,
                num_gpus=settings.gpus_per_worker,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        ray = importlib.import_module("ray")
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for number, result in zip(batch["number"], batch["result"], strict=True):
                    yield {"number": int(number), "result": str(result)}
        except ray.exceptions.RayError as problem:
            raise EngineError(f"engine `ray`: {_words(problem)}") from None

    def stop(self) -> None:
        """Leave the cluster; stop it, if it was started here."""
        if self._ours:
            importlib.import_module("ray").shutdown()
            self._ours = False
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _connect(self) -> Any:
        """Connect, if that has not been done, and return the package `ray.data`."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray, data = importlib.import_module("ray"), importlib.import_module("ray.data")
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(_SILENT)
        data.DataContext.get_current().enable_progress_bars = False
        if ray.is_initialized():
            return data
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        address = self._settings.address
        if address is None:
            self._folder = tempfile.mkdtemp(prefix="rlaif-ray-")
            options |= {
                "include_dashboard": False,
                "num_cpus": math.ceil(self._settings.workers * self._settings.cpus_per_worker) + _SPARE_CPUS,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": self._folder,  # nobody else can read it, and it is removed
            }
        self._ours = True
        try:
            if address and address != "auto":  # Ray itself would try for many minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            with _stderr_aside():
                ray.init(address=address or "local", **options)
        except (OSError, OverflowError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as problem:
            self.stop()
            raise EngineError(self._unreachable(problem)) from None
        return data

    def _room(self) -> int:
        """Return for how many workers the cluster has room, and say where it is fewer than wanted.

        Raises:
            EngineError: there is no room for a single one.
        """
        settings = self._settings
        nodes = [node["Resources"] for node in importlib.import_module("ray").nodes() if node["Alive"]]
        room = 0
        for node in nodes:
            by_cpu = node.get("CPU", 0) // settings.cpus_per_worker
            by_gpu = node.get("GPU", 0) // settings.gpus_per_worker if settings.gpus_per_worker else by_cpu
            room += int(min(by_cpu, by_gpu))
        wish = f"{settings.cpus_per_worker} CPUs and {settings.gpus_per_worker:g} GPUs"
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        if not room:
            raise EngineError(
                f"engine `ray`: a worker needs {wish}, and no machine of the cluster has them ({have}). Lower "
                "ray.cpus_per_worker or ray.gpus_per_worker, or add machines; then run again."
            )
        if room < settings.workers and not self._told:
            self._told = True
            self._say(f"  engine `ray`: room for {room} of {settings.workers} workers ({wish} each; there are {have}).")
        return room

    def _unreachable(self, problem: Exception) -> str:
        reason = " ".join(str(problem).split())[:300].rstrip(".") or type(problem).__name__
        if self._settings.address is None:
            return f"engine `ray`: no cluster can be started on this machine: {reason}."
        return (
            f"engine `ray`: no cluster at ray.address `{self._settings.address}`: {reason}. Start one with `ray start "
            "--head` (one that asks for a token needs RAY_AUTH_MODE=token), or leave ray.address out for a cluster on "
            "this machine; then run again."
        )


@contextmanager
def _stderr_aside() -> Iterator[None]:
    """Let nothing through that Ray's own code writes before it knows how much it shall say."""
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def _words(problem: Exception) -> str:
    """Return what happened to a worker, without any text that may hold a prompt or an answer."""
    told = str(problem).partition("\n\nThe above exception")[0]  # Ray puts an error of its own behind the first one
    frames = list(_FRAME.finditer(told))
    if not frames:
        return (
            f"a worker or a machine was lost ({type(problem).__name__}), and {RESTARTS} further attempts did not help: "
            "often it ran out of memory. Lower batch_size of the stage or ray.workers. All answers so far are stored; "
            "run the same command again."
        )
    kind = re.search(r"^(?:\w+\.)*(\w+)", told[frames[-1].end() :].partition("\n")[2], re.MULTILINE)
    place = next((one for one in reversed(frames) if "/rlaif/" in one[1]), frames[-1])
    return (
        f"a worker failed with {kind[1] if kind else 'an error'} at {Path(place[1]).name}:{place[2]}. If memory ran "
        "out, lower batch_size of the stage. All answers so far are stored; run the same command again. If it fails "
        "without `ray` as well, it is a bug."
    )
