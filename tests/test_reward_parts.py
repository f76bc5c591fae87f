"""What a recipe may say of the parts of a reward, and the message for each thing it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import ConfigError
from rlaif.recipe import Recipe, load_recipe

F = {"name": "f", "function": "brief"}
G = {"name": "g", "function": "brief"}
LONG = {"name": "long", "length": 20}
MODEL = {"name": "m", "model": True}
JUDGE = {"name": "j", "judge": True}


def recipe(folder: Path, stages: list[str], **ppo: Any) -> Recipe:
    path = folder / "recipe.yaml"
    reward = ppo.pop("reward", {})
    path.write_text(json.dumps({"name": "r", "model": "m", "stages": stages, "ppo": ppo, "reward": reward}))
    return load_recipe(path).recipe


@pytest.mark.parametrize(
    "ppo",
    [
        {"rewards": [F, LONG]},
        {"rewards": [F, G], "combine": "worst"},
        {"rewards": [F, G, LONG], "combine": "gate", "gate_safety": "f", "gate_helpfulness": "g", "gate_tags": ["x"]},
        {"rewards": [F, JUDGE, {"name": "r", "repetition": 3, "weight": 0.1}]},
    ],
)
def test_parts_that_fit_are_taken_in_the_order_of_their_names(ppo: dict[str, Any], tmp_path: Path) -> None:
    taken = recipe(tmp_path, ["ppo"], **ppo).ppo
    assert [part.name for part in taken.rewards] == sorted(part["name"] for part in ppo["rewards"])


def test_a_part_says_where_it_comes_from(tmp_path: Path) -> None:
    parts = recipe(tmp_path, ["ppo"], rewards=[F, JUDGE, LONG]).ppo.rewards
    assert [(part.source, part.is_penalty) for part in parts] == [
        ("function", False),
        ("judge", False),
        ("length", True),
    ]


@pytest.mark.parametrize(
    ("ppo", "complaint"),
    [
        ({"rewards": [{"name": "x"}]}, "the part `x` has no source; exactly one of model, cost, function, judge"),
        ({"rewards": [{"name": "x", "model": False}]}, "the part `x` has no source"),
        ({"rewards": [F | {"judge": True}]}, "the part `f` has function and judge; exactly one of"),
        ({"rewards": [F, F]}, "rewards: the name `f` stands in two parts"),
        ({"rewards": [JUDGE, JUDGE | {"name": "k"}]}, "rewards: the source `judge` stands in two parts"),
        ({"rewards": [LONG]}, "rewards has penalties alone; add a part that scores"),
        ({"rewards": [F | {"weight": 0}]}, "greater than 0"),
        ({"rewards": [F | {"weight": -1}]}, "greater than 0"),
        ({"rewards": [{"name": "x", "length": 0}]}, "greater than 0"),
        ({"rewards": [F | {"weigth": 2}]}, "weigth"),
        (
            {"rewards": [F, G | {"weight": 2}], "combine": "worst"},
            "the part `g` has a weight, which `worst` does not read",
        ),
        ({"rewards": [F, G], "combine": "gate"}, "gate_safety is `None`, gate_helpfulness `None`"),
        (
            {"rewards": [F, G], "combine": "gate", "gate_safety": "f", "gate_helpfulness": "f"},
            "gate_helpfulness `f`, and the parts that score are `f`, `g`; a gate needs two, one named by each key",
        ),
        (
            {"rewards": [F, G, JUDGE], "combine": "gate", "gate_safety": "f", "gate_helpfulness": "g"},
            "the parts that score are `f`, `g`, `j`",
        ),
        (
            {"rewards": [F, JUDGE], "combine": "gate", "gate_safety": "j", "gate_helpfulness": "f"},
            "the part `j` is a rating, which is no logit",
        ),
        ({"rewards": [F, G], "gate_threshold": 0.3}, "gate_threshold is read where combine is `gate`, and it is `sum`"),
        ({"combine": "worst", "reward_function": "brief"}, "combine says how parts combine, but `rewards` lists none"),
        ({"rewards": [F], "reward_function": "brief"}, "reward_function and rewards exclude each other"),
        ({"rewards": [MODEL]}, "the part `m` of ppo.rewards needs the stage `reward` before it"),
        (
            {"rewards": [{"name": "c", "cost": "reward"}]},
            "ppo.rewards: the cost needs the stage `reward` before it, with",
        ),
        (
            {"rewards": [{"name": "c", "cost": "runs/other/4-reward"}]},
            "ppo.rewards: no cost adapter in `runs/other/4-reward`; looked for cost/adapter in it",
        ),
        ({}, "ppo needs the stage `reward` before it, or ppo.reward_function or ppo.rewards"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_reason(ppo: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, ["ppo"], **ppo)
    assert complaint in str(caught.value)
    assert str(tmp_path / "recipe.yaml") in str(caught.value) or "no cost adapter" in complaint


def test_a_cost_adapter_of_another_run_is_found_beside_the_recipe(tmp_path: Path) -> None:
    adapter = tmp_path / "other" / "4-reward" / "cost" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    words = [{"name": "w", "function": "brief"}]
    places = {
        "rewards": {"rewards": [{"name": "c", "cost": "other/4-reward"}]},
        "independent": {"rewards": words, "independent": [{"name": "c", "cost": "other/4-reward"}]},
        "constraint": {"rewards": words, "constraint": {"cost": "other/4-reward"}},
    }
    stage = adapter.parent.parent
    for key, ppo in places.items():
        recipe(tmp_path, ["ppo"], **ppo)
        found = load_recipe(tmp_path / "recipe.yaml")
        assert found.cost_stage == stage
        assert found.recipe.ppo.costs == {f"ppo.{key}": str(stage)}  # for any working folder


def test_a_cost_of_this_run_needs_a_reward_stage_that_trains_one(tmp_path: Path) -> None:
    stages = ["label", "reward", "ppo"]
    ppo = {"rewards": [{"name": "c", "cost": "reward"}, MODEL]}
    with pytest.raises(ConfigError, match=r"with reward\.cost: true"):
        recipe(tmp_path, stages, **ppo)
    assert recipe(tmp_path, stages, reward={"cost": True}, **ppo).ppo.rewards[0].cost == "reward"
