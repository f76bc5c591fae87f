"""The engine `ray` on a real cluster of this machine: two workers with the tiny model, lost workers, a killed driver.

The driver that is killed and the one that goes on are processes of their own; they start and lose their own clusters.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
from scripted import Said
from test_ray import QUESTIONS, SECRET, Here, _on_a_cpu, engine, model, task_of  # noqa: F401

from rlaif.engines.engine import ask
from rlaif.engines.local import LocalEngine
from rlaif.engines.ray import Cluster
from rlaif.errors import EngineError
from rlaif.journal import Journal
from rlaif.model.roles import BASE, SharedBase
from rlaif.recipe import RaySection

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what Ray leaves open

PUTS_BEFORE_THE_KILL = 2
TOGETHER = 2  # questions in a batch
PROMPTS = 8


# --- in a process of its own ----------------------------------------------------------------------------------------


def write_recipe(folder, tiny_model):
    few = {"prompts_per_tag": {"ordinary": PROMPTS}, "batch_size": 1}
    return tiny_runs.write_recipe(
        folder / "tiny.yaml",
        tiny_model,
        output=str(folder / "run"),
        stages=["revise"],
        revise={"responder": "ray"} | few,
    )


def drive(recipe, dies):
    """Run the recipe; print how many questions were asked, unless the process kills itself in the midst."""
    from rlaif.engines.ray import RayEngine
    from rlaif.pipeline import run_recipe
    from rlaif.progress import Progress
    from rlaif.recipe import load_recipe

    asked, puts = [], []
    answers, put = RayEngine.answers, Journal.put

    def counting(self, batches):
        asked.extend(question for batch in batches for question in batch)
        return answers(self, batches)

    def dying(self, units):
        put(self, units)
        puts.append(units)
        if dies and len(puts) == PUTS_BEFORE_THE_KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    RayEngine.answers, Journal.put = counting, dying
    run_recipe(load_recipe(Path(recipe)), Progress(quiet=True))
    print(json.dumps([question.item_id for question in asked]))


if __name__ == "__main__":
    drive(sys.argv[1], sys.argv[2] == "dies")


# --- in the process of the tests ------------------------------------------------------------------------------------


def descendants(pid):
    """Return the processes that a process has started, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            stat, name = (entry / "stat").read_text(), (entry / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit():
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = name
    found, new = {}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= {child: names[child] for child in new}
    return found


def workers_of(pid):
    return [child for child, name in descendants(pid).items() if name.startswith("ray::MapWorker")]


@pytest.fixture(scope="module", autouse=True)
def no_niceness():
    """Ray's workers let every other process go first, and would hardly run beside other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(RaySection(workers=2))
    yield found
    found.stop()
    assert workers_of(os.getpid()) == []


def test_workers_answer_as_the_model_on_this_machine_does_and_one_that_is_killed_is_survived(
    cluster, tiny_model, tmp_path, capfd
):
    """Greedy, sampled and chosen answers; what is sampled takes long enough that both workers are busy."""
    questions = [replace(one, max_new_tokens=64 if one.seed else one.max_new_tokens) for one in QUESTIONS]
    local = LocalEngine(SharedBase.load(model(tiny_model)), BASE, batch_size=1)
    groups = local.answers(local.batches(questions))
    expected = {question.item_id: answer for group in groups for question, answer in group}
    capfd.readouterr()
    killed = []

    class Killing(Said):
        @contextmanager
        def task(self, title, total):
            with super().task(title, total) as task:
                yield self
                assert task is not None

        def advance(self, count, *, tokens=0):
            if not killed:
                killed.extend(workers_of(os.getpid())[:1])
                os.kill(killed[0], signal.SIGKILL)

    with Journal(tmp_path / "journal.db") as journal:
        found = list(ask(journal, "revise", engine(tiny_model, cluster, size=1), questions, Killing(), "answers"))
        assert journal.count("revise") == len(questions) and killed
    for question, answer in zip(questions, found, strict=True):
        other = expected[question.item_id]
        assert replace(answer, logprobs=()) == replace(other, logprobs=())
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    said = capfd.readouterr()
    assert said.err == "" and "A worker died" in said.out and "Traceback" not in said.out


def test_a_mistake_of_ours_in_a_worker_is_one_message_that_shows_no_text(cluster, tiny_model, capfd):
    rows = [{"number": 0, "questions": f"no JSON, and {SECRET}"}]
    with pytest.raises(EngineError, match=r"a worker failed with JSONDecodeError at \w+\.py:\d+\.") as found:
        list(cluster.rows(rows, json.dumps(task_of(engine(tiny_model)))))
    assert SECRET not in str(found.value)
    assert capfd.readouterr() == ("", "")


def test_a_driver_that_was_killed_asks_only_what_was_under_way(tiny_model, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "ray", tiny_model)
    command = [sys.executable, __file__, str(recipe)]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def start(how):
        # Short, because Ray's sockets are in it; a driver that is killed leaves its cluster's folder there.
        with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:
            here = environment | {"TMPDIR": folder}
            return subprocess.run([*command, how], capture_output=True, text=True, env=here, timeout=300)

    done = start("dies")
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Journal(tmp_path / "ray" / "run" / "journal.db") as journal:
        kept = {unit.item_id for unit in journal.known("revise").values()}
    assert len(kept) == PUTS_BEFORE_THE_KILL * TOGETHER
    done = start("goes on")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    asked = json.loads(done.stdout)
    assert len(asked) == PROMPTS - len(kept) and not set(asked) & kept

    monkeypatch.setattr("rlaif.stages.run.Cluster", lambda settings, say: Stoppable())
    drive(write_recipe(tmp_path / "here", tiny_model), dies=False)
    runs = [tiny_runs.contents(tmp_path / name / "run" / "1-revise", "*.jsonl") for name in ("ray", "here")]
    assert runs[0] == runs[1] and len(runs[0]) == 3


class Stoppable(Here):
    def stop(self):
        pass
