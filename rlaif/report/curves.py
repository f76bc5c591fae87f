"""The curves of the training stages: which metric each shows, and one line that says how to read it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlaif.report.charts import Point, Series, line_chart, running_mean
from rlaif.report.reading import Metrics

PART = "rollout/score/"  # followed by the part's name
SMOOTH_FROM = 20  # points; a shorter curve is drawn without a running mean


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and one line that says how to read it."""

    title: str
    chart: Markup
    note: str


@dataclass(frozen=True)
class Curve:
    """Which metric of PPO a chart shows; `spread` names the metric that is the half-height of its band.

    An `optional` one is left out where there are no values: not every PPO has a critic or a text.
    """

    key: str
    title: str
    note: str
    spread: str = ""
    percent: bool = False
    optional: bool = False


PPO_CURVES = (
    Curve(
        "rollout/score",
        "Score",
        "Mean score of the update\u2019s responses, before the KL term; the band is one standard deviation. "
        "It should rise and then level off.",
        spread="rollout/score_std",
    ),
    Curve(
        "constraint/lambda",
        "Lambda",
        "The price of the cost. It rises while the window\u2019s mean cost is above the threshold and falls while it "
        "is below; at its maximum, the threshold is out of reach.",
        optional=True,
    ),
    Curve(
        "rollout/kl_to_reference",
        "KL to the reference",
        "How far the policy has moved from the reference, in nats per response. "
        "Where the score rises together with a fast-growing KL, check the samples for a shortcut.",
    ),
    Curve(
        "policy/loss",
        "Policy loss",
        "The clipped surrogate. It hovers around zero by design; only jumps mean something.",
    ),
    Curve(
        "value/loss",
        "Value loss",
        "Squared error of the critic\u2019s predictions of the returns. It should fall, then stay low.",
        optional=True,
    ),
    Curve(
        "value/explained_variance",
        "Explained variance",
        "Share of the variance of the returns that the critic explains: 1 is all, 0 no more than a constant.",
        optional=True,
    ),
    Curve(
        "rollout/response_tokens",
        "Response length",
        "Mean tokens per response. A drift to the limit or to a few words is a sign of a shortcut.",
    ),
    Curve(
        "rollout/ended",
        "Responses that ended",
        "Share of responses that ended by themselves before the token limit.",
        percent=True,
    ),
    Curve(
        "policy/clip_fraction",
        "Clip fraction",
        "Share of tokens whose probability ratio left the clip range; there the gradient is cut off.",
        percent=True,
    ),
    Curve(
        "policy/kl_to_old",
        "Approximate KL within an update",
        "How far the optimizer steps of one update moved the policy, in nats per token. "
        "Large values mean steps that are too big.",
    ),
    Curve(
        "policy/entropy",
        "Entropy",
        "How open the choice of the next token is, in nats. Near zero, all responses become alike.",
    ),
    Curve(
        "ptx/loss",
        "Loss on plain text",
        "Mean negative log-likelihood of a token of the text learned beside, in nats. It should not rise.",
        optional=True,
    ),
    Curve(
        "ptx/heldout_loss",
        "Loss on held-out plain text",
        "The same on chunks that are not learned from: what it rises by is what the policy forgets of plain text.",
        optional=True,
    ),
)


def sft_figures(rows: Metrics) -> list[Figure]:
    """Draw the curves of supervised fine-tuning."""
    series = _smoothed(rows, "sft/loss")
    series.append(Series("held out", points(rows, "step", "sft/heldout_loss"), colour=1))
    rate = [Series("learning rate", points(rows, "step", "sft/learning_rate"))]
    return [
        _training(
            "Loss",
            series,
            "Mean negative log-likelihood of a token of the answer, in nats. "
            "A held-out loss that rises while the training loss falls means overfitting.",
        ),
        _training("Learning rate", rate, "As the recipe schedules it."),
    ]


def reward_figures(rows: Metrics) -> list[Figure]:
    """Draw the curves of the reward model's training."""
    return [
        _training(
            "Loss",
            _smoothed(rows, "reward/loss"),
            "Loss on training rows: of pairs that of Bradley and Terry, 0.693 (log 2) where a model cannot tell them "
            "apart; of ratings a squared error.",
        ),
        _training(
            "Accuracy on training pairs",
            _smoothed(rows, "reward/accuracy"),
            "Share of training pairs ranked as labelled. How good the model is, only held-out pairs can say.",
            percent=True,
        ),
        _training(
            "Margin",
            _smoothed(rows, "reward/margin"),
            "Mean score of the chosen answer minus that of the rejected one.",
        ),
    ]


def ppo_figures(rows: Metrics, beside: Sequence[Figure] = ()) -> list[Figure]:
    """Draw the curves of PPO, one point per update; `beside` come after that of the score."""
    figures = []
    for curve in PPO_CURVES:
        line = points(rows, "update", curve.key)
        if curve.optional and not line:
            continue
        by_update = dict(points(rows, "update", curve.spread))
        spread = [by_update.get(x, math.nan) for x, _ in line] if curve.spread else []
        series = [Series(curve.title, line, spread)]
        chart = line_chart(series, title=curve.title, x_label="update", percent=curve.percent)
        figures.append(Figure(curve.title, chart, curve.note))
    return [*figures[:1], *beside, *_part_figures(rows), *_cost_figures(rows), *figures[1:]]


def _part_figures(rows: Metrics) -> list[Figure]:
    """Draw the parts of a composite reward, where there are some, in one chart."""
    names = sorted({key.removeprefix(PART) for row in rows for key in row if key.startswith(PART)})
    lines = [Series(name, points(rows, "update", PART + name), colour=index % 4) for index, name in enumerate(names)]
    title = "Parts of the reward"
    note = (
        "Mean of each part over the update\u2019s responses: scores in standard deviations from the mean of the first "
        "update (logits with a gate), penalties in tokens or shares. A score that rises alone may be a shortcut."
    )
    return [Figure(title, line_chart(lines, title=title, x_label="update"), note)] if lines else []


def _cost_figures(rows: Metrics) -> list[Figure]:
    """Draw the cost against its threshold, where there is a constraint."""
    named = {
        "update": "rollout/cost",
        "mean of the window": "constraint/mean_cost",
        "threshold": "constraint/threshold",
    }
    lines = [Series(name, points(rows, "update", key), colour=index) for index, (name, key) in enumerate(named.items())]
    note = (
        "Mean cost of the update\u2019s responses, and of the latest ones over several updates, which moves lambda. "
        "It should settle at the threshold or stay below it."
    )
    return [Figure("Cost", line_chart(lines, title="Cost", x_label="update"), note)] if lines[0].points else []


def points(rows: Metrics, x: str, key: str) -> list[Point]:
    """Return (x, value) of the rows that hold both; a value that is no number becomes a gap (NaN)."""
    return [
        (float(row[x]), float(row[key]) if _is_number(row[key]) else math.nan)
        for row in rows
        if key in row and _is_number(row.get(x))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _smoothed(rows: Metrics, key: str) -> list[Series]:
    """Return the curve of single steps, behind its running mean where it is long enough to need one."""
    raw = points(rows, "step", key)
    if len(raw) < SMOOTH_FROM:
        return [Series("training", raw)]
    window = max(5, len(raw) // 20)
    return [
        Series(f"mean of {window} steps", running_mean(raw, window)),
        Series("single steps", raw, faint=True),
    ]


def _training(title: str, series: list[Series], note: str, percent: bool = False) -> Figure:
    return Figure(title, line_chart(series, title=title, x_label="optimizer step", percent=percent), note)
