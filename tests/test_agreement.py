import math
import subprocess
import sys

import numpy as np
import oracles
import pytest

from rlaif.maths.agreement import (
    both_orders,
    mean_interval,
    paired_bootstrap,
    same_position,
    shown_below,
    wilson,
    win_rate,
)

PRINTED = 6e-6  # literals are typed with five decimals
FLOAT64 = 1e-12  # both sides are float64; only the order of a few operations differs
RESAMPLING = 0.03  # the quantiles of 20,000 draws of numbers with a spread near 1


def judged(strength, bias, space="logit"):
    """Ask a judge with a known strength and bias, first with a first, then with b first."""
    return both_orders(strength + bias, -strength + bias, space)


# Both orders


@pytest.mark.parametrize(
    ("strength", "bias", "probability_mean", "logit_mean"),
    [(1.0, 3.0, 0.55061, 0.73106), (0.5, 2.0, 0.55328, 0.62246)],
)
def test_averaging_logits_recovers_what_averaging_probabilities_loses(strength, bias, probability_mean, logit_mean):
    assert judged(strength, bias).preference == pytest.approx(logit_mean, abs=PRINTED)
    assert judged(strength, bias, "probability").preference == pytest.approx(probability_mean, abs=PRINTED)


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_strength_and_bias_are_recovered_and_the_preference_equals_the_loop(space):
    for strength, bias in [(0.0, 0.0), (1.5, -0.5), (-2.0, 3.0), (0.1, 4.0)]:
        verdict = judged(strength, bias, space)
        assert verdict.strength == pytest.approx(strength, abs=FLOAT64)
        assert verdict.bias == pytest.approx(bias, abs=FLOAT64)
        expected = oracles.swapped_preference(strength, bias, space)
        assert verdict.preference == pytest.approx(expected, abs=FLOAT64)


def test_a_judge_that_always_answers_first_has_no_preference():
    verdict = both_orders(4.0, 4.0)
    assert (verdict.preference, verdict.strength, verdict.bias) == (0.5, 0.0, 4.0)
    assert both_orders(4.0, 4.0, "probability").preference == pytest.approx(0.5, abs=FLOAT64)
    assert same_position([4.0, 4.0], [4.0, 4.0]).tolist() == [True, True]


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_exchanging_the_candidates_flips_the_label_and_keeps_the_bias(space):
    label, exchanged = both_orders(2.5, -0.5, space), both_orders(-0.5, 2.5, space)
    assert exchanged.preference == pytest.approx(1 - label.preference, abs=FLOAT64)
    assert (exchanged.strength, exchanged.bias) == (-label.strength, label.bias)


def test_an_unbiased_judge_gets_the_same_label_in_both_spaces():
    assert judged(0.8, 0.0).preference == pytest.approx(judged(0.8, 0.0, "probability").preference, abs=FLOAT64)


def test_extreme_logits_saturate_without_overflow():
    assert judged(2000.0, 0.0).preference == 1.0
    assert judged(-2000.0, 0.0, "probability").preference == 0.0


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_refused(logit):
    with pytest.raises(ValueError, match="finite"):
        both_orders(logit, 0.0)
    with pytest.raises(ValueError, match="finite"):
        same_position([0.0, 1.0], [0.0, logit])


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="'odds'"):
        both_orders(0.0, 0.0, "odds")


def test_the_same_position_wins_where_bias_beats_strength():
    pairs = [(1.0, 3.0), (1.0, -3.0), (3.0, 1.0), (-3.0, 1.0), (-1.0, 3.0), (2.0, 2.0), (0.0, 0.0)]
    first = [strength + bias for strength, bias in pairs]
    second = [-strength + bias for strength, bias in pairs]
    assert same_position(first, second).tolist() == [abs(bias) > abs(strength) for strength, bias in pairs]
    assert same_position(np.array(first), np.array(second)).dtype == np.bool_


def test_the_same_position_of_a_single_pair_can_be_asked():
    assert bool(same_position(1.0, 2.0)) is True
    assert bool(same_position(1.0, -2.0)) is False
    assert bool(same_position(1e-200, 1e-200)) is True  # their product would be 0


# Rates


def test_wilson_gives_the_published_intervals():
    # R: prop.test(8, 10, correct = FALSE) and prop.test(0, 10, correct = FALSE)
    assert wilson(8, 10) == (
        10,
        8,
        0.8,
        pytest.approx(0.4901625, abs=1e-7),
        pytest.approx(0.9433178, abs=1e-7),
    )
    assert wilson(0, 10) == (10, 0, 0.0, 0.0, pytest.approx(0.2775328, abs=1e-7))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_inverts_the_score_test(confidence):
    for count, n in [(0, 1), (1, 1), (1, 3), (5, 10), (37, 200), (199, 200)]:
        rate = wilson(count, n, confidence)
        low, high = oracles.wilson(count, n, confidence)
        assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_a_rate_is_shown_to_be_below_another_where_the_whole_of_its_interval_is():
    for n in (3, 4, 6, 20, 101):
        halves = [count / 2 for count in range(2 * n + 1)]
        whole = [count for count in halves if oracles.wilson(count, n, 0.95)[1] < 0.5]
        assert [count for count in halves if count / n < shown_below(0.5, n)] == whole
    assert shown_below(0.5, 100) == pytest.approx(0.4020018, abs=1e-7)


