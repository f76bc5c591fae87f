"""The studies of PPO on a known reward: what their tables say of runs, and that both scripts run."""

import sys

import known_reward
import pytest
from known_reward import Outcome, Variant
from study import three
from test_studies import script

from rlaif.recipe import load_recipe
from rlaif.records import read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def test_a_row_has_means_over_seeds_and_differences_of_the_same_seed():
    found = {
        "none": [Outcome(1.0, 0, 2.0, 0.5, 9.0, [], [], []), Outcome(3.0, 2, 4.0, 0.5, 9.0, [], [], [])],
        "some": [Outcome(0.5, 1, 1.0, 0.25, 9.0, [], [], []), Outcome(3.5, 0, 1.0, 0.75, 9.0, [], [], [])],
    }
    assert known_reward.rows_of(found) == [
        ["none", "2.000 (1.000 to 3.000)", "+0.0 +0.0", "0 2", "3.000 (2.000 to 4.000)", ".500 (.500 to .500)"],
        ["some", "2.000 (.500 to 3.500)", "-0.5 +0.5", "1 0", "1.000 (1.000 to 1.000)", ".500 (.250 to .750)"],
    ]


def test_a_number_loses_its_leading_zero_and_no_other():
    assert [three(value) for value in (0.5, -0.25, 10.2, 20.0, -10.5, None)] == [
        *(".500", "-.250", "10.200", "20.000", "-10.500", "-")
    ]


def test_words_are_counted_where_there_are_any():
    assert known_reward.words_of([{"text": text} for text in ("one two", "...", "", "it's")]) == [2.0, 1.0]


def test_a_curve_has_every_fourth_update_and_the_last_for_each_seed():
    first = Outcome(0, 0, 0, 0, 0, [0.0, 9.0, 9.0, 9.0, 1.0, 9.0, 2.0], [0.1] * 6 + [0.02], [3.0, 2.0, 4.5])
    second = Outcome(0, 0, 0, 0, 0, [0.5, 1.5], [0.001, 0.0], [])
    assert known_reward.curves_of({"none": [first, second]}) == [
        ["none", "1", "0.0 1.0 2.0", "100.0 100.0 20.0", "3.000 4.500"],
        ["none", "2", "0.5 1.5", "1.0 0.0", ""],
    ]


@pytest.mark.parametrize("name", ["exploration", "ablations"])
def test_what_every_variant_sets_is_a_recipe(name, tmp_path):
    module = script(name)
    parts = {
        "exploration": lambda: [(known_reward.SCORED, module.EXPLORED), (known_reward.LEARNED, module.UNCERTAIN)],
        "ablations": lambda: [part[1:] for embedded in (False, True) for part in module.parts(embedded)],
    }[name]()
    for recipe, variants in parts:
        path = recipe if isinstance(recipe, str) else known_reward.written(tmp_path, name, recipe)
        found = [load_recipe(path, [*one.sets, "model=tiny"]).recipe.ppo for one in variants]
        assert len({one.model_dump_json() for one in found}) == len(variants)  # each sets something of its own


@pytest.mark.slow
def test_a_study_prints_a_row_for_each_variant_from_runs_on_unseen_prompts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--folder", str(tmp_path), "--seeds", "1", "--updates", "2"])
    variants = [Variant("none"), Variant("share", ["ppo.reference_share=0.5"])]
    options = known_reward.parser("").parse_args()
    assert known_reward.main([("part", known_reward.SCORED, variants)], options, curves=["part"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        *("| variant", "| none", "| share"),
        *("| variant", "| none", "| share"),
    ]
    rows = [row for _, row in read_jsonl(tmp_path / "part-1" / "6-evaluate" / "responses.jsonl")]
    assert len([row for row in rows if row["policy"] == "ppo"]) == known_reward.PROMPTS // 2
    assert known_reward.read(tmp_path / "part-1").kl > -0.2  # texts come back from the model's characters


def test_a_mistake_ends_with_a_message_and_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--folder", str(tmp_path), "--model", "no/such", "--updates", "2"])
    options = known_reward.parser("").parse_args()
    assert known_reward.main([("part", known_reward.SCORED, [Variant("none", ["ppo.lam=7"])])], options) == 2
    assert "ppo.lam" in capsys.readouterr().err
