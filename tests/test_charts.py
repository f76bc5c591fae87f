"""Charts as SVG, and numbers as text."""

import math
import re

import pytest

from rlaif.report import charts, curves, wording
from rlaif.report.charts import Bar, Series, interval_chart, line_chart, running_mean, ticks
from rlaif.report.labels import Mean, Rate
from rlaif.report.results import Difference


def numbers(chart: str) -> list[float]:
    """Return the numbers in the attributes of a chart, without those in its texts."""
    return [float(one) for one in re.findall(r'-?\d+(?:\.\d+)?(?=[" ,])', re.sub(r">[^<]*<", "><", chart))]


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [-1e-320, 0.0],
        [5.0, math.nan, 7.0, 8.0],
        [1e99, -1e99],
        [0.3] * 2000 + [9.0],
    ],
)
def test_a_line_chart_keeps_every_point_inside_its_frame(values: list[float]) -> None:
    chart = line_chart([Series("one", list(enumerate(values)), [0.5] * len(values))], title="t", x_label="step")
    assert all(-0.5 <= number <= 361 for number in numbers(chart)), chart
    assert "nan" not in chart and "inf" not in chart


def test_a_single_point_is_a_dot_and_a_gap_breaks_the_line() -> None:
    assert line_chart([Series("a", [(1, 3.0)])], title="", x_label="").count('class="dot') == 1
    gap = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 5.0)]
    assert line_chart([Series("a", gap)], title="", x_label="").count("<polyline") == 2
    assert "no values recorded" in line_chart([Series("a", [(0, math.inf)])], title="", x_label="")
    assert "no values recorded" in line_chart([], title="", x_label="")
    assert "always 2" in line_chart([Series("a", [(0, 2.0), (1, 2.0)])], title="", x_label="")


def test_a_chart_names_its_lowest_highest_and_last_value() -> None:
    chart = line_chart([Series("a", [(1, 0.5), (2, -0.25), (3, 0.125)])], title="", x_label="", percent=True)
    assert "min \u221225\u202f% at 2 \u00b7 max 50\u202f% at 1 \u00b7 last 12.5\u202f%" in chart


def test_a_long_line_keeps_its_extremes_when_it_is_thinned() -> None:
    points = [(float(n), 100.0 if n == 1234 else -100.0 if n == 4321 else 0.0) for n in range(5000)]
    kept = charts._thinned(points)
    assert len(kept) <= 400 and (1234.0, 100.0) in kept and (4321.0, -100.0) in kept
    assert kept == sorted(kept)


