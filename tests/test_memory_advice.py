"""Memory that has run out, in any stage and any words: one message with what to lower, and nothing finished is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from rlaif import memory_advice as advice
from rlaif.errors import DeviceError, ModelError
from rlaif.memory import GIB, Peak
from rlaif.pipeline import run_stage

ROOT = Path(__file__).resolve().parents[1]
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3221225472 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.2 GiB is free."
)


@pytest.fixture
def opened(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, tiny_model, ppo={"microbatch": 4}, sft={"per_device_train_batch_size": 8}) as run:
        yield run


def fixed(monkeypatch, run, *, there, sizes):
    """Let the device have so many GiB, and stages need what a function says of the recipe."""
    monkeypatch.setattr(advice, "capacity", lambda: there * GIB)
    monkeypatch.setattr(advice, "need", lambda run, stage, recipe: Peak(*sizes(recipe)))


def rows_of_ppo(recipe):
    each = 0.1 if recipe.model.gradient_checkpointing else 1.0
    return "updating", 4 * GIB, 0.0, 0.0, 0.0, each * recipe.ppo.microbatch * GIB


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError(CPU),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_is_one_message_whatever_says_so(opened, monkeypatch, problem):
    def stage(run):
        raise problem

    monkeypatch.setattr("rlaif.stages.sft.sft", stage)
    monkeypatch.setattr("rlaif.stages.sft.inputs", lambda run: {})
    with pytest.raises(
        DeviceError, match="^sft: out of memory: this process may have .* GiB.*--set sft.per_device_train"
    ):
        run_stage(opened, "sft")


def test_an_error_of_another_kind_passes(opened):
    for problem in (RuntimeError("shape mismatch"), ModelError("no such model")):
        with pytest.raises(type(problem), match=str(problem)), advice.told(opened, "sft"):
            raise problem


def test_a_model_that_cannot_be_loaded_for_lack_of_memory_is_told_as_such(opened):
    with pytest.raises(DeviceError, match="^ppo: out of memory"), advice.told(opened, "ppo"):
        try:
            raise torch.OutOfMemoryError(CUDA)
        except RuntimeError as problem:
            raise ModelError("model `x`: cannot be loaded") from problem


def test_the_message_says_what_to_lower_how_far_and_what_is_kept(opened, monkeypatch):
    fixed(monkeypatch, opened, there=7, sizes=rows_of_ppo)
    assert advice.message(opened, "ppo", torch.OutOfMemoryError(CUDA)) == (
        "ppo: out of memory: this process may have 7.0 GiB; 2.5 GiB more were asked for. Change ppo.microbatch from 4 "
        "to 2: about 6.0 GiB instead of 8.0 GiB, by the memory model. Nothing that is finished is lost. Run the same "
        "command again, without --from, adding `--set ppo.microbatch=2`: it continues where it stopped."
    )


def test_recomputation_comes_after_a_quarter_of_the_rows(opened, monkeypatch):
    fixed(monkeypatch, opened, there=4.7, sizes=rows_of_ppo)
    keys, then = advice.advice(opened, "ppo", advice.need(opened, "ppo", opened.recipe), 4.7 * GIB)
    assert keys == {"model.gradient_checkpointing": True} and then.total == 4.4 * GIB


def test_where_nothing_fits_the_message_says_so(opened, monkeypatch):
    fixed(monkeypatch, opened, there=2, sizes=rows_of_ppo)
    said = advice.message(opened, "ppo", MemoryError())
    assert "That may not be enough: Set model.load_in_4bit: true, or use a smaller model" in said
    assert "--set model.gradient_checkpointing=true --set ppo.microbatch=1" in said


def test_an_estimate_that_was_too_low_is_raised_in_proportion(opened, monkeypatch):
    fixed(monkeypatch, opened, there=16, sizes=rows_of_ppo)  # 8 of 16 GiB by the model, and yet it did not fit
    keys, then = advice.advice(opened, "ppo", advice.need(opened, "ppo", opened.recipe), 16 * GIB)
    assert keys == {"ppo.microbatch": 2} and then.total == 6 * GIB


def test_fewer_responses_are_sampled_at_a_time_where_sampling_needs_too_much(opened, monkeypatch):
    def sizes(recipe):
        return "sampling", 0.0, 0.0, 0.0, 2.0 * GIB * (recipe.ppo.sampling_batch or recipe.ppo.rollout_batch)

    fixed(monkeypatch, opened, there=5, sizes=sizes)
    said = advice.message(opened, "ppo", MemoryError())
    assert "may have 5.0 GiB. Change ppo.sampling_batch to 2: about 4.0 GiB instead of 8.0 GiB" in said
    assert "--set ppo.sampling_batch=2`: it continues" in said


def test_fewer_rows_of_a_trainer_are_made_up_for_by_more_passes(opened, monkeypatch):
    sizes = lambda recipe: ("training", 0.0, 0.0, 0.0, 0.0, recipe.sft.per_device_train_batch_size * GIB)  # noqa: E731
    fixed(monkeypatch, opened, there=5, sizes=sizes)
    said = advice.message(opened, "sft", RuntimeError(CPU))
    assert "; 3.0 GiB more were asked for. Change sft.per_device_train_batch_size from 8 to 4 and " in said
    assert "sft.gradient_accumulation_steps from 1 to 2: about 4.0 GiB" in said
    assert said.endswith("--set sft.gradient_accumulation_steps=2`: this stage begins again.")


def test_rows_at_a_time_and_recomputation_repeat_no_work(tmp_path, tiny_model):
    def inputs(**changes):
        from rlaif.stages import ppo, revise

        with tiny_runs.opened(tmp_path, tiny_model, **changes) as run:
            return revise.inputs(run), ppo.inputs(run)

    plain = inputs()
    fewer = {"microbatch": 1, "sampling_batch": 2}
    lowered = inputs(model={"gradient_checkpointing": True}, ppo=fewer, revise={"batch_size": 2})
    assert lowered == plain
    assert inputs(ppo={"minibatch": 2}) != plain


def test_what_is_lowered_is_a_recipe_that_can_be_run(opened):
    phases = {"sft": ["training"], "reward": ["training", "scoring"], "ppo": ["sampling", "scoring", "updating"]}
    for stage in ("revise", "sft", "label", "reward", "ppo", "evaluate"):
        for phase in ["", *phases.get(stage, ["sampling"])]:
            for keys in advice.changes(opened.recipe, stage, phase):
                lowered = advice.changed(opened.recipe, keys)
                assert keys and type(lowered).model_validate(lowered.model_dump()) == lowered


def test_the_lengths_of_a_stage_are_those_of_its_longest_row(opened):
    folder = opened.stage_folder("revise")
    folder.mkdir(parents=True)
    turns = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 60}]
    (folder / "demonstrations.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    lengths = advice.lengths_of(opened, "sft")
    assert lengths is not None and lengths.row == 25
    assert advice.lengths_of(opened, "revise") is None


def test_a_model_that_is_not_on_this_machine_has_no_estimate(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, "nobody/has-this-model", ppo={"reward_function": "brief"}) as run:
        assert advice.need(run, "ppo", run.recipe) is None
        said = advice.message(run, "ppo", MemoryError())
    assert "Change ppo.microbatch from 2 to 1. Nothing" in said


LIMITED = """
import resource
import sys
from pathlib import Path

