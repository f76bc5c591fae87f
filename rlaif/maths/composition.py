"""Several scores made into one: the members of an ensemble, and the parts of a composite reward.

Shapes: `B` responses, `M` members, `K` parts. Higher is better everywhere. No order of members or parts matters.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-6


class Standard(NamedTuple):
    """The mean and the standard deviation (over n) of a score on a reference set."""

    offset: float
    scale: float


def mean_score(members: Tensor) -> Tensor:
    """Return the mean over an ensemble's members: `[B, M]` to `[B]`."""
    return members.mean(dim=1)


def worst_score(members: Tensor) -> Tensor:
    """Return the smallest score over members, `[B, M]` to `[B]`: worst-case optimization (Coste, arXiv 2310.02743)."""
    return members.amin(dim=1)


def uncertainty_weighted(members: Tensor, coef: float) -> Tensor:
    """Return the mean score minus what disagreement costs, or plus what it earns: ``mean - coef * variance``.

    Uncertainty-weighted optimization (Coste et al. 2023, arXiv 2310.02743). The variance is over M, not
    M - 1, so that one member alone has none; the paper's code takes the one in one place and the other in another.

    Args:
        members: `[B, M]`.
        coef: in one over the unit of the scores; 0 is the mean, and below 0 disagreement is worth something: optimism
            in the face of uncertainty, which explores what the members do not know.

    Returns:
        `[B]`.
    """
    return members.mean(dim=1) - coef * members.var(dim=1, correction=0)


def standard_of(scores: Tensor) -> Standard:
    """Return mean and standard deviation of a reference set's scores.

    Scores that differ by no more than rounding have no scale, and keep their unit: the deviation is given as 1.

    Args:
        scores: `[B]`, at least one.
    """
    spread = scores.std(correction=0).item()
    return Standard(scores.mean().item(), spread if spread > _ROUNDING * scores.abs().max().item() else 1.0)


def standardize(scores: Tensor, standard: Standard) -> Tensor:
    """Return scores in standard deviations from the mean of the reference set, `[B]`."""
    return (scores - standard.offset) / standard.scale


def weighted_sum(parts: Tensor, weights: Tensor, applies: Tensor) -> Tensor:
    """Return the weighted sum over the parts that apply to each response.

    Args:
        parts: `[B, K]`, standardized on one reference set, or a large part drowns the others.
        weights: `[K]`.
        applies: bool, `[B, K]`; False adds nothing, which is what a standardized part adds on average.

    Returns:
        `[B]`.
    """
    return torch.where(applies, parts * weights, 0.0).sum(dim=1)


def worst_of(parts: Tensor, applies: Tensor) -> Tensor:
    """Return the smallest of the parts that apply to each response; 0, the average, where none does.

    Args:
        parts: `[B, K]`, standardized on one reference set.
        applies: bool, `[B, K]`.

    Returns:
        `[B]`.
    """
    smallest = parts.masked_fill(~applies, torch.inf).amin(dim=1)
    return torch.where(applies.any(dim=1), smallest, 0.0)


def gate(safety: Tensor, helpfulness: Tensor, threshold: float, safety_prompts: Tensor | None = None) -> Tensor:
    """Return the safety score of a response that is not safe enough, and its helpfulness otherwise.

    Touvron et al. 2023 (arXiv 2307.09288, section 3.2.3): with ``R = sigmoid(score)`` it is ``logit(R_s)`` where the
    prompt is one of safety or ``R_s < threshold``, else ``logit(R_h)``. As the logit undoes the sigmoid, the scores
    themselves are returned, exact at any size. The gate is a hard jump: at a threshold of 0.15 and R_h = 0.9, moving
    R_s from 0.10 to 0.20 moves the result from -2.197 to 2.197.

    Args:
        safety: scores in logits, before any sigmoid, `[B]`.
        helpfulness: the same, `[B]`.
        threshold: a probability; the paper's is 0.15.
        safety_prompts: True where the prompt itself asks for the safety score, `[B]`; None: nowhere.

    Returns:
        `[B]`, in logits. It is monotone in helpfulness; in safety only where that does not jump to a lower helpfulness.
    """
    gated = torch.sigmoid(safety) < threshold
    if safety_prompts is not None:
        gated = gated | safety_prompts
    return torch.where(gated, safety, helpfulness)
