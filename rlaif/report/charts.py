"""Charts as inline SVG: lines with an optional band, and rates with interval bars.

Drawing is arithmetic on lists; colours come from the classes of ``report.css``, so that one chart serves the
light and the dark scheme. A chart is drawn about as wide as a phone's screen, so its letters stay readable.
Values that are not finite are left out and break the line. Texts that come from outside are escaped here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 360, 212
LEFT, RIGHT, BOTTOM = 48, 12, 34
MAX_MAGNITUDE = 1e100
MAX_POINTS = 400
ROW, LABEL_END, TRACK_END, INTERVAL_WIDTH = 21, 104, 276, 380

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: shown in the legend where a chart has several lines.
        points: (x, y) in the order of x; a value that is not finite leaves a gap.
        spread: half the height of the band around each point, in units of y; empty for no band.
        faint: drawn thin, pale and behind the others, for single steps behind their running mean.
        colour: number of the colour class in ``report.css``, 0 to 3.
    """

    name: str
    points: Sequence[Point]
    spread: Sequence[float] = ()
    faint: bool = False
    colour: int = 0


class Bar(NamedTuple):
    """One row of an interval chart: a rate between 0 and 1 and its interval, and the text beside them."""

    label: str
    rate: float | None
    low: float | None
    high: float | None
    text: str
    colour: int = 0


