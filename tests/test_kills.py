"""What is left when a process is killed with SIGKILL at any step: see `kills`."""

import itertools
import tempfile
from pathlib import Path

import kills
import pytest

from rlaif.files import (
    append_jsonl,
    fresh_folder,
    mark_complete,
    newest_complete,
    repair_jsonl,
    repair_tree,
    run_lock,
    write_json,
    write_jsonl,
)
from rlaif.journal import Journal, Manifest, Unit, broken, outputs_of, write_manifest

ROWS = [{"step": number, "text": "naïve – 行"} for number in range(4)]
LINES = "".join(f'{{"step": {number}, "text": "naïve – 行"}}\n' for number in range(4)).encode()
OLD, NEW = {"a.txt": "old a"}, {"a.txt": "new a", "deep/b.txt": "new b"}
# The second batch outgrows a page of the file, and its third unit has the key of the first unit of all.
BATCHES = [
    [Unit("revise", f"p{number}", 0, "hash", {"text": "short"}, tokens=3) for number in range(3)],
    [Unit("revise", f"q{number}", 0, "hash", {"text": "long" * 2000}, tokens=4) for number in range(2)]
    + [Unit("revise", "p0", 0, "hash", {"text": "another answer"})],
    [Unit("label", "p0", 1, "hash", {"a": 0.25}, status="bad_request", seconds=1.5)],
]
DISTINCT = [3, 5, 6]  # units in the journal after each batch


def nothing(folder):
    pass


def fill(folder, contents):
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        kills.step()


def contents(folder):
    if not folder.exists():
        return None
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if ".rlaif-" in path.name]


def acknowledge(folder):
    with (folder / "acknowledged").open("ab", buffering=0) as file:
        file.write(b".")


def acknowledged(folder):
    path = folder / "acknowledged"
    return path.stat().st_size if path.exists() else 0


def killed_writing():
    def check(folder):
        assert (folder / "x.json").read_text() in ('{"is": "old"}', '{\n  "is": "new"\n}\n')
        repair_tree(folder)
        assert [path.name for path in folder.iterdir()] == ["x.json"]

    return kills.at_every_step(
        lambda folder: (folder / "x.json").write_text('{"is": "old"}'),
        lambda folder: write_json(folder / "x.json", {"is": "new"}),
        check,
    )


def build(folder):
    with fresh_folder(folder / "stage") as new:
        fill(new, NEW)


def killed_replacing_a_folder():
    absent = 0

    def check(folder):
        nonlocal absent
        found = contents(folder / "stage")
        assert found in (OLD, NEW, None)
        with run_lock(folder):
            repaired = contents(folder / "stage")
        assert repaired == (found or NEW)
        assert leftovers(folder) == []
        absent += found is None
        build(folder)
        assert contents(folder / "stage") == NEW
        assert leftovers(folder) == []

    count = kills.at_every_step(lambda folder: fill(folder / "stage", OLD), build, check)
    assert absent == 6  # from after the first rename to before the second: open and fsync of the parent lie between
    return count


def killed_building_a_folder():
    def check(folder):
        found = contents(folder / "stage")
        assert found in (NEW, None)
        repair_tree(folder)
        assert contents(folder / "stage") == found
        assert leftovers(folder) == []

    return kills.at_every_step(nothing, build, check)


def killed_repairing():
    """Kill the repair of a folder that was killed between its two renames."""

    def prepare(folder):
        fill(folder / ".stage.rlaif-old", OLD)
        fill(folder / ".stage.rlaif-new", NEW)

    def check(folder):
        repair_tree(folder)
        assert contents(folder / "stage") == NEW
        assert leftovers(folder) == []

    return kills.at_every_step(prepare, repair_tree, check)


def killed_saving_a_checkpoint():
    files = {"model.bin": "weights", "optimizer.bin": "moments", "rng/0.json": "[1, 2]"}

    def save(folder, number):
        fill(folder / f"checkpoint-{number}", files)
        mark_complete(folder / f"checkpoint-{number}")

    newest = []

    def check(folder):
        path = newest_complete(folder)
        newest.append(path.name)
        found = contents(path)
        del found["COMPLETE"]
        assert found == files

    count = kills.at_every_step(lambda folder: save(folder, 9), lambda folder: save(folder, 10), check)
    assert sorted(set(newest)) == ["checkpoint-10", "checkpoint-9"]
    return count


def append(folder):
    for row in ROWS:
        append_jsonl(folder / "rows.jsonl", row)
        acknowledge(folder)


def check_appended(folder):
    rows = folder / "rows.jsonl"
    repair_jsonl(rows)
    stored = rows.read_bytes() if rows.exists() else b""
    assert LINES.startswith(stored)
    count = stored.count(b"\n")
    assert count - acknowledged(folder) in (0, 1)
    for row in ROWS[count:]:
        append_jsonl(rows, row)
    assert rows.read_bytes() == LINES


def put(folder):
    with Journal(folder / "journal.db") as journal:
        for batch in BATCHES:
            journal.put(batch)
            acknowledge(folder)


