"""What a run folder remembers: units of work in SQLite, and the manifests of its stages.

After ``kill -9`` at any moment, and after a power failure on a disk that keeps what fsync wrote, the journal
holds all units of one `Journal.put` or none, and all of them once that call has returned. `rlaif.files` says
the same of files, folders and checkpoints; its functions can be imported from here.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlaif.errors import JournalError
from rlaif.files import (
    append_jsonl,
    fresh_folder,
    hashes,
    mark_complete,
    newest_complete,
    repair_jsonl,
    reported,
    run_lock,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)

__all__ = [
    "Journal",
    "Manifest",
    "Unit",
    "append_jsonl",
    "broken",
    "fresh_folder",
    "mark_complete",
    "newest_complete",
    "outputs_of",
    "read_manifest",
    "repair_jsonl",
    "run_lock",
    "write_bytes",
    "write_json",
    "write_jsonl",
    "write_manifest",
    "write_text",
]

_APPLICATION_ID = 0x524C4149
_SCHEMA_VERSION = 1
_COLUMNS = "stage, item_id, sample, request_hash, result, status, tokens, seconds, crc"
_SCHEMA = """CREATE TABLE unit (
  stage TEXT NOT NULL, item_id TEXT NOT NULL, sample INTEGER NOT NULL, request_hash TEXT NOT NULL,
  result TEXT NOT NULL, status TEXT NOT NULL, tokens INTEGER NOT NULL, seconds REAL NOT NULL,
  crc INTEGER NOT NULL, PRIMARY KEY (stage, item_id, sample, request_hash)) WITHOUT ROWID"""

_DAMAGED = (
    "The journal is damaged and was left as it is. Restore it from a copy, or move it away: "
    "finished stages stay valid, and only the answers of unfinished ones are asked for again."
)
_FOREIGN = "This is not a journal, and it was left as it is. Move it away or choose another run folder."
_NO_SPACE = "Free disk space or mend the disk, then run again; every answer stored before is kept."
_NOT_WRITABLE = "Check that the folder exists, that the path is no folder, and that both may be written."
_ADVICE = {
    "SQLITE_NOTADB": _FOREIGN,
    "SQLITE_FULL": _NO_SPACE,
    "SQLITE_IOERR": _NO_SPACE,
    "SQLITE_READONLY": _NOT_WRITABLE,
    "SQLITE_CANTOPEN": _NOT_WRITABLE,
    "SQLITE_PERM": _NOT_WRITABLE,
    "SQLITE_BUSY": "Another process holds the file. Wait until it has ended, then run again.",
}


@dataclass(frozen=True)
class Unit:
    """One answer of a model and what determined it.

    `request_hash` covers everything that can change the answer (model, adapter, messages, sampling, seed);
    `result` is a JSON object; `tokens` were generated in `seconds`. A ``bad_request`` is final: asking again
    would fail again. Failures that may pass are not stored.
    """

    stage: str
    item_id: str
    sample: int
    request_hash: str
    result: dict[str, Any]
    status: Literal["ok", "bad_request"] = "ok"
    tokens: int = 0
    seconds: float = 0.0


class Journal:
    """The durable store of a run's units: one SQLite file, written by one thread of one process.

    Raises:
        JournalError: at opening, where the file is not SQLite, damaged, of another schema, or not writable.
            Such a file is neither rewritten nor deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stand_in: Callable[..., Any] | None = None  # answers in place of every engine, where a run is planned
        with reported(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._reported():
            self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            with reported(path), self._reported():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was put is on disk already."""
        self._connection.close()

    def get(self, stage: str, item_id: str, sample: int, request_hash: str) -> Unit | None:
        """Return the stored unit of this key, or None."""
        query = f"SELECT {_COLUMNS} FROM unit WHERE stage=? AND item_id=? AND sample=? AND request_hash=?"
        with self._reported():
            row = self._connection.execute(query, (stage, item_id, sample, request_hash)).fetchone()
        return None if row is None else self._unit(row)

    def known(self, stage: str) -> dict[tuple[str, int, str], Unit]:
        """Return all units of a stage by ``(item_id, sample, request_hash)``."""
        with self._reported():
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM unit WHERE stage=?", (stage,)).fetchall()
        return {(unit.item_id, unit.sample, unit.request_hash): unit for unit in map(self._unit, rows)}

    def count(self, stage: str) -> int:
        """Return the number of units of a stage."""
        with self._reported():
            row = self._connection.execute("SELECT count(*) FROM unit WHERE stage=?", (stage,)).fetchone()
        return int(row[0])

    def put(self, units: Iterable[Unit]) -> None:
        """Store units in one transaction that is on disk when this returns.

        A unit whose key is stored already changes nothing: the first answer stays.

        Raises:
            JournalError: NaN, infinity or an id that is not Unicode text: nothing of this call is stored.
                A disk that is full or fails: all earlier calls stay stored.
        """
        rows = [self._row(unit) for unit in units]
        if not rows:
            return
        marks = ", ".join("?" * len(rows[0]))
        insert = f"INSERT INTO unit ({_COLUMNS}) VALUES ({marks}) ON CONFLICT DO NOTHING"
        with self._reported():
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(insert, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def forget_refused(self, stage: str) -> None:
        """Remove a stage's units of the status ``bad_request``, so that they are asked again; in one transaction."""
        with self._reported():
            self._connection.execute("DELETE FROM unit WHERE stage=? AND status='bad_request'", (stage,))

    def _open(self) -> None:
        """Create the table in an empty file; of any other, check all before anything may be written."""
        ask = self._connection.execute
        ask("PRAGMA trusted_schema=OFF")
        ask("PRAGMA cell_size_check=ON")
        # EXTRA is FULL and a sync of the folder after a commit; without it a power failure can undo the last.
        ask("PRAGMA synchronous=EXTRA")
        # Reading rolls back what a killed process left half done.
        ask("SELECT count(*) FROM sqlite_master").fetchone()
        if self.path.stat().st_size == 0:  # SQLite would take a file of a few bytes for an empty one, too
            ask("BEGIN IMMEDIATE")
            ask(_SCHEMA)
            ask(f"PRAGMA application_id={_APPLICATION_ID}")
            ask(f"PRAGMA user_version={_SCHEMA_VERSION}")
            ask("COMMIT")
        if ask("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise JournalError(f"{self.path}: a SQLite file of another program. {_FOREIGN}")
        version = ask("PRAGMA user_version").fetchone()[0]
        if version != _SCHEMA_VERSION:
            raise JournalError(
                f"{self.path}: a journal of schema {version}; this release reads schema {_SCHEMA_VERSION}. "
                "Continue with the release that began the run, or start a new one. It was left as it is."
            )
        if ask("SELECT type, name, sql FROM sqlite_master").fetchall() != [("table", "unit", _SCHEMA)]:
            raise JournalError(f"{self.path}: its tables are not those of a journal. {_DAMAGED}")
        finding = ask("PRAGMA quick_check(1)").fetchone()[0]
        if finding != "ok":
            raise JournalError(f"{self.path}: {finding.splitlines()[-1]}. {_DAMAGED}")
        self._check_rows()
        if not all(os.access(place, os.W_OK) for place in (self.path, self.path.parent)):
            raise JournalError(f"{self.path}: may not be written. {_NOT_WRITABLE}")
        ask("PRAGMA journal_mode=DELETE")

    def _check_rows(self) -> None:
        """Refuse damaged rows, and rows out of the order of their keys; SQLite's own check sees neither."""
        last: tuple[Any, ...] = ()
        for row in self._connection.execute(f"SELECT {_COLUMNS} FROM unit"):
            unit = self._unit(row)
            key = (unit.stage, unit.item_id, unit.sample, unit.request_hash)
            if key <= last:
                raise JournalError(f"{self.path}: the answer {key[:3]} is out of order. {_DAMAGED}")
            last = key

    def _row(self, unit: Unit) -> tuple[Any, ...]:
        assert unit.status in ("ok", "bad_request"), unit.status
        assert all(isinstance(part, str) for part in (unit.stage, unit.item_id, unit.request_hash)), unit
        try:
            # ASCII escapes hold any text a model may produce. Exports depend on the order of keys: keep it.
            result = json.dumps(unit.result, allow_nan=False, separators=(",", ":"))
            seconds = float(unit.seconds) + 0.0  # SQLite stores -0.0 as 0.0
            key = (unit.stage, unit.item_id, int(unit.sample), unit.request_hash)
            values = (*key, result, unit.status, int(unit.tokens), seconds)
            return (*values, _checksum(values))
        except ValueError as problem:
            raise JournalError(
                f"{self.path}: the answer {unit.stage}/{unit.item_id!r}/{unit.sample} cannot be stored: "
                f"{problem}. Finite numbers and Unicode text are expected."
            ) from None

    def _unit(self, row: Sequence[Any]) -> Unit:
        *values, crc = row
        with suppress(TypeError, ValueError):
            if _checksum(values) == crc:
                stage, item_id, sample, request_hash, result, *rest = values
                return Unit(stage, item_id, sample, request_hash, json.loads(result), *rest)
        raise JournalError(f"{self.path}: the answer {values[:3]} does not match its checksum. {_DAMAGED}")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a closed journal or another thread: a bug of ours
        except sqlite3.DatabaseError as problem:
            code = str(getattr(problem, "sqlite_errorname", ""))
            advice = next((text for prefix, text in _ADVICE.items() if code.startswith(prefix)), _DAMAGED)
            raise JournalError(f"{self.path}: {problem!s:.100}. {advice}") from None
        except UnicodeDecodeError:  # SQLite's message quotes bytes of the broken file
            raise JournalError(f"{self.path}: not readable. {_DAMAGED}") from None


def _checksum(values: Sequence[Any]) -> int:
    return zlib.crc32(json.dumps(values, ensure_ascii=False, allow_nan=False).encode())


@dataclass
class Manifest:
    """What a stage read (name to hash), wrote (file to SHA-256), counted, took (seconds, GiB), with what."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    stage: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    counts: dict[str, Any]
    seconds: float
    peak_memory_gib: float
    versions: dict[str, str]
    schema: int = 1


_MANIFEST = TypeAdapter(Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` as given; a stage does this last."""
    write_json(folder / "manifest.json", asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """Read a stage's manifest; None where there is none.

    Raises:
        JournalError: a manifest that is not readable, or of another schema.
    """
    path = folder / "manifest.json"
    with reported(path):
        if not path.exists():
            return None
        data = path.read_bytes()
    try:
        manifest = _MANIFEST.validate_json(data)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        wrong = f"{'.'.join(map(str, first['loc'])) or '(file)'}: {first['msg']}"
    else:
        if manifest.schema == 1:
            return manifest
        wrong = f"schema: {manifest.schema}"
    raise JournalError(f"{path}: {wrong}; a manifest of schema 1 is expected. Delete it to run the stage again.")


def outputs_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a stage's folder but ``manifest.json``, by relative name.

    Raises:
        JournalError: a file that cannot be read, or a link that leads out of the folder.
    """
    return hashes(folder, without="manifest.json")


def broken(folder: Path, inputs: dict[str, str]) -> list[str]:
    """Return the reasons why a stage must run again; none if its manifest holds for these inputs.

    Files that the manifest does not name are no reason.

    Raises:
        JournalError: as `read_manifest` and `outputs_of`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return ["no manifest"]
    reasons = []
    for name in sorted(inputs.keys() | manifest.inputs.keys()):
        if name not in manifest.inputs:
            reasons.append(f"input `{name}` is new")
        elif name not in inputs:
            reasons.append(f"input `{name}` is gone")
        elif inputs[name] != manifest.inputs[name]:
            reasons.append(f"input `{name}` changed")
    found = outputs_of(folder)
    changed = [name for name, sha256 in sorted(manifest.outputs.items()) if found.get(name) != sha256]
    return reasons + [f"`{name}` was changed or is missing" for name in changed]
