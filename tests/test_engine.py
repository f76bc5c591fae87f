"""Questions and answers: none is asked twice, none is lost, and a resumed run asks in the same batches."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import Said, ScriptedEngine

from rlaif.engines.engine import Answer, Engine, Question, ask, request_hash
from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError, JournalError
from rlaif.journal import Journal
from rlaif.model import sampling

QUESTIONS = [
    Question(f"p{n}/response", [{"role": "user", "content": f"Say {n}"}], max_new_tokens=8, seed=n) for n in range(5)
]


def echo(question: Question) -> str:
    return question.messages[-1]["content"].lower()


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with Journal(tmp_path / "journal.db") as opened:
        yield opened


def asked(
    journal: Journal,
    engine: Engine,
    questions: Sequence[Question] = QUESTIONS,
    stage: str = "revise",
    progress: Said | None = None,
) -> list[str]:
    return [answer.text for answer in ask(journal, stage, engine, questions, progress or Said(), "answers")]


class Backwards(ScriptedEngine):
    """Forms its batches from the end, as an engine does that sorts by length."""

    def batches(self, questions: Sequence[Question]) -> list[list[Question]]:
        return super().batches(questions[::-1])


def test_answers_come_in_the_order_of_the_questions_whatever_the_batches(journal: Journal) -> None:
    engine = Backwards(echo)
    assert asked(journal, engine) == ["say 0", "say 1", "say 2", "say 3", "say 4"]
    assert engine.ids()[0] == "p4/response"


def test_a_question_is_asked_once(journal: Journal) -> None:
    first, second, said = ScriptedEngine(echo), ScriptedEngine(["never said"]), Said()
    assert asked(journal, first) == asked(journal, second, progress=said)
    assert len(first.asked) == 5 and second.calls == []
    assert said.lines == ["  answers: 5 of 5 taken from the journal"]
    assert journal.count("revise") == 5


def test_an_answer_comes_back_from_the_journal_as_it_was(journal: Journal) -> None:
    questions = [QUESTIONS[0], Question("q", QUESTIONS[0].messages, options=("A", "B"))]
    told = Answer("half a sen", ended=False, tokens=9)
    engine = ScriptedEngine(lambda question: told, lambda question: (-0.1, -2.4), batch_size=1)
    first = list(ask(journal, "s", engine, questions, Said(), ""))
    assert first == [told, Answer(logprobs=(-0.1, -2.4), tokens=3)]
    assert list(ask(journal, "s", ScriptedEngine(), questions, Said(), "")) == first


@pytest.mark.parametrize(
    "change",
    [
        {"item_id": "p0/critique-0"},
        {"messages": [{"role": "user", "content": "Say 0."}]},
        {"messages": [{"role": "system", "content": "Say 0"}]},
        {"messages": [{"role": "user", "content": "Say 0"}, {"role": "assistant", "content": ""}]},
        {"sample": 1},
        {"options": ("A", "B")},
        {"max_new_tokens": 9},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"seed": 1},
    ],
)
def test_a_question_that_differs_is_asked_again(change: dict[str, Any], journal: Journal) -> None:
    asked(journal, ScriptedEngine(echo), QUESTIONS[:1])
    again = ScriptedEngine(echo)
    asked(journal, again, [dataclasses.replace(QUESTIONS[0], **change)])
    assert len(again.asked) == 1


def test_every_field_of_a_question_is_part_of_its_hash() -> None:
    other = Question("b", [{"role": "user", "content": "c"}], 1, ("A",), 1, 0.5, 0.5, 1)
    plain = Question("a", [])
    for part in dataclasses.fields(Question):
        changed = dataclasses.replace(plain, **{part.name: getattr(other, part.name)})
        assert request_hash({}, changed) != request_hash({}, plain), part.name


def test_another_engine_or_stage_is_asked_again(journal: Journal) -> None:
    asked(journal, ScriptedEngine(echo))
    for engine, stage in ((ScriptedEngine(echo, identity="larger"), "revise"), (ScriptedEngine(echo), "label")):
        asked(journal, engine, stage=stage)
        assert len(engine.asked) == 5


def test_a_crash_loses_the_batch_it_happened_in_and_no_other(journal: Journal) -> None:
    whole = ScriptedEngine(echo)
    with Journal(journal.path.with_name("whole.db")) as other:
        expected = asked(other, whole)
    with pytest.raises(KeyboardInterrupt):
        asked(journal, ScriptedEngine(echo, crash_at=2))
    assert journal.count("revise") == 4
    rest, said = ScriptedEngine(echo), Said()
    assert asked(journal, rest, progress=said) == expected
    assert rest.calls == whole.calls[2:]
    assert said.lines == ["  answers: 4 of 5 taken from the journal"]


def test_batches_are_those_of_an_uninterrupted_run_wherever_it_stopped(journal: Journal) -> None:
    whole = Backwards(echo)
    with Journal(journal.path.with_name("whole.db")) as other:
        asked(other, whole)
    calls = []
    for _ in range(4):
        part = Backwards(echo, crash_at=1)
        with suppress(KeyboardInterrupt):
            asked(journal, part)
        calls += part.calls
    assert calls == whole.calls
    assert [len(batch) for batch in calls] == [2, 2, 1]


def test_batches_are_formed_over_all_questions_also_where_some_are_known(journal: Journal) -> None:
    asked(journal, ScriptedEngine(echo), [QUESTIONS[1], QUESTIONS[2]])
    rest = ScriptedEngine(echo)
    assert asked(journal, rest) == ["say 0", "say 1", "say 2", "say 3", "say 4"]
    ids = [[question.item_id for question in batch] for batch in rest.calls]
    assert ids == [["p0/response"], ["p3/response"], ["p4/response"]]


def test_nothing_is_asked_of_no_questions(journal: Journal) -> None:
    engine = ScriptedEngine()
    assert asked(journal, engine, []) == [] and engine.calls == []


def test_an_engine_that_loses_an_answer_is_a_bug(journal: Journal) -> None:
    engine = ScriptedEngine(echo)
    engine.answers = lambda batches: iter([[(batches[0][0], Answer("only one"))]])
    with pytest.raises(AssertionError, match="p1/response"):
        asked(journal, engine)
    assert journal.count("revise") == 1


def test_a_log_probability_that_is_no_number_is_not_stored(journal: Journal) -> None:
    engine = ScriptedEngine(choose=lambda question: (float("nan"), 0.0))
    with pytest.raises(JournalError, match="p0/response"):
        asked(journal, engine, [dataclasses.replace(QUESTIONS[0], options=("A", "B"))])


# --- the shared base as an engine -----------------------------------------------------------------------------------


class LettersAsTokens:
    """A tokenizer for which every letter is a token."""

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        return [ord(letter) for turn in messages for letter in turn["content"]]

    def option_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def base() -> Any:
    acting: list[str] = []
    return SimpleNamespace(
        tokenizer=LettersAsTokens(),
        identity={"model": "m"},
        max_length=20,
        acted=acting,
        acting_as=lambda role: nullcontext(acting.append(role)),
    )


def ask_of(content: str, **settings: Any) -> Question:
    return Question(content, [{"role": "user", "content": content}], **settings)


def test_batches_hold_questions_of_one_kind_longest_first(base: Any) -> None:
    engine = LocalEngine(base, "policy", batch_size=1)
    questions = [
        ask_of("aa", max_new_tokens=4),
        ask_of("b" * 9, options=("A", "B")),
        ask_of("cccc", max_new_tokens=4),
        ask_of("d", max_new_tokens=4),
        ask_of("e", max_new_tokens=4, temperature=0.5),
    ]
    batches = engine.batches(questions)
    assert [[question.item_id for question in batch] for batch in batches] == [["cccc", "aa"], ["d"], ["b" * 9], ["e"]]


def test_the_identity_holds_the_base_and_the_adapter(base: Any) -> None:
    identities = [
        LocalEngine(base, "r", batch_size=size, adapter=a).identity for size, a in ((1, ""), (2, ""), (2, "f"))
    ]
    assert identities == [{"model": "m", "adapter": ""}, {"model": "m", "adapter": ""}, {"model": "m", "adapter": "f"}]


def test_a_conversation_longer_than_the_context_is_named(base: Any) -> None:
    engine = LocalEngine(base, "policy", batch_size=2)
    assert engine.batches([ask_of("a" * 16, max_new_tokens=4)])
    with pytest.raises(DataError) as caught:
        engine.batches([ask_of("a" * 17, max_new_tokens=4)])
    assert str(caught.value) == (
        f"`{'a' * 17}`: 17 prompt tokens and 4 new ones; the model's context holds 20. "
        "Shorten the prompt, or lower max_new_tokens or few_shot."
    )


def test_the_role_writes_with_the_seeds_of_its_questions(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(base: Any, prompts: Any, **settings: Any) -> list[sampling.Sample]:
        assert settings == {"max_new_tokens": 4, "seeds": [7, 8], "temperature": 0.5, "top_p": 0.9, "rows": 2}
        return [sampling.Sample(prompt[::-1], [0.0] * len(prompt), len(prompt) == 2) for prompt in prompts]

    monkeypatch.setattr(sampling, "sample", sample)
    settings = {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9}
    batch = [ask_of("ab", seed=7, **settings), ask_of("xyz", seed=8, **settings)]
    answers = list(LocalEngine(base, "policy", batch_size=2).answers([batch]))
    assert answers == [list(zip(batch, [Answer("ba", True, (), 2), Answer("zyx", False, (), 3)], strict=True))]
    assert base.acted == ["policy"]


def test_the_role_chooses_by_the_log_probabilities_of_the_options(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def next_logprobs(base: Any, prompts: Any, options: Any, rows: int) -> Any:
        assert options == [65, 66] and rows == 2
        return torch.tensor([[-0.5, -1.5], [-2.0, -0.25]])

    monkeypatch.setattr(sampling, "next_logprobs", next_logprobs)
    batch = [ask_of("ab", options=("A", "B")), ask_of("c", options=("A", "B"))]
    (((one, first), (other, second)),) = LocalEngine(base, "base", batch_size=2).answers([batch])
    assert [one, other] == batch
    assert [first, second] == [Answer(logprobs=(-0.5, -1.5), tokens=2), Answer(logprobs=(-2.0, -0.25), tokens=1)]
