"""Commands in several processes, as a launcher starts them, but without a launcher that would end them itself.

Like the runs of `test_kill_stages`, they are forks of one process that has imported everything and computed nothing.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import tiny_runs


def commands(words, *, count=2, prepare=lambda rank: None, name="launched"):
    """Run ``rlaif WORDS`` in so many processes to the end; return each one's exit code and what it printed.

    Args:
        words: the command line.
        count: how many processes; 1 is what a user runs without a launcher.
        prepare: called in each process with its number before the command begins.
        name: of the files that hold what the processes print.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(count):
        told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shown = Path(f"{name}-{rank}.txt")
        started.append((_fork(words, told if count > 1 else {}, shown, lambda rank=rank: prepare(rank)), shown))
    return [(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.read_text()) for pid, shown in started]


def _fork(words, told, shown, prepare):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stream = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ.update(told)
        import torch

        from rlaif import cli

        torch.set_num_threads(1)
        os.fsync = lambda descriptor: None
        prepare()
        sys.argv = ["rlaif", *map(str, words)]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def at_call(owner, name, number, act):
    """Let `act` happen just before a function of an object or class is called for the given time."""
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            act()
        return original(*arguments, **options)

    setattr(owner, name, call)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def prepared(folder, model, stage, rows, *, four_bit=False, **settings):
    """Write the recipe of a run and what its stage reads; return the recipe's path and the stage's folder."""
    from rlaif import files
    from rlaif.recipe import load_recipe
    from rlaif.stages.run import Run

    settings = {"learning_rate": 1e-2, **({"start_from": "base"} if stage == "reward" else {}), **settings}
    sections = {"model": {"load_in_4bit": four_bit}, stage: settings}
    recipe = tiny_runs.write_recipe(folder / "tiny.yaml", model, output=str(folder / "run"), **sections)
    run = Run(load_recipe(recipe), folder / "run", None, None)
    before, name = {"reward": ("label", "comparisons"), "sft": ("revise", "demonstrations")}[stage]
    files.write_jsonl(run.stage_folder(before) / f"{name}.jsonl", rows)
    return recipe, run.stage_folder(stage)
