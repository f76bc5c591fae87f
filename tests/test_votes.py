"""Votes: who is asked under what, what votes add up to, and the test that a label turns around with its pair."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import HARM, ScriptedEngine, judge_of, make_run, prefers

from rlaif.engines.engine import Question
from rlaif.errors import StageError
from rlaif.sections import LabelSection
from rlaif.stages.candidates import Candidate
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Abstention, JudgeSettings, Verdict, as_logit, verdict_of
from rlaif.stages.votes import Panel, Vote, cast, count, swap_test

Maker = Callable[..., Run]
EXACT = pytest.approx


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def panel(run: Run, *engines: ScriptedEngine, together: bool = False, **settings: Any) -> Panel:
    names = ["judge"] if len(engines) == 1 else [f"judge-{n}" for n in range(len(engines))]
    return Panel([judge_of(run, e, name=name, **settings) for e, name in zip(engines, names, strict=True)], together)


def candidate(run: Run, *principles: str, first: str = "good", second: str = "bad", id: str = "p") -> Candidate:
    found = tuple(run.constitution.principle(name) for name in principles)
    return Candidate(id, id, [{"role": "user", "content": "Q?"}], first, second, found, HARM)


def by_question(**strengths: float) -> Callable[[Question], Sequence[float]]:
    """Return a judge whose strength for `good` depends on a word of the question."""

    def choose(question: Question) -> Sequence[float]:
        content = question.messages[-1]["content"]
        return prefers('"good"', next(value for word, value in strengths.items() if word in content), 0.5)(question)

    return choose


# --- what is asked --------------------------------------------------------------------------------------------------


def test_one_principle_is_one_question_in_both_orders(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=prefers('"good"', 1.0, 0.25))
    (ballot,) = cast(panel(run, engine), [candidate(run, "safe")], "votes")
    assert engine.ids() == ["p/given", "p/swapped"]
    assert (ballot.preference, ballot.strength) == EXACT((0.731059, 1.0), abs=1e-6)
    assert ballot.rows() == [
        {
            "annotator": "judge",
            "method": "logprobs",
            "principle": "safe",
            "weight": 1.0,
            "abstained": None,
            "preference": EXACT(0.731059, abs=1e-6),
            "strength": EXACT(1.0),
            "bias": EXACT(0.25),
            "mass": EXACT((math.exp(-0.375) + math.exp(-1.625) + math.exp(-1.375) + math.exp(-0.625)) / 2),
            "logits": EXACT((1.25, -0.75)),
            "logprobs": [EXACT([-0.375, -1.625]), EXACT([-1.375, -0.625])],
        }
    ]


def test_all_principles_are_asked_each_in_turn_and_their_logits_averaged(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=by_question(fewer=3.0, law=-1.0))
    (ballot,) = cast(panel(run, engine), [candidate(run, "safe", "lawful")], "votes")
    assert engine.ids() == ["p@safe/given", "p@safe/swapped", "p@lawful/given", "p@lawful/swapped"]
    assert [vote.logit for vote in ballot.votes] == EXACT([3.0, -1.0])
    assert (ballot.strength, ballot.preference) == EXACT((1.0, 0.731059), abs=1e-6)  # not the mean of 0.953 and 0.269
    assert [row["principle"] for row in ballot.rows()] == ["safe", "lawful"]


def test_all_principles_together_are_one_question(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=prefers('"good"', 1.0))
    (ballot,) = cast(panel(run, engine, together=True), [candidate(run, "safe", "lawful")], "votes")
    assert engine.ids() == ["p/given", "p/swapped"]
    asked = engine.asked[0].messages[-1]["content"]
    assert "- The answer hurts nobody.\n- The answer keeps the law.\nWhich of the two answers follows them" in asked
    (row,) = ballot.rows()
    assert (row["principle"], row["principles"]) == (None, ["safe", "lawful"])


def test_several_judges_each_vote_and_are_named(make: Maker) -> None:
    run = make()
    engines = [ScriptedEngine(choose=prefers('"good"', s), identity=str(s)) for s in (2.0, -1.0)]
    found = panel(run, *engines)
    (ballot,) = cast(found, [candidate(run, "safe")], "votes")
    assert found.name == "panel" and [row["annotator"] for row in ballot.rows()] == ["judge-0", "judge-1"]
    assert (ballot.strength, ballot.preference) == EXACT((0.5, 0.622459), abs=1e-6)


def test_a_prompt_of_several_turns_is_shown_with_who_says_them(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=prefers('"good"', 1.0))
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    one = candidate(run, "safe")._replace(prompt=[{"role": role, "content": text} for role, text in turns])
    cast(panel(run, engine), [one], "votes")
    assert (
        '"Hi"\n\nThe assistant answered:\n"Hello"\n\nThen they asked:\n"Bye"' in engine.asked[0].messages[-1]["content"]
    )


# --- what votes add up to -------------------------------------------------------------------------------------------


def vote(logit: float | None, weight: float = 1.0, **settings: Any) -> Vote:
    opinion = Abstention("unreadable verdict") if logit is None else verdict_of((logit, -logit), "logit")
    return Vote(JudgeSettings(weight=weight, **settings), (), opinion)


@pytest.mark.parametrize(
    ("votes", "strength", "preference"),
    [
        ([(1.0, 1.0)], 1.0, 0.731059),
        ([(1.0, 3.0), (-1.0, 1.0)], 0.5, 0.622459),
        ([(2.0, 1.0), (None, 5.0)], 2.0, 0.880797),  # who abstains has no part in the mean
        ([(2.0, 1.0), (-2.0, 1.0)], 0.0, 0.5),
    ],
)
def test_votes_are_averaged_in_logits_with_their_weights(
    votes: list[tuple[float | None, float]], strength: float, preference: float
) -> None:
    ballot = count([vote(*one) for one in votes])
    assert (ballot.strength, ballot.preference) == EXACT((strength, preference), abs=1e-6)


def test_where_all_abstain_there_is_no_label_but_the_reason() -> None:
    ballot = count([vote(None), vote(None)])
    assert (ballot.preference, ballot.strength, ballot.reason) == (None, None, "unreadable verdict")
    assert ballot.verdicts == [] and ballot.rows()[0]["abstained"] == "unreadable verdict"
    assert ballot.rows()[0]["preference"] is None and ballot.rows()[0]["logits"] is None


def test_probabilities_averaged_over_orders_count_as_their_logit() -> None:
    opinion = verdict_of((4.0, 2.0), "probability")  # s = 1, b = 3
    single = count([Vote(JudgeSettings(debias="probability"), (), opinion)])
    assert single.preference == EXACT(0.55061, abs=5e-6) and single.strength == EXACT(0.203129, abs=1e-6)
    assert count([Vote(JudgeSettings(), (), verdict_of((4.0, 2.0), "logit"))]).preference == EXACT(0.73106, abs=5e-6)


def test_a_certain_probability_has_a_finite_logit() -> None:
    assert as_logit(1.0) == EXACT(27.631, abs=1e-3) and as_logit(0.0) == EXACT(-27.631, abs=1e-3)
    assert as_logit(0.5) == 0.0


# --- the swap test --------------------------------------------------------------------------------------------------


def test_a_labeller_that_knows_its_mind_passes(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=by_question(fewer=3.0, law=-1.0))
    found = swap_test(panel(run, engine), [candidate(run, "safe", "lawful"), candidate(run, "safe", id="q")], 1e-6)
    assert found == {"rows": 2, "compared": 2, "max_error": EXACT(0.0, abs=1e-12), "tolerance": 1e-6}
    assert len(engine.asked) == 12 and len({question.messages[-1]["content"] for question in engine.asked}) == 4


def test_a_judge_that_always_takes_the_first_passes_since_its_label_is_a_half(make: Maker) -> None:
    run = make()
    found = swap_test(panel(run, ScriptedEngine(choose=lambda q: (-0.1, -3.0))), [candidate(run, "safe")], 1e-6)
    assert found["max_error"] == 0.0


def drifting(step: float) -> ScriptedEngine:
    """Return an engine that favours the letter A a little more with each question."""
    asked = iter(range(1000))
    return ScriptedEngine(choose=lambda question: (-1.0 + step * next(asked), -1.0))


def test_a_labeller_that_answers_the_same_question_otherwise_stops_the_stage(make: Maker) -> None:
    run = make()
    steady = ScriptedEngine(choose=prefers('"good"', 1.0))
    with pytest.raises(StageError) as caught:
        swap_test(panel(run, steady, drifting(0.1)), [candidate(run, "safe")], 1e-6)
    text = str(caught.value)
    for part in (
        "label: the labeller contradicts itself: for `p` P(first is better) is 0.6",
        "within label.swap_tolerance 1e-06",
        "The judge `judge-1` differs most. Nothing was labelled.",
        "or raise label.swap_tolerance",
    ):
        assert part in text


@pytest.mark.parametrize(("tolerance", "passes"), [(0.03, True), (0.02, False)])
def test_how_far_a_label_may_be_off_can_be_chosen(tolerance: float, passes: bool, make: Maker) -> None:
    run, engine = make(), drifting(0.1)  # logits 0, 0.1 and 0.2, 0.3: strengths -0.05 twice, so P adds up to 0.975
    if passes:
        found = swap_test(panel(run, engine), [candidate(run, "safe")], tolerance)
        assert found["max_error"] == EXACT(0.024995, abs=1e-6)
    else:
        with pytest.raises(StageError, match="contradicts itself"):
            swap_test(panel(run, engine), [candidate(run, "safe")], tolerance)


@pytest.mark.parametrize(
    ("keys", "tolerance"),
    [
        ({}, 0.01),
        ({"judge": "big"}, 0.05),
        ({"judge": "big", "swap_tolerance": 0.001}, 0.001),
        ({"judges": [{"name": "a"}, {"name": "b", "engine": "big"}]}, 0.05),
        ({"judge": "big", "judges": [{"name": "a", "engine": "base"}, {"name": "b", "adapter": "sft"}]}, 0.01),
        ({"judge": "big", "judge_method": "function", "judge_function": "brief"}, 0.01),
    ],
)
def test_only_a_server_is_allowed_more_than_rounding(keys: dict[str, Any], tolerance: float) -> None:
    assert LabelSection.model_validate(keys).tolerance() == tolerance


def test_abstaining_both_ways_is_no_contradiction_and_one_way_is(make: Maker) -> None:
    run = make()
    silent = swap_test(panel(run, ScriptedEngine(choose=lambda q: (-9.0, -9.0))), [candidate(run, "safe")], 1e-6)
    assert (silent["compared"], silent["max_error"]) == (0, None)
    replies = iter([(-1.0, -1.0)] * 2 + [(-9.0, -9.0)] * 2)
    with pytest.raises(StageError, match=r"abstain with the answers in one place only \(too little probability"):
        swap_test(panel(run, ScriptedEngine(choose=lambda q: next(replies))), [candidate(run, "safe", id="q")], 1e-6)


def test_a_verdict_of_a_stub_with_known_strength_and_bias_is_what_the_algebra_says() -> None:
    for strength, bias, in_probabilities, in_logits in ((1.0, 3.0, 0.5506, 0.7311), (0.5, 2.0, 0.5533, 0.6225)):
        logits = (strength + bias, bias - strength)
        assert verdict_of(logits, "probability").preference == EXACT(in_probabilities, abs=5e-5)
        found = verdict_of(logits, "logit")
        assert found.preference == EXACT(in_logits, abs=5e-5)
        assert isinstance(found, Verdict) and found.same_position
