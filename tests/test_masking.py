import math

import oracles
import pytest
import torch

from rlaif.maths.masking import (
    last_true_index,
    masked_mean,
    masked_var,
    masked_whiten,
    response_mask_after_eos,
    zero_outside,
)

PRINTED = 5e-7  # literals are typed with six decimals
FLOAT64 = 1e-12  # both sides are float64; only the order of a few additions differs

ADVANTAGES = torch.tensor([[0.685175, 0.6265, 0.47]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)


def padded(x, columns=2, value=0.0):
    """Append columns that a mask of False will have to hide."""
    return torch.nn.functional.pad(x, (0, columns), value=value)


def random_case(seed=0, rows=4, columns=6):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=draws) < 0.6
    mask[:, 0] = True
    return x, mask


def test_masked_mean_counts_tokens_alike_not_rows():
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [10.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert masked_mean(x, mask).item() == pytest.approx(14 / 5)  # not the 5.5 of a mean over row means
    assert masked_mean(x, mask, dim=1).tolist() == [1.0, 10.0]
    assert masked_mean(x, mask, dim=0).tolist() == [5.5, 1.0, 1.0, 1.0]


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, False]])
    means = masked_mean(x, mask, dim=1)
    means.sum().backward()
    assert means.tolist() == [0.0, 3.0]
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert masked_mean(x, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_numbers_outside_the_mask_are_never_read():
    x = torch.tensor([[1.0, math.nan], [3.0, math.inf]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 0]])  # integers, as tokenizers make them
    assert masked_mean(x, mask).item() == 2.0
    assert masked_var(x, mask).item() == 1.0
    assert masked_whiten(x, mask).tolist() == [[pytest.approx(-1), 0.0], [pytest.approx(1), 0.0]]
    masked_mean(x, mask).backward()
    assert x.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_a_mask_of_one_row_applies_to_every_row_and_is_counted_for_each():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert masked_mean(x, torch.tensor([True, False])).item() == 2.0
    assert zero_outside(x, torch.tensor([[True, False]])).tolist() == [[1.0, 0.0], [3.0, 0.0]]


def test_the_mean_of_a_bool_is_a_fraction():
    flags = torch.tensor([True, True, False, True])
    assert masked_mean(flags, torch.tensor([True, True, True, False])).item() == pytest.approx(2 / 3)


def test_mean_variance_and_whitening_equal_the_loops():
    for seed in range(5):
        x, mask = random_case(seed)
        flat_x, flat_mask = x.flatten().tolist(), mask.flatten().tolist()
        mean, variance = oracles.mean(flat_x, flat_mask), oracles.biased_variance(flat_x, flat_mask)
        assert masked_mean(x, mask).item() == pytest.approx(mean, abs=FLOAT64)
        assert masked_var(x, mask).item() == pytest.approx(variance, abs=FLOAT64)
        for center in (True, False):
            expected = oracles.whiten(flat_x, flat_mask, center)
            assert masked_whiten(x, mask, center=center).flatten().tolist() == pytest.approx(expected)


def test_the_variance_is_biased():
    assert masked_var(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).item() == 1.0  # unbiased: 2


def test_whitening_gives_the_printed_values():
    expected = [1.005095, 0.359041, -1.364137]
    assert masked_whiten(ADVANTAGES, ALL)[0].tolist() == pytest.approx(expected, abs=PRINTED)


def test_whitening_without_centering_keeps_the_mean():
    whitened = masked_whiten(ADVANTAGES, ALL, center=False)
    assert whitened[0].tolist() == pytest.approx([1.598987, 0.952933, -0.770245], abs=PRINTED)
    assert whitened.mean().item() == pytest.approx(ADVANTAGES.mean().item(), abs=FLOAT64)


def test_whitened_numbers_have_mean_zero_and_unit_variance():
    x, mask = random_case()
    whitened = masked_whiten(x, mask)
    assert masked_mean(whitened, mask).item() == pytest.approx(0, abs=FLOAT64)
    assert masked_var(whitened, mask).item() == pytest.approx(1, abs=1e-7)  # 1e-8 is added to a variance near 1
    assert whitened[~mask].tolist() == [0.0] * int((~mask).sum())


def test_equal_numbers_whiten_to_zero():
    assert masked_whiten(torch.full((2, 2), 0.5), torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_padding_columns_and_row_order_change_no_statistic():
    x, mask = random_case()
    wide, wide_mask = padded(x, value=7.0), padded(mask, value=False)
    order = torch.tensor([2, 0, 3, 1])
    for statistic in (masked_mean, masked_var):
        assert statistic(wide, wide_mask).item() == pytest.approx(statistic(x, mask).item(), abs=FLOAT64)
        assert statistic(x[order], mask[order]).item() == pytest.approx(statistic(x, mask).item(), abs=FLOAT64)
    torch.testing.assert_close(masked_whiten(wide, wide_mask), padded(masked_whiten(x, mask)))
    torch.testing.assert_close(masked_whiten(x[order], mask[order]), masked_whiten(x, mask)[order])


def test_a_response_is_kept_up_to_and_including_its_first_end_token():
    ids = torch.tensor([[5, 6, 2, 0, 2], [5, 6, 7, 8, 9], [2, 2, 5, 5, 5], [5, 3, 2, 5, 5]])
    mask = response_mask_after_eos(ids, [2, 3])
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_without_end_tokens_everything_is_kept():
    assert response_mask_after_eos(torch.tensor([[1, 2, 0]]), []).tolist() == [[True, True, True]]


def test_the_response_mask_equals_the_walk_and_ignores_what_follows_the_end():
    ids = torch.randint(0, 6, (30, 8), generator=torch.Generator().manual_seed(1))
    mask = response_mask_after_eos(ids, (0, 4))
    assert mask.tolist() == [oracles.response_mask(row, (0, 4)) for row in ids.tolist()]
    assert response_mask_after_eos(ids.masked_fill(~mask, 4), (0, 4)).equal(mask)
    assert response_mask_after_eos(ids.masked_fill(~mask, 1), (0, 4)).equal(mask)


def test_the_last_true_index_survives_gaps_and_padding():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = last_true_index(mask)
    assert found.dtype == torch.long
    assert found.tolist() == [1, 3, 3, 0, -1]
    assert last_true_index(padded(mask, value=False)).equal(found)