def test_ticks_are_round_numbers_that_span_the_range() -> None:
    assert ticks(0.29, 1.1, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    assert ticks(0, 3, 5, whole=True) == [0, 1, 2, 3]
    assert ticks(-3.0, 7.0, 5) == [-4, -2, 0, 2, 4, 6, 8]


def test_a_running_mean_steps_over_gaps() -> None:
    points = [(1, 2.0), (2, 4.0), (3, math.nan), (4, 9.0)]
    assert running_mean(points, 2) == [(1, 2.0), (2, 3.0), (3, 3.0), (4, 6.5)]


def test_texts_in_charts_are_escaped() -> None:
    chart = interval_chart([("<u>", [Bar("<b>", None, None, None, "<i>")])], title='"><script>')
    assert "&lt;u&gt;" in chart and "&lt;b&gt;" in chart and "&lt;i&gt;" in chart
    assert 'aria-label="&quot;&gt;&lt;script&gt;"' in chart


def test_an_interval_is_drawn_where_its_rate_lies() -> None:
    chart = interval_chart([("", [Bar("a", 0.5, 0.25, 1.0, "")])], title="", reference=(0.5, "chance"))
    assert 'cx="190.0"' in chart and '<line class="line c0" x1="147.0"' in chart and 'x2="276.0"' in chart
    assert '<line class="ref" x1="190.0"' in chart and ">chance</text>" in chart


def test_a_band_is_as_high_as_its_spread() -> None:
    chart = line_chart([Series("a", [(0, 1.0), (1, 1.0)], [1.0, 1.0])], title="", x_label="")
    assert 'points="48.0,24.0 348.0,24.0 348.0,178.0 48.0,178.0"' in chart


def test_values_that_are_no_numbers_become_gaps() -> None:
    rows = [{"step": 1, "a": 2}, {"step": 2, "a": None}, {"step": 3}, {"a": 4}, {"step": 5, "a": True}]
    assert repr(curves.points(rows, "step", "a")) == "[(1.0, 2.0), (2.0, nan), (5.0, nan)]"


def test_numbers_have_as_many_digits_as_their_interval_supports() -> None:
    def written(value: float, low: float, high: float) -> str:
        return plain(wording.rate(Rate(n=9, count=1, rate=value, low=low, high=high)))

    assert written(0.8234, 0.76, 0.87) == "82 % [76, 87]"
    assert written(0.0041, 0.0, 0.0182) == "0.4 % [0.0, 1.8]"
    assert plain(wording.mean(Mean(n=9, mean=1.234, low=1.1, high=1.36))) == "1.23 [1.10, 1.36]"
    assert plain(wording.mean(Mean(n=9, mean=51.4, low=40.2, high=62.1))) == "51 [40, 62]"
    assert plain(wording.mean(Mean(n=9, mean=0.0, low=0.0, high=0.0))) == "0 [0, 0]"


def test_a_difference_has_a_sign_and_is_in_points() -> None:
    def written(value: float, low: float, high: float) -> str:
        part = {"policy": "p", "against": "q", "metric": "refusal", "tag": "t", "n": 9}
        return plain(wording.points(Difference(**part, difference=value, low=low, high=high)))

    assert written(0.68, 0.6, 0.76) == "+68 [60, 76]"
    assert written(0.0, -0.003, 0.003) == "0.0 [\u22120.3, 0.3]"
    assert written(-0.3, -0.4, -0.2) == "\u221230 [\u221240, \u221220]"


def test_a_difference_of_means_has_a_sign_and_the_digits_that_its_interval_supports() -> None:
    part = {"policy": "ppo", "against": "sft", "metric": "score", "tag": "all", "n": 9}
    changes = [(0.163, -0.12, 0.45), (-2.0, -2.5, -1.5), (0.5, None, None), (None, None, None), (0.0, 0.0, 0.0)]
    assert [
        plain(wording.change(Difference(**part, difference=value, low=low, high=high))) for value, low, high in changes
    ] == ["+0.16 [\u22120.12, 0.45]", "\u22122.0 [\u22122.5, \u22121.5]", "+0.50", "\u2013", "0.00 [0.00, 0.00]"]
    assert wording.change(None) == "\u2013"


def test_an_interval_that_touches_zero_shows_no_difference() -> None:
    assert [wording.shown(*pair) for pair in ((0.0, 0.1), (-0.1, 0.0), (-0.1, 0.1))] == [False] * 3
    assert wording.shown(0.01, 0.1) is True and wording.shown(-0.2, -0.1) is True
    assert wording.shown(0.5, 0.7, 0.5) is False and wording.shown(None, 0.1) is None


def test_numbers_times_and_counts_read_naturally() -> None:
    values = (0.0, 1234.6, 0.00012, -2.5e-7, 3e5, None, math.inf, math.nan)
    written = [wording.number(value) for value in values]
    assert written == ["0", "1,235", "1.2e\u22124", "\u22122.5e\u22127", "3e5", "\u2013", "\u2013", "\u2013"]
    times = [wording.duration(value) for value in (0.42, 59.4, 200, 7503, None)]
    assert times == ["0.4 s", "59 s", "3 min 20 s", "2 h 05 min", "\u2013"]
    counts = {"kept_rows": 1200, "unused": {"a b": 3}, "none": {}, "rate": 0.51234}
    assert wording.counts(counts) == "kept rows 1,200 \u00b7 unused (a b 3) \u00b7 rate 0.512"
