import math

import oracles
import pytest
import torch

from rlaif.maths.losses import (
    Aggregation,
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
)

PRINTED = 6e-6  # literals are typed with five decimals
FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs
FLOAT32 = 1e-6  # a handful of float32 roundings of numbers near 1


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def one_token(x):
    return f64(x).reshape(1, 1)


def random_tokens(seed=0, rows=3, columns=5):
    """Log-probabilities, old ones, advantages and a mask; clipping at 0.2 bites on several tokens."""
    draws = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(rows, columns, generator=draws, dtype=torch.float64)
    new = old + 0.3 * torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    advantages = torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    mask = torch.arange(columns) < torch.tensor([columns, 2, 4]).unsqueeze(1)
    return new, old, advantages, mask


def flat(*tensors):
    return [tensor.flatten().tolist() for tensor in tensors]


def assert_figures(result, expected):
    for name, figure, wanted in zip(result._fields, result, expected, strict=True):
        tolerance = FLOAT32 if name == "clip_fraction" else FLOAT64  # a share of bools is float32
        assert figure.item() == pytest.approx(wanted, abs=tolerance), name


def widened(x, value):
    return torch.nn.functional.pad(x, (0, 2), value=value)


# From tokens to one number


def test_aggregations_give_the_printed_values():
    # sequences of 5 and 10 tokens, sums 14 and 19: (14/5 + 19/10) / 2, 33/15, (1.4 + 1.9) / 2
    x = torch.full((2, 10), math.nan, dtype=torch.float64)
    x[0, :5], x[1] = f64(1, 1, 1, 1, 10), f64(*[1] * 9, 10)
    mask = torch.arange(10) < torch.tensor([[5], [10]])
    found = [Aggregation(over, 10).mean(x, mask).item() for over in ("sequence", "token", "constant")]
    assert found == pytest.approx([2.35, 2.2, 1.65], abs=FLOAT64)
    alone = [Aggregation("constant", 10).mean(x[row : row + 1], mask[row : row + 1]).item() for row in (0, 1)]
    assert alone == pytest.approx([1.4, 1.9], abs=FLOAT64)


@pytest.mark.parametrize("over", ["sequence", "token", "constant"])
def test_parts_add_up_to_the_whole_at_their_shares(over):
    x, _, _, mask = random_tokens(rows=3)
    aggregation = Aggregation(over, 7)
    parts = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    total = sum(aggregation.mean(*part) * aggregation.share(part[1], mask) for part in parts)
    assert total.item() == pytest.approx(aggregation.mean(x, mask).item(), abs=FLOAT32)


