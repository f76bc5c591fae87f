"""Losses of what was said about responses, against printed values, slow loops, identities and finite differences."""

import math

import oracles
import pytest
import torch

from rlaif.maths.preference import (
    bradley_terry,
    centering_penalty,
    cost_loss,
    noise_corrected,
    plackett_luce,
    ranking_loss,
    rating_loss,
    smoothed_preference,
    standardize_by_annotator,
)

PRINTED = 6e-6  # literals are typed with five decimals
FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def preference_gradient(d, **options):
    score = f64(d).requires_grad_()
    bradley_terry(score, f64(0.0), **options).sum().backward()
    return score.grad.item()


# Comparisons


def test_bradley_terry_gives_the_printed_values():
    assert bradley_terry(f64(1.0), f64(0.2)).item() == pytest.approx(0.37110, abs=PRINTED)
    assert preference_gradient(0.8) == pytest.approx(-0.31003, abs=PRINTED)
    assert bradley_terry(f64(1.0), f64(0.2), margin=1.0).item() == pytest.approx(0.79814, abs=PRINTED)


def test_equal_scores_cost_log_two():
    assert bradley_terry(f64(3.0), f64(3.0)).item() == pytest.approx(math.log(2), abs=FLOAT64)
    assert bradley_terry(f64(3.0), f64(3.0), preference=0.9).item() == pytest.approx(math.log(2), abs=FLOAT64)


