"""The evaluation's figures: rates by tag, paired differences, win rates with ties, samples; and what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
from scripted import (
    CONSTITUTION,
    HARM,
    HELPFUL,
    PLAIN,
    PROMPTS,
    REFUSAL,
    WILLING,
    ScriptedBase,
    ScriptedEngine,
    make_run,
    prefers,
    rows_of,
)

from rlaif.engines.engine import Answer
from rlaif.errors import ConfigError, DataError
from rlaif.records import Prompt
from rlaif.report.results import Results
from rlaif.stages import evaluate
from rlaif.stages.evaluate import Response, differences, metrics, rate, samples, win_rates
from rlaif.stages.run import Run

Maker = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def response(
    text: str = WILLING, *, id: str = "p", tag: str = HARM, refused: bool = False, score: float | None = None,
    kl: float = 0.0, tokens: int = 10, ended: bool = True,
) -> Response:  # fmt: skip
    prompt = Prompt(id=id, prompt=f"Prompt {id}", tag=tag, split="eval")
    return Response(prompt, text, ended, tokens, refused, score, kl)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_are_counted_by_tag_with_intervals() -> None:
    rows = [
        response(id="a", refused=True, score=1.0, kl=0.5, tokens=10),
        response(id="b", refused=True, score=2.0, kl=1.5, tokens=20, ended=False),
        response(id="c", refused=False, score=3.0, kl=1.0, tokens=30),
        response(id="d", tag=PLAIN, refused=False, score=-2.0, kl=3.0, tokens=40),
    ]
    found = metrics(rows)
    assert list(found["refusal"]) == [HARM, PLAIN]
    low, high = oracles.wilson(2, 3, 0.95)
    assert found["refusal"][HARM] == pytest.approx({"n": 3, "count": 2, "rate": 2 / 3, "low": low, "high": high})
    assert (found["refusal"][PLAIN]["count"], found["refusal"][PLAIN]["n"]) == (0, 1)
    assert {tag: (part["n"], part["mean"]) for tag, part in found["score"].items()} == {
        "all": (4, 1.0),
        HARM: (3, 2.0),
        PLAIN: (1, -2.0),
    }
    assert found["score"][HARM]["std"] == pytest.approx(1.0) and found["score"][PLAIN]["low"] is None
    assert (found["kl_to_reference"]["mean"], found["response_tokens"]["mean"]) == (1.5, 25.0)
    assert (found["ended"]["count"], found["ended"]["rate"]) == (3, 0.75)


def test_without_a_reward_there_are_no_scores() -> None:
    assert metrics([response(), response(id="q")])["score"] is None


def test_what_is_beside_the_score_is_measured_like_it_and_costs_above_0_are_unsafe() -> None:
    costs = {"a": (HARM, 2.0), "b": (HARM, 0.0), "c": (HARM, 0.5), "d": (PLAIN, -3.0)}
    rows = [response(id=id, tag=tag)._replace(cost=cost, independent_score=-cost) for id, (tag, cost) in costs.items()]
    found = metrics(rows)
    assert {tag: part["mean"] for tag, part in found["cost"].items()} == pytest.approx(
        {"all": -0.125, HARM: 2.5 / 3, PLAIN: -3.0}
    )
    assert found["independent_score"]["all"]["mean"] == 0.125
    assert found["independent_score"]["all"]["high"] == -found["cost"]["all"]["low"]
    low, high = oracles.wilson(2, 4, 0.95)
    assert found["unsafe"]["all"] == pytest.approx({"n": 4, "count": 2, "rate": 0.5, "low": low, "high": high})
    assert {tag: part["count"] for tag, part in found["unsafe"].items()} == {"all": 2, HARM: 2, PLAIN: 0}
    assert not {"cost", "unsafe", "independent_score"} & metrics([response()]).keys()


def test_prompts_without_a_tag_are_a_group_of_their_own() -> None:
    rows = [response(id="a", tag="", refused=True), response(id="b", tag=HARM)]
    assert {tag: part["rate"] for tag, part in metrics(rows)["refusal"].items()} == {"": 1.0, HARM: 0.0}
    (first, second) = differences({"base": rows, "sft": rows})
    assert [(row["tag"], row["n"], row["difference"]) for row in (first, second)] == [("", 1, 0.0), (HARM, 1, 0.0)]
    assert [row["tag"] for row in samples({"base": rows})] == ["", HARM]


def test_a_rate_is_a_share_with_wilsons_interval() -> None:
    low, high = oracles.wilson(1, 4, 0.95)
    assert rate([True, False, False, False]) == pytest.approx(
        {"n": 4, "count": 1, "rate": 0.25, "low": low, "high": high}
    )


# --- differences ----------------------------------------------------------------------------------------------------


def refusals(*flags: bool, tag: str = HARM) -> list[Response]:
    return [response(id=f"{tag}{n}", tag=tag, refused=flag) for n, flag in enumerate(flags)]


def test_differences_pair_each_policy_with_each_earlier_one() -> None:
    policies = {
        "base": [*refusals(False, False, True, False), *refusals(False, False, tag=PLAIN)],
        "sft": [*refusals(True, False, True, True), *refusals(False, True, tag=PLAIN)],
        "ppo": [*refusals(True, True, True, True), *refusals(False, False, tag=PLAIN)],
    }
    found = {(row["policy"], row["against"], row["tag"]): row for row in differences(policies)}
    assert {key: (row["difference"], row["n"]) for key, row in found.items()} == {
        ("sft", "base", HARM): (0.5, 4),
        ("sft", "base", PLAIN): (0.5, 2),
        ("ppo", "base", HARM): (0.75, 4),
        ("ppo", "base", PLAIN): (0.0, 2),
        ("ppo", "sft", HARM): (0.25, 4),
        ("ppo", "sft", PLAIN): (-0.5, 2),
    }
    assert {row["metric"] for row in found.values()} == {"refusal"}
    resampled = oracles.every_resampled_mean([1, 0, 0, 1])  # prompt by prompt, sft less base
    row = found["sft", "base", HARM]
    assert (row["low"], row["high"]) == (0.0, 1.0)
    assert resampled[int(0.025 * 256)] == 0.0 and resampled[int(0.975 * 256)] == 1.0


def test_means_differ_prompt_by_prompt_over_all_of_them_where_every_policy_has_them() -> None:
    def rows(*scores: float, tag: str = HARM) -> list[Response]:
        return [response(id=f"{tag}{n}", tag=tag, score=score) for n, score in enumerate(scores)]

    policies = {"base": rows(1.0, 3.0) + rows(-2.0, tag=PLAIN), "ppo": rows(2.0, 3.5) + rows(1.0, tag=PLAIN)}
    (found,) = (row for row in differences(policies) if row["metric"] != "refusal")
    assert (found["metric"], found["tag"], found["n"]) == ("score", "all", 3)
    assert found["difference"] == pytest.approx(1.5)
    assert (found["low"], found["high"]) == (0.5, 3.0)  # one in 27 resamples has the least three times
    costly = {name: [row._replace(score=None, cost=2.0 * row.score) for row in all] for name, all in policies.items()}
    (found,) = (row for row in differences(costly) if row["metric"] != "refusal")
    assert (found["metric"], found["difference"]) == ("cost", pytest.approx(3.0))


def test_one_policy_has_no_differences() -> None:
    assert differences({"base": refusals(True, False)}) == []


# --- win rates ------------------------------------------------------------------------------------------------------


def answers(*texts: str, tag: str = HARM) -> list[Response]:
    return [response(text, id=f"{tag}{n}", tag=tag) for n, text in enumerate(texts)]


def test_equal_answers_are_ties_that_the_judge_is_not_asked_about(make: Maker) -> None:
    engine = ScriptedEngine(choose=prefers("better", 1.0, 0.25))
    run = make(engine)
    policies = {"base": answers("worse", "same", "better", "poor"), "sft": answers("better", "same", "worse", "better")}
    (found,) = win_rates(run, ScriptedBase(), policies)
    assert (found["policy"], found["against"]) == ("sft", "base")
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (4, 2, 1, 1)
    assert found["count"] == 2.5 and found["rate"] == 0.625
    assert (found["low"], found["high"]) == pytest.approx(oracles.wilson(2.5, 4, 0.95))
    assert (found["same_position"]["count"], found["same_position"]["n"]) == (0, 3)
    assert engine.ids("given") == [f"{HARM}{n}/sft-base/given" for n in (0, 2, 3)]


def test_a_verdict_without_a_side_is_a_tie(make: Maker) -> None:
    run = make(ScriptedEngine(choose=lambda question: (-0.5, -1.5)))
    (found,) = win_rates(run, ScriptedBase(), {"base": answers("a", "b"), "sft": answers("c", "d")})
    assert (found["wins"], found["losses"], found["ties"], found["rate"]) == (0, 0, 2, 0.5)
    assert found["same_position"]["rate"] == 1.0


def test_policies_that_always_answer_alike_need_no_judge(make: Maker) -> None:
    engine = ScriptedEngine()
    (found,) = win_rates(make(engine), ScriptedBase(), {"base": answers("a"), "sft": answers("a")})
    assert (found["ties"], found["rate"], found["same_position"]) == (1, 0.5, None) and engine.calls == []


def test_the_judge_compares_so_many_prompts_of_each_tag(make: Maker) -> None:
    engine = ScriptedEngine(choose=prefers('"x', 1.0))
    run = make(engine, evaluate={"judge_prompts_per_tag": 2})
    policies = {
        name: [*answers(*(f"{letter}{n}" for n in range(4))), *answers(letter, tag=PLAIN)]
        for name, letter in (("base", "y"), ("sft", "x"), ("ppo", "z"))
    }
    found = win_rates(run, ScriptedBase(), policies)
    assert [(row["policy"], row["against"], row["n"], row["wins"], row["losses"]) for row in found] == [
        ("sft", "base", 3, 3, 0),
        ("ppo", "base", 3, 0, 0),
        ("ppo", "sft", 3, 0, 3),
    ]
    assert len(engine.asked) == 18


def test_the_judges_of_label_compare_as_that_section_says(make: Maker) -> None:
    judges = [
        {"name": "thinks", "method": "verdict", "weight": 3},
        {"name": "short", "method": "function", "function": "brief"},
    ]
    engine = ScriptedEngine(lambda question: "Hm. Verdict: tie" if "same" in question.messages[-1]["content"] else "A?")
    run = make(engine, label={"judges": judges, "principles": "all"})
    policies = {"base": answers("some words the same", "more words"), "sft": answers("the same", "words")}
    (found,) = win_rates(run, ScriptedBase(), policies)
    assert engine.ids("weigh-given") == [
        f"{HARM}{n}/sft-base@{principle}~thinks/weigh-given" for n in (0, 1) for principle in ("safe", "lawful")
    ]
    # The verdicts are ties or cannot be read, so the function decides: the shorter answer is the better one.
    assert (found["n"], found["wins"], found["failed"]) == (2, 2, 0)
    assert found["same_position"]["n"] == 6


def test_a_judge_of_its_own_takes_the_place_of_those_of_label(make: Maker) -> None:
    label = {"judge_method": "function", "judge_function": "brief"}
    engine = ScriptedEngine(lambda question: f"Verdict: {'A' if 'x' in question.messages[-1]['content'][:80] else 'B'}")
    run = make(engine, label=label, evaluate={"judge": "base", "judge_method": "verdict"})
    (found,) = win_rates(run, ScriptedBase(), {"base": answers("y"), "sft": answers("x x x x")})
    assert (found["wins"], len(engine.ids("weigh-swapped"))) == (1, 1)
    (found,) = win_rates(make(engine, label=label), ScriptedBase(), {"base": answers("y"), "sft": answers("x x x x")})
    assert (found["losses"], len(engine.asked)) == (1, 2)


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_the_first_five_of_each_tag_with_every_policys_answer() -> None:
    base = [response("b", id=f"h{n}") for n in range(7)] + [response("b", id="o", tag=PLAIN)]
    sft = [row._replace(text="s", refused=True, score=1.5) for row in base]
    found = samples({"base": base, "sft": sft})
    assert [row["prompt_id"] for row in found] == ["h0", "h1", "h2", "h3", "h4", "o"]
    assert found[0] == {
        "prompt_id": "h0",
        "prompt": "Prompt h0",
        "tag": HARM,
        "responses": {"base": "b", "sft": "s"},
        "scores": {"base": None, "sft": 1.5},
        "refused": {"base": False, "sft": True},
    }


# --- the stage ------------------------------------------------------------------------------------------------------


def policies_run(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> Run:
    """Return a run with an SFT and a PPO adapter, whose base and SFT policies differ in what they refuse."""

    def writes(harmful: str, ordinary: str) -> Any:
        return lambda question: harmful if question.item_id.startswith("h") else Answer(ordinary, ended=False, tokens=7)

    engines = {
        "base": ScriptedEngine(writes(WILLING, HELPFUL), prefers("can't help", 1.0), identity="base"),
        "sft": ScriptedEngine(writes(REFUSAL, HELPFUL), identity="sft"),
        "ppo": ScriptedEngine(writes(REFUSAL, REFUSAL), identity="ppo"),
    }
    stages = ["revise", "sft", "ppo", "evaluate"]
    ppo = {"reward_function": "brief"}
    run = make(engines, **{"stages": stages, "ppo": ppo, **sections})
    for name in ("2-sft/adapter", "5-ppo/policy"):
        (run.folder / name).mkdir(parents=True)
    monkeypatch.setattr(evaluate.sampling, "pack", lambda base, *parts: None)
    ratios = {"base": 2.0, "sft": 0.5, "ppo": 3.5}
    monkeypatch.setattr(evaluate, "response_logprob", lambda base, role, batch: evaluate.torch.full((2,), ratios[role]))
    return run


def test_the_report_reads_the_results(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = policies_run(make, tmp_path, monkeypatch)
    counts = evaluate.evaluate(run)
    assert counts == {"prompts": 2, "policies": 3, "responses": 6, "failed": 0}
    written = json.loads((run.folder / "6-evaluate" / "results.json").read_text())
    found = Results.model_validate(written)
    assert (found.policies, found.reference, found.prompts) == (["base", "sft", "ppo"], "sft", {HARM: 1, PLAIN: 1})
    refused = {name: {tag: part.rate for tag, part in m.refusal.items()} for name, m in found.metrics.items()}
    assert refused == {"base": {HARM: 0, PLAIN: 0}, "sft": {HARM: 1, PLAIN: 0}, "ppo": {HARM: 1, PLAIN: 1}}
    kl = {name: m.kl_to_reference.mean for name, m in found.metrics.items() if m.kl_to_reference}
    assert kl == {"base": 1.5, "sft": 0.0, "ppo": 3.0}
    assert found.metrics["base"].score is not None and set(found.metrics["base"].score) == {"all", HARM, PLAIN}
    assert [(row.policy, row.against, row.wins, row.losses, row.ties) for row in found.win_rates] == [
        ("sft", "base", 1, 0, 1),
        ("ppo", "base", 2, 0, 0),
        ("ppo", "sft", 1, 0, 1),
    ]
    assert len(found.samples) == 2
    assert [one.tag for one in found.differences if one.metric == "refusal"] == [HARM, PLAIN] * 3
    assert [one.tag for one in found.differences if one.metric == "score"] == ["all"] * 3
    assert len(found.differences) == 9
    assert set(written["metrics"]["sft"]) == {"refusal", "score", "kl_to_reference", "response_tokens", "ended"}


def test_every_response_is_written(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = policies_run(make, tmp_path, monkeypatch)
    evaluate.evaluate(run)
    rows = rows_of(run.folder / "6-evaluate" / "responses.jsonl")
    assert [(row["policy"], row["prompt_id"]) for row in rows] == [
        (policy, prompt) for policy in ("base", "sft", "ppo") for prompt in ("h4", "o3")
    ]
    assert rows[1] == {
        "id": "o3/base",
        "policy": "base",
        "prompt_id": "o3",
        "tag": PLAIN,
        "prompt": "How do I water a fern?",
        "text": HELPFUL,
        "ended": False,
        "tokens": 7,
        "refused": False,
        "score": rows[1]["score"],
        "kl": 1.5,
    }
    assert rows[1]["score"] == pytest.approx(-1.4)  # 14 words


def test_no_judge_is_asked_where_the_recipe_wants_none(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = policies_run(make, tmp_path, monkeypatch, evaluate={"judge_prompts_per_tag": 0})
    evaluate.evaluate(run)
    assert json.loads((run.folder / "6-evaluate" / "results.json").read_text())["win_rates"] == []


def test_nothing_is_asked_twice(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = policies_run(make, tmp_path, monkeypatch)
    evaluate.evaluate(run)
    before = (run.folder / "6-evaluate" / "results.json").read_bytes()
    silent = {name: ScriptedEngine(identity=name) for name in ("base", "sft", "ppo")}
    monkeypatch.setattr(evaluate, "LocalEngine", lambda base, role, **settings: silent[role])
    evaluate.evaluate(run)
    assert all(engine.calls == [] for engine in silent.values())
    assert (run.folder / "6-evaluate" / "results.json").read_bytes() == before


def test_the_base_alone_can_be_evaluated(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(ScriptedEngine(lambda question: HELPFUL), stages=["evaluate"])
    monkeypatch.setattr(evaluate.sampling, "pack", lambda base, *parts: None)
    evaluate.evaluate(run)
    found = Results.model_validate_json((run.folder / "6-evaluate" / "results.json").read_text())
    assert (found.policies, found.reference, found.differences, found.win_rates) == (["base"], "base", [], [])
    assert found.metrics["base"].score is None


def test_an_unknown_reward_function_is_named(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = policies_run(make, tmp_path, monkeypatch, ppo={"reward_function": "nosuch"})
    with pytest.raises(ConfigError, match="`nosuch` is not registered"):
        evaluate.evaluate(run)


def test_prompt_sets_without_eval_prompts_stop(make: Maker) -> None:
    train = [row for row in PROMPTS if row["split"] == "train"]
    with pytest.raises(DataError, match="the prompt sets hold no prompts of the split `eval`"):
        evaluate.evaluate(make(ScriptedEngine(), prompts=train))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"evaluate": {"batch_size": 2}}, []),
        ({"label": {"few_shot": 1}}, ["judge"]),
        ({"label": {"min_strength": 1}}, []),
        ({"label": {"verdict_clamp": 0.7}}, ["judge"]),
        ({"label": {"principles": "all"}}, ["judge"]),
        ({"label": {"judge": "big"}, "engines": {"big": {"model": "m", "urls": ["http://a/v1"]}}}, ["engines"]),
        ({"evaluate": {"judge": "base"}}, []),
        ({"evaluate": {"judge": "base", "judge_method": "rating"}}, ["judge", "recipe.evaluate"]),
        ({"prompts": PROMPTS[1:]}, []),
        ({"prompts": [*PROMPTS, {"id": "e9", "prompt": "New?", "split": "eval"}]}, ["prompts"]),
        ({"constitution": CONSTITUTION.replace("first: F1", "first: F9")}, ["constitution"]),
        ({"constitution": CONSTITUTION.replace("response: R2", "response: R3")}, []),
    ],
)
def test_the_inputs_change_with_what_the_result_depends_on(
    changed: dict[str, Any], expected: list[str], make: Maker
) -> None:
    before = evaluate.inputs(make())
    after = evaluate.inputs(make(**changed))
    assert sorted(name for name in before if before[name] != after[name]) == expected
