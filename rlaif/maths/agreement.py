"""How far labels agree, and how sure one can be of it. Plain numbers and arrays; no torch.

Intervals are 95 % unless said otherwise. What a single row cannot tell is None, never NaN.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, ndtri, stdtrit

CONFIDENCE = 0.95
_CHUNK_ENTRIES = 1_000_000
"""How many resampled numbers are held at once: 16 MB with their indices."""


class BothOrders(NamedTuple):
    """A judge's verdict on one pair, shown in both orders.

    Attributes:
        preference: P(the first candidate is better), 0..1.
        strength: the verdict without the position's pull, in logits; above 0 favours the first candidate.
        bias: the position's pull, in logits; above 0 favours whatever is shown first.
    """

    preference: float
    strength: float
    bias: float


class Rate(NamedTuple):
    """A share of n trials with its confidence interval; `count` is a whole number except in `win_rate`."""

    n: int
    count: float  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    rate: float
    low: float
    high: float


class Mean(NamedTuple):
    """A mean with its sample standard deviation (n - 1) and confidence interval; None where n is 1."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A difference of two means with its confidence interval; None where there is one pair only."""

    difference: float
    low: float | None
    high: float | None


def both_orders(
    logit_first_order: float,
    logit_second_order: float,
    space: Literal["logit", "probability"] = "logit",
) -> BothOrders:
    """Combine a judge's answers to one pair shown as (a, b) and as (b, a).

    With a judge that answers ``strength + bias`` when a is shown first and ``-strength + bias`` when b is,
    the mean in logit space returns sigmoid(strength): an additive position bias cancels exactly. The mean of
    probabilities (Lee et al. 2023, arXiv 2309.00267) keeps the side but loses confidence as the bias grows.

    Args:
        logit_first_order: log P(first shown) - log P(second shown) with a shown first.
        logit_second_order: the same quantity with b shown first, so it speaks for b.
        space: where to average.

    Returns:
        The preference for a; strength and bias in logits whatever `space` is.

    Raises:
        ValueError: a logit is not finite, or `space` is unknown.
    """
    for logit in (logit_first_order, logit_second_order):
        if not math.isfinite(logit):
            raise ValueError(f"a judge's logit is {logit}; a finite number is expected")
    strength = (logit_first_order - logit_second_order) / 2
    bias = (logit_first_order + logit_second_order) / 2
    if space == "logit":
        preference = float(expit(strength))
    elif space == "probability":
        preference = float(expit(logit_first_order) + expit(-logit_second_order)) / 2
    else:
        raise ValueError(f"the space to average in is {space!r}; 'logit' or 'probability' is expected")
    return BothOrders(preference, strength, bias)


