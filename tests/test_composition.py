"""One score out of several: ensembles and the parts of a composite reward."""

import math

import pytest
import torch

from rlaif.maths.composition import (
    Standard,
    gate,
    mean_score,
    standard_of,
    standardize,
    uncertainty_weighted,
    weighted_sum,
    worst_of,
    worst_score,
)

PRINTED = 6e-6  # literals are typed with five decimals
COMBINATIONS = {
    "mean": mean_score,
    "worst": worst_score,
    "uncertainty": lambda x: uncertainty_weighted(x, 0.5),
    "sum": lambda x: weighted_sum(x, torch.ones(x.shape[1], dtype=x.dtype), torch.ones_like(x, dtype=torch.bool)),
    "worst part": lambda x: worst_of(x, torch.ones_like(x, dtype=torch.bool)),
}
MONOTONE = [name for name in COMBINATIONS if name != "uncertainty"]  # disagreement upwards costs, too


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_an_ensemble_gives_the_printed_values():
    members = f64([1.0, 1.2, 2.6])
    assert mean_score(members).item() == pytest.approx(1.6)
    assert worst_score(members).item() == 1.0
    # the variance over M is .50667; over M - 1 it would be .76 and the score 1.22
    assert uncertainty_weighted(members, 0.5).item() == pytest.approx(1.34667, abs=PRINTED)


def test_certainty_costs_nothing():
    members = f64([0.3, -1.0, 2.0], [4.0, 4.0, 4.0])
    assert uncertainty_weighted(members, 0.0).equal(mean_score(members))
    assert uncertainty_weighted(members, 7.0)[1].item() == 4.0
    one = f64([0.3], [-1.0])
    for combine in (mean_score, worst_score, lambda x: uncertainty_weighted(x, 0.5)):
        assert combine(one).equal(one[:, 0])


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_order_of_members_and_parts_changes_nothing(name):
    parts = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = COMBINATIONS[name](parts[:, [2, 0, 3, 1]])
    torch.testing.assert_close(moved, COMBINATIONS[name](parts))


@pytest.mark.parametrize("name", MONOTONE)
def test_a_better_part_never_makes_the_whole_worse(name):
    parts = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = COMBINATIONS[name](parts)
    for part in range(3):
        better = parts.clone()
        better[:, part] += torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert (COMBINATIONS[name](better) >= before - 1e-12).all()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_gradient_of_a_combination_is_the_finite_difference(name):
    parts = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(COMBINATIONS[name], (parts,))


def test_parts_are_measured_in_deviations_of_the_reference_set():
    standard = standard_of(f64(1.0, 3.0))
    assert standard == Standard(2.0, 1.0)
    assert standardize(f64(1.0, 4.0), Standard(2.0, 4.0)).tolist() == [-0.25, 0.5]
    scores = torch.randn(20, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 7 + 3
    scaled = standardize(scores, standard_of(scores))
    assert scaled.mean().item() == pytest.approx(0, abs=1e-12)
    assert scaled.var(correction=0).item() == pytest.approx(1, abs=1e-12)


def test_scores_that_do_not_vary_keep_their_unit():
    assert standard_of(torch.full((7,), 0.1)).scale == 1.0
    assert standard_of(torch.tensor([0.0, 0.0])) == Standard(0.0, 1.0)
    assert standard_of(torch.tensor([3.0])) == Standard(3.0, 1.0)


def test_a_part_that_does_not_apply_adds_nothing_whatever_stands_there():
    parts = f64([1.0, math.nan], [2.0, 3.0], [math.inf, math.nan])
    applies = torch.tensor([[True, False], [True, True], [False, False]])
    assert weighted_sum(parts, f64(2.0, 0.5), applies).tolist() == [2.0, 5.5, 0.0]
    assert worst_of(parts, applies).tolist() == [1.0, 2.0, 0.0]


def test_the_gate_jumps_by_the_printed_values():
    safety, helpfulness = torch.logit(f64(0.10, 0.20)), torch.logit(f64(0.90, 0.90))
    assert gate(safety, helpfulness, 0.15).tolist() == pytest.approx([-2.19722, 2.19722], abs=PRINTED)


def test_the_gate_gives_the_safety_score_for_prompts_of_safety():
    asked = torch.tensor([True, False])
    assert gate(f64(3.0, 3.0), f64(-1.0, -1.0), 0.15, asked).tolist() == [3.0, -1.0]


def test_the_gate_is_exact_where_a_sigmoid_is_one():
    assert gate(torch.tensor([200.0]), torch.tensor([300.0]), 0.15).item() == 300.0
    assert gate(torch.tensor([-200.0]), torch.tensor([300.0]), 0.15).item() == -200.0


def test_a_threshold_of_zero_or_one_takes_one_score_always():
    safety, helpfulness = f64(-4.0, 4.0), f64(1.0, 2.0)
    assert gate(safety, helpfulness, 0.0).equal(helpfulness)
    assert gate(safety, helpfulness, 1.0).equal(safety)


def test_more_helpfulness_never_makes_the_gated_score_worse():
    safety = torch.linspace(-4, 4, 17, dtype=torch.float64)
    helpfulness = torch.linspace(3, -3, 17, dtype=torch.float64)
    assert (gate(safety, helpfulness + 0.5, 0.15) >= gate(safety, helpfulness, 0.15)).all()
