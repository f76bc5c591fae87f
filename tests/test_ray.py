"""The engine `ray` without a cluster: what is sent, what comes back, what is refused, what is put into words.

`Here` stands for the cluster and lets one worker answer in this process, last row first; the tests of `Cluster` put a
package of their own in Ray's place.
"""

import importlib.machinery
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from scripted import Said, make_run
from test_recipe import complaint, recipe

from rlaif.engines import ray as engine_module
from rlaif.engines.engine import Answer, Question, ask, request_hash
from rlaif.engines.local import LocalEngine
from rlaif.engines.ray import Cluster, RayEngine, require
from rlaif.engines.workers import Worker, packed, unpacked
from rlaif.errors import ConfigError, DeviceError, EngineError, ModelError
from rlaif.journal import Journal
from rlaif.model.roles import BASE, SharedBase
from rlaif.pipeline import run_recipe
from rlaif.plan import plan
from rlaif.progress import Progress
from rlaif.recipe import ModelSection, RaySection, load_recipe
from rlaif.stages import revise

SECRET = "hunter2-and-more"
SAYS = [[{"role": "user", "content": "x" * 9 * n}] for n in range(1, 4)]
QUESTIONS = [
    *(Question(f"g{n}", says, max_new_tokens=6, temperature=0.0) for n, says in enumerate(SAYS)),
    *(Question(f"s{n}", says, max_new_tokens=6, seed=n + 40, sample=n) for n, says in enumerate(SAYS)),
    *(Question(f"c{n}", says, options=("A", "B")) for n, says in enumerate(SAYS)),
]