import tiny_runs

from rlaif.errors import DeviceError
from rlaif.pipeline import run_stage

folder, model, rows, passes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "max_steps": 1}
with tiny_runs.opened(folder, model, sft=training) as run:
    run.load_base()  # what is loaded once is there
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), resource.RLIM_INFINITY))
    try:
        run_stage(run, "sft")
    except DeviceError as problem:
        sys.exit(str(problem))
"""


@pytest.mark.slow
def test_memory_that_really_runs_out_is_told_and_fewer_rows_go_on(tmp_path, tiny_model):
    # TRL holds the logits of 4096 tokens at a time, in half a gigabyte whatever the vocabulary.
    with tiny_runs.opened(tmp_path, tiny_model) as run:
        folder = run.stage_folder("revise")
        folder.mkdir(parents=True)
        rows = [demonstration(number, "x" * 300) for number in range(16)]
        (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def train(rows, passes):
        command = [sys.executable, "-c", LIMITED, str(tmp_path), str(tiny_model), str(rows), str(passes)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    whole = train(16, 1)
    assert whole.returncode == 1 and "\nsft: out of memory: this process may have" in whole.stderr, whole.stderr
    assert "Change sft.per_device_train_batch_size from 16 to 8 and" in whole.stderr
    lowered = train(1, 16)
    assert lowered.returncode == 0, lowered.stderr
    assert (tmp_path / "2-sft" / "manifest.json").is_file()


def demonstration(number, text):
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    answer = [{"role": "assistant", "content": text}]
    return {"id": f"d{number}", "prompt": prompt, "completion": answer, "messages": [*prompt, *answer]} | {
        "revisions": [],
        "flags": [],
        "provenance": {},
    }