def check_put(folder):
    first = acknowledged(folder)
    with Journal(folder / "journal.db") as journal:
        stored = journal.count("revise") + journal.count("label")
        assert stored in [0, *DISTINCT][first : first + 2], (
            "a batch is whole or absent, and what was acknowledged is there"
        )
        for batch in BATCHES:
            journal.put(batch)
        assert journal.known("revise") == {(unit.item_id, 0, "hash"): unit for unit in BATCHES[0] + BATCHES[1][:2]}
        assert journal.known("label") == {("p0", 1, "hash"): BATCHES[2][0]}


HEADER, PAGE = 512, 4096  # of a rollback journal: its header, then of each page a number, the old bytes and a sum


def torn():
    """Cut a commit short in each file that it writes: around the edges of each part, and here and there inside.

    Most of all the bytes stand in the midst of a page like the next, and each would take a moment. Returns how often
    the file was cut in which that happened less often.
    """
    kept = [Unit("revise", f"p{number:02}", 0, "hash", {"text": "a" * 900}) for number in range(20)]
    batch = [Unit("revise", f"q{number}", 0, "hash", {"text": "b" * 1500}) for number in range(3)]
    cut = {"rollback journal": 0, "database": 0}
    with tempfile.TemporaryDirectory(dir=kills.MEMORY) as name:
        path = Path(name) / "journal.db"
        with Journal(path) as journal:
            journal.put(kept)
            before = path.read_bytes()
            journal.put(batch)
        pages = range(0, path.stat().st_size + 1, PAGE)

    def put(folder):
        with Journal(folder / "journal.db") as journal:
            journal.put(batch)

    def check(folder):
        written = (folder / "journal.db").read_bytes() != before
        cut["database" if written else "rollback journal"] += 1
        with Journal(folder / "journal.db") as journal:
            stored = list(journal.known("revise").values())
            assert stored in (kept, kept + batch)
            journal.put(batch)
            assert list(journal.known("revise").values()) == kept + batch

    fields = {HEADER + number * (PAGE + 8) + field for number in range(4) for field in (0, 4, PAGE + 4)}
    edges = {edge + near for edge in {*pages, *fields} for near in (-1, 0, 1)}
    sizes = sorted({*range(30), *edges, *range(0, pages[-1], 509), 2 * pages[-1]} - {-1})
    kills.at_bytes(sizes, lambda folder: (folder / "journal.db").write_bytes(before), put, check)
    return min(cut.values())


def run_stage(folder):
    """A small stage: units into the journal, rows into a fresh folder, then the manifest."""
    with run_lock(folder), Journal(folder / "journal.db") as journal:
        known = journal.known("revise")
        for number in range(3):
            if (str(number), 0, "hash") not in known:
                with (folder / "asked").open("a") as file:
                    file.write(f"{number}\n")
                journal.put([Unit("revise", str(number), 0, "hash", {"text": f"answer {number}"})])
        stage = folder / "1-revise"
        with fresh_folder(stage) as new:
            write_jsonl(new / "rows.jsonl", [unit.result for _, unit in sorted(journal.known("revise").items())])
        write_manifest(stage, Manifest("revise", {"prompts": "1"}, outputs_of(stage), {}, 0.5, 0.0, {}))


def killed_in_a_stage():
    answers = '{"text": "answer 0"}\n{"text": "answer 1"}\n{"text": "answer 2"}\n'
    holding = []

    def check(folder):
        holds = broken(folder / "1-revise", {"prompts": "1"}) == []
        if holds:
            assert (folder / "1-revise" / "rows.jsonl").read_text() == answers
        run_stage(folder)
        assert broken(folder / "1-revise", {"prompts": "1"}) == []
        assert (folder / "1-revise" / "rows.jsonl").read_text() == answers
        assert leftovers(folder) == []
        asked = (folder / "asked").read_text().splitlines()
        assert sorted(set(asked)) == ["0", "1", "2"]
        assert len(asked) <= 4, "no more than the one answer that was under way is asked for again"
        holding.append(holds)

    count = kills.at_every_step(nothing, run_stage, check, stride=3)
    assert set(holding) == {True, False}
    return count


SCENARIOS = {
    "writing": killed_writing,
    "replacing": killed_replacing_a_folder,
    "building": killed_building_a_folder,
    "repairing": killed_repairing,
    "checkpoint": killed_saving_a_checkpoint,
    "appending": lambda: kills.at_every_step(nothing, append, check_appended),
    "appending, inside a write": lambda: kills.at_bytes(itertools.count(0, 3), nothing, append, check_appended),
    "journal": lambda: kills.at_every_step(nothing, put, check_put),
    "journal, inside a write": lambda: kills.at_bytes(itertools.count(3, 661), nothing, put, check_put),
    "stage": killed_in_a_stage,
    "torn": torn,
}
LEAST = {"writing": 6, "replacing": 30, "building": 18, "repairing": 10, "checkpoint": 18, "appending": 8}
LEAST |= {"appending, inside a write": len(LINES) // 3, "journal": 40, "journal, inside a write": 20, "stage": 26}


SELDOM = ("building", "repairing", "checkpoint", "appending, inside a write", "journal, inside a write")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in LEAST])
def test_a_kill_at_any_step_loses_nothing_that_was_acknowledged(name):
    assert kills.in_own_process(__file__, name) >= LEAST[name]


@pytest.mark.slow
def test_a_commit_cut_short_after_any_byte_is_whole_or_absent():
    assert kills.in_own_process(__file__, "torn") >= 50


if __name__ == "__main__":
    kills.main(SCENARIOS)
