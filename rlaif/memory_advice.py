"""What a run's stages need on this machine by the memory model, and what to lower where memory has run out."""

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from rlaif.decoders import Shape
from rlaif.errors import DeviceError, ModelError
from rlaif.memory import GIB, Held, Lengths, Peak, peak
from rlaif.model import builtin
from rlaif.model.base import default_device
from rlaif.recipe import ModelSection, Recipe
from rlaif.records import Messages, read_jsonl
from rlaif.stages.run import Run

LETTERS_PER_TOKEN = 4.0
_USABLE = 0.95  # of the memory there is, so that an estimate that is a little low does not fail again
# What torch and its libraries say in words only.
_WORDS = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMG]iB|bytes)")
_SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
# The key that bounds a phase. The first three change no result beyond rounding, and are lowered without losing work.
# PPO's for sampling is `sampling_batch`.
_ROWS = {
    "sampling": "batch_size",
    **dict.fromkeys(("scoring", "updating", "learning text", "reading text"), "microbatch"),
}
_TRAINING = "per_device_train_batch_size"
_FILES = {"sft": ("revise", "demonstrations"), "reward": ("label", "comparisons"), "dpo": ("label", "comparisons")}


def tokens_of(text: str) -> int:
    """Estimate how many tokens a text has."""
    return max(1, round(len(text) / LETTERS_PER_TOKEN))


