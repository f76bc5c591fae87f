"""Over-optimization: the score that the policy optimizes and the one that it does not, against its distance.

The distance is the square root of the KL to the reference, and each score's curve is fitted with the form of Gao et al.
2023 (arXiv 2210.10760, section 3.1): ``R(d) = d (alpha - beta log d)``, from the first update's score on.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlaif.health import INDEPENDENT, SCORE
from rlaif.report.charts import Point, Series, line_chart, short
from rlaif.report.curves import Figure, points
from rlaif.report.reading import Metrics

KL = "rollout/kl_to_reference"
LEAST_POINTS = 5  # away from the reference, for a curve of two parameters
SEEN = 0.1  # deviations; a smaller fall of a fitted curve is not spoken of
_STEPS = 40


class Fit(NamedTuple):
    """The curve ``start + d (alpha - beta log d)``."""

    start: float
    alpha: float
    beta: float

    def at(self, distance: float) -> float:
        """Return the score at a distance from the reference."""
        return self.start + (distance * (self.alpha - self.beta * math.log(distance)) if distance > 0 else 0.0)

    @property
    def peak(self) -> float:
        """The distance of the highest score; infinite for a curve that rises for ever, 0 for one that only falls."""
        if self.beta <= 0:
            return math.inf if self.beta < 0 or self.alpha > 0 else 0.0
        power = self.alpha / self.beta - 1
        return math.exp(power) if power < 700 else math.inf


def fit(line: Sequence[Point], start: float) -> Fit | None:
    """Fit alpha and beta by least squares to (distance, score); None where too few points lie away from the reference.

    Args:
        line: the points, in any order.
        start: the score at distance 0.
    """
    away = [(d, -d * math.log(d), y - start) for d, y in line if d > 0]
    if len({d for d, _, _ in away}) < LEAST_POINTS:
        return None
    aa, ab, bb = (sum(row[i] * row[j] for row in away) for i, j in ((0, 0), (0, 1), (1, 1)))
    ay, by = (sum(row[i] * row[2] for row in away) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:
        return None
    return Fit(start, (bb * ay - ab * by) / determinant, (aa * by - ab * ay) / determinant)


def overoptimization_figures(rows: Metrics) -> list[Figure]:
    """Draw both scores against the distance, with their fits; nothing where there is no independent score."""
    lines = [against_distance(rows, key) for key in (SCORE, INDEPENDENT)]
    if not lines[1]:
        return []
    fits = [fit(line, line[0][1]) if line else None for line in lines]
    farthest = max(d for line in lines for d, _ in line)
    drawn = [
        Series(name, [point for d, y in line for point in ((d, y), (d, math.nan))], colour=colour)
        for name, line, colour in zip(("score", "independent"), lines, (0, 1), strict=True)
    ]
    for found, colour in zip(fits, (0, 1), strict=True):
        if found:
            steps = [farthest * step / _STEPS for step in range(_STEPS + 1)]
            drawn.append(Series("fit", [(d, found.at(d)) for d in steps], colour=colour))
    title = "Over-optimization"
    note = (
        "The score and the independent score, a dot for each update, against the square root of the KL to the "
        f"reference, in nats per response; both in deviations of the first update. {_said(fits, farthest)}"
    )
    return [Figure(title, line_chart(drawn, title=title, x_label="\u221aKL"), note)]


def against_distance(rows: Metrics, key: str) -> list[Point]:
    """Return (square root of the KL, score) of each update that has both, in the order of updates.

    A batch's estimate of the KL may be negative; it then counts as 0.
    """
    kl = dict(points(rows, "update", KL))
    found = [(kl[x], y) for x, y in points(rows, "update", key) if x in kl]
    return [(math.sqrt(max(k, 0.0)), y) for k, y in found if math.isfinite(k) and math.isfinite(y)]


def _said(fits: Sequence[Fit | None], farthest: float) -> str:
    """Say whether the fitted independent score falls where the score still rises."""
    score, independent = fits
    if score is None or independent is None:
        return "There are too few updates away from the reference to fit curves."
    form = "The curves are d (\u03b1 \u2212 \u03b2 log d), fitted by least squares."
    peak = min(independent.peak, farthest)
    fall = independent.at(peak) - independent.at(farthest)
    if fall < SEEN:
        return f"{form} The independent score does not fall along its curve."
    where = f"from \u221aKL {short(peak)} (a KL of {short(peak**2)} nats) on" if peak > 0 else "from the start"
    if score.at(farthest) > score.at(peak):
        return (
            f"{form} Over-optimization: {where} the independent score falls, by {short(fall)}, while the score rises "
            f"by {short(score.at(farthest) - score.at(peak))}."
        )
    return f"{form} The independent score falls {where}, by {short(fall)}; so does the score."
