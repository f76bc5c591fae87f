"""The judge: both orders, what swapping cancels, and how it is measured."""

import math
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
from scripted import CONSTITUTION, PROMPTS, ScriptedEngine, judge_of, make_run, measure, prefers

from rlaif.documents import shipped
from rlaif.engines.engine import Question
from rlaif.prompting import load_template
from rlaif.report.reading import Judge
from rlaif.stages.judge import judge, positions, worked_comparisons
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Abstention, Pair, Verdict

Maker = Callable[..., Run]
EXACT = pytest.approx


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def verdict_of(run: Run, engine: ScriptedEngine, first: str = "good", second: str = "bad", id: str = "p") -> Verdict:
    pair = Pair(id, "Q?", first, second, run.constitution.principle("useful"))
    (verdict,) = judge(judge_of(run, engine), [pair], "judge")
    assert isinstance(verdict, Verdict)
    return verdict


# --- both orders ----------------------------------------------------------------------------------------------------


def test_a_judge_that_always_takes_the_first_prefers_nothing(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=lambda question: (math.log(0.75), math.log(0.25)))
    verdict = verdict_of(run, engine)
    assert (verdict.preference, verdict.strength) == (0.5, 0.0)
    assert verdict.bias == EXACT(math.log(3)) and verdict.mass == EXACT(1.0)
    measured = measure(run, engine)
    assert measured is not None
    assert (measured["same_position"]["rate"], measured["same_position_choice"]) == (1.0, "first")
    assert (measured["tests"]["correct"], measured["tests"]["rate"]) == (0, 0.0)


def test_a_judge_that_always_takes_the_second_is_seen_to_do_so(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=lambda question: (-2.0, -0.5))
    measured = measure(run, engine)
    assert measured is not None
    assert (measured["same_position"]["count"], measured["same_position_choice"]) == (4, "second")


@pytest.mark.parametrize(
    ("strength", "bias", "logit_mean", "probability_mean"),
    [
        (1.0, 0.0, 0.731059, 0.731059),
        (1.0, 3.0, 0.731059, 0.550608),
        (1.0, -3.0, 0.731059, 0.550608),
        (-0.5, 3.0, 0.377541, 0.476727),
        (0.0, 5.0, 0.5, 0.5),
    ],
)
def test_averaging_logits_returns_the_strength_whatever_the_bias(
    strength: float, bias: float, logit_mean: float, probability_mean: float, make: Maker
) -> None:
    for space, expected in (("logit", logit_mean), ("probability", probability_mean)):
        run = make(label={"debias": space})
        verdict = verdict_of(run, ScriptedEngine(choose=prefers("good", strength, bias)))
        assert (verdict.strength, verdict.bias) == EXACT((strength, bias))
        assert verdict.preference == EXACT(expected, abs=1e-6)
        assert verdict.preference == EXACT(oracles.swapped_preference(strength, bias, space))
        assert verdict.same_position == (abs(bias) > abs(strength))


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_swapping_the_pair_gives_one_minus_the_preference(space: str, make: Maker) -> None:
    run, engine = make(label={"debias": space}), ScriptedEngine(choose=prefers("good", 0.8, 1.5))
    there, back = verdict_of(run, engine), verdict_of(run, engine, "bad", "good", id="swapped")
    assert back.preference == EXACT(1 - there.preference) and back.strength == EXACT(-there.strength)
    assert (back.bias, back.mass) == EXACT((there.bias, there.mass))
    assert back.logits == EXACT(there.logits[::-1])


def test_the_mass_is_the_probability_on_both_letters_over_both_orders(make: Maker) -> None:
    masses = iter([(0.5, 0.25), (0.125, 0.125)])

    def choose(question: Question) -> tuple[float, ...]:
        return tuple(map(math.log, next(masses)))

    verdict = verdict_of(make(), ScriptedEngine(choose=choose))
    assert verdict.mass == EXACT((0.75 + 0.25) / 2)
    assert verdict.logits == EXACT((math.log(2), 0.0)) and not verdict.same_position


