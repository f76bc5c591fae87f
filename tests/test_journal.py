import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import kills
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import rlaif.journal
from rlaif.errors import JournalError
from rlaif.journal import Journal, Manifest, Unit, broken, outputs_of, read_manifest, write_manifest


def unit(item_id="p1", text="yes", **changes):
    fields = {
        "stage": "revise",
        "item_id": item_id,
        "sample": 0,
        "request_hash": "abc",
        "result": {"text": text},
    }
    return Unit(**(fields | changes))


def test_a_unit_is_read_back_as_it_was_put(tmp_path):
    result = {"z": [1, 2.5, None, True], "a": {"text": 'naïve\n"行"\x00\ud800'}, "logprob": -1e-310}
    whole = Unit("label", "id/é\x00'", 7, "f" * 64, result, status="bad_request", tokens=12, seconds=0.1)
    with Journal(tmp_path / "deep" / "journal.db") as journal:
        journal.put([whole])
        assert journal.get("label", "id/é\x00'", 7, "f" * 64) == whole
    with Journal(tmp_path / "deep" / "journal.db") as journal:
        found = journal.get("label", "id/é\x00'", 7, "f" * 64)
        assert found == whole
        assert list(found.result) == ["z", "a", "logprob"]
        assert journal.known("label") == {("id/é\x00'", 7, "f" * 64): whole}


@pytest.mark.parametrize(
    "key",
    [
        ("label", "p1", 0, "abc"),
        ("revise", "p2", 0, "abc"),
        ("revise", "p1", 1, "abc"),
        ("revise", "p1", 0, "abd"),
    ],
)
def test_every_part_of_the_key_tells_units_apart(tmp_path, key):
    with Journal(tmp_path / "journal.db") as journal:
        journal.put([unit()])
        assert journal.get("revise", "p1", 0, "abc") == unit()
        assert journal.get(*key) is None
        stage, item_id, sample, request_hash = key
        journal.put([Unit(stage, item_id, sample, request_hash, {"text": "other"})])
        assert journal.get("revise", "p1", 0, "abc") == unit()
        assert journal.get(*key).result == {"text": "other"}


