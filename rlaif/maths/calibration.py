"""What a reward model's numbers are worth on labelled pairs: likelihood, calibration, correlations, accuracy by slices.

A pair's `gap` is the score of its first response minus that of its second, and `sigmoid(gap)` the model's P(first is
better); its `preference` is the labelled P(first is better), 0 to 1. Exchanging the responses of a pair (gap to -gap,
preference to 1 - preference) changes no figure here. Plain numbers and arrays, `n` pairs; no torch. What the numbers
cannot tell is None, never NaN.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from rlaif.maths.agreement import Rate, wilson

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """A bin of a reliability diagram; without pairs its means are None.

    Attributes:
        low: from this confidence.
        high: to below this one; the last bin includes it.
        count: pairs in the bin.
        confidence: mean of the model's P(the response it prefers is better), 0.5 to 1.
        accuracy: mean of the labelled P of the same thing, with Wilson's interval.
    """

    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    confidence: float | None
    accuracy: Rate | None


class Temperature(NamedTuple):
    """The number that gaps are divided by for the best likelihood.

    Attributes:
        temperature: above 1 where the model is too sure of itself. None where no number is best; then `found` says why.
        nll: the mean negative log-likelihood at it, in nats; where there is none, what is approached.
        found: `fitted`; `separable`: no label speaks against the model, so the colder the better, without end;
            `uninformative`: the gaps do not point at the labels, so the hotter the better, until P is 0.5 everywhere.
    """

    temperature: float | None
    nll: float
    found: Literal["fitted", "separable", "uninformative"]


class Slice(NamedTuple):
    """Accuracy on the rows whose covariate lies between two of its values, both included."""

    low: float
    high: float
    accuracy: Rate


def nll(gaps: ArrayLike, preferences: ArrayLike) -> float:
    """Return the mean negative log-likelihood of the labels under ``sigmoid(gap)``, in nats.

    ``mean(log(1 + exp(gap)) - preference * gap)``, exact at any gap. A model that knows nothing has log 2.

    Args:
        gaps: `[n]`.
        preferences: `[n]`, in [0, 1].

    Raises:
        ValueError: there are no pairs, the lengths differ, or a number is outside its range.
    """
    return _nll(*_pairs(gaps, preferences))


def reliability(gaps: ArrayLike, preferences: ArrayLike, bins: int = 10) -> list[Bin]:
    """Return the reliability diagram: how often the response that the model prefers is better, by how sure it is.

    Equal bins from 0.5 to 1 of the model's confidence in its own side (Guo et al. 2017, arXiv 1706.04599, section 2).
    A gap of 0 prefers neither side and is right half the time.

    Args:
        gaps: `[n]`.
        preferences: `[n]`, in [0, 1].
        bins: how many, at least 1.

    Raises:
        ValueError: as for `nll`, or there are no bins.
    """
    gap, preference = _pairs(gaps, preferences)
    if bins < 1:
        raise ValueError(f"{bins} bins; at least 1 is expected")
    confidence = expit(np.abs(gap))
    right = np.where(gap > 0, preference, np.where(gap < 0, 1 - preference, 0.5))
    edges = np.linspace(0.5, 1.0, bins + 1)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        chosen = index == number
        count = int(chosen.sum())
        mean = float(confidence[chosen].mean()) if count else None
        found.append(Bin(float(edges[number]), float(edges[number + 1]), count, mean, _rate(right[chosen])))
    return found


def ece(gaps: ArrayLike, preferences: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error: the mean over pairs of their bin's |accuracy - confidence|.

    Guo et al. 2017 (arXiv 1706.04599, equation 3), over the bins of `reliability`. It is above 0 for a perfect model on
    few pairs, because the bins' accuracies scatter.

    Raises:
        ValueError: as for `reliability`.
    """
    drawn = reliability(gaps, preferences, bins)
    filled = [(one.count, one.confidence, one.accuracy.rate) for one in drawn if one.accuracy and one.confidence]
    return sum(count * abs(accuracy - sure) for count, sure, accuracy in filled) / sum(one.count for one in drawn)


