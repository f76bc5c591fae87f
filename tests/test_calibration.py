"""What a reward model's numbers are worth: against loops, planted truth and the ways in which data can say nothing."""

import math

import numpy as np
import oracles
import pytest

from rlaif.maths.calibration import (
    accuracy_by_quantile,
    ece,
    fit_temperature,
    nll,
    pearson,
    reliability,
    spearman,
)

FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs


def drawn(n=400, seed=0, temperature=1.0):
    """Gaps and hard labels of a model that is `temperature` times too sure of itself."""
    draws = np.random.default_rng(seed)
    true = draws.normal(0, 1.5, n)
    return true * temperature, (draws.random(n) < 1 / (1 + np.exp(-true))).astype(float)


def soft(n=60, seed=1):
    draws = np.random.default_rng(seed)
    return draws.normal(0, 2, n), draws.random(n)


def test_a_model_that_knows_nothing_costs_log_two():
    assert nll([0, 0, 0], [1, 0, 0.3]) == pytest.approx(math.log(2), abs=FLOAT64)


def test_the_likelihood_equals_the_loop():
    for gaps, preferences in (drawn(), soft()):
        assert nll(gaps, preferences) == pytest.approx(oracles.nll(list(gaps), list(preferences)), abs=FLOAT64)


def test_extreme_gaps_cost_what_they_should():
    assert nll([50.0, -50.0], [1, 0]) == pytest.approx(math.exp(-50), rel=1e-9)
    assert nll([-50.0, 5000.0], [1, 0]) == pytest.approx((50 + 5000) / 2)


def test_the_calibration_error_equals_the_loop():
    for gaps, preferences in (drawn(), soft()):
        for bins in (1, 5, 10):
            expected = oracles.ece(list(gaps), list(preferences), bins)
            assert ece(gaps, preferences, bins) == pytest.approx(expected, abs=FLOAT64)


def test_a_model_that_is_sure_and_half_right_is_half_a_unit_off():
    assert ece([100.0, 100.0], [1, 0]) == pytest.approx(0.5)
    assert ece([100.0, -100.0], [1, 0]) == pytest.approx(0)
    gap = math.log(3)  # P = .75, and three of four are right
    assert ece([gap] * 4, [1, 1, 1, 0]) == pytest.approx(0, abs=FLOAT64)


def test_bins_hold_counts_means_and_intervals():
    # confidences .75, .75, .9 and, exactly, 1
    bins = reliability([math.log(3), -math.log(3), math.log(9), 1000.0], [1, 1, 1, 1], bins=2)
    assert [(one.low, one.high, one.count) for one in bins] == [(0.5, 0.75, 0), (0.75, 1.0, 4)]
    assert bins[0].confidence is None and bins[0].accuracy is None
    assert bins[1].confidence == pytest.approx((0.75 + 0.75 + 0.9 + 1) / 4)
    accuracy = bins[1].accuracy
    assert (accuracy.n, accuracy.count) == (4, 3)
    assert (accuracy.low, accuracy.high) == pytest.approx(oracles.wilson(3, 4, 0.95))


def test_exchanging_the_responses_of_pairs_changes_nothing():
    gaps, preferences = soft()
    sign = np.random.default_rng(2).choice([-1, 1], len(gaps))
    gaps[:5] = 0
    turned = (gaps * sign, np.where(sign > 0, preferences, 1 - preferences))
    assert nll(*turned) == pytest.approx(nll(gaps, preferences), abs=FLOAT64)
    for one, other in zip(reliability(*turned), reliability(gaps, preferences), strict=True):
        assert one.count == other.count
        assert one.accuracy == pytest.approx(other.accuracy)
    assert fit_temperature(*turned).temperature == pytest.approx(fit_temperature(gaps, preferences).temperature)


def test_the_temperature_of_a_model_that_is_too_sure_is_found_again():
    found = {scale: fit_temperature(*drawn(4000, temperature=scale)).temperature for scale in (1.0, 4.0, 0.25)}
    assert found[1.0] == pytest.approx(1, abs=0.1)  # sampling error of 4,000 labels
    assert found[4.0] == pytest.approx(4 * found[1.0], rel=1e-9)
    assert found[0.25] == pytest.approx(found[1.0] / 4, rel=1e-9)


