"""Answers judged alone: the expected rating, a function as a judge, and the rating as PPO's reward."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedBase, ScriptedEngine, judge_of, make_run

from rlaif.constitution import Principle
from rlaif.engines.engine import Question
from rlaif.errors import ConfigError, StageError
from rlaif.maths.agreement import expected_rating, rescaled_rating
from rlaif.requests import fence_of
from rlaif.stages import judged_reward
from rlaif.stages.judge import judge
from rlaif.stages.judged_reward import as_reward, reward_function
from rlaif.stages.rating import NUMBERS, gathered
from rlaif.stages.rewards import brief
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Abstention, Pair, Verdict

Maker = Callable[..., Run]
NEVER = -1e9


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def only(number: int, probability: float = 1.0) -> tuple[float, ...]:
    """Return log-probabilities of 1 to 10 with everything on one number."""
    return tuple(math.log(probability) if number == one else NEVER for one in range(1, 11))


def rates(**numbers: int) -> Callable[[Question], tuple[float, ...]]:
    """Return a judge that gives each answer its number."""

    def choose(question: Question) -> tuple[float, ...]:
        content = question.messages[-1]["content"]
        return only(
            next(number for word, number in numbers.items() if f'] "{word}" [' in content.split("answered:")[1]), 0.5
        )

    return choose


# --- the number -----------------------------------------------------------------------------------------------------


def test_a_uniform_rating_is_five_and_a_half_and_its_reward_is_0() -> None:
    rating, mass = expected_rating([math.log(0.1)] * 10)
    assert (rating, mass) == pytest.approx((5.5, 1.0)) and rating is not None
    assert rescaled_rating(rating) == pytest.approx(0.0)


@pytest.mark.parametrize(("number", "reward"), [(10, 1.0), (1, -1.0), (7, 1 / 3)])
def test_a_sure_rating_is_its_number(number: int, reward: float) -> None:
    rating, mass = expected_rating(only(number, 0.25))
    assert (rating, mass) == pytest.approx((number, 0.25)) and rating is not None
    assert rescaled_rating(rating) == pytest.approx(reward)


def test_the_expected_rating_lies_between_its_numbers() -> None:
    logprobs = [NEVER] * 10
    logprobs[2], logprobs[8] = math.log(0.3), math.log(0.1)  # 3 with 3/4 and 9 with 1/4
    assert expected_rating(logprobs) == (pytest.approx(4.5), pytest.approx(0.4))
    assert expected_rating([-math.inf] * 10) == (None, 0.0)


# --- as a judge of pairs --------------------------------------------------------------------------------------------


def opinion_of(run: Run, choose: Any, first: str = "good", second: str = "bad", **settings: Any) -> Any:
    pair = Pair("p", "Q?", first, second, run.constitution.principle("useful"), "ordinary")
    engine = ScriptedEngine(choose=choose)
    (opinion,) = judge(judge_of(run, engine, method="rating", **settings), [pair], "judge")
    return opinion, engine


def test_the_difference_of_two_ratings_is_the_logit_of_the_preference(make: Maker) -> None:
    opinion, engine = opinion_of(make(), rates(good=7, bad=5))
    assert isinstance(opinion, Verdict)
    assert (opinion.strength, opinion.bias, opinion.mass) == pytest.approx((2.0, 0.0, 0.5))
    assert opinion.preference == pytest.approx(0.880797, abs=1e-6) and not opinion.same_position
    assert engine.ids() == ["p/rate-first", "p/rate-second"]
    assert {question.options for question in engine.asked} == {NUMBERS} == {tuple("123456789") + ("10",)}
    mark = fence_of("Q?", "good", "The answer helps.")
    assert engine.asked[0].messages == [
        {
            "role": "user",
            "content": f'Someone asked an assistant:\n[{mark}] "Q?" [{mark}]\n\n'
            f'The assistant answered:\n[{mark}] "good" [{mark}]\n\n'
            "A good answer follows this principle: The answer helps.\n"
            "How well does the answer follow it, from 1 (not at all) to 10 (fully)? Reply with the number.",
        }
    ]


def test_exchanged_answers_give_one_minus_the_preference(make: Maker) -> None:
    run = make()
    there, back = (opinion_of(run, rates(good=8, bad=5), *sides)[0] for sides in (("good", "bad"), ("bad", "good")))
    assert there.preference + back.preference == pytest.approx(1.0, abs=1e-12)


def test_a_model_that_names_no_number_abstains(make: Maker) -> None:
    def choose(question: Question) -> tuple[float, ...]:
        return only(5, 0.5) if '"good"' in question.messages[-1]["content"] else only(5, 0.001)

    assert opinion_of(make(), choose)[0].reason == "too little probability on the options"
    assert isinstance(opinion_of(make(), choose, min_option_mass=0.0)[0], Verdict)


def test_several_principles_become_one_request(make: Maker) -> None:
    constitution = make().constitution
    assert gathered([constitution.principles[0]]) is constitution.principles[0]
    both = gathered(constitution.principles[:2])
    assert both.comparison_question() == (
        "A good answer follows these principles:\n- The answer hurts nobody.\n- The answer keeps the law.\n"
        "Which of the two answers follows them better, all in all?"
    )
    assert both.text == "- The answer hurts nobody.\n- The answer keeps the law."


# --- a function -----------------------------------------------------------------------------------------------------


def test_a_registered_function_compares_by_its_scores_and_may_decline(make: Maker) -> None:
    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        assert columns == {"tag": ["ordinary"] * 4, "id": ["p", "p", "q", "q"]} and prompts == ["Q?"] * 4
        return [None if text == "none" else float(len(text)) for text in completions]

    run = make()
    who = judge_of(run, ScriptedEngine(), method="function", function="length")
    who = type(who)(**{**vars(who), "engine": None, "function": score})
    principle = run.constitution.principle("useful")
    pairs = [
        Pair("p", "Q?", "four", "six..", principle, "ordinary"),
        Pair("q", "Q?", "x", "none", principle, "ordinary"),
    ]
    first, second = judge(who, pairs, "judge")
    assert isinstance(first, Verdict) and (first.strength, first.bias, first.mass) == (-1.0, 0.0, None)
    assert first.preference == pytest.approx(0.268941, abs=1e-6)
    assert second == Abstention("the function gave no score", (1.0, None))
    assert judge(who, [], "judge") == []


# --- as a reward ----------------------------------------------------------------------------------------------------


def test_the_reward_is_the_mean_rating_over_principles_moved_to_minus_1_to_1(make: Maker) -> None:
    run = make()
    principles: dict[str, list[Principle]] = {
        "h1": run.constitution.principles[:2],
        "o1": run.constitution.principles[2:],
    }

    def choose(question: Question) -> tuple[float, ...]:
        content = question.messages[-1]["content"]
        return only(10 if "hurts nobody" in content else 1 if "keeps the law" in content else 7)

    engine = ScriptedEngine(choose=choose)
    score = as_reward(judge_of(run, engine), principles)
    assert score(["P", "Q"], ["r", "s"], id=["h1", "o1"], tag=["", ""]) == pytest.approx([0.0, 1 / 3])
    assert engine.ids() == ["h1/reward/safe", "h1/reward/lawful", "o1/reward/useful"]
    engine.calls.clear()
    assert score(["P"], ["r"], id=["h1"]) == pytest.approx([0.0]) and engine.calls == []  # from the journal


def test_a_response_without_a_rating_stops_since_ppo_needs_a_number(make: Maker) -> None:
    run = make()
    score = as_reward(
        judge_of(run, ScriptedEngine(choose=lambda q: only(3, 0.001))), {"h1": run.constitution.principles[:1]}
    )
    with pytest.raises(StageError, match="the judge `tiny` did not rate a response: too little probability") as caught:
        score(["P"], ["r"], id=["h1"])
    assert "lower label.min_option_mass" in str(caught.value)


def test_a_recipe_names_the_judge_or_a_registered_function(make: Maker) -> None:
    engine = ScriptedEngine(choose=lambda question: only(10))
    run = make(engine, ppo={"reward_function": "judge"}, label={"principles": "all"})
    score = reward_function(run, ScriptedBase(), "ppo")  # type: ignore[arg-type]
    assert score(["P"], ["r"], id=["h1"], tag=["harmful"]) == [1.0]
    assert engine.ids() == ["h1/reward/safe", "h1/reward/lawful"]
    assert reward_function(make(ppo={"reward_function": "brief"}), None, "ppo") is brief  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"known: brief, curt \(and `judge`, the judge's rating\)"):
        reward_function(make(ppo={"reward_function": "brie"}), None, "ppo")  # type: ignore[arg-type]


def test_a_judged_reward_depends_on_the_principles_and_how_they_are_asked(make: Maker) -> None:
    plain = judged_reward.reward_inputs(make(ppo={"reward_function": "brief"}))
    one = judged_reward.reward_inputs(make(ppo={"reward_function": "judge"}))
    together = judged_reward.reward_inputs(make(ppo={"reward_function": "judge"}, label={"principles": "together"}))
    assert plain == {} and sorted(key for key in one if one[key] != together[key]) == ["judge"]
