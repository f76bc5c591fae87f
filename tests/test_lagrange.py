"""The multiplier of a constraint: its rule by hand, and a bandit whose constrained optimum is known."""

import math

import pytest
import torch

from rlaif.maths.lagrange import Multiplier, combine, combine_whitened
from rlaif.maths.masking import masked_whiten

FLOAT64 = 1e-12


def multiplier(init=1.0, threshold=0.0, learning_rate=0.1, maximum=5.0, delay=0, window=128):
    return Multiplier(
        init, threshold=threshold, learning_rate=learning_rate, maximum=maximum, delay=delay, window=window
    )


def test_a_step_is_that_of_the_logarithm():
    """exp(0 + 0.1 * 1 * (0.5 - 0)) = exp(0.05); then exp(0.05 + 0.1 * exp(0.05) * (0.25 - 0))."""
    one = multiplier()
    one.update([0.5], 0)
    assert one.value == pytest.approx(1.0512710963760241, rel=FLOAT64)
    one.update([0.0], 1)  # the mean of the window is 0.25
    assert one.value == pytest.approx(1.0792666443, rel=1e-9)


def test_it_falls_below_the_threshold_and_rises_above_it_and_stands_still_on_it():
    for cost, sign in ((-3.5, -1), (-3.0, 0), (-2.5, 1)):
        one = multiplier(threshold=-3.0)
        one.update([cost] * 4, 0)
        assert math.copysign(1, one.value - 1.0) * (one.value != 1.0) == sign


def test_it_stops_at_its_maximum_and_leaves_it_at_once_when_the_cost_is_low_again():
    one = multiplier(maximum=2.0, learning_rate=10.0, window=1)
    for update in range(50):
        one.update([100.0], update)
    assert one.value == pytest.approx(2.0, rel=FLOAT64)
    one.update([-0.01], 50)
    assert one.value == pytest.approx(2.0 * math.exp(10.0 * 2.0 * -0.01), rel=FLOAT64)


def test_it_waits_for_the_delay_but_takes_in_what_the_responses_cost():
    one = multiplier(delay=2, window=3)
    one.update([1.0, 2.0], 0)
    one.update([3.0], 1)
    assert (one.value, one.mean_cost) == (1.0, 2.0)
    one.update([4.0], 2)  # the window holds 2, 3, 4
    assert one.mean_cost == 3.0
    assert one.value == pytest.approx(math.exp(0.1 * 3.0), rel=FLOAT64)


def test_zero_stays_zero_and_a_learning_rate_of_zero_keeps_it():
    one, fixed = multiplier(init=0.0), multiplier(init=0.5, learning_rate=0.0)
    for update in range(5):
        one.update([1e6], update)
        fixed.update([1e6], update)
    assert (one.value, fixed.value) == (0.0, pytest.approx(0.5, rel=FLOAT64))


def test_a_cost_that_is_not_finite_stops_it():
    with pytest.raises(ValueError, match="diverged"):
        multiplier().update([1.0, math.nan], 0)


def test_a_restored_one_goes_on_as_the_one_that_was_saved():
    one, other = multiplier(window=3), multiplier(window=3)
    one.update([0.1, 0.7, -0.3, 0.9], 0)
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.update([0.3], 1)
    assert (one.value, one.mean_cost) == (other.value, other.mean_cost)
    assert one.value != 1.0


def test_advantages_are_combined_by_hand_and_at_the_ends():
    reward, cost = torch.tensor([1.0, -2.0, 0.1]), torch.tensor([0.5, 4.0, -0.3])
    assert combine(reward, cost, 1.0).tolist() == pytest.approx([0.25, -3.0, 0.2])  # (1 - 0.5) / 2, ...
    assert torch.equal(combine(reward, cost, 0.0), reward)
    assert combine(reward, cost, 1e6).tolist() == pytest.approx((-cost).tolist(), abs=1e-5)


def test_whitened_advantages_are_the_rewards_at_lambda_0_and_rest_where_both_balance():
    generator = torch.Generator().manual_seed(0)
    reward, cost = torch.randn(2, 6, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 5, 2]).unsqueeze(1)
    assert torch.equal(combine_whitened(reward, cost, 0.0, mask), masked_whiten(reward, mask))
    rest = combine_whitened(reward, reward, 1.0, mask)  # by its own deviation it would be rounding at full size
    assert rest.abs().max().item() == 0.0
    kept = combine_whitened(reward, reward, 0.5, mask)[mask]  # (1 - 0.5) / (1 + 0.5) of the reward's
    assert kept.tolist() == pytest.approx((masked_whiten(reward, mask)[mask] / 3).tolist(), abs=1e-6)
    dear = combine_whitened(reward, 1e4 * cost, 2.0, mask)
    assert dear[mask].std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert dear[mask].tolist() == pytest.approx((-masked_whiten(cost, mask)[mask]).tolist(), abs=1e-3)


def test_a_bandit_ends_at_its_constrained_optimum_and_the_multiplier_at_the_price_of_the_cost():
    """Three arms, rewards 1, 0.5, 0 and costs 1, 0, 0; a mean cost of 0.3 is allowed, and a nat of entropy earns 0.1.

    What is maximized is ``p . (r - lambda c) / (1 + lambda) + 0.1 H(p)``, so p is proportional to the exponential of
    10 (r - lambda c) / (1 + lambda). With p_1 = 0.3 this gives lambda = 0.630745 and the others, solved by bisection:
    log(0.3 / 0.66883) = 10 (0.5 - lambda) / (1 + lambda), log(0.03117 / 0.66883) = -5 / (1 + lambda).
    """
    reward, cost = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logits = torch.zeros(3, dtype=torch.float64)
    one = multiplier(threshold=0.3, learning_rate=0.5, window=1)
    for step in range(300):
        policy = logits.softmax(0)
        one.update([(policy @ cost).item()], step)
        surprise = 0.1 * policy.log()  # enters both, as the KL does
        logits = (logits + combine(reward - surprise, cost + surprise, one.value)).log_softmax(0)
    assert policy.tolist() == pytest.approx([0.3, 0.668830, 0.031170], abs=1e-5)
    assert one.value == pytest.approx(0.630745, abs=1e-5)
