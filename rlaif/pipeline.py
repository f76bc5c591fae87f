"""The stages in order: each runs unless its manifest shows that nothing it depends on has changed.

A stage folder's manifest is written last, with a hash of each input and of each output. A stage that was killed has no
manifest: it runs again and takes finished answers from the journal and finished training steps from its newest complete
checkpoint. Where its inputs changed meanwhile, its folder is emptied first, so nothing stale is continued.
"""

import gc
import importlib
import io
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from rlaif import files, journal, memory_advice
from rlaif.documents import fingerprint
from rlaif.errors import JournalError
from rlaif.progress import Progress
from rlaif.recipe import Loaded, load_recipe
from rlaif.rounds import Step, chosen, steps_of
from rlaif.stages import gate, processes
from rlaif.stages.run import Run
from rlaif.stages.training import CHECKPOINTS, STARTED

_PACKAGES = (
    "rlaif-toolkit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
)


def run_recipe(
    loaded: Loaded,
    progress: Progress,
    *,
    first: str | None = None,
    last: str | None = None,
    only: str | None = None,
) -> Path:
    """Run a recipe's stages and return the run folder.

    Args:
        loaded: the checked recipe.
        progress: where to say what happens.
        first: run this stage and all later ones again, whatever their manifests say. Of a later round: `round-2/ppo`.
        last: stop after this stage.
        only: run this stage alone.

    Raises:
        RlaifError: see the stages; a run folder that another process uses is a JournalError.
    """
    recipe = loaded.recipe
    every = steps_of(recipe.stages, recipe.rounds.count)
    steps, again = chosen(every, loaded.path, first, last, only)
    processes.refuse_unsupported([step.stage for step in steps])
    folder = recipe.folder()
    with files.run_lock(folder):
        files.repair_tree(folder)
        with journal.Journal(folder / "journal.db") as book:
            run = Run(loaded, folder, book, progress)
            _write_recipe(run)
            steps = again if first else steps
            run.check_keys(list(dict.fromkeys(step.stage for step in steps)))
            _forget(run, again)
            for number, stage in steps:
                run = run.in_round(number)
                run_stage(run, stage)
                if recipe.rounds.count > 1 and stage == "evaluate":
                    gate.decide(run)
    return folder


def _forget(run: Run, steps: list[Step]) -> None:
    """Let stages run anew. All are marked before the first one starts, so continuing needs no ``--from``.

    Their answers stay, but what a server has refused is asked again: it may have been started with other limits.
    """
    for number, stage in steps:
        run.journal.forget_refused(stage)
        for name in (STARTED, "manifest.json"):
            (run.in_round(number).stage_folder(stage) / name).unlink(missing_ok=True)


def _write_recipe(run: Run) -> None:
    resolved = run.recipe.model_dump() | {
        "output": str(run.folder.resolve()),
        "constitution": str(run.loaded.constitution),
        "prompts": [
            str(path) if isinstance(source, str) else {**source.model_dump(), "file": str(path)}
            for source, path in zip(run.recipe.prompts, run.loaded.prompts, strict=True)
        ],
    }
    resolved["human"]["files"] = [str(path) for path in run.loaded.human_files]
    resolved["human"]["known"] = None if run.loaded.known is None else str(run.loaded.known)
    label, adapters = resolved["label"], run.loaded.adapters
    label["candidate_files"] = [str(path) for path in run.loaded.candidate_files]
    label["reference"] = None if run.loaded.reference is None else str(run.loaded.reference)
    label["policies"] = [str(adapters.get(name, name)) for name in label["policies"]]
    for one in label["judges"]:
        one["adapter"] = str(adapters.get(one["adapter"], one["adapter"])) if one["adapter"] else None
    if run.loaded.ptx_file:
        resolved["ppo"]["ptx_file"] = str(run.loaded.ptx_file)
    if run.loaded.start:
        resolved["reward"]["start_from"] = str(run.loaded.start)
    path = run.folder / "recipe.yaml"
    text = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # the order of tags is the order of prompts
    yaml.width = 120
    yaml.dump(resolved, text)
    files.write_text(path, text.getvalue())