def test_a_badly_ranked_pair_keeps_its_full_gradient():
    # the logarithm of sigmoid + 1e-5 would give 11.4828 and a gradient of -.0297
    assert bradley_terry(f64(-15.0), f64(0.0)).item() == pytest.approx(15.0, abs=PRINTED)
    assert preference_gradient(-15.0) == pytest.approx(-1.0, abs=PRINTED)
    assert bradley_terry(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200.0  # float32, no infinity


def test_a_soft_label_has_its_minimum_at_the_log_odds():
    at = math.log(0.6 / 0.4)
    assert at == pytest.approx(0.40547, abs=PRINTED)
    assert bradley_terry(f64(at), f64(0.0), preference=0.6).item() == pytest.approx(0.67301, abs=PRINTED)
    assert preference_gradient(at, preference=0.6) == pytest.approx(0, abs=FLOAT64)
    assert bradley_terry(f64(1.0), f64(0.0), preference=0.6).item() == pytest.approx(0.71326, abs=PRINTED)


def test_a_certain_soft_label_is_a_hard_label():
    chosen, rejected = f64(0.3, -2.0, 1.0), f64(0.1, 4.0, -1.0)
    hard = bradley_terry(chosen, rejected)
    assert bradley_terry(chosen, rejected, preference=1.0).equal(hard)
    assert bradley_terry(chosen, rejected, preference=torch.ones(3)).equal(hard)
    assert bradley_terry(chosen, rejected, margin=0.0).equal(hard)


def test_swapping_a_pair_flips_its_preference():
    chosen, rejected, preference = f64(0.3, -2.0, 1.0), f64(0.1, 4.0, -1.0), f64(0.9, 0.5, 0.6)
    swapped = bradley_terry(rejected, chosen, preference=1 - preference)
    torch.testing.assert_close(swapped, bradley_terry(chosen, rejected, preference=preference))


def test_only_the_difference_of_scores_matters_to_a_comparison():
    chosen, rejected = f64(0.3, -2.0), f64(0.1, 4.0)
    shifted = bradley_terry(chosen + 7, rejected + 7)
    torch.testing.assert_close(shifted, bradley_terry(chosen, rejected))


def test_bradley_terry_equals_the_loop_row_by_row():
    rows = [(0.3, 0.1, 0.9, 0.0), (-2.0, 1.0, 0.5, 1.0), (1.0, -1.0, 0.7, 0.5)]
    losses = bradley_terry(*(f64(*column) for column in zip(*rows, strict=True)))
    assert losses.tolist() == pytest.approx([oracles.bradley_terry(*row) for row in rows], abs=FLOAT64)


def test_centering_charges_the_squared_sum_of_each_pair():
    assert centering_penalty(f64(1.0, 2.0, 0.5), f64(2.0, -2.0, 0.5)).tolist() == [9.0, 0.0, 1.0]


# Labels that may be wrong


def test_smoothing_and_correction_give_the_printed_values_of_dpo():
    # at a margin of 1 with a tenth of the labels flipped: conservative .41326, robust .18826
    smooth = bradley_terry(f64(1.0), f64(0.0), smoothed_preference(1.0, 0.1))
    assert smooth.item() == pytest.approx(0.41326, abs=PRINTED)
    assert noise_corrected(f64(1.0), f64(0.0), eps=0.1).item() == pytest.approx(0.18826, abs=PRINTED)


def test_a_smoothed_hard_label_has_its_minimum_at_the_log_odds_of_being_right():
    at = math.log(0.9 / 0.1)
    assert at == pytest.approx(2.19722, abs=PRINTED)
    assert preference_gradient(at, preference=smoothed_preference(1.0, 0.1)) == pytest.approx(0, abs=FLOAT64)


def test_smoothing_moves_a_preference_towards_a_half():
    assert smoothed_preference(f64(1.0, 0.5, 0.0), 0.1).tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert smoothed_preference(f64(0.7), 0.0).tolist() == [0.7]


def test_the_corrected_loss_averages_over_flips_to_the_loss_of_the_true_label():
    chosen, rejected, margin = f64(0.3, -2.0, 1.0), f64(0.1, 4.0, -1.0), f64(0.0, 1.0, 2.0)
    for eps in (0.0, 0.1, 0.4):
        for preference in (1.0, f64(0.9, 0.5, 0.7)):
            right = noise_corrected(chosen, rejected, preference, margin, eps=eps)
            flipped = noise_corrected(rejected, chosen, preference, margin, eps=eps)
            expected = bradley_terry(chosen, rejected, preference, margin)
            torch.testing.assert_close((1 - eps) * right + eps * flipped, expected)


def test_without_a_margin_the_corrected_loss_takes_the_preference_for_its_opposite():
    chosen, rejected, preference = f64(0.3, -2.0), f64(0.1, 4.0), f64(0.9, 0.6)
    rows = zip(chosen.tolist(), rejected.tolist(), preference.tolist(), strict=True)
    expected = [
        (0.8 * oracles.bradley_terry(c, r, p) - 0.2 * oracles.bradley_terry(c, r, 1 - p)) / 0.6 for c, r, p in rows
    ]
    assert noise_corrected(chosen, rejected, preference, eps=0.2).tolist() == pytest.approx(expected, abs=FLOAT64)


def test_the_corrected_loss_falls_without_end():
    # beyond the first few units by eps / (1 - 2 eps) = 0.4 / 0.2 per unit of d
    near, far = (noise_corrected(f64(d), f64(0.0), eps=0.4).item() for d in (50.0, 1000.0))
    assert far - near == pytest.approx(-2 * 950, abs=1e-9)


@pytest.mark.parametrize("eps", [-0.1, 0.5, 0.7, math.nan])
def test_a_rate_at_which_labels_say_nothing_is_refused(eps):
    with pytest.raises(ValueError, match=f"flipped labels is {eps}; 0 to below 0.5"):
        smoothed_preference(1.0, eps)
    with pytest.raises(ValueError, match="0 to below 0.5"):
        noise_corrected(f64(1.0), f64(0.0), eps=eps)


# Rankings


def test_rankings_of_three_give_the_printed_values():
    scores, ranks = f64(2.0, 1.0, 0.0), torch.tensor([1, 2, 3])
    assert plackett_luce(scores, ranks).item() == pytest.approx(0.72087, abs=PRINTED)
    assert ranking_loss(scores, ranks).item() == pytest.approx(0.25115, abs=PRINTED)


def test_rankings_equal_the_loops():
    scores = [0.3, -1.2, 2.0, 0.7, 0.1]
    for ranks in ([3, 1, 2, 5, 4], [1.5, 2.5, -1.0, 0.0, 9.0]):
        given = (f64(*scores), torch.tensor(ranks))
        assert plackett_luce(*given).item() == pytest.approx(oracles.plackett_luce(scores, ranks), abs=FLOAT64)
        assert ranking_loss(*given).item() == pytest.approx(oracles.ranking_loss(scores, ranks), abs=FLOAT64)
    tied = [1, 2, 2, 1, 3]
    expected = oracles.ranking_loss(scores, tied)
    assert ranking_loss(f64(*scores), torch.tensor(tied)).item() == pytest.approx(expected, abs=FLOAT64)


def test_a_ranking_of_two_is_a_comparison():
    scores = f64(0.4, -0.8)
    pair = bradley_terry(scores[1], scores[0])
    torch.testing.assert_close(ranking_loss(scores, torch.tensor([2, 1])), pair)
    torch.testing.assert_close(plackett_luce(scores, torch.tensor([2, 1])), pair)


def test_the_order_in_which_a_ranking_is_written_changes_nothing():
    scores, ranks, order = f64(0.4, -0.8, 1.0), torch.tensor([2, 3, 1]), torch.tensor([2, 0, 1])
    for loss in (ranking_loss, plackett_luce):
        torch.testing.assert_close(loss(scores[order], ranks[order]), loss(scores, ranks))


def test_ties_are_left_out_of_pairs_and_refused_by_plackett_luce():
    scores = f64(3.0, 1.0, 1.5)
    assert ranking_loss(scores, torch.tensor([1, 2, 2])).item() == pytest.approx(
        (oracles.bradley_terry(3.0, 1.0) + oracles.bradley_terry(3.0, 1.5)) / 2, abs=FLOAT64
    )
    with pytest.raises(ValueError, match="same rank; Plackett-Luce needs a strict order"):
        plackett_luce(scores, torch.tensor([1, 2, 2]))
    with pytest.raises(ValueError, match="3 responses without two different ranks"):
        ranking_loss(scores, torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce])
