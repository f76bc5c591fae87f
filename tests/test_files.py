import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

from rlaif.errors import JournalError
from rlaif.files import (
    append_jsonl,
    fresh_folder,
    hashes,
    mark_complete,
    newest_complete,
    repair_jsonl,
    run_lock,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from rlaif.records import Prompt

ROWS = [{"step": number, "text": "naïve – 行"} for number in range(4)]
LINES = "".join(f'{{"step": {number}, "text": "naïve – 行"}}\n' for number in range(4)).encode()
OLD, NEW = {"a.txt": "old a"}, {"a.txt": "new a", "deep/b.txt": "new b"}


def fill(folder, contents):
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def build(folder):
    with fresh_folder(folder / "stage") as new:
        fill(new, NEW)


def contents(folder):
    if not folder.exists():
        return None
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if ".rlaif-" in path.name]


def test_files_are_written_as_given(tmp_path):
    write_bytes(tmp_path / "deep" / "x", b"\x00\xff")
    write_text(tmp_path / "t", "line\r\né\n")
    write_json(tmp_path / "j", {"b": 1, "a": ["é"]})
    write_jsonl(tmp_path / "l", [*ROWS, Prompt(id="p", prompt="Why?")])
    assert (tmp_path / "deep" / "x").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t").read_bytes() == b"line\r\n\xc3\xa9\n"
    assert (tmp_path / "j").read_bytes() == b'{\n  "b": 1,\n  "a": [\n    "\xc3\xa9"\n  ]\n}\n'
    assert (tmp_path / "l").read_bytes().startswith(LINES + b'{"id":')
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_values_that_json_cannot_hold_are_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "x"
    path.write_bytes(LINES)
    for write in (write_json, append_jsonl, lambda path, row: write_jsonl(path, [row])):
        with pytest.raises(JournalError, match="Finite numbers and Unicode text are expected"):
            write(path, {"value": value})
    assert path.read_bytes() == LINES
    assert leftovers(tmp_path) == []


def test_a_full_disk_keeps_the_old_file_and_names_the_new_one(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with (
        kills.full_disk(100),
        pytest.raises(JournalError, match=r"x\.txt: File too large\. Check free disk space"),
    ):
        write_text(path, "n" * 101)
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_full_disk_keeps_every_acknowledged_row(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed
    path = tmp_path / "rows.jsonl"
    length = len(LINES) // 4
    for size in range(len(LINES) - 1):
        path.unlink(missing_ok=True)
        acknowledged = 0
        with kills.full_disk(size), pytest.raises(JournalError):
            for row in ROWS:
                append_jsonl(path, row)
                acknowledged += 1
        assert acknowledged == size // length
        assert path.read_bytes() == LINES[: acknowledged * length]


def test_a_full_disk_keeps_the_old_folder(tmp_path):
    fill(tmp_path / "stage", OLD)
    with pytest.raises(JournalError), fresh_folder(tmp_path / "stage") as new, kills.full_disk(10):
        write_text(new / "a.txt", "new a" * 3)
    assert contents(tmp_path) == {"stage/a.txt": "old a"}


def test_rows_cut_at_any_byte_lose_only_the_torn_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed
    path = tmp_path / "rows.jsonl"
    length = len(LINES) // 4
    for offset in range(len(LINES) + 1):
        path.write_bytes(LINES[:offset])
        whole = (offset + 1) // length  # a row that lacks nothing but its line end is whole
        assert repair_jsonl(path) == max(0, offset - whole * length), offset
        assert path.read_bytes() == LINES[: whole * length]
        assert repair_jsonl(path) == 0
        append_jsonl(path, {"n": 1})
        assert path.read_bytes() == LINES[: whole * length] + b'{"n": 1}\n'


def test_bytes_are_on_disk_before_a_name_points_to_them(tmp_path, monkeypatch):
    done = []

    def recorded(name):
        original = getattr(os, name)

        def call(what, *target):
            if name == "fsync":
                done.append(("fsync", os.fstat(what).st_ino))
            else:
                done.append((name, os.stat(what).st_ino))
            original(what, *target)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        recorded(name)
    folder = tmp_path.stat().st_ino
    write_text(tmp_path / "a", "text")
    a = (tmp_path / "a").stat().st_ino
    assert done == [("fsync", a), ("replace", a), ("fsync", folder)]

    done.clear()
    append_jsonl(tmp_path / "rows", {})
    append_jsonl(tmp_path / "rows", {})
    rows = (tmp_path / "rows").stat().st_ino
    assert done == [("fsync", rows), ("fsync", folder), ("fsync", rows)]

    done.clear()
    build(tmp_path)
    stage = (tmp_path / "stage").stat().st_ino
    inside = {path.stat().st_ino for path in (tmp_path / "stage").rglob("*")}
    renamed = done.index(("rename", stage))
    assert {*inside, stage} <= {inode for _, inode in done[:renamed]}
    assert done[renamed + 1 :] == [("fsync", folder)]

    done.clear()
    mark_complete(tmp_path / "stage")
    marked = ("replace", (tmp_path / "stage" / "COMPLETE").stat().st_ino)
    assert {*inside, stage, folder} <= {inode for _, inode in done[: done.index(marked)]}


def test_zeros_after_a_power_failure_are_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + b'{"a": 1' + bytes(4096))
    append_jsonl(path, {"n": 1})
    assert path.read_bytes() == LINES + b'{"n": 1}\n'


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_building_keeps_the_old_folder(tmp_path, error):
    fill(tmp_path / "stage", OLD)
    with pytest.raises(error), fresh_folder(tmp_path / "stage") as new:
        fill(new, NEW)
        raise error
    assert contents(tmp_path) == {"stage/a.txt": "old a"}


def test_an_error_between_the_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "stage", OLD)
    rename = os.rename

    def refuse_the_second(source, target):
        if str(source).endswith("new"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    with pytest.raises(JournalError, match="Permission denied"), fresh_folder(tmp_path / "stage") as new:
        fill(new, NEW)
        monkeypatch.setattr(os, "rename", refuse_the_second)
    assert contents(tmp_path) == {"stage/a.txt": "old a"}


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "stage").write_text("mine")
    with pytest.raises(JournalError, match="is a file"), fresh_folder(tmp_path / "stage"):
        pass
    assert contents(tmp_path) == {"stage": "mine"}