def run_stage(run: Run, stage: str) -> None:
    """Run one stage unless its manifest holds."""
    folder = run.stage_folder(stage)
    module = importlib.import_module(f"rlaif.stages.{stage}")
    inputs: dict[str, str] = module.inputs(run)
    reasons = journal.broken(folder, inputs)
    name = folder.relative_to(run.folder).as_posix()
    if not reasons:
        _tidy(folder)
        run.progress.say(f"{name}: up to date")
        return
    run.progress.say(name + ("" if reasons == ["no manifest"] else f" ({'; '.join(reasons)})"))
    launched = {"processes": run.processes} if run.processes > 1 and stage in processes.TRAIN_TOGETHER else {}
    if launched:
        run.progress.say(f"  training in {run.processes} processes")
    gate.withdraw(run)
    # A training goes on with as many processes as it began with; once finished it holds for any number.
    kept = (folder / CHECKPOINTS).is_dir()
    if not _prepare(folder, inputs | {name: str(value) for name, value in launched.items()}) and kept:
        run.progress.say("  what was begun there under other inputs is removed; the stage starts anew")
    began = time.monotonic()
    _reset_peak()
    try:
        with memory_advice.told(run, stage):
            counts = getattr(module, stage)(run)
    finally:
        run.release()
    manifest = journal.Manifest(
        stage=stage,
        inputs=inputs,
        outputs={name: sha256 for name, sha256 in journal.outputs_of(folder).items() if not _passing(name)},
        counts=counts | launched,
        seconds=round(time.monotonic() - began, 1),
        peak_memory_gib=round(peak_memory_gib(), 2),
        versions={name: version(name) for name in _PACKAGES},
    )
    journal.write_manifest(folder, manifest)
    _tidy(folder)
    shown = ", ".join(f"{key} {_short(value)}" for key, value in counts.items())
    run.progress.say(f"  done in {manifest.seconds:.0f} s, {manifest.peak_memory_gib:.1f} GiB: {shown}")
    gc.collect()


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _passing(name: str) -> bool:
    """Tell whether a file of a stage is of use only until its manifest is written."""
    return name == STARTED or CHECKPOINTS in name.split("/")


def _tidy(folder: Path) -> None:
    """Remove what a finished stage no longer needs; only after its manifest, so a kill in between loses nothing."""
    for checkpoints in (folder / CHECKPOINTS, *folder.glob(f"*/{CHECKPOINTS}")):
        files.remove_folder(checkpoints)
    (folder / STARTED).unlink(missing_ok=True)


def _prepare(folder: Path, inputs: dict[str, str]) -> bool:
    """Empty the stage's folder unless it was left by a run that was stopped under the same inputs; tell whether so."""
    path = folder / STARTED
    try:
        same = json.loads(path.read_text(encoding="utf-8"))["inputs"] == fingerprint(inputs) and not folder.is_symlink()
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        files.remove_folder(folder)
    files.write_json(path, {"inputs": fingerprint(inputs)})
    return same


def _reset_peak() -> None:
    """Start a new measurement of peak memory, where the system offers it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_gib() -> float:
    """Return the peak memory in GiB since `_reset_peak`: on a GPU what torch reserved there, else what is resident."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def open_run(folder: Path) -> Loaded:
    """Read the resolved recipe of a run folder.

    Raises:
        JournalError: the folder is not a run folder.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise JournalError(
            f"{folder}: not a run folder (it has no recipe.yaml). Name a folder such as runs/quickstart."
        )
    return load_recipe(path)


@contextmanager
def journal_copy(folder: Path) -> Iterator[journal.Journal]:
    """Open a copy of a run's journal, so that reading it writes nothing; an empty one where there is none."""
    path = folder / "journal.db"
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        with files.reported(path):
            for suffix in ("-journal", ""):  # in this order a transaction that ends meanwhile is seen whole or not
                if path.with_name(path.name + suffix).is_file():
                    shutil.copyfile(path.with_name(path.name + suffix), copy.with_name(copy.name + suffix))
        try:
            book = journal.Journal(copy)
        except JournalError as problem:
            raise JournalError(str(problem).replace(str(copy), str(path))) from None
        with book:
            yield book