def shape_of(settings: ModelSection) -> Shape | None:
    """Return the shape of the model that a recipe names; None where it is not on this machine, or of another kind."""
    name = settings.model_name_or_path
    if name in builtin.EMBEDDED:
        path: Any = builtin.converted_folder(name) / "config.json" if builtin.is_fetched(name) else None
    elif Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        path = try_to_load_from_cache(name, "config.json", revision=settings.model_revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    return Shape.of(json.loads(Path(path).read_text(encoding="utf-8")))


def held(settings: ModelSection) -> Held | None:
    """Return the model that a recipe names as it would be held in memory here; None where its shape is not known."""
    shape = shape_of(settings)
    return shape and Held(shape, settings, default_device().type == "cuda")


def need(run: Run, stage: str, recipe: Recipe, prompt: int | None = None) -> Peak | None:
    """Estimate what a stage needs at its peak.

    Args:
        run: the run.
        stage: its name.
        recipe: the run's, or what would become of it.
        prompt: the length of the longest question in tokens, where the questions are known.

    Returns:
        None where the model or the texts are not known.
    """
    policy, reward = held(recipe.model), held(recipe.reward_base()) if recipe.reward.model else None
    lengths = lengths_of(run, stage, prompt)
    if policy is None or lengths is None or (recipe.reward.model and reward is None):
        return None
    return peak(stage, recipe, lengths, policy, reward)


def lengths_of(run: Run, stage: str, prompt: int | None = None) -> Lengths | None:
    """Return the longest texts of a stage: of its rows where they are written, else what the recipe allows."""
    if stage in _FILES:
        return Lengths(row=max(lengths_of_rows(run, stage), default=getattr(run.recipe, stage).max_length))
    if prompt is None and stage in ("ppo", "rejection", "evaluate"):
        split: Any = "eval" if stage == "evaluate" else "train"
        rows_of = run.select(split, getattr(run.recipe, stage).prompts_per_tag)
        prompt = max(tokens_of(_said(row.messages)) for row in rows_of)
    if prompt is None:
        return None
    return Lengths(prompt, prompt + run.recipe.rejection.sampling.max_new_tokens)


def lengths_of_rows(run: Run, stage: str) -> list[int]:
    """Return the tokens of each row that a stage trains on, of a comparison its longer side; none while unwritten."""
    source, name = _FILES[stage]
    path = run.stage_folder(source) / f"{name}.jsonl"
    rows = [row for _, row in read_jsonl(path)] if path.is_file() else []
    return [max(map(tokens_of, _sides(row))) for row in rows]


def _sides(row: dict[str, Any]) -> list[str]:
    """Return the texts of a row: a demonstration's, or each side of a comparison's with its prompt."""
    if "messages" in row:
        return [_said(row["messages"])]
    return [_said([*row["prompt"], *row[side]]) for side in ("chosen", "rejected")]


def _said(messages: Messages) -> str:
    return "".join(turn["content"] for turn in messages)


def capacity() -> float:
    """Return the bytes that this process may have: of a GPU those that others leave, else of main memory."""
    if default_device().type == "cuda":
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return float(there if limit == resource.RLIM_INFINITY else min(there, limit))


# --- where memory has run out -----------------------------------------------------------------------------------------


@contextmanager
def told(run: Run, stage: str) -> Iterator[None]:
    """Turn an error of a stage that says memory has run out into one message that says what to lower.

    Raises:
        DeviceError: says what was asked for, which keys to lower to what, and what is kept.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ModelError) as problem:
        if not ran_out(problem):
            raise
        raise DeviceError(message(run, stage, problem)) from None


def ran_out(problem: BaseException | None) -> bool:
    """Tell whether memory that has run out is at the root of an error."""
    while problem is not None:
        if isinstance(problem, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(problem, RuntimeError) and any(words in str(problem) for words in _WORDS):
            return True
        problem = problem.__cause__
    return False


def message(run: Run, stage: str, problem: BaseException) -> str:
    """Say in one message what has run out, what to lower to what, and what is kept."""
    there = capacity()
    where = "the GPU" if default_device().type == "cuda" else "this process"
    asked = _ASKED.search(f"{problem} {problem.__cause__}")
    more = f"; {_size(float(asked[1]) * _SIZES[asked[2]])} more were asked for" if asked else ""
    now = need(run, stage, run.recipe)
    keys, then = advice(run, stage, now, there)
    said = [f"{stage}: out of memory: {where} may have {_size(there)}{more}."]
    if not keys:
        said.append(f"{_instead(run.recipe)} {_kept('')}")
        return " ".join(said)
    words = " and ".join(f"{key}{_from(run.recipe, key)} to {_yaml(value)}" for key, value in keys.items())
    said.append(f"Change {words}" + (f": about {_size(then.total)} {_instead_of(now)}." if then else "."))
    if then and then.total > there * _USABLE:
        said.append(f"That may not be enough: {_instead(run.recipe)}")
    options = " ".join(f"--set {key}={_yaml(value)}" for key, value in keys.items())
    return " ".join([*said, _kept(options, begins=any(_TRAINING in key for key in keys))])


def _kept(options: str, *, begins: bool = False) -> str:
    """Say what is kept, and how to go on."""
    here = "this stage begins again" if begins else "it continues where it stopped"
    again = f"Run the same command again, without --from, adding `{options}`: {here}." if options else ""
    return f"Nothing that is finished is lost. {again}".strip()


def _instead_of(now: Peak | None) -> str:
    return f"instead of {_size(now.total)}, by the memory model" if now else "by the memory model"


def _instead(recipe: Recipe) -> str:
    bits = "" if recipe.model.load_in_4bit else "set model.load_in_4bit: true, or "
    return f"{bits}use a smaller model or shorter texts.".capitalize()


def advice(run: Run, stage: str, now: Peak | None, there: float) -> tuple[dict[str, Any], Peak | None]:
    """Return the first change of keys that fits, or the last one tried, and what is needed with it.

    Where the model thinks that the stage fits as it is, it is too low, and all its figures are raised in proportion.
    """
    too_low = max(1.0, there / now.total) if now else 1.0
    keys: dict[str, Any] = {}
    then = None
    for keys in changes(run.recipe, stage, now.phase if now else ""):
        then = need(run, stage, changed(run.recipe, keys))
        if then is None or then.total * too_low <= there * _USABLE:
            break
    return keys, then


def changes(recipe: Recipe, stage: str, phase: str) -> Iterator[dict[str, Any]]:
    """Yield what can be lowered, from the cheapest on: half and a quarter of the rows, then recomputed activations."""
    settings: Any = getattr(recipe, stage)
    key = _ROWS.get(phase) or next(name for name in (_TRAINING, "microbatch", "batch_size") if hasattr(settings, name))
    learns = stage not in ("revise", "label", "evaluate") and phase not in ("sampling", "scoring")
    recompute = {"model.gradient_checkpointing": True}
    if not hasattr(settings, key):
        key = "sampling_batch"
    rows = getattr(settings, key) or settings.rollout_batch * settings.samples_per_prompt
    smaller = [size for size in range(rows - 1, 0, -1) if rows % size == 0]
    can_recompute = learns and not recipe.model.gradient_checkpointing
    for size in smaller[: 2 if can_recompute else None]:
        yield _fewer(stage, key, settings, size)
    if can_recompute:
        yield recompute
        for size in smaller:
            yield recompute | _fewer(stage, key, settings, size)


def _fewer(stage: str, key: str, settings: Any, size: int) -> dict[str, Any]:
    """Return the keys for so many rows at a time; a trainer takes as many more passes, for the same optimizer step."""
    found = {f"{stage}.{key}": size}
    if key == _TRAINING:
        found[f"{stage}.gradient_accumulation_steps"] = (
            settings.gradient_accumulation_steps * settings.per_device_train_batch_size // size
        )
    return {name: value for name, value in found.items() if value != getattr(settings, name.split(".")[1])}


def changed(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """Return a recipe with other values of some keys, such as ``ppo.microbatch``."""
    for name, value in keys.items():
        section, _, key = name.partition(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
    return recipe


def _from(recipe: Recipe, name: str) -> str:
    section, _, key = name.partition(".")
    value = getattr(getattr(recipe, section), key)
    return "" if value is None else f" from {_yaml(value)}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def as_words(found: Peak | None, there: float) -> str:
    """Write an estimate in one line, with its parts in GiB."""
    if found is None:
        return "unknown; the model is not on this machine, or of a kind that docs/memory.md has no equations for"
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.parts.items() if size >= GIB / 20)
    over = "" if found.total <= there else f", more than the {_size(there)} here"
    return f"about {_size(found.total)} at its peak ({found.phase}){over}: {parts}"
