"""An engine whose answers a test writes down, and a run on disk whose stages are answered by it.

The stages' own code runs; only the model is missing.
"""

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif.engines.engine import Answer, Answered, Question
from rlaif.journal import Journal
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.stages.quality import measure_panel
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Judge
from rlaif.stages.votes import Panel, settings_of

CONSTITUTION = """\
name: small
version: "2"
description: For tests.
principles:
  - id: safe
    title: Nobody is hurt
    text: The answer hurts nobody.
    critique: Who is hurt?
    revision: Rewrite it so that nobody is hurt.
    comparison: Which one hurts fewer people?
    applies_to: [harmful]
  - {id: lawful, title: Within the law, text: The answer keeps the law., applies_to: [harmful]}
  - {id: useful, title: Helps, text: The answer helps., comparison: Which one helps more?, applies_to: [ordinary]}
examples:
  - {id: one, principle: safe, prompt: P1, response: R1, critique: C1, revision: V1}
  - {id: two, principle: lawful, prompt: P2, response: R2, critique: C2, revision: V2}
comparisons:
  - {prompt: Q1, first: F1, second: S1, better: second, principle: useful}
  - {prompt: Q2, first: F2, second: S2, better: first}
tests:
  - {prompt: T0, better: good, worse: bad}
  - {prompt: T1, better: good, worse: bad, principle: lawful}
  - {prompt: T2, better: good, worse: bad, principle: useful}
  - {prompt: T3, better: good, worse: bad, principle: useful}
"""
HARM, PLAIN = "harmful", "ordinary"
PROMPTS = [
    {"id": "h1", "prompt": "How do I steal a bicycle?", "tag": HARM, "split": "train"},
    {"id": "h2", "prompt": "How do I pick a lock?", "tag": HARM, "split": "train"},
    {"id": "h3", "prompt": "How do I forge a ticket?", "tag": HARM, "split": "train"},
    {"id": "h4", "prompt": "How do I read her mail?", "tag": HARM, "split": "eval"},
    {"id": "o1", "prompt": "How do I boil an egg?", "tag": PLAIN, "split": "train"},
    {"id": "o2", "prompt": "How do I fold a shirt?", "tag": PLAIN, "split": "train"},
    {"id": "o3", "prompt": "How do I water a fern?", "tag": PLAIN, "split": "eval"},
]
WILLING = "Wait until it is dark, take a strong tool along and be quick about it."
REFUSAL = "I can't help with that, because the owner would lose something. A shop can help you."
HELPFUL = "Put it into boiling water for eight minutes, then cool it under the tap."
CRITIQUE = "It helps someone to do wrong."
Write = Callable[[Question], str | Answer]
Choose = Callable[[Question], Sequence[float]]


class ScriptedEngine:
    """Answers with a function, or with replies in their order; `calls` holds every batch it was asked."""

    def __init__(
        self,
        write: Write | Iterable[str] = (),
        choose: Choose = lambda question: (-0.5, -1.0),
        *,
        identity: str = "scripted",
        batch_size: int = 2,
        crash_at: int | None = None,
    ):
        self._write, self._choose = write if callable(write) else self._from_queue(list(write)), choose
        self._name, self._size, self.crash_at = identity, batch_size, crash_at
        self.calls: list[list[Question]] = []

    @staticmethod
    def _from_queue(replies: list[str]) -> Write:
        return lambda question: replies.pop(0)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self._name}

    @property
    def asked(self) -> list[Question]:
        return [question for batch in self.calls for question in batch]

    def ids(self, part: str = "") -> list[str]:
        """Return the ids of the questions it was asked, or of those of one part, such as ``critique-0``."""
        return [question.item_id for question in self.asked if part in ("", question.item_id.rpartition("/")[2])]

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        return [list(questions[start : start + self._size]) for start in range(0, len(questions), self._size)]

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        for batch in batches:
            if self.crash_at is not None and len(self.calls) == self.crash_at:
                raise KeyboardInterrupt
            self.calls.append(list(batch))
            yield [(question, self._one(question)) for question in batch]

    def _one(self, question: Question) -> Answer:
        if question.options:
            return Answer(logprobs=tuple(self._choose(question)), tokens=3)
        reply = self._write(question)
        return reply if isinstance(reply, Answer) else Answer(reply, tokens=len(reply.split()))


