"""What people or judges said of responses, as losses of a score: comparisons, rankings, ratings and safety signs.

Shapes: `B` rows, `K` responses to one prompt. Scores should be float32. Every loss is one number per row (or per
ranking), so that the caller can weight rows; all are built on ``logsigmoid``, which is exact at any margin where the
logarithm of a sigmoid is not.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor | float | None = None,
    margin: Tensor | float | None = None,
) -> Tensor:
    """Return the negative log-likelihood of a comparison under the Bradley-Terry model.

    With p the preference and ``d = chosen - rejected - margin``, it is
    ``-[p log sigmoid(d) + (1 - p) log sigmoid(-d)]``. Hard labels: Ouyang et al. 2022 (arXiv 2203.02155,
    equation 1); margin: Touvron et al. 2023 (arXiv 2307.09288, section 3.2.2); soft labels: Bai et al. 2022
    (arXiv 2212.08073). It is linear in d for badly ranked pairs, so their gradient does not die.
    With p < 1 the minimum is at ``d = log(p / (1 - p))``.

    Args:
        chosen: scores of the better responses, `[B]`.
        rejected: scores of the worse responses, `[B]`.
        preference: P(chosen is better) in [0, 1], `[B]` or one number; None means 1.
        margin: how far apart the scores should be, `[B]` or one number; None means 0.

    Returns:
        `[B]`, not averaged.
    """
    d = chosen - rejected
    if margin is not None:
        d = d - margin
    if preference is None:
        return -logsigmoid(d)
    return -(preference * logsigmoid(d) + (1.0 - preference) * logsigmoid(-d))


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the squared sum of a pair's scores, which pulls scores towards an average of 0.

    Comparisons leave one constant free; this settles it (Eisenstein et al. 2023, arXiv 2312.09244).

    Args:
        chosen: scores, `[B]`.
        rejected: scores, `[B]`.

    Returns:
        `[B]`; the caller applies the coefficient (0.01 is usual).
    """
    return (chosen + rejected).square()


def smoothed_preference(preference: Tensor | float, eps: float) -> Tensor | float:
    """Return a preference that allows for a label being wrong: ``(1 - eps) p + eps (1 - p)``.

    As the target of `bradley_terry` it is the conservative loss of Mitchell 2023 ("A note on DPO with noisy
    preferences"): for a hard label its minimum is at ``d = log((1 - eps) / eps)`` instead of at infinity.

    Args:
        preference: P(chosen is better) in [0, 1], `[B]` or one number.
        eps: the rate of flipped labels, 0 to below 0.5.

    Returns:
        Shaped like `preference`; between eps and 1 - eps.

    Raises:
        ValueError: eps is outside its range.
    """
    _check_rate(eps)
    return (1.0 - eps) * preference + eps * (1.0 - preference)


def noise_corrected(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor | float | None = None,
    margin: Tensor | float | None = None,
    *,
    eps: float,
) -> Tensor:
    """Return the loss whose mean over flipped and unflipped labels is the loss of the true label.

    With L the Bradley-Terry loss of a row and L' that of the row with its sides exchanged, it is
    ``[(1 - eps) L - eps L'] / (1 - 2 eps)`` (Natarajan et al. 2013, "Learning with noisy labels", lemma 1; for
    preferences Chowdhury et al. 2024, arXiv 2403.00409). If each row was flipped with the probability eps, whichever
    side was better, its expectation is L. Without a margin, L' is the loss of the preference 1 - p.

    It has no lower bound: for a hard label it falls by ``eps / (1 - 2 eps)`` per unit of d without end, so that it must
    be stopped early or held by the centring penalty.

    Args:
        chosen: scores of the better responses, `[B]`.
        rejected: scores of the worse responses, `[B]`.
        preference: as for `bradley_terry`.
        margin: as for `bradley_terry`; a flipped row keeps its margin.
        eps: the rate of flipped labels, 0 to below 0.5.

    Returns:
        `[B]`, not averaged; may be negative.

    Raises:
        ValueError: eps is outside its range.
    """
    _check_rate(eps)
    as_labelled = bradley_terry(chosen, rejected, preference, margin)
    exchanged = bradley_terry(rejected, chosen, preference, margin)
    return ((1.0 - eps) * as_labelled - eps * exchanged) / (1.0 - 2.0 * eps)


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the mean Bradley-Terry loss over all pairs of one prompt's responses that have different ranks.

    Ouyang et al. 2022 (arXiv 2203.02155, equation 1) weight the pairs of a prompt by 1 / C(K, 2), so that a prompt
    with many responses counts no more than one with two. Pairs that tie say nothing and are left out of the mean.

    Args:
        scores: `[K]`.
        ranks: `[K]`, any numbers; the smallest is the best.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ, or no two ranks do.
    """
    _check_ranking(scores, ranks)
    better, worse = torch.nonzero(ranks.unsqueeze(1) < ranks.unsqueeze(0), as_tuple=True)
    if not len(better):
        raise ValueError(f"a ranking of {len(ranks)} responses without two different ranks says nothing")
    return bradley_terry(scores[better], scores[worse]).mean()


def plackett_luce(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the negative log-likelihood of one prompt's ranking under the Plackett-Luce model.

    ``-sum_i log(exp(s_i) / sum_{j >= i} exp(s_j))`` with the best response first (Plackett 1975; Rafailov et al. 2023,
    arXiv 2305.18290, appendix A.3). For two responses it is the Bradley-Terry loss. The model has no ties: rankings
    that hold some are for `ranking_loss`.

    Args:
        scores: `[K]`.
        ranks: `[K]`, any numbers, all different; the smallest is the best.

    Returns:
        A scalar, the sum over the K - 1 choices.

    Raises:
        ValueError: the shapes differ, there are fewer than two responses, or two ranks are equal.
    """
    _check_ranking(scores, ranks)
    if len(torch.unique(ranks)) < len(ranks):
        raise ValueError("two responses have the same rank; Plackett-Luce needs a strict order, ranking_loss does not")
    worst_first = scores[ranks.argsort(descending=True)]
    return (torch.logcumsumexp(worst_first, dim=0) - worst_first).sum()


