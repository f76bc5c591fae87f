"""Sums over the tokens that count, and which tokens those are.

A mask is True at what is kept. Numbers outside a mask are never read, so they may be infinite or NaN.
Shapes: `B` rows, `T` response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8
"""Added to the variance before its root, as in Huang et al. 2024 (arXiv 2403.17031)."""


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Put 0 where the mask is False; no gradient flows back from there.

    Args:
        x: any shape.
        mask: shaped like `x`, or with leading dimensions missing or of size 1; True keeps.

    Returns:
        Shaped and typed like `x`.
    """
    return x.masked_fill(~mask.bool(), 0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average the kept entries.

    Where the mask keeps nothing the mean is 0, so that an empty row of a microbatch adds nothing to a loss
    or to a gradient; a NaN would spread to every parameter.

    Args:
        x: floating point or bool (counted as 0 and 1), any shape.
        mask: shaped like `x`, or with leading dimensions missing or of size 1; True keeps.
        dim: the dimension to average over; all of them by default.

    Returns:
        A scalar, or the shape of `x` without `dim`. Tokens count alike: without `dim`, long rows weigh more.
    """
    kept = mask.bool().expand_as(x)
    x = x if x.is_floating_point() else x.float()
    total = zero_outside(x, kept)
    if dim is None:
        return total.sum() / kept.sum().clamp(min=1)
    return total.sum(dim) / kept.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Return the biased variance of the kept entries: the sum of squared deviations over n, not n - 1.

    Args:
        x: floating point, any shape.
        mask: shaped like `x`; True keeps.

    Returns:
        A scalar; 0 where the mask keeps one entry or none.
    """
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def weighted_moments(x: Tensor, mask: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance of the kept entries, where rows count their weights.

    Args:
        x: floating point, `[B, T]`.
        mask: `[B, T]`; True keeps.
        weights: `[B, 1]`, not negative; None: 1 each.
    """
    counted = torch.ones_like(x) if weights is None else weights.expand_as(x)
    share = masked_mean(counted, mask)
    mean = masked_mean(counted * x, mask) / share
    return mean, masked_mean(counted * (x - mean).square(), mask) / share


def masked_whiten(x: Tensor, mask: Tensor, *, center: bool = True, weights: Tensor | None = None) -> Tensor:
    """Scale the kept entries to unit (biased) variance, and by default shift them to mean 0.

    Args:
        x: floating point, `[B, T]`.
        mask: `[B, T]`; True keeps.
        center: False puts the mean back after scaling, so that mean(x) is unchanged.
        weights: what rows count in mean and variance, `[B, 1]`, not negative; None: 1 each.

    Returns:
        `[B, T]`, 0 outside the mask. Equal entries give 0 (their mean where `center` is False).
    """
    mean, variance = weighted_moments(x, mask, weights)
    whitened = (x - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return zero_outside(whitened if center else whitened + mean, mask)


def response_mask_after_eos(response_ids: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Keep each response up to and including its first end-of-sequence token, and nothing after that.

    The end token itself is kept: the policy chose it, and the score is given there::

        eos_ids       [2]
        response_ids  [[5, 6, 2, 0, 2], [5, 6, 7, 8, 9], [2, 2, 5, 5, 5]]
        mask          [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]

    Args:
        response_ids: integers, `[B, T]`, starting at the first token after the prompt.
        eos_ids: every token id that ends a response; none keeps everything.

    Returns:
        Bool, `[B, T]`.
    """
    ends = torch.tensor(list(eos_ids), dtype=response_ids.dtype, device=response_ids.device)
    is_end = torch.isin(response_ids, ends).long()
    ends_before = is_end.cumsum(dim=1) - is_end  # [B, T]
    return ends_before == 0


def last_true_index(mask: Tensor) -> Tensor:
    """Find the last kept position of each row.

    Args:
        mask: `[B, T]`; True keeps. Gaps are allowed.

    Returns:
        Long, `[B]`; -1 for a row that keeps nothing (`gather` and `scatter` refuse it).
    """
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (positions * mask.bool()).amax(dim=1) - 1