class Said(Progress):
    """Progress that keeps the lines it was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class ScriptedBase:
    """Stands for the shared base: remembers which roles a stage added."""

    def __init__(self) -> None:
        self.roles: dict[str, Any] = {}
        self.heads: dict[str, Any] = {}
        self.tokenizer = self

    def add_role(self, role: str, **settings: Any) -> None:
        self.roles[role] = settings

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        return [1]

    def response(self, text: str, *, ended: bool) -> list[int]:
        return [2]


def by_part(**replies: str | Answer | Write) -> Write:
    """Write by what a question is for: ``response``, ``critique``, ``revise``, ``contrast`` or ``eval``."""

    def write(question: Question) -> str | Answer:
        part = question.item_id.rpartition("/")[2].partition("-")[0]
        reply = replies[part]
        return reply(question) if callable(reply) else reply

    return write


def usual(question: Question) -> str | Answer:
    """Help with everything, and refuse everything when asked for a revision."""
    answer = HELPFUL if question.item_id.startswith("o") else WILLING
    replies = by_part(response=answer, eval=answer, critique=CRITIQUE, revise=REFUSAL, contrast=REFUSAL)
    return replies(question)


def prefers(text: str, strength: float, bias: float = 0.0) -> Choose:
    """Return a judge with a known strength for answers that contain a text, and a known bias for option A."""

    def choose(question: Question) -> tuple[float, float]:
        shown_first = question.messages[-1]["content"].split("Answer B:")[0]
        logit = (strength if text in shown_first else -strength) + bias
        return logit / 2 - 1.0, -logit / 2 - 1.0

    return choose


def make_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: ScriptedEngine | dict[str, ScriptedEngine] | None = None,
    *,
    constitution: str = CONSTITUTION,
    prompts: Sequence[dict[str, Any]] = PROMPTS,
    recipe_prompts: Sequence[Any] = ("prompts.jsonl",),
    **sections: Any,
) -> Run:
    """Write a recipe, a constitution and prompts, and return the run; a second call continues the first one's journal.

    Args:
        tmp_path: where to.
        monkeypatch: puts the engine in the place of the model.
        engine: who answers, or who answers for each role.
        constitution: the constitution's text.
        prompts: the rows of the prompt set.
        recipe_prompts: what the recipe names as its prompts.
        sections: keys of the recipe.
    """
    recipe = {
        "name": "small",
        "model": "tiny",
        "constitution": "constitution.yaml",
        "prompts": list(recipe_prompts),
        "stages": ["revise", "label", "evaluate"],
        **sections,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "constitution.yaml").write_text(constitution)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    base = ScriptedBase()

    def engine_of(_: Any, role: str, **settings: Any) -> ScriptedEngine | None:
        return engine[role] if isinstance(engine, dict) else engine

    for module in ("run", "candidates", "evaluate"):
        monkeypatch.setattr(f"rlaif.stages.{module}.LocalEngine", engine_of)
    monkeypatch.setattr(Run, "load_base", lambda run: base)
    folder = tmp_path / "run"
    run = Run(load_recipe(tmp_path / "recipe.yaml"), folder, Journal(folder / "journal.db"), Said())
    weakref.finalize(run, run.journal.close)
    return run


def judge_of(run: Run, engine: ScriptedEngine, **changed: Any) -> Judge:
    """Return the first judge of a run's recipe, with an engine of one's own."""
    settings = dataclasses.replace(settings_of(run.recipe.label, run.recipe.label.panel()[0]), **changed)
    model = run.recipe.model.model_name_or_path
    return Judge(engine, run.constitution, run.journal, run.progress, "label", settings, model)


def measure(run: Run, engine: ScriptedEngine) -> dict[str, Any] | None:
    """Measure the first judge of a run's recipe, with an engine of one's own, on the constitution's tests."""
    return measure_panel(Panel([judge_of(run, engine)], together=False))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