def fit_temperature(gaps: ArrayLike, preferences: ArrayLike) -> Temperature:
    """Return the temperature whose ``sigmoid(gap / temperature)`` gives the labels the best likelihood.

    Guo et al. 2017 (arXiv 1706.04599, section 4.2). The likelihood is convex in 1 / temperature, so the root of its
    derivative is bracketed by doubling and found to rounding; where no root above 0 exists, none is made up.

    Args:
        gaps: `[n]`; best of pairs that nothing was trained on.
        preferences: `[n]`, in [0, 1].

    Raises:
        ValueError: as for `nll`.
    """
    gap, preference = _pairs(gaps, preferences)
    largest = float(np.abs(gap).max())
    unit = gap / largest if largest > 0 else gap  # gaps between -1 and 1

    def slope(coldness: float) -> float:
        return float(np.mean(unit * (expit(coldness * unit) - preference)))

    if slope(0.0) >= 0:
        return Temperature(None, math.log(2), "uninformative")
    against = np.where(gap > 0, 1 - preference, np.where(gap < 0, preference, 0.0))
    if not against.any():
        return Temperature(None, math.log(2) * float(np.mean(gap == 0)), "separable")
    high = 1.0
    while slope(high) < 0 and high < 1e300:
        high *= 2
    coldness = float(brentq(slope, 0.0, high, xtol=1e-300, rtol=1e-14))
    return Temperature(largest / coldness, _nll(coldness * unit, preference), "fitted")


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Pearson's correlation of `[n]` and `[n]`; None where one does not vary or there is one row only.

    Raises:
        ValueError: there are no rows, the lengths differ, or a number is not finite.
    """
    a, b = _columns(x, y)
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if not _varies(x) or not _varies(y) or spread == 0:
        return None
    return float(np.clip(float(a @ b) / spread, -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's rank correlation of `[n]` and `[n]`, equal values sharing their mean rank; None as `pearson`.

    Raises:
        ValueError: as for `pearson`.
    """
    a, b = _columns(x, y)
    return pearson(_ranks(a), _ranks(b))


def accuracy_by_quantile(covariate: ArrayLike, right: ArrayLike, bins: int = 4) -> list[Slice]:
    """Return accuracy in slices of equal counts of a covariate, such as a margin or a difference of lengths.

    Rows with the same value stay in one slice, so there may be fewer slices, of unequal counts.

    Args:
        covariate: `[n]`.
        right: how right each row is: 1, 0, or 0.5 for a tie; `[n]`.
        bins: how many slices are wanted, at least 1.

    Raises:
        ValueError: as for `pearson`, `right` is outside [0, 1], or there are no bins.
    """
    values, share = _columns(covariate, right)
    if ((share < 0) | (share > 1)).any():
        raise ValueError("a row is right by less than 0 or more than 1; 0 to 1 is expected")
    if bins < 1:
        raise ValueError(f"{bins} bins; at least 1 is expected")
    tops = np.unique(np.quantile(values, np.arange(1, bins + 1) / bins, method="inverted_cdf"))
    index = np.searchsorted(tops, values)
    found = []
    for number in range(len(tops)):
        chosen = index == number
        accuracy = _rate(share[chosen])
        assert accuracy, "a quantile is a value of some row"
        found.append(Slice(float(values[chosen].min()), float(values[chosen].max()), accuracy))
    return found


def _nll(gap: Floats, preference: Floats) -> float:
    return float(np.mean(preference * np.logaddexp(0, -gap) + (1 - preference) * np.logaddexp(0, gap)))


def _rate(right: Floats) -> Rate | None:
    return wilson(min(float(right.sum()), len(right)), len(right)) if len(right) else None


def _ranks(x: Floats) -> Floats:
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[which], dtype=np.float64)


def _varies(x: ArrayLike) -> bool:
    return len(np.unique(np.asarray(x))) > 1


def _columns(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"arrays of the shapes {a.shape} and {b.shape}; two rows of the same n of at least 1 are expected"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a number is not finite; finite numbers are expected")
    return a, b


def _pairs(gaps: ArrayLike, preferences: ArrayLike) -> tuple[Floats, Floats]:
    gap, preference = _columns(gaps, preferences)
    if ((preference < 0) | (preference > 1)).any():
        raise ValueError("a preference is below 0 or above 1; 0 to 1 is expected")
    return gap, preference
