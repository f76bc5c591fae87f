import math

import oracles
import pytest
import torch

from rlaif.maths.advantages import (
    SEQUENCE_ESTIMATORS,
    dr_grpo,
    gae,
    grpo,
    reinforce,
    rloo,
    sequence_advantages,
    token_rewards,
)

FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs
LENGTHS = [5, 1, 3, 4]

LITERAL_REWARDS = torch.tensor([[-0.01, -0.02, 0.97]], dtype=torch.float64)
LITERAL_VALUES = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)


def mask_of(lengths, columns):
    return torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)


def random_rollout(columns=5, seed=0):
    """Rewards, values and mask of four responses; numbers after the end are wild on purpose."""
    draws = torch.Generator().manual_seed(seed)
    mask = mask_of(LENGTHS, columns)
    rewards, values = torch.randn(2, len(LENGTHS), columns, generator=draws, dtype=torch.float64)
    return rewards.masked_fill(~mask, 99.0), values.masked_fill(~mask, math.nan), mask


def widened(x, value):
    return torch.nn.functional.pad(x, (0, 3), value=value)


def test_token_rewards_charge_kl_per_token_and_add_the_score_at_the_end():
    rewards = token_rewards(
        scores=torch.tensor([1.0, -2.0]),
        logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 7.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -3.0, -7.0]]),
        response_mask=mask_of([3, 2], 3),
        kl_coef=0.1,
    )
    # row 0: -.1 * (.5, -1, 0) + (0, 0, 1); row 1: -.1 * (0, 2) + (0, -2), then padding
    expected = [pytest.approx([-0.05, 0.1, 1.0]), pytest.approx([0.0, -2.2, 0.0])]
    assert rewards.tolist() == expected


def test_token_rewards_equal_the_loop():
    draws = torch.Generator().manual_seed(2)
    scores = torch.randn(4, generator=draws, dtype=torch.float64)
    logprobs, ref_logprobs = -torch.rand(2, 4, 5, generator=draws, dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask_of(LENGTHS, 5), 0.05)
    for row, length in enumerate(LENGTHS):
        expected = oracles.token_rewards(
            scores[row].item(), logprobs[row].tolist(), ref_logprobs[row].tolist(), length, 0.05
        )
        assert rewards[row].tolist() == pytest.approx(expected, abs=FLOAT64)


def test_a_policy_that_is_its_reference_pays_nothing():
    logprobs = -torch.rand(4, 5, generator=torch.Generator().manual_seed(3))
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards = token_rewards(scores, logprobs, logprobs.clone(), mask_of(LENGTHS, 5), kl_coef=10.0)
    assert rewards.sum(dim=1).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert [rewards[row, length - 1].item() for row, length in enumerate(LENGTHS)] == [1.0, 2.0, 3.0, 4.0]


def test_token_rewards_carry_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    scores = torch.ones(1, requires_grad=True)
    rewards = token_rewards(scores, logprobs, torch.full((1, 2), -1.0), torch.ones(1, 2), kl_coef=0.1)
    assert not rewards.requires_grad


def test_padding_never_reaches_the_token_rewards():
    nan = math.nan
    logprobs = torch.tensor([[-1.0, nan]])
    rewards = token_rewards(torch.ones(1), logprobs, torch.tensor([[-1.0, -math.inf]]), mask_of([1], 2), 0.1)
    assert rewards.tolist() == [[1.0, 0.0]]


def test_a_response_without_tokens_is_refused():
    with pytest.raises(AssertionError, match="no response token"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), torch.zeros(2, 2), mask_of([1, 0], 2), 0.1)


def test_gae_gives_the_printed_values():
    # deltas: -.01+.3-.2 = .09, -.02+.5-.3 = .18, .97-.5 = .47
    # advantages: .47, .18+.95*.47 = .6265, .09+.95*.6265 = .685175
    result = gae(LITERAL_REWARDS, LITERAL_VALUES, ALL, gamma=1.0, lam=0.95)
    assert result.advantages[0].tolist() == pytest.approx([0.685175, 0.6265, 0.47], abs=FLOAT64)
    assert result.returns[0].tolist() == pytest.approx([0.885175, 0.9265, 0.97], abs=FLOAT64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    rewards, values, mask = random_rollout()
    result = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, n in enumerate(LENGTHS):
        expected = oracles.gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        for found, wanted in zip(result, expected, strict=True):
            assert found[row, :n].tolist() == pytest.approx(wanted, abs=FLOAT64)
            assert found[row, n:].tolist() == [0.0] * (5 - n)


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value():
    rewards, values, mask = random_rollout()
    result = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            to_go = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, n))
            assert result.returns[row, t].item() == pytest.approx(to_go, abs=FLOAT64)
            assert result.advantages[row, t].item() == pytest.approx(to_go - values[row, t].item(), abs=FLOAT64)


