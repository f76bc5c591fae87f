"""What `rlaif run` would do: stages up to date or not, answers that are there or must be asked for, time and memory.

The stages that ask questions are rehearsed: their own code runs in a temporary folder, on a copy of the journal, and
where an answer is missing a stand-in answers with a text that no question has met before. So a question that builds on
a missing answer is missing as well, and the count is exact as far as answers are known. Training is not rehearsed;
what depends on an adapter that would be trained counts as to be asked. Nothing is written and no stage runs.

Times are estimates: from the speed of earlier answers in the journal and the last run of a stage where there are any,
else from a few seconds of generation on the model. Memory is what the memory model says of the stage
(`rlaif.memory`), beside what its last run took.
"""

import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlaif import files, journal
from rlaif.engines.engine import Answer, Answered, Engine, Question, request_hash
from rlaif.errors import RlaifError
from rlaif.journal import Journal, Manifest
from rlaif.memory import GIB, Peak
from rlaif.memory_advice import as_words, capacity, need, tokens_of
from rlaif.pipeline import journal_copy, peak_memory_gib
from rlaif.progress import Progress
from rlaif.recipe import Loaded
from rlaif.rounds import Step, chosen, steps_of
from rlaif.stages import gate
from rlaif.stages.run import Run
from rlaif.training_costs import work_of

_ASKING = ("revise", "label", "rejection", "evaluate")
_TRAINED = {"sft": "adapter", "reward": "adapter", "ppo": "policy", "dpo": "policy", "rejection": "policy"}
_CALIBRATION = {"prompts": 8, "tokens": 16}


@dataclass
class Wave:
    """Questions that a stage asks together."""

    title: str
    asked: int
    missing: list[Question]


@dataclass
class StagePlan:
    """What would become of one stage."""

    stage: str
    reasons: list[str]  # why it runs; none where it is up to date
    waves: list[Wave] = field(default_factory=list)
    steps: int | None = None  # of training
    new_tokens: int = 0
    read_tokens: int = 0
    seconds: float | None = None
    memory_gib: float | None = None  # of its last run, else of the memory model, else while the speed was measured
    basis: str = ""
    note: str = ""
    memory: Peak | None = None  # by the memory model
    round: int = 1

    @property
    def missing(self) -> list[Question]:
        """All questions that must be asked."""
        return [question for wave in self.waves for question in wave.missing]

    @property
    def rows(self) -> int:
        """How many prompts, pairs or tests have a question that must be asked."""
        return len({question.item_id.rpartition("/")[0] for question in self.missing})


@dataclass(frozen=True)
class Speed:
    """Measured tokens per second: written ones, and read ones (None where unknown), and where from."""

    written: float | None
    read: float | None
    basis: str
    memory_gib: float | None = None


class _StandIn:
    """Answers what no model has answered yet, with texts and verdicts of its own."""

    def __init__(self, engine: Engine, wave: Wave):
        self._engine, self._wave = engine, wave

    @property
    def identity(self) -> dict[str, Any]:
        return self._engine.identity

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        return [list(questions)]

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        for batch in batches:
            self._wave.missing += batch
            yield [(question, _invented(self.identity, question)) for question in batch]


def _invented(identity: dict[str, Any], question: Question) -> Answer:
    mark = request_hash(identity, question)
    if question.options:
        return Answer(logprobs=(-1.0 - int(mark[:4], 16) / 65536, *([-1.0] * (len(question.options) - 1))))
    words = " ".join(mark[start : start + 8] for start in range(0, 64, 8))
    return Answer(f"An answer that is not written yet: {words}.")


class _BaseByName:
    """Stands for the shared base: it has the identity that decides what is in the journal, and no weights."""

    def __init__(self, identity: dict[str, Any]):
        self.identity = identity
        self.heads: dict[str, Any] = {}

    def add_role(self, role: str, **settings: Any) -> None:
        """Take part in name only."""


class Rehearsal(Run):
    """A run in a temporary folder whose stages ask nobody."""

    fetches = False

    def load_base(self) -> Any:
        """Return a stand-in for the model, which is not loaded."""
        from rlaif.model.base import identity_of

        return _BaseByName(identity_of(self.recipe.model))


