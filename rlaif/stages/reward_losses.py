"""The loss of each example of the reward stage, whichever kinds of labels a batch holds."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlaif.maths.preference import (
    bradley_terry,
    centering_penalty,
    cost_loss,
    noise_corrected,
    plackett_luce,
    ranking_loss,
    rating_loss,
    smoothed_preference,
)
from rlaif.recipe import RewardSection
from rlaif.stages.reward_data import Example


class Losses(NamedTuple):
    """What a batch costs: `losses` ``[B, H]`` for each example and head, and the gaps of its pairs ``[pairs]``."""

    losses: Tensor
    gaps: Tensor


def example_losses(scores: Tensor, examples: Sequence[Example], settings: RewardSection) -> Losses:
    """Return the loss of each example under each head.

    Args:
        scores: of all answers, example by example, ``[N, H]``.
        examples: the batch, of any kinds.
        settings: how rankings and ratings count, and the centring coefficient.

    Returns:
        The losses ``[B, H]`` without weights, and chosen minus rejected (for costs: more minus less harmful), averaged
        over heads, of each pair.
    """
    parts: Sequence[Tensor] = torch.split(scores, [len(example.responses) for example in examples])
    rows: list[Tensor | None] = [None] * len(examples)
    gaps: list[Tensor] = []
    pairs = [index for index, example in enumerate(examples) if example.kind in ("pair", "cost")]
    if pairs:
        first, second = (torch.stack([parts[index][side] for index in pairs]) for side in (0, 1))
        labelled = [examples[index] for index in pairs]
        for index, loss in zip(pairs, _pairs(first, second, labelled, settings), strict=True):
            rows[index] = loss
        signs = scores.new_tensor([_direction(example) for example in labelled])
        gaps = [((first - second).mean(1) * signs).detach()[signs != 0]]
    for index, example in enumerate(examples):
        if example.kind == "ranking":
            rows[index] = _ranking(parts[index], example, settings)
        elif example.kind == "rating":
            target = scores.new_tensor(example.rating)
            rows[index] = settings.rating_coef * rating_loss(parts[index][0], target)
    return Losses(
        torch.stack([row for row in rows if row is not None]), torch.cat(gaps) if gaps else scores.new_empty(0)
    )


def _pairs(first: Tensor, second: Tensor, examples: Sequence[Example], settings: RewardSection) -> Tensor:
    """Return the losses of comparisons ``[pairs, H]``; those of a kind and of the same settings go together."""
    result = torch.empty_like(first)
    groups: dict[tuple[str, str, float, float], list[int]] = {}
    for index, example in enumerate(examples):
        loss = example.loss
        groups.setdefault((example.kind, loss.loss, loss.label_smoothing, loss.flip_rate), []).append(index)
    for (kind, name, smoothing, flip_rate), places in groups.items():
        a, b = first[places], second[places]
        rows = [examples[place] for place in places]
        p = _column(a, [0.5 if row.preference is None else row.preference for row in rows])
        if kind == "cost":
            first_sign, second_sign = (_column(a, [row.signs[side] for row in rows]) for side in (0, 1))
            known = _column(a, [float(row.preference is not None) for row in rows])
            result[places] = cost_loss(a, b, first_sign, second_sign, preference=p, order_weight=known)
            continue
        target = smoothed_preference(p, smoothing)
        margin = _column(a, [row.margin for row in rows])
        corrected = name == "noise_corrected"
        cost = (
            noise_corrected(a, b, target, margin, eps=flip_rate) if corrected else bradley_terry(a, b, target, margin)
        )
        result[places] = cost + settings.center_rewards_coefficient * centering_penalty(a, b)
    return result


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return like.new_tensor(numbers).unsqueeze(1)


def _direction(example: Example) -> float:
    """Return 1 where the labels put the first answer higher, -1 where the second, 0 where neither."""
    p = 0.5 if example.preference is None else example.preference
    return float(p > 0.5) - float(p < 0.5)


def _ranking(scores: Tensor, example: Example, settings: RewardSection) -> Tensor:
    ranks = torch.tensor(example.ranks, device=scores.device)
    strict = len(set(example.ranks)) == len(example.ranks)
    loss = plackett_luce if settings.ranking_loss == "plackett_luce" and strict else ranking_loss
    each = torch.stack([loss(column, ranks) for column in scores.unbind(1)])
    return each + settings.center_rewards_coefficient * centering_penalty(scores.mean(0), scores.mean(0))


def head_weights(identifier: str, heads: int, seed: int) -> list[float]:
    """Return what an example counts for each of several heads: draws from Poisson(1), as an online bootstrap.

    Heads of one adapter see the same batches, so they cannot differ in the order of their data; they differ in how
    often each example is theirs (Oza and Russell 2001; Osband et al. 2016, arXiv 1602.04621). One head gets 1.
    """
    if heads == 1:
        return [1.0]
    digest = hashlib.sha256(repr((seed, identifier)).encode()).digest()
    draws = np.random.default_rng(int.from_bytes(digest[:8], "big")).poisson(1.0, heads)
    return [float(draw) for draw in draws]
