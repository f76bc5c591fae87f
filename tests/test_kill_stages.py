"""A run that is killed, interrupted or out of disk space in any stage, and then continued, is the run that was not.

The runs are children forked from one process that has imported everything and computed nothing; each is the command
line itself, in which one function was replaced by itself and a fatal moment before or after it.
"""

import functools
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import tiny_runs

from rlaif.errors import JournalError
from rlaif.progress import Progress
from rlaif.recipe import load_recipe

pytestmark = pytest.mark.slow

# Function, what its arguments must contain, which of the calls, and whether death comes before or after it.
KILLS = [
    ("rlaif.journal:Journal.put", "", 2, "before"),
    ("rlaif.journal:Journal.put", "", 1, "after"),
    ("rlaif.files:write_jsonl", "chains.jsonl", 1, "before"),
    ("rlaif.journal:write_manifest", "1-revise", 1, "before"),
    ("transformers.trainer:Trainer._save_optimizer_and_scheduler", "checkpoint-2", 1, "before"),
    ("rlaif.stages.training:Recorder.on_save", "", 2, "before"),
    ("rlaif.files:append_jsonl", "2-sft", 2, "after"),
    ("rlaif.files:_sync_tree", "adapter", 1, "before"),
    ("rlaif.stages.sft:last_metrics", "", 1, "before"),
    ("rlaif.pipeline:_tidy", "2-sft", 1, "before"),
    ("rlaif.journal:Journal.put", "", 2, "before"),
    ("rlaif.files:write_json", "quality.json", 1, "before"),
    ("rlaif.stages.training:Recorder.on_save", "", 2, "after"),
    ("rlaif.stages.reward:measure", "", 1, "before"),
    ("rlaif.files:write_json", "calibration.json", 1, "after"),
    ("rlaif.stages.ppo:record", "", 2, "before"),
    ("rlaif.stages.checkpoints:save_file", "checkpoint-2", 1, "after"),
    ("rlaif.files:mark_complete", "checkpoint-3", 1, "before"),
    ("rlaif.model.roles:SharedBase.save_role", "5-ppo/policy", 1, "after"),
    ("rlaif.journal:Journal.put", "", 3, "before"),
    ("rlaif.files:write_jsonl", "responses.jsonl", 1, "before"),
    ("rlaif.report.run:render", "", 1, "before"),
]
INTERRUPTS = [
    ("rlaif.engines.local:LocalEngine._answer", "", 2, "before"),
    ("rlaif.stages.training:Recorder.on_step_end", "", 2, "before"),
    ("rlaif.stages.quality:measure_panel", "", 1, "before"),
    ("rlaif.stages.training:Recorder.on_step_end", "", 2, "after"),
    ("rlaif.stages.ppo:backward", "", 5, "after"),
    ("rlaif.stages.evaluate:response_logprob", "", 2, "after"),
]
STAGES = ["1-revise", "2-sft", "3-label", "4-reward", "5-ppo", "6-evaluate"]


# --- in the process of its own ---------------------------------------------------------------------------------------


def arm(point, number):
    """Let a signal end this process around the named call of a function."""
    target, wanted, remaining, when = point
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*arguments, **options):
        nonlocal remaining
        hit = wanted in " ".join(map(str, arguments))
        remaining -= hit
        if hit and remaining == 0 and when == "before":
            os.kill(os.getpid(), number)
        result = original(*arguments, **options)
        if hit and remaining == 0 and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, call)


def child(words, prepare=lambda: None):
    """Run ``rlaif WORDS`` in a fork; return its exit code (negative: the signal) and what it printed on stderr."""
    shown = Path("stderr.txt")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stream = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            from rlaif import cli

            prepare()
            sys.argv = ["rlaif", *words]
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.read_text()


def place_of(folder):
    """The stage that is under way in a run folder; none once all have finished."""
    started = [stage for stage in STAGES if (folder / stage / "started.json").exists()]
    return started[0] if started else ""


def killed(recipe, folder):
    """Return where each run was killed, and from which step on each one that found a checkpoint went on."""
    places, went_on = [], []
    for point in [*KILLS, None]:
        code, shown = child(["run", recipe], lambda point=point: point and arm(point, signal.SIGKILL))
        assert code == (-signal.SIGKILL if point else 0), f"{point}: {code}\n{shown}"
        places.append(place_of(Path(folder)))
        stages = re.findall(r"^(?:([1-6]-[a-z]+)$|  continuing after step ([0-9]+)$)", shown, re.MULTILINE)
        went_on += [f"{stages[index - 1][0]} {step}" for index, (_, step) in enumerate(stages) if step]
    return places, went_on