@pytest.mark.parametrize("over", ["sequence", "token", "constant"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(over):
    old, _, advantages, mask = random_tokens()
    logprobs = old.clone().requires_grad_()
    clipped_policy_loss(logprobs, old, advantages, mask, 0.2, Aggregation(over, 7)).loss.backward()
    lengths = {"token": [11] * 3, "sequence": [5 * 3, 2 * 3, 4 * 3], "constant": [7 * 3] * 3}[over]
    for row, length in enumerate(lengths):  # of minus the mean over responses of A * log p / length
        expected = [-a.item() / length if keep else 0.0 for a, keep in zip(advantages[row], mask[row], strict=True)]
        assert logprobs.grad[row].tolist() == pytest.approx(expected, abs=FLOAT64)


# Policy


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [(1.0, 1.5, -1.2, 1.0), (-1.0, 0.5, 0.8, 1.0), (-1.0, 1.5, 1.5, 0.0), (1.0, 0.5, -0.5, 0.0)],
)
def test_the_clipped_loss_gives_the_printed_values(advantage, ratio, loss, clipped):
    result = clipped_policy_loss(
        one_token(math.log(ratio)), one_token(0.0), one_token(advantage), torch.ones(1, 1), clip=0.2
    )
    assert result.loss.item() == pytest.approx(loss, abs=FLOAT64)
    assert result.clip_fraction.item() == clipped
    assert result.ratio.item() == pytest.approx(ratio, abs=FLOAT64)
    assert result.kl_to_old.item() == pytest.approx(math.log(ratio) ** 2 / 2, abs=FLOAT64)


def test_the_policy_loss_equals_the_loop():
    bites = 0.0
    for seed in range(5):
        tokens = random_tokens(seed)
        result = clipped_policy_loss(*tokens, clip=0.2)
        expected = oracles.clipped_policy_loss(*flat(*tokens), clip=0.2)
        assert_figures(result, expected)
        bites += result.clip_fraction.item()
    assert bites > 0.1, "the case must reach the clipped branch"


def test_an_unmoved_policy_has_ratio_one_no_clipping_and_no_kl():
    new, _, advantages, mask = random_tokens()
    result = clipped_policy_loss(new, new.clone(), advantages, mask, clip=0.2)
    assert (result.ratio.item(), result.clip_fraction.item(), result.kl_to_old.item()) == (1.0, 0.0, 0.0)


def test_the_gradient_of_an_unmoved_policy_is_that_of_reinforce():
    new, _, advantages, mask = random_tokens()
    new.requires_grad_()
    clipped_policy_loss(new, new.detach().clone(), advantages, mask, clip=0.2).loss.backward()
    tokens = mask.sum().item()
    reinforce = [-advantage / tokens if keep else 0.0 for advantage, keep in zip(*flat(advantages, mask), strict=True)]
    assert new.grad.flatten().tolist() == pytest.approx(reinforce, abs=FLOAT64)


def test_without_clipping_the_loss_is_the_plain_surrogate():
    new, old, advantages, mask = random_tokens()
    result = clipped_policy_loss(new, old, advantages, mask, clip=math.inf)
    ratios = [math.exp(a - b) for a, b in zip(*flat(new, old), strict=True)]
    plain = [-ratio * advantage for ratio, advantage in zip(ratios, *flat(advantages), strict=True)]
    assert result.loss.item() == pytest.approx(oracles.mean(plain, *flat(mask)), abs=FLOAT64)
    assert result.clip_fraction.item() == 0.0


def test_clipped_tokens_push_nothing_and_only_the_policy_gets_a_gradient():
    log_ratio = f64(math.log(1.5), math.log(1.1)).reshape(1, 2).requires_grad_()
    old = torch.zeros_like(log_ratio, requires_grad=True)
    advantages = torch.ones_like(log_ratio, requires_grad=True)
    result = clipped_policy_loss(log_ratio, old, advantages, torch.ones(1, 2), clip=0.2)
    result.loss.backward()
    assert log_ratio.grad.tolist() == [[0.0, pytest.approx(-0.55)]]  # -1.1 over two tokens
    assert old.grad is None
    assert advantages.grad is None
    assert not any(figure.requires_grad for figure in result[1:])


def test_padding_and_row_order_change_nothing_in_the_policy_loss():
    new, old, advantages, mask = random_tokens()
    result = clipped_policy_loss(new, old, advantages, mask, clip=0.2)
    wide = clipped_policy_loss(
        widened(new, math.nan),
        widened(old, -math.inf),
        widened(advantages, math.nan),
        widened(mask, False),
        clip=0.2,
    )
    order = torch.tensor([2, 0, 1])
    moved = clipped_policy_loss(new[order], old[order], advantages[order], mask[order], clip=0.2)
    for figure, wider, reordered in zip(result, wide, moved, strict=True):
        assert wider.item() == pytest.approx(figure.item(), abs=FLOAT64)
        assert reordered.item() == pytest.approx(figure.item(), abs=FLOAT64)


def test_wild_padding_leaves_every_gradient_finite():
    # ratios of 0, infinity and NaN behind the end of a response
    new = torch.tensor([[-1.0, -math.inf, 3.0, math.nan]]).requires_grad_()
    old = torch.tensor([[-1.0, -1.0, -math.inf, -1.0]])
    values = torch.tensor([[0.1, math.inf, -math.inf, math.nan]]).requires_grad_()
    targets = torch.tensor([[1.0, math.inf, 1.0, math.nan]])
    mask = torch.tensor([[True, False, False, False]])
    clipped_policy_loss(new, old, targets, mask, clip=0.2).loss.backward()
    clipped_value_loss(values, torch.zeros(1, 4), targets, mask, clip=0.2).loss.backward()
    assert new.grad.tolist() == [[-1.0, 0.0, 0.0, 0.0]]
    assert values.grad.tolist() == [[pytest.approx(-0.9), 0.0, 0.0, 0.0]]


# Value function


def test_the_value_loss_takes_the_worse_of_two_errors():
    # 0 -> 0.5, target 1: clipped to .2, error .64 against .25, half of it .32; 0 -> -0.5: .5 * 2.25 = 1.125
    towards = clipped_value_loss(one_token(0.5), one_token(0.0), one_token(1.0), torch.ones(1, 1), clip=0.2)
    away = clipped_value_loss(one_token(-0.5), one_token(0.0), one_token(1.0), torch.ones(1, 1), clip=0.2)
    assert (towards.loss.item(), towards.clip_fraction.item()) == (pytest.approx(0.32), 1.0)
    assert (away.loss.item(), away.clip_fraction.item()) == (pytest.approx(1.125), 0.0)


def test_the_value_loss_equals_the_loop():
    for seed in range(5):
        tokens = random_tokens(seed)
        result = clipped_value_loss(*tokens, clip=0.2)
        expected = oracles.clipped_value_loss(*flat(*tokens), clip=0.2)
        assert_figures(result, expected)


def test_without_clipping_the_value_loss_is_half_the_squared_error():
    values, old, returns, mask = random_tokens()
    result = clipped_value_loss(values, old, returns, mask, clip=math.inf)
    squares = [(a - b) ** 2 / 2 for a, b in zip(*flat(values, returns), strict=True)]
    assert result.loss.item() == pytest.approx(oracles.mean(squares, *flat(mask)), abs=FLOAT64)
    assert result.clip_fraction.item() == 0.0


def test_padding_and_row_order_change_nothing_in_the_value_loss():
    values, old, returns, mask = random_tokens()
    result = clipped_value_loss(values, old, returns, mask, clip=0.2)
    wide_mask = widened(mask, False)
    wide = clipped_value_loss(widened(values, 9.0), widened(old, 8.0), widened(returns, 7.0), wide_mask, clip=0.2)
    order = torch.tensor([2, 0, 1])
    moved = clipped_value_loss(values[order], old[order], returns[order], mask[order], clip=0.2)
    for figure, wider, reordered in zip(result, wide, moved, strict=True):
        assert wider.item() == pytest.approx(figure.item(), abs=FLOAT64)
        assert reordered.item() == pytest.approx(figure.item(), abs=FLOAT64)


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant():
    returns, mask = f64(1.0, 2.0, 4.0, 99.0), torch.tensor([True, True, True, False])
    assert explained_variance(returns + 3, returns, mask).item() == pytest.approx(1, abs=FLOAT64)
    assert explained_variance(torch.full_like(returns, 5.0), returns, mask).item() == pytest.approx(0, abs=FLOAT64)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3, abs=FLOAT64)  # 1 - var(2R)/var(R)


