"""Which properties of rows go with labels that a reference speaks against: words of the prompt, annotators, sources.

A row's `margin` is how far a reference model puts the side that the label prefers above the other; below 0 it speaks
against the label. Plain numbers and arrays, `n` rows; no torch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr
from scipy.stats import rankdata

from rlaif.maths.agreement import false_discovery_rates

Floats = NDArray[np.float64]


class Association(NamedTuple):
    """How the margins of the rows that have a property lie beside all others'.

    Attributes:
        name: of the property.
        rows: how many have it.
        against: the share of them whose margin is below 0; a margin of 0 counts half.
        others_against: the same share of the rows that do not have it.
        log_odds: of being spoken against, with it less without, half a row added to each cell (Haldane 1956).
        z: of the rank sum; above 0 where the margins are lower than others'.
        p: the chance of such a z or a higher one if the property had nothing to do with the margins.
        q: the least share of false finds at which this one is among the finds (Benjamini and Hochberg 1995).
    """

    name: str
    rows: int
    against: float
    others_against: float
    log_odds: float
    z: float
    p: float
    q: float


def associations(margins: ArrayLike, having: Mapping[str, Sequence[int]]) -> list[Association]:
    """Test of each property whether the rows that have it have lower margins than all others.

    The test is the rank sum of Mann and Whitney 1947, one-sided, with the normal approximation and its correction for
    ties, so that it needs no scale of the margins; it wants ten rows or so on either side. A label exchanged at random
    turns a margin's sign, so rows whose labels were exchanged stand out as far as the reference is right at all.

    Args:
        margins: `[n]`.
        having: the places, without repeats, of the rows that have a property, at least one and not all; by its name.

    Returns:
        One for each property, the strongest sign first.

    Raises:
        ValueError: there are no rows, a margin is not finite, or a property has no rows, all, or one that is not there.
    """
    values = np.asarray(margins, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"margins of the shape {values.shape}; a row of finite numbers is expected")
    total = len(values)
    ranks = rankdata(values)
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    # The variance of a rank is (n^2 - 1) / 12 without ties; each group of t equal values takes (t^3 - t) / (12 n).
    spread = (total**2 - 1 - float((ties**3 - ties).sum()) / total) / 12
    against = np.where(values < 0, 1.0, np.where(values == 0, 0.5, 0.0))
    found: list[Association] = []
    for name, places in having.items():
        rows = np.asarray(places, dtype=np.int64)
        count = len(rows)
        if not 0 < count < total or rows.min() < 0 or rows.max() >= total:
            raise ValueError(f"`{name}` has {count} of {total} rows; some of them, and not all, are expected")
        variance = spread * count * (total - count) / (total - 1)
        z = float((total + 1) / 2 * count - ranks[rows].sum()) / math.sqrt(variance) if variance > 0 else 0.0
        own = float(against[rows].sum())
        other = float(against.sum()) - own
        odds = math.log((own + 0.5) / (count - own + 0.5)) - math.log((other + 0.5) / (total - count - other + 0.5))
        share, rest = own / count, other / (total - count)
        found.append(Association(name, count, share, rest, odds, z, float(ndtr(-z)), 1.0))
    found.sort(key=lambda one: (one.p, -one.z, one.name))
    rates = false_discovery_rates([one.p for one in found])
    return [one._replace(q=rate) for one, rate in zip(found, rates, strict=True)]


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Return the chance that a positive row's score is above a negative one's, a tie counting half.

    The area under the receiver operating characteristic, by rank sums (Hanley and McNeil 1982). None where all rows are
    of one kind.

    Args:
        scores: `[n]`.
        positive: `[n]`, of truth values.

    Raises:
        ValueError: the shapes differ.
    """
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if values.ndim != 1 or values.shape != wanted.shape:
        raise ValueError(f"scores of the shape {values.shape} with kinds of {wanted.shape}; the same [n] is expected")
    ones, zeros = int(wanted.sum()), int((~wanted).sum())
    if not ones or not zeros:
        return None
    return (float(rankdata(values)[wanted].sum()) - ones * (ones + 1) / 2) / (ones * zeros)