def test_gae_with_lambda_zero_is_the_one_step_error():
    result = gae(LITERAL_REWARDS, LITERAL_VALUES, ALL, gamma=1.0, lam=0.0)
    assert result.advantages[0].tolist() == pytest.approx([0.09, 0.18, 0.47], abs=FLOAT64)


def test_perfect_values_leave_no_advantage():
    to_go = LITERAL_REWARDS.flip(1).cumsum(1).flip(1)
    result = gae(LITERAL_REWARDS, to_go, ALL, gamma=1.0, lam=0.95)
    assert result.advantages[0].tolist() == pytest.approx([0, 0, 0], abs=FLOAT64)
    assert result.returns[0].tolist() == pytest.approx(to_go[0].tolist(), abs=FLOAT64)


def test_padding_columns_and_row_order_change_no_advantage():
    rewards, values, mask = random_rollout()
    result = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    wide = gae(widened(rewards, 7.0), widened(values, -math.inf), widened(mask, False), gamma=0.9, lam=0.8)
    order = torch.tensor([2, 0, 3, 1])
    moved = gae(rewards[order], values[order], mask[order], gamma=0.9, lam=0.8)
    for found, wider, reordered in zip(result, wide, moved, strict=True):
        assert wider.equal(widened(found, 0.0))
        assert reordered.equal(found[order])


def test_gae_carries_no_gradient_and_leaves_its_inputs_alone():
    values = LITERAL_VALUES.clone().requires_grad_()
    before = values.detach().clone()
    result = gae(LITERAL_REWARDS, values, ALL, gamma=1.0, lam=0.95)
    assert not result.advantages.requires_grad
    assert not result.returns.requires_grad
    assert values.detach().equal(before)


# Without a critic: the advantage of a whole response


@pytest.mark.parametrize(("estimator", "size"), [(rloo, 2 / 3), (dr_grpo, 0.5), (grpo, 0.8660254), (reinforce, 0.5)])
def test_estimators_without_a_critic_give_the_printed_values(estimator, size):
    # mean 1/2; the others' mean 1/3 or 2/3; variance over G - 1: 4 * 1/4 / 3 = 1/3
    found = estimator(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), 4)
    assert found.tolist() == pytest.approx([size, -size, -size, size], abs=1e-7)


def test_each_prompts_responses_are_compared_with_one_another():
    returns = torch.randn(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for start in range(0, 12, 4):
        group = returns[start : start + 4].tolist()
        deviations, standardized = oracles.group_deviations(group)
        expected = {rloo: oracles.leave_one_out(group), dr_grpo: deviations, grpo: standardized}
        for estimator, wanted in expected.items():
            assert estimator(returns, 4)[start : start + 4].tolist() == pytest.approx(wanted, abs=FLOAT64)
    assert reinforce(returns, 4).tolist() == pytest.approx((returns - returns.mean()).tolist(), abs=FLOAT64)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_leave_one_out_is_a_multiple_of_the_deviation_from_the_mean(group):
    returns = torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = (dr_grpo(returns, group) * group / (group - 1)).tolist()
    assert rloo(returns, group).tolist() == pytest.approx(expected, abs=FLOAT64)


@pytest.mark.parametrize("estimator", SEQUENCE_ESTIMATORS)
def test_equal_returns_give_no_advantage_although_their_mean_is_rounded(estimator):
    returns = torch.cat([torch.full((7,), 0.1), torch.full((7,), 0.1)])
    assert (returns - returns.view(-1, 7).mean(1).repeat_interleave(7)).abs().max().item() > 0
    assert SEQUENCE_ESTIMATORS[estimator](returns, 7).tolist() == [0.0] * 14


@pytest.mark.parametrize("estimator", SEQUENCE_ESTIMATORS)
def test_every_token_of_a_response_has_its_advantage_and_padding_none(estimator):
    returns = torch.tensor([3.0, -1.0, 0.5, 0.0], requires_grad=True)
    found = sequence_advantages(estimator, returns, mask_of(LENGTHS, 5), 2)
    whole = SEQUENCE_ESTIMATORS[estimator](returns, 2).tolist()
    assert not found.requires_grad
    for row, length in enumerate(LENGTHS):
        assert found[row].tolist() == [whole[row]] * length + [0.0] * (5 - length)
