"""The rules of `rlaif.health` on made-up figures: what fires, when, on which value, and what must not."""

import random

import pytest
from pydantic import ValidationError

from rlaif.health import ADVICE, KINDS, HealthSection, findings, window_means
from rlaif.ppo_section import PpoSection

HEALTHY = {
    "rollout/score": 0.0,
    "rollout/score_std": 1.0,
    "rollout/kl_to_reference": 1.0,
    "rollout/response_tokens": 30.0,
    "rollout/ended": 0.9,
    "policy/kl_to_old": 0.01,
    "policy/entropy": 2.0,
    "value/loss": 0.5,
    "rollout/independent_score": 0.0,
}


def run_of(count=12, **series):
    """Rows of a healthy run, with the series named by the last part of their key in the place of some figures."""
    keys = {key.rpartition("/")[2]: key for key in HEALTHY if key != "value/loss"} | {"value_loss": "value/loss"}
    rows = [{"update": n + 1, **HEALTHY} for n in range(count)]
    for name, values in series.items():
        for row, value in zip(rows, values, strict=True):
            row[keys[name]] = value
    return rows


def found(rows, **limits):
    return findings(rows, HealthSection.model_validate(limits))


def test_a_healthy_run_has_no_findings():
    assert found(run_of()) == []
    assert found([]) == []


def test_noise_of_small_batches_and_a_learning_policy_has_no_findings():
    """Fifty runs of 8 and of 60 updates with 8 responses: the score rises from 0 to 2, all is as noisy as it is."""
    draw = random.Random(1).gauss
    for count in [8, 60] * 25:
        rise = [2 * n / count for n in range(count)]
        rows = run_of(
            count,
            score=[mean + draw(0, 1) / 8**0.5 for mean in rise],
            score_std=[max(0.3, 1 + draw(0, 0.3)) for _ in rise],
            kl_to_reference=[5 * mean + draw(0, 2) for mean in rise],
            response_tokens=[30 + draw(0, 6) for _ in rise],
            ended=[min(1.0, max(0.0, 0.6 + draw(0, 0.17))) for _ in rise],
            entropy=[2.2 - 0.5 * mean + draw(0, 0.2) for mean in rise],
            kl_to_old=[0.02 + abs(draw(0, 0.02)) for _ in rise],
            value_loss=[0.5 + abs(draw(0, 0.4)) for _ in rise],
            independent_score=[mean / 2 + draw(0, 1) / 8**0.5 for mean in rise],
        )
        assert [one for one in found(rows) if one.kind != "overoptimization"] == []


# Each breaks from update 6 on; over a window of 5 the limit is passed at the update given (worked out by hand).
BROKEN = {
    "score_drop": ("score", [1.0] * 6 + [-1.0] * 6, 9, -0.2),  # means 1, .6, .2, -.2; 1.2 below
    "score_spread": ("score_std", [1.0] * 6 + [0.0] * 6, 11, 0.0),  # .2 at update 10, then 0
    "kl_to_reference": ("kl_to_reference", [1.0] * 6 + [121.0] * 6, 9, 73.0),  # 1, 25, 49, 73
    "kl_to_old": ("kl_to_old", [0.0] * 6 + [0.5] * 6, 9, 0.3),  # .1, .2 (not above .2), .3
    "entropy": ("entropy", [2.0] * 6 + [0.0] * 6, 11, 0.0),  # .4 at update 10 is not below .4
    "response_tokens": ("response_tokens", [30.0] * 6 + [90.0] * 6, 9, 66.0),  # 42, 54, 66 above 60
    "ended_drop": ("ended", [0.9] * 6 + [0.0] * 6, 9, 0.36),  # .72, .54, .36 below .4
    "value_loss": ("value_loss", [0.5] * 6 + [10.5] * 6, 9, 6.5),  # 2.5, 4.5, 6.5 above 5
}


@pytest.mark.parametrize("kind", BROKEN)
def test_each_rule_fires_once_at_the_first_update_whose_mean_passes_its_limit(kind):
    name, series, update, value = BROKEN[kind]
    rows = run_of(**{name: series})
    (one,) = found(rows)
    assert (one.kind, one.update, one.value) == (kind, update, pytest.approx(value))
    assert found(rows[: update - 1]) == []
    assert found(rows, **{kind: None}) == []
    assert f"update {update}: {one.key} is" in str(one)
    assert "over 5 updates" in str(one)
    assert ADVICE[kind] in str(one)