def plan(loaded: Loaded, *, first: str | None = None, last: str | None = None) -> list[StagePlan]:
    """Return what would become of each stage, without running any.

    Args:
        loaded: the checked recipe.
        first: a stage that would run again with all later ones.
        last: the stage after which the run would stop.

    Raises:
        RlaifError: what would stop the run before its first answer, such as a broken prompt file.
    """
    recipe = loaded.recipe
    steps, again = chosen(steps_of(recipe.stages, recipe.rounds.count), loaded.path, first, last)
    real = recipe.folder()
    with journal_copy(real) as book, tempfile.TemporaryDirectory() as shadow:
        speed, lengths = _measured(book), _lengths(book)  # before stand-ins' answers are among them
        run = Rehearsal(loaded, Path(shadow), book, Progress(quiet=True))
        plans: list[StagePlan] = []
        for step in steps:
            plans.append(_of_stage(run.in_round(step.round), real, step, step in again, plans))
        work = [one for one in plans if one.reasons and (one.missing or one.stage in _TRAINED)]
        reads = any(one.stage in _TRAINED or any(question.options for question in one.missing) for one in work)
        if (work and speed.written is None) or (reads and speed.read is None):
            speed = _calibrated(run, speed)
        for one in (one for one in plans if one.reasons):
            place = run.in_round(one.round).stage_folder(one.stage).relative_to(run.folder)
            _estimate(run.in_round(one.round), one, journal.read_manifest(real / place), lengths, speed)
    return plans


def _lenient(loaded: Loaded) -> Loaded:
    """Return a recipe that no judge is too weak for: a stand-in judges at random."""
    label = loaded.recipe.label.model_copy(update={"allow_weak_judge": True, "swap_tolerance": 2.0})
    return loaded.model_copy(update={"recipe": loaded.recipe.model_copy(update={"label": label})})


def _of_stage(run: Run, real: Path, step: Step, forced: bool, before: list[StagePlan]) -> StagePlan:
    """Find out whether a stage would run, and rehearse it where it would."""
    stage = step.stage
    module = importlib.import_module(f"rlaif.stages.{stage}")
    folder = real / run.stage_folder(stage).relative_to(run.folder)
    gate.shadow(run, real, changed=any(one.reasons and one.round < run.round for one in before))
    reasons = ["--from"] if forced else journal.broken(folder, module.inputs(run))
    found = StagePlan(stage, reasons, round=step.round)
    if not reasons:
        run.stage_folder(stage).symlink_to(folder.resolve())
        return found
    if stage in _TRAINED:
        adapter = run.stage_folder(stage) / _TRAINED[stage]
        files.write_json(adapter / "adapter_config.json", {"not_trained_yet": str(step)})  # its own, so are its answers
        if stage not in _ASKING:
            return found

    def stand_in(_: str, title: str, engine: Engine, questions: Sequence[Question]) -> Engine:
        found.waves.append(Wave(title, len(questions), []))
        return _StandIn(engine, found.waves[-1])

    run.journal.stand_in = stand_in
    rehearse: Callable[[Run], Any] = module.rehearse if hasattr(module, "rehearse") else getattr(module, stage)
    try:
        rehearse(replace(run, loaded=_lenient(run.loaded)))
    except RlaifError as problem:
        if not any(one.missing for one in [*before, found]):  # else the stand-in's answers may have led to it
            found.note = f"would stop: {problem}"
    return found


# --- estimates --------------------------------------------------------------------------------------------------------


def _measured(book: Journal) -> Speed:
    """Return the speed of earlier answers, as far as their time was stored."""
    written, read = [0.0, 0.0], [0.0, 0.0]
    for stage in _ASKING:
        for unit in book.known(stage).values():
            if unit.seconds > 0:
                kind = read if unit.result.get("logprobs") else written
                kind[0], kind[1] = kind[0] + unit.tokens, kind[1] + unit.seconds
    rates = [tokens / seconds if tokens and seconds else None for tokens, seconds in (written, read)]
    return Speed(rates[0], rates[1], "the speed of earlier answers")


def _calibrated(run: Run, speed: Speed) -> Speed:
    """Generate for a few seconds with the recipe's model; where it is not on this machine, nothing is known."""
    from rlaif.model.builtin import EMBEDDED, is_fetched

    name = run.recipe.model.model_name_or_path
    if name in EMBEDDED and not is_fetched(name):
        return Speed(speed.written, speed.read, "nothing: the model is not on this machine yet")
    from rlaif.model import sampling
    from rlaif.model.roles import BASE, SharedBase

    base = SharedBase.load(run.recipe.model)
    rows = [prompt for prompt in run.prompts if prompt.split == "train"][: _CALIBRATION["prompts"]]
    prompts = [base.tokenizer.prompt(prompt.messages) for prompt in rows]
    with base.acting_as(BASE):
        times = []
        for tokens in (1, 1, _CALIBRATION["tokens"]):  # the first pass warms up
            began = time.monotonic()
            drawn = sampling.sample(base, prompts, max_new_tokens=tokens, seeds=list(range(len(prompts))))
            times.append(time.monotonic() - began)
    count = sum(len(one.ids) for one in drawn)
    measured = f"{sum(times):.1f} s of generation on the model"
    return Speed(
        speed.written or count / times[2],
        speed.read or sum(map(len, prompts)) / times[1],
        f"{speed.basis} and {measured}" if speed.written or speed.read else measured,
        peak_memory_gib(),
    )