def test_no_temperature_beside_the_fitted_one_is_better():
    for gaps, preferences in (drawn(seed=3), drawn(30, seed=4, temperature=9.0)):
        fitted = fit_temperature(gaps, preferences)
        assert fitted.found == "fitted"
        assert fitted.nll == pytest.approx(nll(gaps / fitted.temperature, preferences), abs=FLOAT64)
        for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2):
            assert nll(gaps / (fitted.temperature * factor), preferences) > fitted.nll


def test_soft_labels_of_a_model_give_its_own_temperature():
    gaps = np.linspace(-3, 3, 13)
    fitted = fit_temperature(5 * gaps, 1 / (1 + np.exp(-gaps)))
    assert fitted.temperature == pytest.approx(5, rel=1e-9)


def test_separable_labels_have_no_temperature():
    assert fit_temperature([1.0, -0.2, 3.0], [1, 0, 1]) == (None, 0.0, "separable")
    tied = fit_temperature([1.0, 0.0], [1, 1])  # a gap of 0 costs log 2 at any temperature
    assert tied == (None, pytest.approx(math.log(2) / 2), "separable")


def test_gaps_that_do_not_point_at_the_labels_have_no_temperature():
    for gaps, preferences in (([1.0, -1.0], [0, 1]), ([1.0, 1.0], [1, 0]), ([0.0, 0.0], [1, 1])):
        assert fit_temperature(gaps, preferences) == (None, math.log(2), "uninformative")


def test_one_wrong_pair_among_many_still_gives_a_temperature():
    fitted = fit_temperature([1.0] * 99 + [1e-6], [1] * 99 + [0])
    assert fitted.found == "fitted" and 0 < fitted.temperature < 0.1
    assert math.isfinite(fitted.nll)


def test_correlations_equal_the_loops():
    draws = np.random.default_rng(5)
    x = draws.integers(0, 6, 40).astype(float)  # with ties
    y = x + draws.normal(0, 2, 40)
    assert pearson(x, y) == pytest.approx(oracles.pearson(list(x), list(y)), abs=FLOAT64)
    expected = oracles.pearson(oracles.ranks(list(x)), oracles.ranks(list(y)))
    assert spearman(x, y) == pytest.approx(expected, abs=FLOAT64)


def test_correlations_of_known_shapes():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert pearson([1, 2, 3, 4], [1, 10, 100, 1000]) < 0.9


def test_what_does_not_vary_has_no_correlation():
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2, 3], [0.1, 0.1, 0.1]) is None
    assert pearson([1], [2]) is None


def test_accuracy_by_quantile_counts_each_row_once():
    slices = accuracy_by_quantile([4, 1, 3, 2, 5, 6, 8, 7], [1, 0, 1, 0, 1, 0.5, 1, 1], bins=4)
    assert [(one.low, one.high) for one in slices] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [one.accuracy.rate for one in slices] == [0, 1, 0.75, 1]
    assert slices[0].accuracy.high == pytest.approx(oracles.wilson(0, 2, 0.95)[1])


def test_equal_values_of_a_covariate_stay_together():
    slices = accuracy_by_quantile([0, 0, 0, 0, 0, 9], [1, 1, 0, 0, 1, 1], bins=3)
    assert [(one.low, one.high, one.accuracy.n) for one in slices] == [(0, 0, 5), (9, 9, 1)]


@pytest.mark.parametrize("call", [nll, ece, reliability, fit_temperature])
@pytest.mark.parametrize(
    ("gaps", "preferences", "complaint"),
    [
        ([], [], r"shapes \(0,\) and \(0,\)"),
        ([1.0], [1.0, 0.0], r"shapes \(1,\) and \(2,\)"),
        ([math.nan], [1.0], "not finite"),
        ([1.0], [1.5], "preference is below 0 or above 1"),
    ],
)
def test_pairs_that_are_none_are_refused(call, gaps, preferences, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(gaps, preferences)


def test_bins_and_shares_outside_their_range_are_refused():
    for call in (reliability, accuracy_by_quantile):
        with pytest.raises(ValueError, match="0 bins; at least 1"):
            call([1.0, 2.0], [1, 0], bins=0)
    with pytest.raises(ValueError, match="right by less than 0 or more than 1"):
        accuracy_by_quantile([1.0], [2.0])