def test_wilson_mirrors_failures_and_narrows_with_more_trials():
    some, rest = wilson(3, 10), wilson(7, 10)
    assert (some.low, some.high) == (pytest.approx(1 - rest.high), pytest.approx(1 - rest.low))
    many = wilson(300, 1000)
    assert many.high - many.low < (some.high - some.low) / 5
    assert (wilson(4, 4).high, wilson(0, 4).low) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "0 trials"),
        ((3, 2), "3 successes in 2"),
        ((-1, 2), "-1 successes"),
        ((1, 2, 1.0), "confidence"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson(*arguments)


def test_a_tie_is_half_a_win():
    rate = win_rate(wins=3, ties=2, n=10)
    assert (rate.count, rate.rate) == (4.0, 0.4)
    assert (rate.low, rate.high) == wilson(4, 10)[3:]
    assert win_rate(wins=0, ties=10, n=10).rate == 0.5


def test_a_policy_and_its_opponent_share_the_win_rate():
    assert win_rate(3, 2, 10).rate + win_rate(5, 2, 10).rate == pytest.approx(1, abs=FLOAT64)


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (4, 2, 5)])
def test_wins_and_ties_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="wins and"):
        win_rate(*counts)


# Means and differences


def test_the_mean_interval_is_students():
    result = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # std sqrt(2.5) = 1.5811388; t(.975, 4 degrees) = 2.7764451; half width 2.7764451 * 1.5811388 / sqrt(5)
    assert (result.n, result.mean) == (5, 3.0)
    assert result.std == pytest.approx(1.5811388, abs=1e-7)
    assert (result.low, result.high) == (
        pytest.approx(1.0367568, abs=1e-6),
        pytest.approx(4.9632432, abs=1e-6),
    )


def test_one_number_has_a_mean_and_no_interval():
    assert mean_interval([2.5]) == (1, 2.5, None, None, None)


@pytest.mark.parametrize("x", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_numbers_without_a_mean_are_refused(x):
    with pytest.raises(ValueError, match="expected"):
        mean_interval(x)


def test_the_bootstrap_interval_is_that_of_all_resamples():
    a, b = [1.0, 0.0, 2.0, 3.0, -1.0], [0.5, 0.5, 0.0, 1.0, 0.0]
    exact = oracles.every_resampled_mean([x - y for x, y in zip(a, b, strict=True)])  # 3,125 of them
    result = paired_bootstrap(a, b, samples=20_000)
    assert result.difference == pytest.approx(0.6, abs=FLOAT64)
    assert result.low == pytest.approx(exact[round(0.025 * len(exact))], abs=RESAMPLING)
    assert result.high == pytest.approx(exact[round(0.975 * len(exact))], abs=RESAMPLING)


def test_the_bootstrap_pairs_its_rows():
    base = np.linspace(-50, 50, 21)  # a large spread that both sides share
    result = paired_bootstrap(base + 1 + np.tile([0.0, 0.1, -0.1], 7), base)
    assert 0.9 < result.low < 1.0 < result.high < 1.1


def test_the_bootstrap_repeats_for_a_seed_and_ignores_the_order_of_rows():
    a, b = np.random.default_rng(1).normal(size=(2, 30))
    result = paired_bootstrap(a, b, samples=500, seed=3)
    assert paired_bootstrap(a, b, samples=500, seed=3) == result
    assert paired_bootstrap(a[::-1], b[::-1], samples=500, seed=3) == result
    assert paired_bootstrap(a, b, samples=500, seed=4) != result


def test_exchanging_the_sides_negates_the_difference():
    a, b = [0.0, 1.0, 4.0, 2.0], [1.0, 1.0, 0.0, 3.0]
    assert paired_bootstrap(b, a, samples=10).difference == -paired_bootstrap(a, b, samples=10).difference


def test_one_pair_has_a_difference_and_no_interval():
    assert paired_bootstrap([3.0], [1.0]) == (2.0, None, None)


@pytest.mark.parametrize("entries", [1, 1_700, 50_000])
def test_the_size_of_a_chunk_does_not_show_in_the_interval(monkeypatch, entries):
    a = np.random.default_rng(1).normal(size=51)
    whole = paired_bootstrap(a, np.zeros(51), samples=200)
    monkeypatch.setattr("rlaif.maths.agreement._CHUNK_ENTRIES", entries)
    assert paired_bootstrap(a, np.zeros(51), samples=200) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([1.0], [1.0, 2.0]), "pairs"), (([], []), "at least 1"), (([math.nan], [0.0]), "finite")],
)
def test_rows_that_are_not_pairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


def test_a_bootstrap_without_samples_is_refused():
    with pytest.raises(ValueError, match="0 bootstrap samples"):
        paired_bootstrap([1.0, 2.0], [0.0, 0.0], samples=0)


def test_agreement_is_measured_without_torch():
    check = "import sys, rlaif.maths.agreement; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