def same_position(logits_first: ArrayLike, logits_second: ArrayLike) -> NDArray[np.bool_]:
    """Tell for each pair whether the same position won in both orders, which is where bias beats strength.

    Args:
        logits_first: log P(first shown) - log P(second shown) in one order, one number or `[n]`.
        logits_second: the same quantity in the other order.

    Returns:
        Bool, shaped like the inputs. A logit of 0 in either order is no win for any position.

    Raises:
        ValueError: a logit is not finite.
    """
    first, second = np.asarray(logits_first, dtype=np.float64), np.asarray(logits_second, dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a judge's logit is not finite; finite numbers are expected")
    return np.asarray(np.sign(first) * np.sign(second) > 0)


def wilson(count: float, n: int, confidence: float = CONFIDENCE) -> Rate:
    """Return count / n with Wilson's score interval (1927), which holds for small n and rates near 0 or 1.

    Args:
        count: successes, 0..n.
        n: trials, at least 1.
        confidence: between 0 and 1.

    Returns:
        The rate and the interval's ends, all within 0..1.

    Raises:
        ValueError: there are no trials, or an argument is outside its range.
    """
    if n < 1:
        raise ValueError(f"a rate of {n} trials does not exist; at least 1 is expected")
    if not 0 <= count <= n:
        raise ValueError(f"{count} successes in {n} trials; 0 to {n} are expected")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; a number between 0 and 1 is expected")
    z = float(ndtri(0.5 + confidence / 2))
    rate = count / n
    scale = 1 + z * z / n
    center = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if count == 0 else center - half
    high = 1.0 if count == n else center + half
    return Rate(n, count, rate, low, high)


def shown_below(rate: float, n: int, confidence: float = CONFIDENCE) -> float:
    """Return the share of n trials below which the whole of Wilson's interval lies below a rate; 0 or less: no share.

    The interval is that of the score test: ``rate - z sqrt(rate (1 - rate) / n)``.

    Args:
        rate: between 0 and 1.
        n: trials, at least 1.
        confidence: between 0 and 1.
    """
    return rate - float(ndtri(0.5 + confidence / 2)) * math.sqrt(rate * (1 - rate) / n)


def win_rate(wins: int, ties: int, n: int) -> Rate:
    """Return the share of n comparisons that were won, a tie counting half, with Wilson's interval.

    A half point varies less than a win or a loss, so ties make the interval wider than it need be.

    Args:
        wins: comparisons won.
        ties: comparisons without a winner.
        n: all comparisons, at least 1.

    Returns:
        A rate whose `count` is wins + ties / 2.

    Raises:
        ValueError: there are no comparisons, or the counts do not fit into n.
    """
    if wins < 0 or ties < 0 or wins + ties > n:
        raise ValueError(f"{wins} wins and {ties} ties of {n} comparisons; counts of 0 to {n} are expected")
    return wilson(wins + ties / 2, n)


def mean_interval(x: Sequence[float] | NDArray[np.float64]) -> Mean:
    """Return a mean with Student's t interval.

    Args:
        x: at least one finite number.

    Returns:
        The mean; std, low and high are None for a single number, which says nothing about its own spread.

    Raises:
        ValueError: there are no numbers, or one is not finite.
    """
    numbers = _finite(x)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Mean(1, mean, None, None, None)
    std = float(numbers.std(ddof=1))
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(n)
    return Mean(n, mean, std, mean - half, mean + half)


def false_discovery_rates(p: Sequence[float]) -> list[float]:
    """Return for each p the least false-discovery rate at which it is found: ``min over p' >= p of m p' / rank(p')``.

    Benjamini and Hochberg 1995 ("Controlling the false discovery rate"); holds for independent and positively dependent
    tests, as those of words that stand in the same prompts are.

    Args:
        p: `[m]`, in [0, 1].

    Returns:
        `[m]`, in the same order.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, dtype=np.float64)[order] * len(p) / np.arange(1, len(p) + 1)
    least = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    result = np.empty(len(p))
    result[order] = least
    return [float(value) for value in result]


def paired_bootstrap(
    a: Sequence[float] | NDArray[np.float64],
    b: Sequence[float] | NDArray[np.float64],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return mean(a) - mean(b) with a percentile bootstrap interval over the pairs.

    Pairs are drawn with replacement, so what a prompt adds to both sides cancels. The result does not depend
    on the order of the pairs. Where every pair differs by the same amount the interval has no width: a
    bootstrap cannot draw what was never seen, so few pairs that agree are not certainty.

    Args:
        a: one number per prompt.
        b: one number per prompt, the same prompts in the same order.
        samples: how many resamples to draw.
        seed: of the draws.

    Returns:
        The difference; low and high are None for a single pair.

    Raises:
        ValueError: the lengths differ, there are no pairs, a number is not finite, or `samples` is below 1.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} numbers against {len(b)}; pairs are expected")
    if samples < 1:
        raise ValueError(f"{samples} bootstrap samples; at least 1 is expected")
    differences = np.sort(_finite(_finite(a) - _finite(b)))
    n, difference = len(differences), float(differences.mean())
    if n == 1:
        return Difference(difference, None, None)
    draws = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // n)
    means = [
        differences[draws.integers(0, n, size=(min(chunk, samples - done), n))].mean(axis=1)
        for done in range(0, samples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Difference(difference, float(low), float(high))


def _finite(x: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    numbers = np.asarray(x, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"an array of shape {numbers.shape}; one row of at least 1 number is expected")
    if not np.isfinite(numbers).all():
        raise ValueError("a number is not finite; finite numbers are expected")
    return numbers


def expected_rating(logprobs: Sequence[float]) -> tuple[float | None, float]:
    """Return the expected value of a rating 1, 2, ... n from the log-probabilities of the numbers, and their mass.

    ``s = sum_i i P(i) / sum_i P(i)``, with ``sum_i P(i)`` as the mass; the value is None where there is no mass.
    """
    probabilities = [math.exp(one) for one in logprobs]
    mass = math.fsum(probabilities)
    if not mass > 0:
        return None, 0.0
    return math.fsum(number * p for number, p in enumerate(probabilities, start=1)) / mass, mass


def rescaled_rating(rating: float) -> float:
    """Move a rating from 1..10 to -1..1."""
    return (rating - 5.5) / 4.5


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Return Cohen's kappa (1960) of two raters of the same items: agreement beyond that of their marginals.

    Returns:
        1 for full agreement, 0 for chance; None where there are no items or both always said the same one thing,
        which leaves no disagreement to compare with.

    Raises:
        ValueError: the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} labels against {len(b)}; labels of the same items are expected")
    n = len(a)
    if n == 0:
        return None
    counts_a, counts_b = Counter(a), Counter(b)
    chance = sum(counts_a[label] * counts_b[label] for label in counts_a) / (n * n)
    if chance == 1:
        return None
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    return (agreed - chance) / (1 - chance)


def krippendorff_alpha(items: Sequence[Sequence[Hashable | None]]) -> float | None:
    """Return Krippendorff's alpha for nominal labels (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    Args:
        items: for each item the label of every rater, None where a rater gave none.

    Returns:
        ``1 - D_observed / D_expected``; None where no item has two labels, or all labels are one and the same.
    """
    pairable = [Counter(label for label in item if label is not None) for item in items]
    pairable = [counts for counts in pairable if counts.total() > 1]
    totals: Counter[Hashable] = sum(pairable, Counter())
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum(
        (counts.total() ** 2 - sum(count * count for count in counts.values())) / (counts.total() - 1)
        for counts in pairable
    )
    return 1 - (n - 1) * observed / expected