def test_each_pair_is_asked_in_both_orders_and_gets_its_own_verdict(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=prefers("good", 1.0), batch_size=3)
    principle = run.constitution.principle("useful")
    pairs = [
        Pair("a", "Q?", "good", "bad", principle),
        Pair("b", "Q?", "bad", "good", principle),
        Pair("c", "Q?", "good", "poor", principle),
    ]
    verdicts = judge(judge_of(run, engine), pairs, "judge")
    assert [round(verdict.strength, 6) for verdict in verdicts] == [1.0, -1.0, 1.0]
    assert engine.ids() == ["a/given", "a/swapped", "b/given", "b/swapped", "c/given", "c/swapped"]
    assert {question.options for question in engine.asked} == {("A", "B")}
    given, swapped = (question.messages[-1]["content"] for question in engine.asked[:2])
    mark = given.split("[")[1].split("]")[0]
    assert len(mark) == 4
    assert given.replace(f"[{mark}]", "|") == (
        'Someone asked an assistant:\n| "Q?" |\n\nAnswer A:\n| "good" |\n\nAnswer B:\n| "bad" |\n\n'
        "Which one helps more? Reply with the letter A or B."
    )
    assert swapped == given.replace('"good"', "-").replace('"bad"', '"good"').replace("-", '"bad"')


def test_a_judge_that_does_not_answer_a_or_b_abstains(make: Maker) -> None:
    run, engine = make(), ScriptedEngine(choose=lambda question: (-6.0, -7.0))  # 0.0034 on both letters
    pair = Pair("p", "Q?", "good", "bad", run.constitution.principle("useful"))
    (opinion,) = judge(judge_of(run, engine), [pair], "judge")
    assert opinion == Abstention("too little probability on the options", ([-6.0, -7.0], [-6.0, -7.0]))
    measured = measure(run, engine)
    assert measured is not None
    assert (measured["abstained"], measured["tests"]["correct"], measured["option_mass"]) == (4, 0, None)


def test_no_pairs_ask_nothing(make: Maker) -> None:
    engine, run = ScriptedEngine(), make()
    assert judge(judge_of(run, engine), [], "judge") == [] and engine.calls == []


# --- worked comparisons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few_shot", [0, 1, 2, 5])
def test_worked_comparisons_come_first_each_under_its_own_principle(few_shot: int, make: Maker) -> None:
    run, engine = make(label={"few_shot": few_shot}), ScriptedEngine()
    verdict_of(run, engine)
    turns = engine.asked[0].messages
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * min(few_shot, 2) + ["user"]
    assert [turn["content"] for turn in turns[1::2]] == ["B", "A"][:few_shot]
    questions = ["Which one helps more?", "Which one hurts fewer people?"]  # named; by default the first principle
    for turn, question in zip(turns[:-1:2], questions, strict=False):
        assert turn["content"].endswith(f"\n\n{question} Reply with the letter A or B.")


@pytest.mark.parametrize("name", ["harmless", "helpful-honest"])
def test_shipped_worked_comparisons_each_name_a_principle_that_decides_them(name: str, make: Maker) -> None:
    text = (shipped("constitutions") / f"{name}.yaml").read_text()
    run = make(constitution=text, label={"few_shot": 9})
    expected = {
        "harmless": ["protect-privacy", "no-needless-refusal", "no-crime-help"],
        "helpful-honest": ["correct-over-confident", "concrete-steps", "correct-false-premises"],
    }
    assert [example.principle for example in run.constitution.comparisons] == expected[name]
    turns = worked_comparisons(judge_of(run, ScriptedEngine()), load_template("compare"))
    for turn, identifier in zip(turns[::2], expected[name], strict=True):
        assert run.constitution.principle(identifier).comparison_question() in turn["content"]