def test_a_constant_first_rollout_is_found_at_once_and_a_later_one_is_not_called_so():
    (one,) = found(run_of(1, score_std=[1e-9]))
    assert (one.kind, one.update) == ("constant_score", 1)
    assert found(run_of(3, score_std=[1.0, 0.0, 0.0])) == []


def test_a_figure_that_one_response_could_not_give_is_not_judged_and_others_are_judged_without_it():
    rows = run_of(13, score_std=[1.0] * 7 + [0.0] * 6)
    del rows[0]["rollout/score_std"]
    (one,) = found(rows)  # five zeros end at update 12, one later than where the first update's is there
    assert (one.kind, one.update, one.value) == ("score_spread", 12, 0.0)
    for row in rows:
        row.pop("rollout/score_std", None)
    assert found(rows) == []


def test_overoptimization_is_a_falling_independent_score_under_a_rising_score():
    rising, falling = [n / 4 for n in range(12)], [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 2 + [-0.5] * 5
    (one,) = found(run_of(score=rising, independent_score=falling))
    # Means over five: .4, .6, .76, .58, .36, .1: at update 10 it is .66 below its best.
    assert (one.kind, one.update, one.value) == ("overoptimization", 10, pytest.approx(0.1))
    assert "it was 0.76, and the score has risen from 1 to 1.75 since" in str(one)
    assert found(run_of(score=[0.0] * 12, independent_score=falling)) == []
    assert found(run_of(score=rising, independent_score=rising)) == []


def test_what_is_first_found_does_not_change_with_later_updates():
    rows = run_of(score=[1.0] * 6 + [-1.0] * 6, entropy=[2.0] * 6 + [0.0] * 6)
    whole = found(rows)
    assert [one.kind for one in whole] == ["score_drop", "entropy"]
    for count in range(len(rows) + 1):
        assert found(rows[:count]) == [one for one in whole if one.update <= count]


def test_figures_that_a_run_does_not_have_are_not_judged():
    rows = [{key: value for key, value in row.items() if not key.startswith(("value", "policy"))} for row in run_of()]
    assert found(rows) == []
    assert found(run_of(value_loss=[0.0] + [1.0] * 11)) == []  # no multiple of 0


def test_means_are_over_the_rows_that_hold_the_figure():
    rows = [{"a": 1.0}, {}, {"a": 2.0}, {"a": 6.0}]
    assert window_means(rows, "a", 2) == [(2, 1.5), (3, 4.0)]
    assert window_means(rows, "a", 4) == window_means(rows, "b", 1) == []


def test_every_kind_has_advice_and_a_limit_but_the_one_that_needs_none():
    assert set(ADVICE) == set(KINDS)
    assert set(HealthSection.model_fields) == {*KINDS, "window", "stop"} - {"constant_score"}


def test_an_unknown_kind_to_stop_at_is_refused():
    with pytest.raises(ValidationError, match="Input should be 'constant_score'"):
        HealthSection.model_validate({"stop": ["boredom"]})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"reward_function": "brief", "independent": [{"name": "a", "function": "brief"}]},
            "what the policy optimizes",
        ),
        ({"independent": [{"name": "a", "model": True}]}, "what the policy optimizes"),
        ({"reward_function": "judge", "independent": [{"name": "a", "judge": True}]}, "what the policy optimizes"),
        ({"rewards": [{"name": "a", "cost": "x"}], "independent": [{"name": "b", "cost": "x"}]}, "policy optimizes"),
        ({"reward_function": "brief", "independent": [{"name": "a", "member": 2}]}, "here give `model`"),
        ({"independent": [{"name": "a", "member": 1}]}, "greater than or equal to 2"),
        ({"independent": [{"name": "a", "member": 2}, {"name": "b", "member": 3}]}, "one source stands in two parts"),
        ({"independent": [{"name": "a", "judge": True}, {"name": "a", "function": "x"}]}, "two parts have one name"),
        ({"independent": [{"name": "a", "length": 3}]}, "has length; exactly one of member, model, cost, function"),
        ({"independent": [{"name": "a", "function": "x", "length": 3}]}, "has function and length; exactly one"),
    ],
)
def test_an_independent_score_from_what_is_optimized_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        PpoSection.model_validate(keys)


def test_a_rule_a_judge_or_a_member_beside_a_reward_model_is_independent():
    parts = [{"name": "rule", "function": "brief"}, {"name": "judge", "judge": True}, {"name": "own", "member": 2}]
    found = PpoSection.model_validate({"independent": parts})
    assert [part.source for part in found.independent] == ["function", "judge", "member"]
