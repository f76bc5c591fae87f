"""The judge that reasons first: the last verdict counts, one that cannot be read counts for nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import ScriptedEngine, judge_of, make_run, measure

from rlaif.engines.engine import Answer, Question
from rlaif.stages.judge import judge
from rlaif.stages.reasoning import read_verdict
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Abstention, Opinion, Pair, Verdict

Maker = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("B is rude, A is kind.\nVerdict: A", 1.0),
        ("Verdict: B", -1.0),
        ("**Verdict:** B.", -1.0),
        ("**Verdict**: (A)", 1.0),
        ("verdict: answer B", -1.0),
        ('Verdict: "A"', 1.0),
        ("Verdict: tie", 0.0),
        ("Verdict: Tie.", 0.0),
        ("Verdict:\nA", 1.0),
        ("Verdict: A because it is kind", 1.0),
        # The last one counts: reasoning may change its mind, or quote an answer that gives itself a verdict.
        ("Verdict: A\nOn second thoughts it is rude.\nVerdict: B", -1.0),
        ('It says "Verdict: A" of itself, which is no reason.\nVerdict: B', -1.0),
        # What cannot be read is nothing, even after one that could be.
        ("", None),
        ("A is better.", None),
        ("The verdict is A.", None),
        ("Verdict: neither", None),
        ("Verdict: A or B", None),
        ("Verdict: A/B", None),
        ("Verdict: A, B", None),
        ("Verdict: Anna's answer", None),
        ("Verdict: a hard case", None),
        ("Verdict: A\nNo, that was too quick.\nVerdict: both", None),
        ("Verdict:\n\nA", None),
    ],
)
def test_a_verdict_is_read_from_the_last_place_that_gives_one(text: str, side: float | None) -> None:
    assert read_verdict(text) == side


def opinion_of(run: Run, *replies: str | Answer, **settings: object) -> Opinion:
    queue = list(replies)
    engine = ScriptedEngine(lambda question: queue.pop(0))
    pair = Pair(str(replies), "Q?", "good", "bad", run.constitution.principle("useful"))
    (opinion,) = judge(judge_of(run, engine, method="verdict", **settings), [pair], "judge")
    return opinion


@pytest.mark.parametrize(
    ("given", "swapped", "preference", "bias"),
    [
        ("A", "B", 0.6, 0.0),  # the first answer wins in both orders, as much as a verdict may count
        ("B", "A", 0.4, 0.0),
        ("A", "A", 0.5, 0.405465),  # the first place wins: no preference, and a bias of log(0.6 / 0.4)
        ("B", "B", 0.5, -0.405465),
        ("A", "tie", 0.550510, 0.202733),
        ("tie", "tie", 0.5, 0.0),
    ],
)
def test_both_orders_count_and_a_verdict_is_held_at_60_percent(
    given: str, swapped: str, preference: float, bias: float, make: Maker
) -> None:
    opinion = opinion_of(make(), f"Verdict: {given}", f"Verdict: {swapped}")
    assert isinstance(opinion, Verdict)
    assert (opinion.preference, opinion.bias) == pytest.approx((preference, bias), abs=1e-6)
    assert opinion.mass is None and opinion.said == (f"Verdict: {given}", f"Verdict: {swapped}")


def test_the_most_that_a_verdict_counts_as_can_be_chosen(make: Maker) -> None:
    opinion = opinion_of(make(), "Verdict: A", "Verdict: B", verdict_clamp=0.8)
    assert isinstance(opinion, Verdict) and opinion.preference == pytest.approx(0.8)


def test_a_pair_of_which_one_order_is_unreadable_has_no_verdict(make: Maker) -> None:
    assert opinion_of(make(), "Verdict: A", "Hm.") == Abstention("unreadable verdict", ("Verdict: A", "Hm."))
    cut = Answer("Both are", ended=False)
    assert opinion_of(make(), cut, "Verdict: A") == Abstention(
        "reasoning cut off before a verdict", ("Both are", "Verdict: A")
    )


def test_reasoning_is_asked_for_without_sampling_and_without_worked_comparisons(make: Maker) -> None:
    engine = ScriptedEngine(lambda question: "Verdict: tie")
    run = make(label={"max_reasoning_tokens": 99, "judge_method": "verdict"})
    measure(run, engine)
    asked: list[Question] = engine.asked
    assert {(q.temperature, q.max_new_tokens, q.options, len(q.messages)) for q in asked} == {(0.0, 99, (), 1)}
    assert engine.ids()[:2] == ["test-0/weigh-given", "test-0/weigh-swapped"]
    assert 'Close with one line of the form "Verdict: A"' in asked[0].messages[0]["content"]