class Here:
    """A cluster of one worker in this process, which answers the last row first."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def rows(self, rows: Sequence[dict[str, Any]], task: str) -> Iterator[dict[str, Any]]:
        self.tasks.append(task)
        worker = Worker(task)
        for row in reversed(rows):
            done = worker({"number": [row["number"]], "questions": [row["questions"]]})
            yield {"number": done["number"][0], "result": done["result"][0]}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for module in ("rlaif.engines.workers", "rlaif.model.base"):
        monkeypatch.setattr(f"{module}.default_device", lambda: torch.device("cpu"))


def model(folder: Path, **settings: Any) -> ModelSection:
    return ModelSection(model_name_or_path=str(folder), **settings)


def engine(folder: Path, cluster: Any = None, *, kind: str = "cpu", size: int = 2, **settings: Any) -> RayEngine:
    return RayEngine(model(folder, **settings), cluster or Here(), kind=kind, batch_size=size)


def all_of(found: RayEngine, questions: Sequence[Question]) -> list[Answer]:
    groups = found.answers(found.batches(questions))
    answers = {id(question): answer for group in groups for question, answer in group}
    return [answers[id(question)] for question in questions]


# --- questions and answers ------------------------------------------------------------------------------------------


def test_workers_answer_as_the_model_on_this_machine_does(tiny_model: Path) -> None:
    local = LocalEngine(SharedBase.load(model(tiny_model)), BASE, batch_size=2)
    expected = {
        question.item_id: answer for group in local.answers(local.batches(QUESTIONS)) for question, answer in group
    }
    for question, answer in zip(QUESTIONS, all_of(engine(tiny_model), QUESTIONS), strict=True):
        other = expected[question.item_id]
        assert replace(answer, logprobs=()) == replace(other, logprobs=())
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_questions_and_answers_travel_unchanged() -> None:
    question = Question(
        "ü/critique-0", [{"role": "user", "content": 'a"\n\ud800\U0001f600\0'}], 2, ("A", "B"), 3, 0.1, 0.9, 2**62 + 1
    )
    (row,) = json.loads(packed([question]))
    assert Question(**{**row, "options": tuple(row["options"])}) == question
    answers = [Answer("\u2028ok", False, (-0.1234567890123456, -float("inf")), 7), Answer(error="no")]
    text = json.dumps({"answers": [vars(answer) | {"logprobs": list(answer.logprobs)} for answer in answers]})
    assert unpacked(text) == answers


def test_a_batch_holds_questions_of_one_kind_and_similar_length(tiny_model: Path) -> None:
    batches = engine(tiny_model, size=1).batches(QUESTIONS[::-1])  # two rounds of one
    names = [sorted(question.item_id for question in batch) for batch in batches]
    assert sorted(names) == [["c0"], ["c1", "c2"], ["g0"], ["g1", "g2"], ["s0"], ["s1", "s2"]]


def test_no_worker_is_asked_where_there_is_nothing_to_ask(tiny_model: Path) -> None:
    cluster = Here()
    assert list(engine(tiny_model, cluster).answers([])) == [] and cluster.tasks == []


def test_a_question_that_does_not_fit_fails_alone(tiny_model: Path) -> None:
    long = Question("long", [{"role": "user", "content": "x"}], max_new_tokens=99999)
    short = replace(QUESTIONS[3], item_id="short")
    first, second = all_of(engine(tiny_model), [replace(short, max_new_tokens=99999, item_id="long"), short])
    assert first.error.startswith("`long`: ") and "context holds 16384" in first.error
    assert second == all_of(engine(tiny_model), [short])[0] and not second.error
    mixed = Worker(json.dumps(task_of(engine(tiny_model))))
    done = mixed({"number": [0], "questions": [packed([long, short])]})
    assert [bool(answer.error) for answer in unpacked(done["result"][0])] == [True, False]


def task_of(found: RayEngine) -> dict[str, Any]:
    cluster = Here()
    list(RayEngine(found._model, cluster, kind="cpu", batch_size=2).answers([[QUESTIONS[6]]]))
    task: dict[str, Any] = json.loads(cluster.tasks[0])
    return task


class Failing(Here):
    """A cluster whose worker finds other weights after so many rows."""

    def rows(self, rows: Sequence[dict[str, Any]], task: str) -> Iterator[dict[str, Any]]:
        yield from list(super().rows(rows, task))[:2]
        other = json.loads(task)
        other["identity"]["weights"] = {"model.safetensors": "0"}
        yield from super().rows(rows[2:], json.dumps(other))


def test_an_error_in_a_worker_stops_with_its_message_and_what_was_answered_is_kept(
    tiny_model: Path, tmp_path: Path
) -> None:
    questions = QUESTIONS[:3] + QUESTIONS[6:]
    with Journal(tmp_path / "journal.db") as journal:
        with pytest.raises(EngineError, match=r"on the machine \S+: the model `.*` is another one than where the run"):
            list(ask(journal, "revise", engine(tiny_model, Failing(), size=1), questions, Said(), ""))
        assert journal.count("revise") == 3  # one of the lengths alone, and two
        said = Said()
        assert len(list(ask(journal, "revise", engine(tiny_model, size=1), questions, said, ""))) == 6
    assert said.lines == ["  : 3 of 6 taken from the journal"]


def test_a_worker_without_the_model_or_the_gpu_says_so(tiny_model: Path, tmp_path: Path) -> None:
    task = task_of(engine(tiny_model))
    gone = task | {"model": task["model"] | {"model_name_or_path": str(tmp_path / "gone")}}
    without = task | {"identity": task["identity"] | {"device": "cuda"}}
    for wrong, words in ((gone, "cannot be loaded"), (without, "there is no NVIDIA GPU that torch can use")):
        done = Worker(json.dumps(wrong))({"number": [0], "questions": [packed(QUESTIONS[:1])]})
        with pytest.raises(EngineError, match=words):
            unpacked(done["result"][0])


# --- identity -------------------------------------------------------------------------------------------------------


def test_answers_of_another_precision_device_or_model_are_not_taken(tiny_model: Path, tiny_model_64: Path) -> None:
    found = [
        engine(tiny_model),
        engine(tiny_model, kind="cuda"),
        engine(tiny_model, kind="cuda", dtype="float32"),
        engine(tiny_model, load_in_4bit=True),
        engine(tiny_model_64),
    ]
    assert [one.identity["dtype"] for one in found[:3]] == ["torch.float32", "torch.bfloat16", "torch.float32"]
    assert len({request_hash(one.identity, QUESTIONS[0]) for one in found}) == 5
    base = SharedBase.load(model(tiny_model))
    assert found[0].identity == base.identity | {"adapter": "", "device": "cpu"}


def test_a_model_that_is_not_there_and_a_precision_that_a_cpu_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        engine(tmp_path / "gone").identity  # noqa: B018
    with pytest.raises(DeviceError, match=r"model\.dtype: `float16` on a CPU"):
        require(model(tmp_path, dtype="float16"), RaySection())


def test_what_a_stage_depends_on_names_the_device_and_not_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inputs(**ray: Any) -> dict[str, str]:
        return revise.inputs(make_run(tmp_path, monkeypatch, revise={"critic": "ray"}, ray=ray))

    assert inputs() == inputs(address="10.0.0.1:6379", workers=64, cpus_per_worker=8)
    assert inputs(gpus_per_worker=1) == inputs(gpus_per_worker=0.5) != inputs()
    assert revise.inputs(make_run(tmp_path, monkeypatch)) != inputs()


@pytest.mark.slow
def test_a_plan_starts_no_cluster_and_knows_what_workers_have_answered(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_runs.write_recipe(
        tmp_path / "tiny.yaml",
        tiny_model,
        output=str(tmp_path / "run"),
        stages=["revise"],
        revise={"responder": "ray", "prompts_per_tag": {"harmful": 2, "ordinary": 2}},
    )

    class Stopping(Here):
        def stop(self) -> None:
            pass

    monkeypatch.setattr("rlaif.stages.run.Cluster", lambda settings, say: Stopping())
    run_recipe(load_recipe(path), Progress(quiet=True))
    (tmp_path / "run" / "1-revise" / "manifest.json").unlink()
    monkeypatch.setattr("rlaif.stages.run.Cluster", lambda settings, say: None)
    (found,) = plan(load_recipe(path))
    assert [(wave.title, wave.asked, len(wave.missing)) for wave in found.waves][0] == ("responses", 4, 0)


# --- the recipe -----------------------------------------------------------------------------------------------------

RECIPE = "name: r\nmodel: tiny\nrevise: {responder: ray, critic: ray}\nlabel: {judge: ray}\n"


def test_a_recipe_names_ray_wherever_an_engine_may_be_named(tmp_path: Path) -> None:
    found = recipe(tmp_path, RECIPE + "evaluate: {judge: ray}\n")
    assert (found.ray.address, found.ray.workers, found.ray.cpus_per_worker, found.ray.kind) == (None, 2, 1, "cpu")
    assert found.engines_of("revise") == {"responder": "ray", "critic": "ray", "reviser": "base"}
    for address in ("auto", "10.0.0.1:6379", "head.example:6379"):
        assert recipe(tmp_path, f"{RECIPE}ray: {{address: '{address}'}}\n").ray.address == address
    assert recipe(tmp_path, RECIPE + "ray: {gpus_per_worker: 0.5}\n").ray.kind == "cuda"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{address: head}", "ray.address: `auto` or HOST:PORT is expected"),
        ("{address: 'ray://head:10001'}", "ray.address: Ray Data cannot be driven through a Ray client"),
        ("{address: 'http://head:8265'}", "ray.address: `auto` or HOST:PORT"),
        ("{workers: 0}", "ray.workers"),
        ("{cpus_per_worker: 0}", "ray.cpus_per_worker"),
        ("{gpus_per_worker: 2}", "ray.gpus_per_worker"),
        ("{worker: 3}", "ray.worker: unknown key; did you mean `workers`?"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(section: str, words: str, tmp_path: Path) -> None:
    assert words in complaint(tmp_path, f"{RECIPE}ray: {section}\n")


def test_without_the_package_there_is_one_message_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> None:
        return None

    monkeypatch.setattr(engine_module.importlib.util, "find_spec", find)
    run = make_run(tmp_path, monkeypatch, evaluate={"judge": "ray"})
    run.check_keys(["revise"])
    with pytest.raises(ConfigError, match=r"pip install 'rlaif-toolkit\[ray\]'"):
        run.check_keys(["revise", "evaluate"])


# --- the cluster, with another package in Ray's place ---------------------------------------------------------------


class RayError(Exception):
    """As `ray.exceptions.RayError`."""


class TaskError(RayError):
    """As Ray reports an exception of a worker: with everything that it held."""

    def __init__(self) -> None:
        super().__init__(
            f'ray::W.submit()\n  File "/a/rlaif/c.py", line 7, in g\n    x({SECRET})\n  File "/d.py", line 3, in f\n'
            f"    y()\n    ^^^\njson.decoder.JSONDecodeError: {SECRET}\n\nThe above exception was the direct cause of "
            'the following exception:\n\nray::W\n  File "/z.py", line 1, in z\nUserCodeException: UDF failed'
        )


class FakeRay:
    """The parts of the package `ray` that are used; remembers what it was told."""

    def __init__(self, nodes: Sequence[dict[str, float]] = ({"CPU": 4.0},), fails: Exception | None = None) -> None:
        self.calls: list[Any] = []
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.problem: Exception | None = None
        self.running, self._nodes, self._fails = False, nodes, fails
        self.data = self
        self.DataContext = SimpleNamespace(get_current=lambda: SimpleNamespace())

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self._fails:
            raise self._fails
        self.running = True

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.running = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes] + [{"Alive": False, "Resources": {}}]

    def ActorPoolStrategy(self, size: int) -> int:
        return size

    def from_items(self, rows: list[dict[str, Any]], override_num_blocks: int) -> "FakeRay":
        self.rows = rows
        assert override_num_blocks == len(rows)
        return self

    def map_batches(self, worker: Any, **options: Any) -> "FakeRay":
        self.calls.append(options)
        return self

    def iter_batches(self, **options: Any) -> Iterator[dict[str, list[Any]]]:
        for row in self.rows:
            yield {"number": [row["number"]], "result": [row["questions"].upper()]}
        if self.problem:
            raise self.problem


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def install(ray: FakeRay) -> FakeRay:
        for name in ("ray", "ray.data"):
            monkeypatch.setitem(sys.modules, name, ray)
        return ray

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.data")}
    yield install
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


ROWS = [{"number": n, "questions": f"q{n}"} for n in range(3)]


def test_a_cluster_is_started_here_with_cpus_to_spare_and_stopped_with_its_folder(fake: Any) -> None:
    ray = fake(FakeRay())
    cluster = Cluster(RaySection(workers=5, cpus_per_worker=2))
    with pytest.raises(EngineError, match="a worker failed with JSONDecodeError"):
        ray.problem = TaskError()
        list(cluster.rows(ROWS, "task"))
    ray.problem = None
    assert list(cluster.rows(ROWS, "task")) == [{"number": n, "result": f"Q{n}"} for n in range(3)]
    started, *_ = ray.calls
    assert (started["address"], started["num_cpus"], started["include_dashboard"]) == ("local", 12, False)
    folder = Path(started["_temp_dir"])
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    cluster.stop()
    assert ray.calls[-1] == "shutdown" and not folder.exists()
    cluster.stop()
    assert [one for one in ray.calls if one == "shutdown"] == ["shutdown"]


def test_a_stage_that_ends_stops_the_cluster_and_a_connection_of_someone_else_is_left_alone(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(FakeRay())
    run = make_run(tmp_path, monkeypatch, revise={"critic": "ray"})
    run.release()
    list(run._cluster.rows(ROWS, "task"))
    run.release()
    assert ray.calls[-1] == "shutdown"
    ray.running = True
    cluster = Cluster(RaySection())
    list(cluster.rows(ROWS, "task"))
    cluster.stop()
    assert ray.running


def test_as_many_workers_are_started_as_there_is_room_and_work_for(fake: Any) -> None:
    lines: list[str] = []
    settings = RaySection(workers=8, cpus_per_worker=2, gpus_per_worker=0.5)

    def started(nodes: Sequence[dict[str, float]], rows: int) -> int:
        ray = fake(FakeRay(nodes))
        cluster = Cluster(settings, lines.append)
        list(cluster.rows([{"number": n, "questions": ""} for n in range(rows)], "task"))
        cluster.stop()
        size: int = ray.calls[1]["compute"]
        return size

    assert started([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 64.0}], 99) == 3
    assert lines[0].startswith("  engine `ray`: room for 3 of 8 workers (2 CPUs and 0.5 GPUs each; there are 8 CPUs")
    assert started([{"CPU": 99.0, "GPU": 8.0}], 5) == 5 and len(lines) == 1
    with pytest.raises(EngineError, match=r"needs 2 CPUs and 0\.5 GPUs, and no machine of the cluster has them"):
        started([{"CPU": 64.0}], 5)


def test_a_cluster_that_is_not_there_is_one_message(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(FakeRay(fails=ConnectionError("Could not find any\nrunning Ray instance.")))
    with pytest.raises(EngineError) as found:
        list(Cluster(RaySection(address="auto")).rows(ROWS, "task"))
    assert str(found.value) == (
        "engine `ray`: no cluster at ray.address `auto`: Could not find any running Ray instance. Start one with "
        "`ray start --head` (one that asks for a token needs RAY_AUTH_MODE=token), or leave ray.address out for a "
        "cluster on this machine; then run again."
    )
    assert ray.calls[-1] == "shutdown"
    ray.calls.clear()
    with pytest.raises(EngineError, match=r"no cluster at ray\.address `127\.0\.0\.1:1`: "):
        list(Cluster(RaySection(address="127.0.0.1:1")).rows(ROWS, "task"))
    assert ray.calls == ["shutdown"]  # Ray was not asked


def test_what_a_worker_died_of_is_told_without_what_it_was_asked(fake: Any) -> None:
    ray = fake(FakeRay())
    for problem, words in (
        (TaskError(), "a worker failed with JSONDecodeError at c.py:7."),
        (RayError(SECRET), "a worker or a machine was lost (RayError)"),
    ):
        ray.problem = problem
        with pytest.raises(EngineError) as found:
            list(Cluster(RaySection()).rows(ROWS, "task"))
        assert words in str(found.value) and SECRET not in str(found.value)
        assert found.value.__suppress_context__
        ray.running = False


def test_ray_is_found_where_it_is_installed() -> None:
    assert importlib.machinery.PathFinder.find_spec("ray") is not None
    require(ModelSection(model_name_or_path="tiny"), RaySection())
