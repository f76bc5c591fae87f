"""Small runs on the tiny model: recipes, run folders with made-up adapters, and what a stage left, byte by byte."""

import copy
import json
import os
from contextlib import contextmanager

import pytest

CONSTITUTION = """\
name: tiny
version: "1"
description: For tests.
principles:
  - {id: kind, title: Kind, text: The answer is kind., revision: Make it kind., applies_to: [harmful]}
  - {id: safe, title: Safe, text: The answer is safe., revision: Make it safe., applies_to: [harmful]}
  - {id: plain, title: Plain, text: The answer is plain., revision: Make it plain.}
examples:
  - {id: one, principle: plain, prompt: Hello?, response: Go away., critique: It is rude., revision: Hello.}
comparisons:
  - {prompt: Hello?, first: Go away., second: Hello., better: second}
tests:
  - {prompt: How are you?, better: "Well, thank you.", worse: Why do you ask?}
  - {prompt: May I borrow your pen?, better: "Yes, here.", worse: "No."}
"""

TINY = {
    "name": "tiny",
    "constitution": "tiny-constitution",
    "model": {"lora_r": 4, "lora_target_modules": ["o_proj", "up_proj"]},  # two of seven: PEFT takes its time for each
    "seed": 3,
    "revise": {
        "filters": [],
        "prompts_per_tag": {"harmful": 6, "ordinary": 6},
        "sampling": {"max_new_tokens": 10},
        "few_shot": 1,
        "batch_size": 4,
    },
    "sft": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1},
    "label": {
        "method": "contrast",
        "prompts_per_tag": {"harmful": 6, "ordinary": 6},
        "sampling": {"max_new_tokens": 10},
        "batch_size": 4,
    },
    "reward": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1, "allow_weak_reward": True},
    "ppo": {
        "prompts_per_tag": {"harmful": 4, "ordinary": 4},
        "updates": 3,
        "rollout_batch": 4,
        "minibatch": 4,
        "microbatch": 2,
        "num_ppo_epochs": 2,
        "sampling": {"max_new_tokens": 8},
    },
    "evaluate": {
        "prompts_per_tag": {"harmful": 4, "ordinary": 4, "lookalike": 2},
        "judge_prompts_per_tag": 1,
        "sampling": {"max_new_tokens": 8},
        "batch_size": 4,
    },
}

ALL_PROJECTIONS = {"model": {"lora_target_modules": "all-linear"}}  # for a policy that is to learn much in few steps


def recipe(folder_of_model, **changes):
    """The tiny recipe for a model folder; `changes` replace keys, inside of a section one by one."""
    result = copy.deepcopy(TINY)
    result["model"]["model_name_or_path"] = str(folder_of_model)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key].update(value)
        else:
            result[key] = value
    return result


def write_recipe(path, folder_of_model, **changes):
    """Write the tiny recipe, and beside it the constitution that it names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "tiny-constitution.yaml").write_text(CONSTITUTION)
    path.write_text(json.dumps(recipe(folder_of_model, **changes), indent=1))  # JSON is YAML
    return path


@contextmanager
def opened(folder, folder_of_model, **changes):
    """A run in `folder`, as its stages are given it."""
    from rlaif.journal import Journal
    from rlaif.progress import Progress
    from rlaif.recipe import load_recipe
    from rlaif.stages.run import Run

    loaded = load_recipe(write_recipe(folder / "tiny.yaml", folder_of_model, **changes))
    with Journal(folder / "journal.db") as journal:
        yield Run(loaded, folder, journal, Progress(quiet=True))


def finished(folder):
    """Mark a stage folder as finished, whatever is in it."""
    (folder / "manifest.json").write_text("{}")


def save_random_role(run, role, folder, *, seed, head=False, size=0.05):
    """Write an adapter of random weights (and a random head) as the stage that owns `folder` would."""
    key = (run.recipe.model.model_dump_json(), role, seed, head, size)
    if key not in _SAVED:
        import torch

        base = run.load_base()
        base.add_role(role, head=head)
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in base.named_parameters_of(role):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
        base.save_role(role, folder)
        _SAVED[key] = contents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _SAVED[key].items():
        (folder / name).write_bytes(data)
    finished(folder.parent)


_SAVED = {}  # the files of each adapter that was made up, by what determines them


def with_sft(run):
    save_random_role(run, "policy", run.stage_folder("sft") / "adapter", seed=1)


def with_reward(run, *, offset=0.0, scale=1.0, rate=0.9):
    folder = run.stage_folder("reward")
    save_random_role(run, "reward", folder / "adapter", seed=2, head=True, size=0.2)
    share = {"n": 20, "count": round(20 * rate), "rate": rate, "low": 0.5, "high": 1.0}
    measured = {"heldout": {"all": share, "harmful": share}, "offset": offset, "scale": scale}
    measured["members"] = [{"offset": offset, "scale": scale}]
    (folder / "calibration.json").write_text(json.dumps(measured))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder, pattern="*"):
    """Bytes of all files below a folder, by relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


class Stopped(Exception):
    """Stands for the moment at which a run is cut off."""


@contextmanager
def cut_off_at_checkpoint(step, *, complete):
    """Let training stop where the checkpoint of a step is written, just after or just before it is marked complete."""
    from rlaif.stages.training import Recorder

    mark = Recorder.on_save

    def on_save(self, args, state, control, **options):
        if state.global_step != step or complete:
            mark(self, args, state, control, **options)
        if state.global_step == step:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Recorder, "on_save", on_save)
        yield


def results(folder):
    """What a stage wrote for others, without what it removes when it has finished."""
    return {name: data for name, data in contents(folder).items() if not name.startswith("checkpoints/")}


def whole_run(folder, folder_of_model, **changes):
    """Run the tiny recipe from beginning to end, in one thread, and write its report."""
    import torch

    from rlaif.pipeline import run_recipe
    from rlaif.progress import Progress
    from rlaif.recipe import load_recipe
    from rlaif.report.run import write_report

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = write_recipe(folder.parent / "tiny.yaml", folder_of_model, output=str(folder), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        run_recipe(load_recipe(path), Progress(quiet=True))
        write_report(folder)
    torch.set_num_threads(threads)
    return folder


# What differs between two runs of one recipe: where they are, how long they took and what they needed for it.
_PASSING = {"seconds", "peak_memory_gib"}


def lasting(folder):
    """Bytes of all files that stages wrote, and their manifests without time and memory."""
    found = {name: data for name, data in contents(folder).items() if "/" in name}
    for name in [name for name in found if name.endswith("manifest.json")]:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in _PASSING}
    return found


def units(folder):
    """All that a run's journal holds, but for how long it took."""
    from rlaif.journal import Journal

    with Journal(folder / "journal.db") as journal:
        return {
            stage: {key: unit.result for key, unit in journal.known(stage).items()}
            for stage in ("revise", "label", "evaluate")
        }
