"""What `evaluate` scores with: what PPO optimized, what it did not, and the cost, each compared with bare members."""

import json
from contextlib import contextmanager

import pytest
import tiny_rewards
import tiny_runs

from rlaif.model import sampling
from rlaif.records import Prompt
from rlaif.sections import Combination
from rlaif.stages import evaluate, rejection
from rlaif.stages.independent import kept_out
from rlaif.stages.reward_model import RewardModel
from rlaif.stages.scorers import BESIDE, functions_of, scorers_of

TEXTS = ["ab", "abcabc", "x"]
ROWS = [Prompt(id=f"p{number}", prompt="Hello?", tag="t") for number in range(3)]


@contextmanager
def finished(folder, model, *, heads=2, **ppo):
    """A run whose stage `reward` left heads (offsets 1, 2, ..., scale 2) and a cost, and whose PPO left its scales."""
    tiny_rewards.finished(folder, model, heads=heads, cost=True)
    with tiny_runs.opened(folder, model, ppo=ppo, reward={"num_heads": heads, "cost": True}) as run:
        place = run.stage_folder("ppo")
        place.mkdir(exist_ok=True)
        scale = {"offset": 5.0, "scale": 7.0, "parts": {"harm": [0.5, 4.0]}, "independent": {"kept": [0.25, 3.0]}}
        (place / "scale.json").write_text(json.dumps(scale))
        tiny_runs.finished(place)
        tiny_runs.finished(run.stage_folder("reward"))
        yield run


def numbers(run):
    """What the run's scorers say, and what members and cost say by themselves."""
    base = run.load_base()
    batch = sampling.pack(base, [base.tokenizer.prompt(row.messages) for row in ROWS], [[70, 71, 2], [72, 2], [2]])
    found = {name: scorer(ROWS, TEXTS, batch).tolist() for name, scorer in scorers_of(run, base).items()}
    fresh, stage = run.load_base(), run.stage_folder("reward")
    members = RewardModel.load(fresh, stage, Combination()).members(batch).T.tolist()
    (cost,) = RewardModel.load(fresh, stage, Combination(), "cost").members(batch).T.tolist()
    return found, members, cost


def near(values):
    return pytest.approx(values, abs=1e-4)


def test_the_score_does_without_the_member_that_ppo_did_without(tmp_path, tiny_model):
    with finished(tmp_path, tiny_model, independent=[{"name": "kept", "member": 2, "weight": 3.0}]) as run:
        found, (first, second), cost = numbers(run)
    assert found["score"] == near([(one - 1) / 2 for one in first])
    assert found["independent_score"] == near([(one - 0.25) / 3 for one in second])
    assert found["cost"] == near(cost)
    assert len({*first, *second, *cost}) == 9


def test_without_an_independent_score_the_whole_ensemble_scores(tmp_path, tiny_model):
    with finished(tmp_path, tiny_model) as run:
        found, (first, second), cost = numbers(run)
    assert found["score"] == near([((a - 1) / 2 + (b - 2) / 2) / 2 for a, b in zip(first, second, strict=True)])
    assert found.keys() == {"score", "cost"}


@pytest.mark.parametrize("key", ["rewards", "independent"])
def test_a_cost_that_is_a_part_is_loaded_once_and_given_as_it_is(tmp_path, tiny_model, key):
    name = "harm" if key == "rewards" else "kept"
    with finished(tmp_path, tiny_model, heads=1, **{key: [{"name": name, "cost": "reward"}]}) as run:
        found, _, cost = numbers(run)
    assert found["cost"] == near(cost)
    if key == "rewards":
        assert found["score"] == near([((-one - 0.5) / 4 - 5) / 7 for one in cost])
    else:
        assert found["independent_score"] == near([(-one - 0.25) / 3 for one in cost])


def test_rejection_depends_on_the_member_that_it_does_without_where_ppo_follows(tmp_path, tiny_model):
    parts = {"ppo": {"independent": [{"name": "kept", "member": 2}]}, "reward": {"num_heads": 2}}
    stages = ["revise", "sft", "label", "reward", "rejection", "ppo"]
    for changes, kept in (({}, []), (parts, [2])):
        with tiny_runs.opened(tmp_path, tiny_model, **changes, stages=stages) as run:
            assert ("kept_out" in rejection.inputs(run)) == bool(kept)
            assert kept_out(run) == kept
    with tiny_runs.opened(tmp_path, tiny_model, **parts, stages=stages[:-1]) as run:
        assert kept_out(run) == []


def test_what_is_measured_beside_the_score_is_an_input_only_where_it_is_measured(tmp_path, tiny_model):
    with tiny_runs.opened(tmp_path, tiny_model) as run:
        plain = evaluate.inputs(run)
    assert not {"beside", "cost", "independent", *BESIDE} & plain.keys()
    with tiny_runs.opened(tmp_path, tiny_model, reward={"cost": True}) as run:
        assert evaluate.inputs(run).keys() - plain.keys() == {"beside", "cost"}
    with tiny_runs.opened(tmp_path, tiny_model, ppo={"independent": [{"name": "r", "function": "brief"}]}) as run:
        assert evaluate.inputs(run).keys() - plain.keys() == {"beside", "independent"}
    for cost in (False, True):  # a function gives the cost, so that an adapter of the stage `reward` is not asked
        limit = {"ppo": {"constraint": {"function": "brief"}}, "reward": {"cost": cost}}
        with tiny_runs.opened(tmp_path, tiny_model, **limit) as run:
            assert evaluate.inputs(run).keys() - plain.keys() == {"beside", "cost_function"}


def test_how_members_combine_is_an_input_where_no_ppo_has_it_as_one(tmp_path, tiny_model):
    combined = {"ppo": {"reward_model": {"ensemble": "worst"}}, "reward": {"num_heads": 2}}
    stages = ["revise", "sft", "label", "reward", "evaluate"]
    for changes, listed, expected in (({}, stages, False), (combined, stages, True), (combined, None, False)):
        with tiny_runs.opened(tmp_path, tiny_model, **changes, **({"stages": listed} if listed else {})) as run:
            assert ("reward_model" in evaluate.inputs(run)) == expected


def test_the_function_that_ppo_limits_gives_the_cost_and_not_an_adapter(tmp_path, tiny_model):
    with finished(tmp_path, tiny_model, constraint={"function": "brief"}, reward_function="brief") as run:
        found, _, _ = numbers(run)
        assert found == {}
        measured = {name: (called, function([], TEXTS)) for name, (called, function) in functions_of(run, None).items()}
    assert measured == {"score": ("brief", [-0.1] * 3), "cost": ("brief", [-0.1] * 3)}
    with finished(tmp_path, tiny_model, constraint={"cost": "reward"}) as run:
        assert functions_of(run, None) == {}
        assert "cost" in numbers(run)[0]
