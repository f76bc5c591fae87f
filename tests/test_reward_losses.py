"""Losses of mixed batches, against the exact values of the methods and by what each kind of label says."""

import math

import pytest
import torch

from rlaif.recipe import PairLoss, RewardSection
from rlaif.stages.reward_data import Example
from rlaif.stages.reward_losses import example_losses, head_weights

PLAIN = RewardSection(center_rewards_coefficient=0.0)


def pair(preference=1.0, margin=0.0, **loss):
    return Example("pair", "p", [1], [[2], [3]], preference=preference, margin=margin, loss=PairLoss(**loss))


def losses(scores, examples, settings=PLAIN):
    found = example_losses(torch.tensor(scores).reshape(len(scores), -1), examples, settings)
    return found.losses.tolist(), found.gaps.tolist()


@pytest.mark.parametrize(
    ("scores", "example", "expected"),
    [
        ([1.0, 0.2], pair(), 0.37110),
        ([1.0, 0.2], pair(0.6), 0.69110),  # 0.6 x 0.37110 + 0.4 x 1.17110
        ([1.0, 0.2], pair(margin=1.0), 0.79814),
        ([0.40547, 0.0], pair(0.6), 0.67301),  # the minimum of a preference of 0.6
        ([1.0, 0.0], pair(label_smoothing=0.1), 0.41326),  # the smoothed loss at a gap of 1
        ([1.0, 0.0], pair(loss="noise_corrected", flip_rate=0.1), 0.18826),
        ([50.0, -50.0], pair(), 0.0),
        ([-50.0, 50.0], pair(), 100.0),
    ],
)
def test_the_loss_of_a_pair_has_the_value_of_its_formula(scores, example, expected):
    assert losses(scores, [example])[0][0] == pytest.approx([expected], abs=2e-5)


def test_centering_adds_the_squared_sum_of_a_pairs_scores():
    settings = RewardSection(center_rewards_coefficient=0.1)
    (plain,), _ = losses([1.0, 0.5], [pair()])
    (centred,), _ = losses([1.0, 0.5], [pair()], settings)
    assert centred[0] - plain[0] == pytest.approx(0.1 * 1.5**2)


def test_a_ranking_counts_as_all_its_pairs_or_as_a_sequence_of_choices():
    scores = [2.0, 1.0, 0.0]
    example = Example("ranking", "k", [1], [[2], [3], [4]], ranks=[1, 2, 3])
    assert losses(scores, [example])[0][0] == pytest.approx([0.251151], abs=1e-5)  # (2 x .313262 + .126928) / 3
    chosen = RewardSection(center_rewards_coefficient=0.0, ranking_loss="plackett_luce")
    assert losses(scores, [example], chosen)[0][0] == pytest.approx([0.720868], abs=1e-5)
    tied = Example("ranking", "k", [1], [[2], [3], [4]], ranks=[1, 2, 2])
    as_pairs = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert losses(scores, [tied], chosen)[0][0] == pytest.approx([as_pairs], abs=1e-5)


def test_a_rating_counts_as_its_squared_error_times_its_coefficient():
    example = Example("rating", "r", [1], [[2]], rating=-0.5)
    assert losses([1.0], [example], RewardSection(rating_coef=0.5))[0] == [[pytest.approx(0.5 * 1.5**2)]]


def test_a_cost_row_is_the_loss_of_safe_rlhf_in_either_order():
    """methods T4.1: the more harmful answer at 1, marked unsafe, the other at -1, marked safe."""
    first = Example("cost", "a", [1], [[2], [3]], preference=1.0, signs=(1.0, -1.0))
    second = Example("cost", "b", [1], [[2], [3]], preference=0.0, signs=(-1.0, 1.0))
    found, gaps = losses([1.0, -1.0, -1.0, 1.0], [first, second])
    assert found == [[pytest.approx(0.75345, abs=1e-5)]] * 2
    assert gaps == [2.0, 2.0]  # more minus less harmful


def test_what_a_cost_row_does_not_say_adds_nothing():
    signs_only = Example("cost", "a", [1], [[2], [3]], preference=None, signs=(1.0, 0.0))
    found, gaps = losses([1.0, 7.0], [signs_only])
    assert found == [[pytest.approx(math.log1p(math.exp(-1)))]]
    assert gaps == []


def test_a_mixed_batch_gives_each_example_what_it_gets_alone_for_every_head():
    examples = [
        Example("rating", "r", [1], [[2]], rating=0.3),
        pair(0.7, loss="noise_corrected", flip_rate=0.2),
        Example("ranking", "k", [1], [[2], [3], [4]], ranks=[2, 1, 3]),
        pair(),
        Example("cost", "c", [1], [[2], [3]], preference=0.2, signs=(1.0, 0.0)),
    ]
    torch.manual_seed(0)
    scores = torch.randn(10, 3)
    together = example_losses(scores, examples, RewardSection())
    assert together.losses.shape == (5, 3)
    start = 0
    for row, example in zip(together.losses, examples, strict=True):
        own = scores[start : start + len(example.responses)]
        start += len(example.responses)
        for head in range(3):
            alone = example_losses(own[:, head : head + 1], [example], RewardSection()).losses
            if example.kind == "ranking":  # its centring looks at the mean over answers of each head
                assert alone.shape == (1, 1)
            assert row[head].item() == pytest.approx(alone.item(), rel=1e-5)


def test_gradients_of_badly_ranked_pairs_do_not_die():
    scores = torch.tensor([[-15.0], [15.0]], requires_grad=True)
    example_losses(scores, [pair()], PLAIN).losses.sum().backward()
    assert scores.grad.flatten().tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


def test_one_head_counts_every_example_once_and_several_count_them_as_a_bootstrap():
    assert head_weights("any", 1, 0) == [1.0]
    assert head_weights("one", 4, 7) == head_weights("one", 4, 7)
    drawn = torch.tensor([head_weights(f"row {n}", 4, 7) for n in range(2000)])
    assert drawn.mean(0).tolist() == pytest.approx([1.0] * 4, abs=0.1)
    assert drawn.var(0).tolist() == pytest.approx([1.0] * 4, abs=0.2)
    assert torch.corrcoef(drawn.T)[0, 1].abs() < 0.1