def test_units_are_counted_by_stage(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        journal.put(unit(f"p{number}") for number in range(3))
        journal.put([unit(stage="label")])
        journal.put([])
        assert [journal.count(stage) for stage in ("revise", "label", "ppo")] == [3, 1, 0]
        assert journal.known("ppo") == {}


def test_the_first_answer_stays(tmp_path):
    path = tmp_path / "journal.db"
    with Journal(path) as journal:
        journal.put([unit(text="first"), unit(text="second")])
        before = path.read_bytes()
        journal.put([unit(text="third", status="bad_request")])
        journal.put([unit(text="first")])
        assert journal.known("revise") == {("p1", 0, "abc"): unit(text="first")}
        assert journal.count("revise") == 1
    assert len(path.read_bytes()) == len(before)


@pytest.mark.parametrize(
    "bad",
    [
        unit("bad", result={"logprob": float("nan")}),
        unit("bad", result={"deep": [{"score": float("-inf")}]}),
        unit("bad", seconds=float("nan")),
        unit("bad\ud800"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_whole_call(tmp_path, bad):
    with Journal(tmp_path / "journal.db") as journal:
        with pytest.raises(JournalError, match=r"the answer revise/'bad.*'/0 cannot be stored"):
            journal.put([unit(), bad])
        assert journal.count("revise") == 0
        journal.put([unit()])
        assert journal.count("revise") == 1


def test_an_error_of_the_caller_stores_nothing(tmp_path):
    def failing():
        yield unit()
        raise KeyboardInterrupt

    with Journal(tmp_path / "journal.db") as journal:
        with pytest.raises(KeyboardInterrupt):
            journal.put(failing())
        assert journal.count("revise") == 0


def test_a_bug_of_the_caller_is_no_journal_error_and_stores_nothing(tmp_path):
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(OverflowError):
        journal.put([unit(), unit("p2", tokens=2**70)])
    assert journal.count("revise") == 0
    journal.put([unit("p3")])
    assert journal.count("revise") == 1
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.put([unit("p4")])


def test_commits_are_synced_and_no_write_ahead_log_is_kept(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        journal.put([unit()])
        ask = journal._connection.execute
        assert ask("PRAGMA journal_mode").fetchone() == ("delete",)
        assert ask("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert ask("PRAGMA trusted_schema").fetchone() == (0,)
        assert os.listdir(tmp_path) == ["journal.db"]


IDS = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 1)), max_size=4)


class Kept(RuleBasedStateMachine):
    """Puts, resumes, and kills just before or after a commit; a kill goes on from the files as they were."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=kills.MEMORY))
        self.generation = 0
        self.model = {}
        self.texts = 0
        self.journal = Journal(self.path)

    @property
    def path(self):
        return self.folder / str(self.generation) / "journal.db"

    def units(self, ids):
        self.texts += 1
        return [unit(item_id, str(self.texts), sample=sample) for item_id, sample in ids]

    def keep(self, units):
        for item in units:
            self.model.setdefault((item.item_id, item.sample, "abc"), item)

    @rule(ids=IDS)
    def add(self, ids):
        units = self.units(ids)
        self.journal.put(units)
        self.keep(units)

    @rule(ids=IDS, committed=st.booleans())
    def kill(self, ids, committed):
        image = self.folder / str(self.generation + 1)
        units = self.units(ids)

        class Copying(sqlite3.Connection):
            def execute(connection, statement, *values):
                if statement == "COMMIT" and not committed:
                    shutil.copytree(self.path.parent, image)
                result = super().execute(statement, *values)
                if statement == "COMMIT" and committed:
                    shutil.copytree(self.path.parent, image)
                return result

        self.journal.close()
        connect = sqlite3.connect
        rlaif.journal.sqlite3.connect = lambda path, **options: connect(path, factory=Copying, **options)
        try:
            self.journal = Journal(self.path)
        finally:
            rlaif.journal.sqlite3.connect = connect
        self.journal.put(units)
        self.journal.close()
        if not image.exists():  # nothing to commit
            shutil.copytree(self.path.parent, image)
        self.generation += 1
        self.journal = Journal(self.path)
        if committed:
            self.keep(units)

    @rule()
    def resume(self):
        self.journal.close()
        self.journal = Journal(self.path)

    @invariant()
    def holds_what_was_put_first(self):
        assert self.journal.known("revise") == self.model
        assert self.journal.count("revise") == len(self.model)

    def teardown(self):
        self.journal.close()
        shutil.rmtree(self.folder)


Kept.TestCase.settings = settings(max_examples=20, stateful_step_count=12, deadline=None, derandomize=True)
test_kills_and_resumes_keep_what_was_put_first = Kept.TestCase


MANIFEST = Manifest(
    stage="revise",
    inputs={"constitution": "c1", "model": "m1"},
    outputs={},
    counts={"prompts": 3, "quarantined_by_reason": {"empty": 1}},
    seconds=1.5,
    peak_memory_gib=0.25,
    versions={"torch": "2.13.0"},
)
INPUTS = {"constitution": "c1", "model": "m1"}


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "1-revise"
    (folder / "deep").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "deep" / "weights").write_bytes(b"\x00")
    MANIFEST.outputs = outputs_of(folder)
    write_manifest(folder, MANIFEST)
    return folder


def test_a_manifest_is_read_back_as_it_was_written(stage):
    assert read_manifest(stage) == MANIFEST
    assert MANIFEST.outputs == {
        "deep/weights": "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "rows.jsonl": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
    }
    assert broken(stage, INPUTS) == []


def test_a_stage_without_a_manifest_must_run(tmp_path):
    assert read_manifest(tmp_path) is None
    assert broken(tmp_path, {}) == ["no manifest"]
    assert broken(tmp_path / "absent", {}) == ["no manifest"]


@pytest.mark.parametrize(
    "inputs, reasons",
    [
        ({"constitution": "c2", "model": "m1"}, ["input `constitution` changed"]),
        ({"model": "m1"}, ["input `constitution` is gone"]),
        (INPUTS | {"prompts": "p1"}, ["input `prompts` is new"]),
        (
            {"model": "m2", "a": ""},
            ["input `a` is new", "input `constitution` is gone", "input `model` changed"],
        ),
    ],
)
def test_changed_inputs_are_reasons_to_run_again(stage, inputs, reasons):
    assert broken(stage, inputs) == reasons


def test_changed_outputs_are_reasons_to_run_again(stage):
    (stage / "notes.txt").write_text("a file that the manifest does not name")
    assert broken(stage, INPUTS) == []
    (stage / "rows.jsonl").write_text("{ }\n")
    (stage / "deep" / "weights").unlink()
    assert broken(stage, INPUTS) == [
        "`deep/weights` was changed or is missing",
        "`rows.jsonl` was changed or is missing",
    ]


def test_a_manifest_cannot_name_files_outside_of_its_folder(stage):
    (stage.parent / "outside").write_bytes(b"\x00")
    MANIFEST.outputs = {"../outside": "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"}
    write_manifest(stage, MANIFEST)
    assert broken(stage, INPUTS) == ["`../outside` was changed or is missing"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"schema": 1', '"schema": 2', "schema: 2; a manifest of schema 1 is expected. Delete it to run"),
        ('"seconds": 1.5', '"seconds": "1.5"', "seconds: Input should be a valid number"),
        ('"stage": "revise",', "", "stage: "),
        ('"stage"', '"stages": 1, "stage"', "stages: "),
        ("{", "", r"\(file\): Invalid JSON"),
    ],
)
def test_an_unreadable_manifest_is_an_error(stage, old, new, message):
    path = stage / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    for read in (read_manifest, lambda folder: broken(folder, INPUTS)):
        with pytest.raises(JournalError, match=rf"manifest\.json: {message}"):
            read(stage)