def interrupted(recipe, folder):
    places = []
    for point in INTERRUPTS:
        code, shown = child(["run", recipe, "--set", "seed=3"], lambda point=point: arm(point, signal.SIGINT))
        assert code == 130, f"{point}: {code}\n{shown}"
        assert shown.endswith(f"nothing finished is lost. Continue with: rlaif run {recipe} --set seed=3\n"), shown
        assert "Traceback" not in shown, shown
        places.append(place_of(Path(folder)))
    code, shown = child(["run", recipe])
    assert code == 0, shown
    return places


def out_of_space(recipe, folder):
    """In each stage let every write beyond a size fail, with ever larger sizes, until the stage comes through."""
    places = []
    for stage in STAGES:
        size, code = 8192, 2
        while code:
            limits = (size, resource.RLIM_INFINITY)
            words = ["run", recipe, "--until", stage.partition("-")[2]]
            code, shown = child(words, lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
            assert code in (0, 2), f"{stage}, {size} bytes: {code}\n{shown}"
            if code:
                assert "Traceback" not in shown, f"{stage}, {size} bytes:\n{shown}"
                assert shown.count("rlaif: ") == 1, f"{stage}, {size} bytes:\n{shown}"
                message = shown[shown.index("rlaif: ") :]
                assert re.search("space|disk", message), message
                assert message.count("\n") == 1, message
                places.append(place_of(Path(folder)))
            size *= 4
    return places


def main():
    import tokenizers  # noqa: F401  (imported before any fork, as all that follows)
    import torch

    from rlaif.stages import evaluate, label, ppo, revise, reward, sft  # noqa: F401

    torch.set_num_threads(1)
    scenario, recipe, folder = sys.argv[1:]
    print(json.dumps(globals()[scenario](recipe, folder)))


if __name__ == "__main__":
    main()


# --- in the process of the tests -------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tmp_path, tiny_model, finished_run):
    """Play a scenario in a process of its own; return where it was each time, and compare the run at its end."""

    def play(scenario):
        folder = tmp_path / "run"
        recipe = tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, output=str(folder))
        words = [sys.executable, __file__, scenario, str(recipe), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        theirs, ours = tiny_runs.lasting(folder), tiny_runs.lasting(finished_run)
        assert theirs.keys() == ours.keys()
        assert [name for name in ours if theirs[name] != ours[name]] == []
        assert tiny_runs.units(folder) == tiny_runs.units(finished_run)
        assert (folder / "report.html").is_file()
        left = [path for path in folder.rglob("*") if ".rlaif-" in path.name or path.name == "started.json"]
        assert left == []
        return json.loads(done.stdout)

    return play


def test_a_run_killed_at_many_moments_of_every_stage_and_continued_equals_one_that_was_not(outcome):
    places, went_on = outcome("killed")
    assert len(places) == 23
    assert [stage for stage in STAGES if stage not in places] == []
    assert went_on == [
        *("2-sft 1", "2-sft 2", "2-sft 3", "2-sft 4", "2-sft 4"),
        "4-reward 2",  # killed later, it finds its adapter there
        *("5-ppo 1", "5-ppo 1", "5-ppo 2", "5-ppo 3"),
    ]


def test_a_run_interrupted_in_every_stage_says_how_to_continue_and_continued_equals_one_that_was_not(outcome):
    assert outcome("interrupted") == STAGES


def test_a_run_that_is_out_of_space_again_and_again_says_so_and_loses_nothing(outcome):
    places = outcome("out_of_space")
    assert [stage for stage in STAGES if stage not in places] == []


def test_a_real_process_holds_its_run_folder_and_ctrl_c_ends_it_with_the_command_that_continues(tmp_path, tiny_model):
    folder = tmp_path / "run"
    recipe = tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, output=str(folder), sft={"max_steps": 10_000})
    from rlaif.pipeline import run_recipe

    command = [sys.executable, "-c", "from rlaif.cli import main; main()", "run", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "2-sft" / "metrics.jsonl").is_file() and process.poll() is None:
            time.sleep(0.1)
        with pytest.raises(JournalError, match=f"in use by another process .process id {process.pid}."):
            run_recipe(load_recipe(recipe), Progress(quiet=True))
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "Continue with: rlaif run" in shown.splitlines()[-1]
    assert "Traceback" not in shown
