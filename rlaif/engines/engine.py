"""The protocol of everything that answers, and `ask`: journalled questions.

Two kinds of question: *write* (continue a conversation) and *choose* (log-probabilities of option labels). Each has a
key that says what it is for, and a hash of everything that determines its answer: the engine's identity, the messages,
the sampling settings and the seed. An answer is committed to the journal before it is used; asking again reads it.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlaif.documents import fingerprint
from rlaif.errors import JournalError
from rlaif.journal import Journal, Unit
from rlaif.progress import Progress
from rlaif.records import Messages


@dataclass(frozen=True)
class Question:
    """One question. With `options` it is a choice; otherwise text is written."""

    item_id: str
    messages: Messages
    sample: int = 0
    options: tuple[str, ...] = ()
    max_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Written text and whether it ended by itself, or the log-probabilities of the options in their order.

    An answer with an `error` holds neither: it says why there will be none, and asking again would not help. With the
    method ``verdict`` the log-probabilities were not measured: they stand for a letter that was read in a short text.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    text: str = ""
    ended: bool = True
    logprobs: tuple[float, ...] = ()
    tokens: int = 0
    error: str = ""
    method: Literal["logprobs", "verdict"] = "logprobs"


_ANSWER = TypeAdapter(Answer)
Answered = list[tuple[Question, Answer]]


class Engine(Protocol):
    """Whatever can answer batches of questions."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of all that an answer depends on besides the question: model, weights, adapter, precision."""
        ...

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Split questions into the batches they are answered in, as a function of the questions alone."""
        ...

    def answers(self, batches: Sequence[Sequence[Question]]) -> Iterator[Answered]:
        """Answer batches; yield questions with their answers as soon as they are there, in any order."""
        ...


def request_hash(identity: dict[str, Any], question: Question) -> str:
    """Hash everything that determines an answer."""
    return fingerprint({"engine": identity, **asdict(question)})


def ask(
    journal: Journal,
    stage: str,
    engine: Engine,
    questions: Sequence[Question],
    progress: Progress,
    title: str,
) -> Iterator[Answer]:
    """Answer questions in their order, taking from the journal what is there and committing each batch before use.

    Batches are formed over all questions, answered or not, so a resumed run computes the very batches that an
    uninterrupted one would. What an engine yields together is committed together.
    """
    if journal.stand_in is not None:
        engine = journal.stand_in(stage, title, engine, questions)
    known = journal.known(stage)
    keys = {id(q): (q.item_id, q.sample, request_hash(engine.identity, q)) for q in questions}
    found = {id(q): _stored(journal, known[keys[id(q)]]) for q in questions if keys[id(q)] in known}
    missing = len(questions) - len(found)
    if found:
        progress.say(f"  {title}: {len(found)} of {len(questions)} taken from the journal")
    with progress.task(title, missing) as task:
        batches = engine.batches(questions) if missing else []
        todo = [[question for question in batch if id(question) not in found] for batch in batches]
        groups = engine.answers([batch for batch in todo if batch])
        began = time.monotonic()
        try:
            for group in groups:
                each, began = (time.monotonic() - began) / len(group), time.monotonic()
                journal.put([_unit(stage, keys[id(question)], answer, each) for question, answer in group])
                found.update({id(question): answer for question, answer in group})
                task.advance(len(group), tokens=sum(answer.tokens for _, answer in group))
        finally:
            if isinstance(groups, Generator):  # ends what it has under way now, and not when it is collected
                groups.close()
    lost = [question.item_id for question in questions if id(question) not in found]
    assert not lost, f"the engine gave no answer to {lost[:3]}"
    return iter([found[id(question)] for question in questions])


def _unit(stage: str, key: tuple[str, int, str], answer: Answer, seconds: float) -> Unit:
    status: Literal["ok", "bad_request"] = "bad_request" if answer.error else "ok"
    return Unit(stage, *key, result=_to_json(answer), status=status, tokens=answer.tokens, seconds=seconds)


def _to_json(answer: Answer) -> dict[str, Any]:
    return {**asdict(answer), "logprobs": list(answer.logprobs)}


def _stored(journal: Journal, unit: Unit) -> Answer:
    """Return the answer that a unit holds; its checksum was right, but another release may have written it."""
    try:
        return _ANSWER.validate_python(unit.result)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        raise JournalError(
            f"{journal.path}: the answer {unit.stage}/{unit.item_id!r}/{unit.sample} has another form than this "
            f"release writes ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()}). Continue with the "
            "release that began the run, or start a new one. The journal was left as it is."
        ) from None
