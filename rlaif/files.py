"""Files and folders that are whole or absent, whenever the process is killed; and the lock of a run folder.

What holds after ``kill -9`` at any moment, and after a power failure on a disk that keeps what fsync wrote:

- `write_bytes` and its kin: the old file or the new one, never a mixture.
- `append_jsonl`: every row whose call returned. Half a row left behind is cut off by the next append.
- `fresh_folder`: the old folder or the new one. Between two renames neither stands at its path; both then lie
  beside it, and `repair_tree` or the next `fresh_folder` puts the new one in place.
- `mark_complete`: a checkpoint that was cut short is passed over by `newest_complete`.

What a killed process leaves is named ``.NAME.rlaif-tmp``, ``.NAME.rlaif-new`` or ``.NAME.rlaif-old``.
One process at a time works in a run folder: the one that holds its `run_lock`.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlaif.documents import file_sha256
from rlaif.errors import JournalError
from rlaif.records import Row, jsonl

_LEFTOVER = re.compile(r"\.(.+)\.rlaif-(tmp|new|old)")


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn a failing disk, and a value that JSON cannot hold, into a JournalError that names the path."""
    try:
        yield
    except OSError as problem:
        raise JournalError(
            f"{path}: {problem.strerror or problem}. Check free disk space, permissions and the path, "
            "then run again; what was stored before is kept."
        ) from None
    except ValueError as problem:
        raise JournalError(f"{path}: {problem}. Finite numbers and Unicode text are expected.") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file at once: its old content stays until all of the new content is on disk.

    Raises:
        JournalError: a disk that is full or fails; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.rlaif-tmp")
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file at once with UTF-8 text; errors as in `write_bytes`."""
    with reported(path):
        data = text.encode()
    write_bytes(path, data)


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once with indented JSON; NaN and infinity are refused with a JournalError."""
    with reported(path):
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Row | dict[str, Any]]) -> None:
    """Replace a file at once with one JSON object per line; errors as in `write_json`."""
    with reported(path):
        text = jsonl(rows)
    write_text(path, text)


def append_jsonl(path: Path, row: Row | dict[str, Any]) -> None:
    """Append one row that is on disk when this returns; a torn line before it is cut off first.

    Raises:
        JournalError: NaN or infinity, or a disk that is full or fails; the file then ends as it did before.
    """
    with reported(path):
        line = jsonl([row]).encode()
        repair_jsonl(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        size = 0 if is_new else path.stat().st_size
        try:
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)
            raise
        if is_new:
            _sync(path.parent)