def _estimate(run: Run, one: StagePlan, earlier: Manifest | None, lengths: dict[str, int], speed: Speed) -> None:
    """Fill in tokens, time and memory of a stage that would run."""
    asked = {question.item_id: tokens_of(_text(question)) for question in one.missing}
    for question in one.missing:
        one.read_tokens += asked[question.item_id]
        kind = question.item_id.rpartition("/")[2]
        one.new_tokens += 0 if question.options else lengths.get(kind, question.max_new_tokens)
    one.memory = need(run, one.stage, run.recipe, max(asked.values(), default=None))
    modelled = one.memory.total / GIB if one.memory else speed.memory_gib
    one.memory_gib = earlier.peak_memory_gib if earlier else modelled
    one.basis = speed.basis
    chosen = sum(asked[question.item_id] for question in one.missing if question.options)
    if one.stage in _TRAINED:
        work = work_of(run, one.stage)
        one.steps, one.new_tokens = work.steps, one.new_tokens + work.written
        one.read_tokens += work.read
        if work.rated:
            one.note = one.note or f"the judge would be asked for about {work.rated} ratings of responses"
        done = earlier.counts.get("updates" if one.stage == "ppo" else "steps") if earlier else None
        if earlier and done and not one.missing:
            one.seconds, one.basis = earlier.seconds / done * one.steps, "the stage's last run"
            return
        chosen += round(work.passes)
    rates = ((one.new_tokens, speed.written), (chosen, speed.read))
    if all(rate or not tokens for tokens, rate in rates):
        one.seconds = sum(tokens / rate for tokens, rate in rates if rate)


def _text(question: Question) -> str:
    return "".join(turn["content"] for turn in question.messages)


def _lengths(book: Journal) -> dict[str, int]:
    """Return how long earlier answers were on average, by what they were for, such as ``critique-0``."""
    found: dict[str, list[int]] = {}
    for stage in _ASKING:
        for unit in book.known(stage).values():
            if not unit.result.get("logprobs"):
                found.setdefault(unit.item_id.rpartition("/")[2], []).append(unit.tokens)
    return {kind: round(statistics.fmean(tokens)) for kind, tokens in found.items()}


# --- words ------------------------------------------------------------------------------------------------------------


def as_lines(plans: Sequence[StagePlan]) -> Iterator[str]:
    """Write a plan for people."""
    for number, one in enumerate(plans, start=1):
        if not one.reasons:
            yield f"{number}. {Step(one.round, one.stage)}: up to date"
            continue
        yield f"{number}. {Step(one.round, one.stage)}: would run ({'; '.join(one.reasons)})"
        for wave in one.waves:
            yield f"     {wave.title}: {len(wave.missing)} of {wave.asked} answers to ask for"
        if one.waves:
            asked = sum(wave.asked for wave in one.waves)
            there = asked - len(one.missing)
            yield f"     together: {there} in the journal, {len(one.missing)} to ask for ({one.rows} prompts or pairs)"
        if one.note:
            yield f"     {one.note}"
        work = [f"{one.steps} steps"] if one.steps else []
        work += [f"{one.read_tokens} tokens read, {one.new_tokens} written"] if one.read_tokens else []
        took = "time unknown" if one.seconds is None else f"about {_duration(one.seconds)}"
        memory = [] if one.memory_gib is None else [f"about {one.memory_gib:.1f} GiB"]
        yield f"     estimate: {', '.join([*work, took, *memory])} (from {one.basis})"
        yield f"     memory: {as_words(one.memory, capacity())}"
    known = [one.seconds for one in plans if one.reasons and one.seconds is not None]
    unknown = sum(bool(one.reasons) and one.seconds is None for one in plans)
    yield f"estimate for all: about {_duration(sum(known))}" + (f", and {unknown} stages unknown" if unknown else "")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_json(plans: Sequence[StagePlan]) -> str:
    """Write a plan for programs."""
    keys = ("stage", "round", "reasons", "steps", "new_tokens", "read_tokens", "seconds", "memory_gib", "basis", "note")
    rows = [
        {key: getattr(one, key) for key in keys}
        | {"memory": one.memory and one.memory._asdict()}
        | {"waves": [vars(wave) | {"missing": [q.item_id for q in wave.missing]} for wave in one.waves]}
        for one in plans
    ]
    return json.dumps(rows, indent=2)