def test_a_ranking_of_one_or_of_another_length_is_refused(loss):
    with pytest.raises(ValueError, match=r"\[1\] with ranks of \[1\]; \[K\] is expected"):
        loss(f64(1.0), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\[2\] with ranks of \[3\]"):
        loss(f64(1.0, 2.0), torch.tensor([1, 2, 3]))


# Ratings


def test_a_rating_is_missed_by_its_squared_distance():
    assert rating_loss(f64(1.0, -2.0), f64(0.5, 1.0)).tolist() == [0.25, 9.0]


def test_each_annotators_ratings_are_brought_to_mean_zero_and_unit_spread():
    # strict rates 1 and 3, mild 8 and 10: the same opinion on another scale
    assert standardize_by_annotator([1, 3, 8, 10], ["strict", "strict", "mild", "mild"]) == [-1, 1, -1, 1]
    assert standardize_by_annotator([1, 8, 3, 10], ["strict", "mild", "strict", "mild"]) == [-1, -1, 1, 1]


def test_an_annotator_without_a_scale_is_measured_by_all_ratings():
    # pooled: mean 3, variance (4 + 4 + 0 + 4 + 4) / 5 = 3.2
    ratings, annotators = [1, 5, 3, 1, 5], ["a", "a", "one", "same", "same2"]
    scaled = standardize_by_annotator(ratings, annotators)
    assert scaled == pytest.approx([-1, 1, 0, -2 / math.sqrt(3.2), 2 / math.sqrt(3.2)])
    rounding = standardize_by_annotator([0.1 + 0.2, 0.3, 1.0, 2.0], ["x", "x", "y", "y"])
    assert rounding[0] == pytest.approx(rounding[1])
    assert -2 < rounding[0] < 0  # not blown up by a spread of 5e-17


@pytest.mark.parametrize(
    ("ratings", "annotators", "complaint"),
    [
        ([], [], "0 ratings by 0 annotators"),
        ([1.0], ["a", "b"], "1 ratings by 2 annotators"),
        ([1.0, math.nan], ["a", "b"], "not finite"),
        ([4.0, 4.0], ["a", "b"], "all 2 ratings are 4; at least two different ones"),
    ],
)
def test_ratings_that_say_nothing_are_refused(ratings, annotators, complaint):
    with pytest.raises(ValueError, match=complaint):
        standardize_by_annotator(ratings, annotators)


# Costs


def test_the_cost_loss_gives_the_printed_value():
    loss = cost_loss(f64(1.0), f64(-1.0), f64(1.0), f64(-1.0))
    assert loss.item() == pytest.approx(0.75345, abs=PRINTED)  # .12693 + .31326 + .31326


def test_the_cost_loss_equals_the_loop_row_by_row():
    rows = [(0.5, -1.0, 1, -1), (2.0, 1.0, 1, 1), (-0.5, -2.0, -1, -1), (-3.0, 0.5, 1, -1)]
    losses = cost_loss(*(f64(*column) for column in zip(*rows, strict=True)))
    assert losses.tolist() == pytest.approx([oracles.cost_loss(*row) for row in rows], abs=FLOAT64)


def test_rows_may_bring_only_signs_or_only_an_order():
    worse, better = f64(0.5, 0.5, 0.5, 0.5), f64(-1.0, -1.0, -1.0, -1.0)
    losses = cost_loss(worse, better, f64(0, 1, 0, 0), f64(0, 0, -1, 0), order_weight=f64(1, 0, 0, 0))
    order, unsafe, safe = (oracles.bradley_terry(x, 0.0) for x in (1.5, 0.5, 1.0))
    assert losses.tolist() == pytest.approx([order, unsafe, safe, 0.0], abs=FLOAT64)


def test_an_unsafe_response_is_pushed_above_zero_and_a_safe_one_below():
    costs = f64(0.0, 0.0).requires_grad_()
    cost_loss(costs[:1], costs[1:], f64(1.0), f64(-1.0), order_weight=0.0).sum().backward()
    assert costs.grad.tolist() == [-0.5, 0.5]


def test_a_soft_order_of_costs_is_a_soft_comparison():
    none = f64(0.0)
    loss = cost_loss(f64(1.0), f64(0.0), none, none, preference=0.6)
    assert loss.item() == pytest.approx(0.71326, abs=PRINTED)


# All of them


LOSSES = {
    "bradley_terry": lambda s: bradley_terry(s[:2], s[2:], f64(0.9, 0.4), f64(0.0, 1.5)),
    "centering": lambda s: centering_penalty(s[:2], s[2:]),
    "noise_corrected": lambda s: noise_corrected(s[:2], s[2:], f64(1.0, 0.7), f64(0.5, 0.0), eps=0.3),
    "ranking": lambda s: ranking_loss(s, torch.tensor([2, 1, 3, 2])),
    "plackett_luce": lambda s: plackett_luce(s, torch.tensor([2, 1, 4, 3])),
    "rating": lambda s: rating_loss(s, f64(0.1, -1.0, 0.0, 2.0)),
    "cost": lambda s: cost_loss(s[:2], s[2:], f64(1, 0), f64(-1, 1), 0.8, f64(1.0, 0.5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_finite_difference(name):
    scores = f64(0.3, -1.1, 0.8, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (scores,))


@pytest.mark.parametrize("size", [50.0, -50.0, 200.0])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_in_float32_equal_float64_and_keep_a_finite_gradient(name, size):
    wide = (f64(0.5, -0.5, -0.4, 0.6) * size).requires_grad_()
    narrow = wide.detach().float().requires_grad_()
    exact, rounded = LOSSES[name](wide), LOSSES[name](narrow)
    exact.sum().backward()
    rounded.sum().backward()
    assert rounded.isfinite().all() and narrow.grad.isfinite().all()
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