# --- measuring ------------------------------------------------------------------------------------------------------


def test_the_judge_is_measured_on_the_constitutions_tests(make: Maker) -> None:
    logits = iter([(1.5, -0.5), (0.2, 0.6), (-0.4, -1.0), (-1.0, 3.0)])  # given and swapped, test by test
    flat = [logit for pair in logits for logit in pair]

    def choose(question: Question) -> tuple[float, float]:
        logit = flat.pop(0)
        return logit / 2 - 2.0, -logit / 2 - 2.0

    run = make()
    measured = measure(run, ScriptedEngine(choose=choose))
    assert measured is not None
    rows = measured["by_test"]
    assert [row["strength"] for row in rows] == EXACT([1.0, -0.2, 0.3, -2.0])
    assert [row["bias"] for row in rows] == EXACT([0.5, 0.4, -0.7, 1.0])
    assert [row["correct"] for row in rows] == [True, False, True, False]
    assert [row["principle"] for row in rows] == [None, "lawful", "useful", "useful"]
    assert (measured["tests"]["n"], measured["tests"]["correct"], measured["tests"]["rate"]) == (4, 2, 0.5)
    assert (measured["tests"]["low"], measured["tests"]["high"]) == EXACT((0.150039, 0.849961), abs=1e-6)
    assert measured["mean_abs_bias"] == EXACT(0.65) and measured["median_abs_strength"] == EXACT(0.65)
    assert (measured["same_position"]["count"], measured["same_position_choice"]) == (2, "first")
    mass = [sum(math.exp(sign * logit / 2 - 2) for logit in pair for sign in (1, -1)) / 2
            for pair in ((1.5, -0.5), (0.2, 0.6), (-0.4, -1.0), (-1.0, 3.0))]  # fmt: skip
    assert measured["option_mass"] == EXACT({"mean": sum(mass) / 4, "min": min(mass)})
    assert (measured["model"], measured["method"], measured["identity"]) == ("tiny", "logprobs", '{"name":"scripted"}')
    assert Judge.model_validate(measured).tests.count == 2


def test_a_test_is_judged_under_its_principle_or_the_first(make: Maker) -> None:
    engine = ScriptedEngine()
    run = make()
    measure(run, engine)
    asked = {question.item_id: question.messages[-1]["content"] for question in engine.asked}
    assert len(asked) == 8
    for identifier, words in (
        ("test-0", "Which one hurts fewer people?"),
        ("test-1", "The answer keeps the law."),
        ("test-2", "Which one helps more?"),
    ):
        assert words in asked[f"{identifier}/given"] and words in asked[f"{identifier}/swapped"]


def test_a_constitution_without_tests_measures_nothing(make: Maker) -> None:
    engine, run = ScriptedEngine(), make(constitution=CONSTITUTION.partition("tests:")[0])
    assert measure(run, engine) is None
    assert engine.calls == []


def test_a_judge_is_measured_once_for_any_threshold(make: Maker) -> None:
    run = make()
    first = measure(run, ScriptedEngine(choose=prefers("good", 1.0)))
    engine = ScriptedEngine()
    again = make(label={"min_judge_accuracy": 0.9}, prompts=PROMPTS[:2])
    assert measure(again, engine) == first
    assert engine.calls == []


def test_positions_of_verdicts_that_never_agree_with_themselves() -> None:
    def verdict(*logits: float) -> Verdict:
        return Verdict(0.5, 0.0, 0.0, 1.0, (logits[0], logits[1]))

    assert positions([verdict(1, -1), verdict(0, 2)])["same_position_choice"] is None
    mixed = positions([verdict(1, 1), verdict(-1, -1), verdict(-2, -1), verdict(1, -1)])
    assert (mixed["same_position"]["count"], mixed["same_position"]["n"]) == (3, 4)
    assert mixed["same_position_choice"] == "second"