def test_a_linked_stage_folder_is_replaced_and_its_target_kept(tmp_path):
    fill(tmp_path / "elsewhere", OLD)
    (tmp_path / "stage").symlink_to(tmp_path / "elsewhere")
    build(tmp_path)
    assert contents(tmp_path / "stage") == NEW
    assert contents(tmp_path / "elsewhere") == OLD


def test_hashes_name_every_file_but_the_manifest_and_leftovers(tmp_path):
    fill(tmp_path, {"a": "", "deep/manifest.json": "", "manifest.json": "", ".a.12.rlaif-tmp": ""})
    fill(tmp_path, {"deep/.x.rlaif-old/a": "", "deep/.x.rlaif-new/a": ""})
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hashes(tmp_path, without="manifest.json") == {"a": empty, "deep/manifest.json": empty}


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    fill(tmp_path, {"secret": "key", "stage/a": "x"})
    (tmp_path / "stage" / "b").symlink_to("../secret")
    with pytest.raises(JournalError, match="stage/b: a link that leads out of its folder"):
        hashes(tmp_path / "stage", without="manifest.json")


def test_the_newest_checkpoint_is_that_of_the_highest_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-120", "checkpoint-30", "best"):
        fill(tmp_path / name, {"model.bin": name})
        mark_complete(tmp_path / name)
    assert newest_complete(tmp_path).name == "checkpoint-120"
    assert newest_complete(tmp_path, "checkpoint-?").name == "checkpoint-9"
    assert newest_complete(tmp_path / "none") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.bin").write_text("other!!"),
        lambda folder: (folder / "model.bin").write_text("short"),
        lambda folder: (folder / "model.bin").unlink(),
        lambda folder: (folder / "optimizer.pt").write_text("planted"),
        lambda folder: (folder / "COMPLETE").unlink(),
        lambda folder: (folder / "COMPLETE").write_text("{"),
        lambda folder: (folder / "COMPLETE").write_text("[]"),
        lambda folder: (folder / "link").symlink_to("/etc/hostname"),
    ],
)
def test_a_checkpoint_that_changed_is_passed_over(tmp_path, change):
    for number in (1, 2):
        fill(tmp_path / f"checkpoint-{number}", {"model.bin": "weights"})
        mark_complete(tmp_path / f"checkpoint-{number}")
    recorded = json.loads((tmp_path / "checkpoint-2" / "COMPLETE").read_text())
    assert recorded["model.bin"]["size"] == 7
    assert newest_complete(tmp_path).name == "checkpoint-2"
    change(tmp_path / "checkpoint-2")
    assert newest_complete(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_checkpoint_without_files_is_not_marked(tmp_path, make):
    make(tmp_path / "checkpoint-1")
    with pytest.raises(JournalError, match="checkpoint-1"):
        mark_complete(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "COMPLETE").exists()


LOCKING = """
import os, signal, sys
from pathlib import Path
from rlaif.errors import JournalError
from rlaif.files import run_lock
try:
    with run_lock(Path(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGKILL)
except JournalError as problem:
    print(problem)
"""


def test_a_second_process_is_refused_and_a_killed_one_frees_the_folder(tmp_path):
    command = [sys.executable, "-c", LOCKING, str(tmp_path)]
    with run_lock(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith(f"{tmp_path}: in use by another process (process id {os.getpid()}). ")
    assert subprocess.run(command).returncode == -9
    with run_lock(tmp_path):
        assert (tmp_path / ".lock.pid").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / ".lock.pid").exists()


def test_the_lock_is_not_taken_twice_in_one_process(tmp_path):
    with run_lock(tmp_path), pytest.raises(JournalError, match=str(os.getpid())), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file/run: Not a directory"), run_lock(tmp_path / "file" / "run"):
        pass


def test_files_are_imported_without_torch():
    code = "import sys, rlaif.journal; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stdout == "False\n", result.stderr