def test_explained_variance_equals_the_loop():
    values, _, returns, mask = random_tokens()
    expected = oracles.explained_variance(*flat(values, returns, mask))
    assert explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=FLOAT64)


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(4))
    returns = (torch.full((7, 11), 0.1) - values) + values  # 0.1 up to float32 rounding
    assert explained_variance(values, returns, torch.ones(7, 11)).item() == 0.0


def test_only_the_value_function_gets_a_gradient():
    values, old, returns = (one_token(x).requires_grad_() for x in (0.1, 0.0, 1.0))
    result = clipped_value_loss(values, old, returns, torch.ones(1, 1), clip=0.2)
    result.loss.backward()
    assert values.grad.item() == pytest.approx(-0.9)
    assert old.grad is None
    assert returns.grad is None


# Entropy


def test_entropy_of_known_distributions():
    assert entropy(torch.zeros(2, 3, 8)).tolist() == [[pytest.approx(math.log(8), abs=FLOAT32)] * 3] * 2
    assert entropy(f64(0.7, 0.2, 0.1).log() + 5).item() == pytest.approx(0.8018186, abs=1e-7)
    assert entropy(torch.tensor([1000.0, 0.0])).item() == 0.0


def test_entropy_equals_the_loop():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert entropy(logits).tolist() == pytest.approx([oracles.entropy(row) for row in logits.tolist()], abs=FLOAT64)


def test_forbidden_tokens_count_nothing_in_the_entropy_nor_in_its_gradient():
    logits = torch.tensor([0.3, -math.inf, -1.0], requires_grad=True)
    allowed = torch.tensor([0.3, -1.0], requires_grad=True)
    entropy(logits).backward()
    entropy(allowed).backward()
    assert entropy(logits).item() == pytest.approx(entropy(allowed).item(), abs=FLOAT32)
    assert logits.grad.tolist() == pytest.approx([allowed.grad[0].item(), 0.0, allowed.grad[1].item()], abs=FLOAT32)


def test_entropy_of_half_precision_logits_is_computed_in_float32():
    logits = torch.zeros(50_000, dtype=torch.bfloat16)
    assert entropy(logits).item() == pytest.approx(math.log(50_000), rel=FLOAT32 * 10)  # sums of 50,000 terms
