"""Journal, questions and exports under any mixture of answers, refusals, errors, kills, resumptions and exports.

A kill is played by a copy of the folder, taken at the moment of death; what goes on afterwards goes on in the copy.
"""

import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import kills
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scripted import Said, rows_of

import rlaif.journal
from rlaif.engines.engine import Answer, Answered, Question, ask
from rlaif.files import write_jsonl
from rlaif.journal import Journal, Manifest, broken, outputs_of, write_manifest

SIZE = 2  # questions in a batch


class Broken(Exception):
    """An engine that breaks down."""


class Oracle:
    """Answers by a running number, so that asking twice would show; refuses some, and breaks down where told."""

    identity: dict[str, Any] = {"name": "oracle"}

    def __init__(self) -> None:
        self.number, self.refused, self.breaks_at, self.before_send = 0, frozenset[str](), 99, lambda group: None
        self.asked: Counter[str] = Counter()
        self.given: list[list[tuple[str, Answer]]] = []

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        return [list(questions[start : start + SIZE]) for start in range(0, len(questions), SIZE)]

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        self.given = []
        for index, batch in enumerate(batches):
            self.before_send(index)
            if index == self.breaks_at:
                raise Broken
            group = [(question, self._answer(question)) for question in batch]
            self.given.append([(question.item_id, answer) for question, answer in group])
            yield group

    def _answer(self, question: Question) -> Answer:
        self.number += 1
        self.asked[question.item_id] += 1
        return Answer(error="no") if question.item_id in self.refused else Answer(f"answer {self.number}")


IDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7, unique=True)


class Stage(RuleBasedStateMachine):
    """One stage of a run, over many deaths."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=kills.MEMORY))
        self.life = 0
        self.oracle = Oracle()
        self.stored: dict[str, Answer] = {}
        self.exported: list[dict[str, Any]] | None = None
        self.journal = Journal(self.folder / "journal.db")

    @property
    def folder(self) -> Path:
        return self.root / str(self.life)

    def keep(self, groups: Sequence[Sequence[tuple[str, Answer]]]) -> None:
        self.stored.update(dict(pair for group in groups for pair in group))

    def put(self, ids: Sequence[str]) -> list[Answer]:
        questions = [Question(name, [{"role": "user", "content": name}]) for name in ids]
        return list(ask(self.journal, "revise", self.oracle, questions, Said(), "answers"))

    def again_in(self, image: Path) -> None:
        self.journal.close()
        if not image.exists():  # the moment of death was not reached
            shutil.copytree(self.folder, image)
        self.life += 1
        self.journal = Journal(self.folder / "journal.db")

    @rule(ids=IDS, refused=st.frozensets(st.sampled_from("abcdefgh")))
    def answer(self, ids: list[str], refused: frozenset[str]) -> None:
        self.oracle.refused = refused
        before = self.oracle.asked.copy()
        found = self.put(ids)
        assert self.oracle.asked - before == Counter(name for name in ids if name not in self.stored)
        self.keep(self.oracle.given)
        assert found == [self.stored[name] for name in ids], "in the order of the questions, each its own"

    @rule(ids=IDS, at=st.integers(0, 3))
    def fail(self, ids: list[str], at: int) -> None:
        self.oracle.breaks_at, self.oracle.given = at, []
        with suppress(Broken):
            self.put(ids)
        self.oracle.breaks_at = 99
        self.keep(self.oracle.given)

    @rule(ids=IDS, at=st.integers(0, 3), moment=st.sampled_from(["before send", "before commit", "after commit"]))
    def kill(self, ids: list[str], at: int, moment: str) -> None:
        image, commits = self.root / str(self.life + 1), 0
        folder = self.folder

        def die(number: int, now: str) -> None:
            if (number, now) == (at, moment) and not image.exists():
                shutil.copytree(folder, image)

        class Dying(sqlite3.Connection):
            def execute(connection, statement: str, *values: Any) -> Any:
                nonlocal commits
                if statement == "COMMIT":
                    die(commits, "before commit")
                result = super().execute(statement, *values)
                if statement == "COMMIT":
                    die(commits, "after commit")
                    commits += 1
                return result

        self.journal.close()
        connect = sqlite3.connect
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                rlaif.journal.sqlite3, "connect", lambda path, **options: connect(path, factory=Dying, **options)
            )
            self.journal = Journal(folder / "journal.db")
        self.oracle.before_send, self.oracle.given = lambda number: die(number, "before send"), []
        self.put(ids)
        self.oracle.before_send = lambda number: None
        done = at + (moment == "after commit") if image.exists() else len(self.oracle.given)
        self.again_in(image)
        self.keep(self.oracle.given[:done])
        for name, _ in [pair for group in self.oracle.given[done:] for pair in group]:
            self.oracle.asked[name] -= 1  # what was under way at the death may be asked again

    @rule()
    def resume(self) -> None:
        self.again_in(self.root / str(self.life + 1))

    @rule(moment=st.sampled_from(["never", "before the data", "before the manifest", "after the manifest"]))
    def export(self, moment: str) -> None:
        image, stage = self.root / str(self.life + 1), self.folder / "1-revise"
        rows = [{"id": key[0], **unit.result} for key, unit in sorted(self.journal.known("revise").items())]

        def die(now: str) -> None:
            if now == moment:
                shutil.copytree(self.folder, image)

        die("before the data")
        write_jsonl(stage / "rows.jsonl", rows)
        die("before the manifest")
        write_manifest(stage, Manifest("revise", self.inputs, outputs_of(stage), {"in": len(rows)}, 0.0, 0.0, {}))
        die("after the manifest")
        if moment in ("never", "after the manifest"):
            self.exported = rows
        elif moment == "before the manifest" and rows != self.exported:
            self.exported = None  # a manifest of the rows before stands beside the new ones, and does not hold
        if moment != "never":
            self.again_in(image)

    inputs = {"prompts": "1"}

    @invariant()
    def nothing_is_lost_doubled_or_paid_for_twice(self) -> None:
        known = self.journal.known("revise")
        assert {key[0]: unit.result["text"] for key, unit in known.items()} == {
            name: answer.text for name, answer in self.stored.items()
        }
        assert {key[0] for key, unit in known.items() if unit.status == "bad_request"} == {
            name for name, answer in self.stored.items() if answer.error
        }
        assert +self.oracle.asked == Counter(list(self.stored))

    @invariant()
    def a_manifest_holds_for_whole_rows_or_not_at_all(self) -> None:
        stage = self.folder / "1-revise"
        holds = broken(stage, self.inputs) == []
        assert holds == (self.exported is not None)
        if holds:
            assert rows_of(stage / "rows.jsonl") == self.exported

    def teardown(self) -> None:
        with closing(self.journal):
            shutil.rmtree(self.root)


Stage.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None, derandomize=True)
test_answers_survive_any_mixture_of_refusals_errors_kills_and_exports = Stage.TestCase