def rating_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of scores against ratings (Wang et al. 2024, arXiv 2406.08673).

    Args:
        scores: `[B]`.
        targets: ratings, `[B]`, best standardized by `standardize_by_annotator`.

    Returns:
        `[B]`, not averaged.
    """
    return (scores - targets).square()


def standardize_by_annotator(ratings: Sequence[float], annotators: Sequence[Hashable]) -> list[float]:
    """Bring each annotator's ratings to mean 0 and standard deviation 1, so that strict and mild ones agree.

    An annotator with a single rating, or whose ratings are all the same, has no scale of their own: those ratings are
    measured by the mean and deviation of all ratings together. They keep their order against each other's, and are not
    blown up by a division by zero. Deviations are over n, not n - 1.

    Args:
        ratings: finite numbers.
        annotators: who gave each of them.

    Returns:
        One number per rating, in the same order.

    Raises:
        ValueError: the lengths differ, there are no ratings, one is not finite, or all of them are the same.
    """
    if len(ratings) != len(annotators) or not ratings:
        raise ValueError(
            f"{len(ratings)} ratings by {len(annotators)} annotators; one annotator per rating is expected"
        )
    if not all(math.isfinite(rating) for rating in ratings):
        raise ValueError("a rating is not finite; finite numbers are expected")
    pooled = _mean_and_spread(ratings)
    if pooled is None:
        raise ValueError(f"all {len(ratings)} ratings are {ratings[0]:g}; at least two different ones are expected")
    given: dict[Hashable, list[float]] = defaultdict(list)
    for rating, annotator in zip(ratings, annotators, strict=True):
        given[annotator].append(rating)
    scales = {annotator: _mean_and_spread(own) or pooled for annotator, own in given.items()}
    return [
        (rating - scales[annotator][0]) / scales[annotator][1]
        for rating, annotator in zip(ratings, annotators, strict=True)
    ]


def cost_loss(
    worse_cost: Tensor,
    better_cost: Tensor,
    worse_sign: Tensor,
    better_sign: Tensor,
    preference: Tensor | float | None = None,
    order_weight: Tensor | float = 1.0,
) -> Tensor:
    """Return the loss of a cost model: which response is more harmful, and whether each is harmful at all.

    ``-logsigmoid(C_w - C_l) - logsigmoid(s_w C_w) - logsigmoid(s_l C_l)`` (Dai et al. 2023, Safe RLHF, arXiv
    2310.12773, section 3.2). Mind the names: w is the **more harmful** response, which "wins" in cost. A cost above 0
    means unsafe.

    Args:
        worse_cost: costs of the more harmful responses, `[B]`.
        better_cost: costs of the less harmful responses, `[B]`.
        worse_sign: 1 where the more harmful response is unsafe, -1 where it is safe, 0 where nobody said; `[B]`. An
            unknown sign adds nothing to the loss.
        better_sign: the same for the less harmful response, `[B]`.
        preference: P(the more harmful one is more harmful) in [0, 1], `[B]` or one number; None means 1.
        order_weight: what the order counts, 0 to 1, `[B]` or one number: 0 where a row brings signs alone.

    Returns:
        `[B]`, not averaged; 0 for a row that brings neither signs nor an order.
    """
    order = order_weight * bradley_terry(worse_cost, better_cost, preference)
    return order + _sign_loss(worse_cost, worse_sign) + _sign_loss(better_cost, better_sign)


def _sign_loss(cost: Tensor, sign: Tensor) -> Tensor:
    return -sign.abs() * logsigmoid(sign * cost)


def _check_rate(eps: float) -> None:
    if not 0 <= eps < 0.5:
        raise ValueError(
            f"the rate of flipped labels is {eps}; 0 to below 0.5 is expected, since at 0.5 labels say nothing"
        )


def _check_ranking(scores: Tensor, ranks: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != ranks.shape or len(scores) < 2:
        raise ValueError(
            f"scores of the shape {list(scores.shape)} with ranks of {list(ranks.shape)}; [K] is expected of both, "
            "with K of at least 2"
        )


def _mean_and_spread(numbers: Sequence[float]) -> tuple[float, float] | None:
    """Return mean and standard deviation; None where the numbers differ by no more than rounding."""
    mean = math.fsum(numbers) / len(numbers)
    spread = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    return (mean, spread) if spread > 1e-12 * max(abs(number) for number in numbers) else None