def repair_jsonl(path: Path) -> int:
    """Cut off what a killed process left after the last complete row, and return how many bytes that was.

    A last row that is complete but for its line end is kept and gets one. An absent file needs no repair.
    """
    with reported(path):
        if not path.exists() or path.stat().st_size == 0:
            return 0
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return 0
            file.seek(0)
            data = file.read()
            tail = data[data.rfind(b"\n") + 1 :]
            whole = _is_object(tail)
            if whole:
                file.write(b"\n")
            else:
                file.truncate(len(data) - len(tail))
            file.flush()
            os.fsync(file.fileno())
            return 0 if whole else len(tail)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Build a folder beside `path` and let it replace `path` when the block ends well.

    All files are on disk before the old folder is moved aside. After an error the new folder is removed and
    the old one stands. The module's docstring says what a kill leaves.

    Raises:
        JournalError: a file stands at `path`, or a disk that is full or fails; the old folder stays.
    """
    new, old = _beside(path, "new"), _beside(path, "old")
    with reported(path):
        repair_folder(path)
        if path.exists() and not path.is_dir():
            raise JournalError(f"{path}: is a file; a folder is to stand there. Move the file away.")
        new.mkdir(parents=True)
    try:
        yield new
        with reported(path):
            _sync_tree(new)
            if os.path.lexists(path):
                path.rename(old)
                _sync(path.parent)
            new.rename(path)
            _sync(path.parent)
            _remove(old)
    except BaseException:
        with suppress(OSError):
            _remove(new)
            repair_folder(path)
        raise


def repair_folder(path: Path) -> None:
    """Finish a replacement by `fresh_folder` that a kill cut short, and remove what it left beside `path`.

    Only the process that holds the run's lock may call this.
    """
    new, old = _beside(path, "new"), _beside(path, "old")
    if os.path.lexists(old) and not os.path.lexists(path):
        # The old folder is moved aside only once the new one is whole, so a new one found now is whole.
        (new if os.path.lexists(new) else old).rename(path)
        _sync(path.parent)
    _remove(new)
    _remove(old)


def repair_tree(folder: Path) -> None:
    """Finish or remove all that killed writers left below a folder; for the holder of its lock only."""
    for left in sorted(folder.rglob(".*.rlaif-*")):
        name = _LEFTOVER.fullmatch(left.name)
        if name and name[2] == "tmp":
            left.unlink(missing_ok=True)
        elif name:
            repair_folder(left.with_name(name[1]))


@contextmanager
def run_lock(run_folder: Path) -> Iterator[None]:
    """Hold a run folder for this process, and finish in it what an earlier, killed one was replacing.

    Raises:
        JournalError: another process holds it (named by its process id), or the folder cannot be written.
    """
    lock, side = FileLock(run_folder / ".lock", blocking=False), run_folder / ".lock.pid"
    with reported(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = side.read_text().strip() if side.exists() else "not known yet"
            raise JournalError(
                f"{run_folder}: in use by another process (process id {holder}). "
                "Wait until it has ended, or end it; then run again, or choose another run folder."
            ) from None
    try:
        write_text(side, f"{os.getpid()}\n")
        with reported(run_folder):
            repair_tree(run_folder)
        yield
    finally:
        side.unlink(missing_ok=True)
        lock.release()


def hashes(folder: Path, without: str) -> dict[str, str]:
    """Return the SHA-256 by relative name of all files below a folder but one and what killed writers left.

    Raises:
        JournalError: a file that cannot be read, or a link that leads out of the folder.
    """
    found = {}
    with reported(folder):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if name.as_posix() == without or any(map(_LEFTOVER.fullmatch, name.parts)) or not path.is_file():
                continue
            if not path.resolve().is_relative_to(folder.resolve()):
                raise JournalError(f"{path}: a link that leads out of its folder. Put a copy of the file there.")
            found[name.as_posix()] = file_sha256(path)
    return found


def mark_complete(folder: Path) -> None:
    """Put a checkpoint's files on disk, then write ``COMPLETE`` with the size and SHA-256 of each.

    Raises:
        JournalError: a folder without files, or a disk that is full or fails.
    """
    with reported(folder):
        _sync_tree(folder)
        files = _contents(folder)
    if not files:
        raise JournalError(f"{folder}: holds no files; a written checkpoint is expected.")
    write_json(folder / "COMPLETE", files)


def newest_complete(parent: Path, pattern: str = "*-*") -> Path | None:
    """Return the folder with the highest number at the end of its name that is as `mark_complete` saw it.

    Folders without ``COMPLETE``, and those with a file changed, missing or added since, are passed over.
    """
    numbered = [
        (int(number[0]), path)
        for path in parent.glob(pattern)
        if (number := re.search(r"[0-9]+$", path.name)) and path.is_dir()
    ]
    for _, path in sorted(numbered, reverse=True):
        with suppress(OSError, ValueError, JournalError):
            if json.loads((path / "COMPLETE").read_bytes()) == _contents(path):
                return path
    return None


def _contents(folder: Path) -> dict[str, dict[str, int | str]]:
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in hashes(folder, without="COMPLETE").items()
    }


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.rlaif-{kind}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    with reported(path):
        if path.exists():
            _remove(path)


def _sync(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on disk."""
    if os.name == "nt":  # Windows syncs no folder, and no file that is opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for inner in [folder, *folder.rglob("*")]:
        if inner.is_dir() or inner.is_file():
            _sync(inner)
    _sync(folder.parent)