class Frame(NamedTuple):
    """The range of x and the ticks of y in units of the data, and the y of the top edge in pixels."""

    x_low: float
    x_high: float
    y_ticks: list[float]
    top: float

    def x(self, value: float) -> float:
        """Return the pixel of an x value."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the pixel of a y value; pixels count downwards."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - self.top)


def line_chart(series: Sequence[Series], *, title: str, x_label: str, percent: bool = False) -> Markup:
    """Draw up to four lines over one x axis.

    Above the lines stand the lowest, the highest and the last value of the first series; the first two are
    also marked on the line.

    Args:
        series: the lines; the first may carry a band.
        title: what the chart shows, for readers who hear the page.
        x_label: what the x axis counts.
        percent: the values are fractions, and the axis shows them times 100.

    Returns:
        One ``<svg>`` element; a frame that says so where no value is finite.
    """
    drawn = [one for one in series if any(_finite(x) and _finite(y) for x, y in one.points)]
    if not drawn:
        return _svg(title, 60, WIDTH, [_text(WIDTH / 2, 34, "no values recorded", "mid")])
    frame = _frame(drawn, percent)
    parts = [*_axes(frame, x_label, percent)]
    if len(drawn) > 1:
        parts += _legend(drawn)
    for one in sorted(drawn, key=lambda one: not one.faint):
        parts += _line(one, frame)
    parts += _extremes(drawn[0], frame, percent)
    return _svg(title, HEIGHT, WIDTH, parts)


def interval_chart(
    groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, reference: tuple[float, str] | None = None
) -> Markup:
    """Draw rates from 0 to 100 % as dots with their intervals as bars, in groups with a heading.

    Args:
        groups: headings (may be empty) and their rows.
        title: what the chart shows, for readers who hear the page.
        reference: a rate to draw as a dashed line, and its name; such as chance.

    Returns:
        One ``<svg>`` element.
    """
    parts: list[str] = []
    y = 8.0 if reference is None else 22.0
    top = y
    for heading, bars in groups:
        if heading:
            parts.append(_text(0, y + 13, heading, "head"))
            y += ROW
        for bar in bars:
            parts += _bar(bar, y)
            y += ROW
        y += 5
    grid = [_stroke("grid", _track(rate), top, _track(rate), y) for rate in (0.0, 0.25, 0.5, 0.75, 1.0)]
    grid += [_text(_track(rate), y + 14, _value(rate, percent=True), "mid") for rate in (0.0, 0.5, 1.0)]
    if reference is not None:
        x = _track(reference[0])
        grid.append(_stroke("ref", x, top - 4, x, y))
        grid.append(_text(x, top - 8, reference[1], "mid"))
    return _svg(title, y + 20, INTERVAL_WIDTH, grid + parts)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) that span a range from end to end.

    Args:
        low: the least value to be shown.
        high: the greatest value to be shown; greater than `low`.
        count: about how many steps there should be.
        whole: steps of at least 1, for counts.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """Write a number for a tick or a caption: at most three digits before a power of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        text = f"{value:.3g}"
    elif 1e3 <= abs(value) < 1e5:
        text = f"{value:,.0f}"
    else:
        digits, power = f"{value:.2e}".split("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "\u2212")


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Return the mean of each value and of up to ``window - 1`` finite values before it, at the same x."""
    result: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        recent = [*recent, y][-window:] if _finite(y) else recent
        if recent:
            result.append((x, sum(recent) / len(recent)))
    return result


def _finite(value: float) -> bool:
    return abs(value) < MAX_MAGNITUDE  # false for NaN and the infinities too


def _spread(one: Series) -> list[float]:
    given = list(one.spread) + [0.0] * (len(one.points) - len(one.spread))
    return [abs(value) if _finite(value) else 0.0 for value in given]


def _frame(series: Sequence[Series], percent: bool) -> Frame:
    """Return ranges that hold every finite point and band, with room where all values are equal."""
    xs: list[float] = []
    ys: list[float] = []
    for one in series:
        for (x, y), half in zip(one.points, _spread(one), strict=True):
            if _finite(x) and _finite(y):
                xs.append(x)
                ys += [y - half, y + half]
    x_low, x_high = (
        (min(xs), max(xs))
        if max(xs) > min(xs)
        else (xs[0] - max(1.0, abs(xs[0]) * 0.1), xs[0] + max(1.0, abs(xs[0]) * 0.1))
    )
    y_low, y_high = min(ys), max(ys)
    if y_high - y_low <= max(abs(y_high) * 1e-9, 1e-100):
        room = abs(y_high) * 0.1 or (0.1 if percent else 1.0)
        y_low, y_high = (y_low - room if y_low else 0.0), y_high + room
    return Frame(x_low, x_high, ticks(y_low, y_high, 5), 40.0 if len(series) > 1 else 24.0)


def _axes(frame: Frame, x_label: str, percent: bool) -> Iterator[str]:
    for value in frame.y_ticks:
        y = frame.y(value)
        yield _stroke("grid", LEFT, y, WIDTH - RIGHT, y)
        yield _text(LEFT - 6, y + 4, _value(value, percent), "end")
    for value in ticks(frame.x_low, frame.x_high, 5, whole=True):
        if frame.x_low <= value <= frame.x_high:
            x, base = frame.x(value), HEIGHT - BOTTOM
            yield _stroke("axis", x, base, x, base + 4)
            yield _text(x, base + 15, short(value), "mid")
    yield _stroke("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, "mid")


def _value(value: float, percent: bool) -> str:
    return short(value * 100) + "\u202f%" if percent else short(value)


def _legend(series: Sequence[Series]) -> Iterator[str]:
    x = float(LEFT)
    for one in series:
        faint = " faint" if one.faint else ""
        yield _stroke(f"line c{one.colour}{faint}", x, 24, x + 16, 24)
        yield _text(x + 21, 28, one.name, "")
        x += 33 + 6.2 * len(one.name)


def _line(one: Series, frame: Frame) -> Iterator[str]:
    """Draw the band first, then the line over it; a point without neighbours becomes a dot."""
    faint = " faint" if one.faint else ""
    halves = _spread(one) if one.spread else []
    for run in _runs(one.points):
        if halves:
            upper = [f"{frame.x(x):.1f},{frame.y(y + halves[at]):.1f}" for at, (x, y) in run]
            lower = [f"{frame.x(x):.1f},{frame.y(y - halves[at]):.1f}" for at, (x, y) in reversed(run)]
            yield f'<polygon class="band c{one.colour}" points="{" ".join(upper + lower)}"/>'
        if len(run) == 1:
            x, y = run[0][1]
            yield f'<circle class="dot c{one.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
            continue
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in _thinned([point for _, point in run]))
        yield f'<polyline class="line c{one.colour}{faint}" points="{path}"/>'


def _runs(points: Sequence[Point]) -> list[list[tuple[int, Point]]]:
    """Split points (with their indices) at the values that are not finite."""
    runs: list[list[tuple[int, Point]]] = [[]]
    for at, (x, y) in enumerate(points):
        if _finite(x) and _finite(y):
            runs[-1].append((at, (x, y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Keep the lowest and the highest of each bucket of neighbours: the same picture with fewer points."""
    if len(points) <= MAX_POINTS:
        return list(points)
    edges = [len(points) * index // (MAX_POINTS // 2) for index in range(MAX_POINTS // 2 + 1)]
    kept: list[Point] = []
    for start, stop in pairwise(edges):
        bucket = points[start:stop]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def _extremes(one: Series, frame: Frame, percent: bool) -> Iterator[str]:
    """Mark the lowest and the highest value and write both, and the last, above the chart."""
    finite = [(x, y) for x, y in one.points if _finite(x) and _finite(y)]
    low, high = min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])
    if low[1] == high[1]:
        yield _text(WIDTH - RIGHT, 11, f"always {_value(low[1], percent)}", "end")
        return
    for x, y in (low, high):
        yield f'<circle class="mark" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>'
    lowest, highest = (f"{_value(y, percent)} at {short(x)}" for x, y in (low, high))
    words = f"min {lowest} \u00b7 max {highest} \u00b7 last {_value(finite[-1][1], percent)}"
    yield _text(WIDTH - RIGHT, 11, words, "end")


def _track(rate: float) -> float:
    return LABEL_END + min(max(rate, 0.0), 1.0) * (TRACK_END - LABEL_END)


def _bar(bar: Bar, y: float) -> Iterator[str]:
    middle = y + 9
    label = bar.label if len(bar.label) <= 16 else bar.label[:15] + "\u2026"
    yield _text(LABEL_END - 10, middle + 4, label, "end")
    yield _text(INTERVAL_WIDTH, middle + 4, bar.text, "end")
    if bar.rate is None or not _finite(bar.rate):
        return
    if bar.low is not None and bar.high is not None and _finite(bar.low) and _finite(bar.high):
        low, high = _track(bar.low), _track(bar.high)
        yield _stroke(f"line c{bar.colour}", low, middle, high, middle)
        for x in (low, high):
            yield _stroke(f"cap c{bar.colour}", x, y + 5, x, y + 13)
    yield f'<circle class="dot c{bar.colour}" cx="{_track(bar.rate):.1f}" cy="{middle:.1f}" r="4"/>'


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _svg(title: str, height: float, width: int, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
