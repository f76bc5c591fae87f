"""The curve of Gao et al. through made-up points, against numpy's least squares, and what the report says of it."""

import math
import random

import numpy
import pytest

from rlaif.health import INDEPENDENT, SCORE
from rlaif.report.overoptimization import KL, against_distance, fit, overoptimization_figures


def rows_of(score, independent, count=30, noise=0.0):
    """Updates whose scores follow d (alpha - beta log d), at a KL that grows by 0.5 an update."""
    draw = random.Random(4).gauss
    rows = []
    for n in range(count):
        d = math.sqrt(0.5 * n)
        row = {"update": n + 1, KL: 0.5 * n}
        for key, (alpha, beta) in ((SCORE, score), (INDEPENDENT, independent)):
            row[key] = (d * (alpha - beta * math.log(d)) if d else 0.0) + draw(0, noise)
        rows.append(row)
    return rows


def test_alpha_and_beta_are_found_again_and_the_peak_is_where_the_derivative_is_0():
    line = against_distance(rows_of((1.0, 0.2), (0.8, 0.5)), INDEPENDENT)
    found = fit(line, 0.0)
    assert (found.alpha, found.beta) == pytest.approx((0.8, 0.5))
    assert found.peak == pytest.approx(math.exp(0.8 / 0.5 - 1))
    assert found.at(found.peak) == pytest.approx(0.5 * found.peak)  # beta times d at the peak
    assert found.at(found.peak * 1.01) < found.at(found.peak) > found.at(found.peak * 0.99)
    assert found.at(0.0) == 0.0


def test_a_fit_to_noisy_points_is_that_of_numpy():
    line = against_distance(rows_of((1.0, 0.2), (0.8, 0.5), noise=0.3), SCORE)
    d, y = numpy.array(line).T
    d, y = d[1:], y[1:] - 0.7
    (alpha, beta), *_ = numpy.linalg.lstsq(numpy.stack([d, -d * numpy.log(d)], 1), y, rcond=None)
    found = fit(line, 0.7)
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta))
    assert found.at(2.0) == pytest.approx(0.7 + 2 * (alpha - beta * math.log(2)))


def test_too_few_distances_give_no_curve():
    assert fit([(0.0, 0.0), (1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0)], 0.0) is None
    assert fit([], 0.0) is None


def test_a_negative_estimate_of_the_kl_counts_as_0_and_values_that_are_no_numbers_are_left_out():
    rows = [
        {"update": 1, KL: -0.2, SCORE: 0.1},
        {"update": 2, KL: 4.0, SCORE: 0.3},
        {"update": 3, KL: None, SCORE: 0.4},
        {"update": 4, KL: 9.0},
        {"update": 5, SCORE: 1.0},
    ]
    assert against_distance(rows, SCORE) == [(0.0, 0.1), (2.0, 0.3)]


@pytest.mark.parametrize(
    ("score", "independent", "says"),
    [
        ((1.0, 0.1), (0.8, 0.5), "Over-optimization: from √KL 1.82 (a KL of 3.32 nats) on the independent score falls"),
        ((1.0, 0.1), (0.8, 0.1), "The independent score does not fall along its curve."),
        ((0.8, 0.5), (0.8, 0.5), "falls from √KL 1.82 (a KL of 3.32 nats) on, by 0.41; so does the score."),
        ((1.0, 0.1), (-0.5, 0.0), "Over-optimization: from the start the independent score falls, by 1.9"),
    ],
)
def test_the_note_says_where_the_independent_score_falls_and_whether_the_score_rises(score, independent, says):
    (figure,) = overoptimization_figures(rows_of(score, independent))
    assert says in figure.note
    assert figure.chart.count("<circle") >= 2 * 30  # a dot for each update and score
    assert figure.chart.count("<polyline") == 2  # and two curves


def test_a_run_without_an_independent_score_has_no_such_chart_and_a_short_one_no_curves():
    rows = rows_of((1.0, 0.1), (0.8, 0.5))
    assert overoptimization_figures([{k: v for k, v in row.items() if k != INDEPENDENT} for row in rows]) == []
    assert overoptimization_figures([]) == []
    (figure,) = overoptimization_figures(rows[:4])
    assert "too few updates" in figure.note
    assert "<polyline" not in figure.chart
