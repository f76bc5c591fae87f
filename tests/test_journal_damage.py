"""Journals on full disks, broken, changed by others, or where they may not be written."""

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import kills
import pytest

from rlaif.errors import JournalError
from rlaif.journal import Journal, Unit

PAGE = 4096


def unit(item_id="p1", text="yes", **changes):
    fields = {
        "stage": "revise",
        "item_id": item_id,
        "sample": 0,
        "request_hash": "abc",
        "result": {"text": text},
    }
    return Unit(**(fields | changes))


def units_of(path):
    with Journal(path) as journal:
        return journal.known("revise")


@pytest.fixture
def stored(tmp_path):
    """A journal of several pages: leaves, an inner page and chains of overflow pages."""
    path = tmp_path / "journal.db"
    with Journal(path) as journal:
        journal.put([unit(f"p{number}", "a" * (number % 7) * 100, tokens=number) for number in range(60)])
        journal.put([unit(f"q{number}", "a" * 9000) for number in range(3)])
    assert path.stat().st_size > 10 * PAGE
    return path


def test_a_full_disk_loses_no_answer_and_the_journal_goes_on(tmp_path):
    path = tmp_path / "journal.db"
    for size in range(0, 10 * PAGE, 1000):
        path.unlink(missing_ok=True)
        known = {}
        full = pytest.raises(JournalError, match=r"journal\.db: .*Free disk space")
        with kills.full_disk(size), full, Journal(path) as journal:
            for number in range(100):
                journal.put([unit(f"p{number}", "a" * 3000)])
                known[f"p{number}", 0, "abc"] = unit(f"p{number}", "a" * 3000)
        assert units_of(path) == known
        with Journal(path) as journal:
            journal.put([unit("later")])
            assert journal.count("revise") == len(known) + 1
    assert len(known) == 7


def test_a_failed_put_leaves_the_open_journal_usable(tmp_path):
    with Journal(tmp_path / "journal.db") as journal:
        journal.put([unit("before")])
        with kills.full_disk(3 * PAGE), pytest.raises(JournalError):
            journal.put([unit("large", "a" * 9 * PAGE)])
        journal.put([unit("after")])
        assert sorted(item_id for item_id, _, _ in journal.known("revise")) == ["after", "before"]


def refused(path, content):
    """Tell whether a file with this content is refused; it must not be rewritten, nor another file left."""
    path.write_bytes(content)
    try:
        Journal(path).close()
        return False
    except JournalError as problem:
        assert str(problem).startswith(f"{path}: ")
        assert "was left as it is" in str(problem)
        return True
    finally:
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == [path.name]


def test_a_broken_page_is_refused(stored):
    whole = stored.read_bytes()
    pages = [whole[start : start + PAGE] for start in range(0, len(whole), PAGE)]
    for number in range(len(pages)):
        for other in (bytes(PAGE), b"\xff" * PAGE, pages[number - 1], pages[(number + 1) % len(pages)]):
            if other == pages[number]:
                continue  # chains of equal text have equal pages
            assert refused(stored, b"".join([*pages[:number], other, *pages[number + 1 :]])), number


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_a_broken_byte_is_refused_or_without_effect(stored, flip):
    whole = bytearray(stored.read_bytes())
    expected = units_of(stored)
    count = 0
    # The head of the file, the text of the schema at the end of the first page, and samples of the rest.
    for position in [*range(100), *range(3600, PAGE, 7), *range(PAGE, len(whole), 311)]:
        whole[position] ^= flip
        if refused(stored, whole):
            count += 1
        else:
            assert units_of(stored) == expected, position
        whole[position] ^= flip
    assert count > 100


def test_a_shortened_file_is_refused(stored):
    whole = stored.read_bytes()
    for size in [1, 15, 16, 99, 100, 512, *range(1000, len(whole), 1000), len(whole) - 1]:
        assert refused(stored, whole[:size]), size


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "journal.db"
    assert refused(path, b"prompt,answer\n" * 100)
    with pytest.raises(JournalError, match=r"journal\.db: file is not a database\. This is not a journal"):
        Journal(path)


def test_an_empty_file_becomes_a_journal(tmp_path):
    # SQLite makes the file before its first commit, so a process killed in between leaves an empty one.
    (tmp_path / "journal.db").touch()
    with Journal(tmp_path / "journal.db") as journal:
        journal.put([unit()])
    assert len(units_of(tmp_path / "journal.db")) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "PRAGMA user_version=2",
            "a journal of schema 2; this release reads schema 1. Continue with the release",
        ),
        ("PRAGMA application_id=5", "a SQLite file of another program. This is not a journal"),
        ("CREATE TABLE more (a)", "its tables are not those of a journal"),
        ("CREATE TRIGGER t AFTER INSERT ON unit BEGIN DELETE FROM unit; END", "its tables are not those of"),
        ("DROP TABLE unit", "its tables are not those of a journal"),
        (
            "UPDATE unit SET result='{}' WHERE item_id='p7'",
            r"the answer \['revise', 'p7', 0\] does not match",
        ),
        ("UPDATE unit SET tokens='x' WHERE item_id='p7'", "does not match its checksum"),
        ("UPDATE unit SET result=x'00ff' WHERE item_id='p7'", "does not match its checksum"),
    ],
)
def test_a_journal_changed_by_others_is_refused(stored, change, message):
    connection = sqlite3.connect(stored)
    connection.execute(change)
    connection.commit()
    connection.close()
    assert refused(stored, stored.read_bytes())
    with pytest.raises(JournalError, match=message):
        Journal(stored)


def test_a_path_that_cannot_hold_a_journal_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file/journal.db: .*Check free disk space, permissions and the path"):
        Journal(tmp_path / "file" / "journal.db")
    with pytest.raises(JournalError, match="unable to open database file. Check that the folder exists"):
        Journal(tmp_path)


def test_a_locked_journal_is_named(stored, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, **options: connect(path, timeout=0, **options))
    other = sqlite3.connect(stored, timeout=0, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(JournalError, match="database is locked. Another process holds the file"):
        Journal(stored)
    other.close()


OPENING = """
import os, sys
from pathlib import Path
from rlaif.errors import JournalError
from rlaif.journal import Journal
if os.geteuid() == 0:
    os.setuid(65534)  # permissions do not bind the superuser
try:
    Journal(Path(sys.argv[1]))
except JournalError as problem:
    print(problem)
"""


@pytest.mark.parametrize("file_mode, folder_mode", [(0o444, 0o777), (0o666, 0o555), (None, 0o555)])
def test_a_journal_that_may_not_be_written_is_refused(file_mode, folder_mode):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "journal.db"
        if file_mode is not None:
            Journal(path).close()
            path.chmod(file_mode)
        Path(name).chmod(folder_mode)
        result = subprocess.run([sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True)
        Path(name).chmod(stat.S_IRWXU)
        assert "Check that the folder exists, that the path is no folder, and that both may be written" in result.stdout
