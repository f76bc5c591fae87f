"""What goes wrong in a run of PPO: rules over the figures of its updates, and what to do about each.

`findings` is a pure function of the rows of ``metrics.jsonl``, so a resumed run and the report find what the run found.
Figures of single updates are noisy: but for `constant_score` a rule reads means over `window` updates.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field

from rlaif.sections import Fraction, Positive, PositiveFloat, Section

Kind = Literal[
    "constant_score",
    "score_drop",
    "score_spread",
    "kl_to_reference",
    "kl_to_old",
    "entropy",
    "response_tokens",
    "ended_drop",
    "value_loss",
    "overoptimization",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCORE, SPREAD = "rollout/score", "rollout/score_std"
INDEPENDENT, INDEPENDENT_SPREAD = "rollout/independent_score", "rollout/independent_score_std"
_CONSTANT = 1e-6  # deviations; scores that differ by rounding alone


class HealthSection(Section):
    """When a run of PPO warns or stops; a limit of null is not looked at."""

    window: Positive = Field(5, description="updates that figures are averaged over before they are judged")
    score_drop: PositiveFloat | None = Field(
        1.0, description="how far the score may fall below its best, in deviations"
    )
    score_spread: Fraction | None = Field(0.1, description="least deviation of the scores, as a share of the first one")
    kl_to_reference: PositiveFloat | None = Field(50.0, description="nats per response")
    kl_to_old: PositiveFloat | None = Field(0.2, description="nats per token, moved in one update")
    entropy: Fraction | None = Field(0.2, description="least entropy, as a share of the first update's")
    response_tokens: PositiveFloat | None = Field(2.0, description="greatest length, as a multiple of the first one")
    ended_drop: Fraction | None = Field(
        0.5, description="how far the share of ended responses may fall below the first"
    )
    value_loss: PositiveFloat | None = Field(10.0, description="as a multiple of the first update's")
    overoptimization: PositiveFloat | None = Field(
        0.5, description="how far the independent score may fall below its best while the score rises, in deviations"
    )
    stop: list[Kind] = Field(["constant_score"], description="what stops the run; all else warns")


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        kind: which rule found it; for all but `constant_score` also the key of its limit in `ppo.health`.
        update: the number of the first update at which it holds.
        key: the metric.
        value: what it was.
        expected: what it should have been, in words.
        advice: what to do, with keys of the recipe.
    """

    kind: Kind
    update: int
    key: str
    value: float
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"update {self.update}: {self.key} is {self.value:.3g}; {self.expected}. {self.advice}"


Rows = Sequence[dict[str, Any]]
Found = tuple[int, str, float, str] | None  # place of the row, metric, value, what is expected


def findings(rows: Rows, limits: HealthSection) -> list[Finding]:
    """Return the first finding of each kind, in the order of updates.

    Args:
        rows: of ``metrics.jsonl``, from the first update on.
        limits: the recipe's `ppo.health`.
    """
    result = []
    for kind in KINDS:
        wanted = kind == "constant_score" or getattr(limits, kind) is not None
        found = _RULES[kind](rows, limits) if wanted and rows else None
        if found:
            place, key, value, expected = found
            result.append(Finding(kind, rows[place]["update"], key, value, expected, ADVICE[kind]))
    return sorted(result, key=lambda one: one.update)


def window_means(rows: Rows, key: str, window: int) -> list[tuple[int, float]]:
    """Return the means over `window` rows in turn that hold a figure, each with the place of the last of them."""
    places = [place for place, row in enumerate(rows) if key in row]
    sums = [0.0, *accumulate(rows[place][key] for place in places)]
    return [(places[end - 1], (sums[end] - sums[end - window]) / window) for end in range(window, len(sums))]


def _constant(rows: Rows, limits: HealthSection) -> Found:
    value = rows[0].get(SPREAD, 1.0)
    return (0, SPREAD, value, "scores that differ are expected") if value <= _CONSTANT else None


def _drop(key: str) -> Callable[[Rows, HealthSection], Found]:
    """Return a rule for a mean that falls too far below the best one before."""

    def rule(rows: Rows, limits: HealthSection) -> Found:
        assert limits.score_drop
        best = -float("inf")
        for place, mean in window_means(rows, key, limits.window):
            best = max(best, mean)
            if best - mean > limits.score_drop:
                return place, key, mean, _of(limits, f"it was {best:.3g}, and at least {best - limits.score_drop:.3g}")
        return None

    return rule


def _level(kind: Kind, key: str, unit: str = "", *, least: bool = False, relative: bool = False) -> Any:
    """Return a rule for a mean beyond a limit.

    Args:
        kind: the key of the limit.
        key: the metric.
        unit: of both, for the message.
        least: the limit is the least allowed instead of the greatest.
        relative: the limit is a multiple of the first update's figure, where that is above 0.
    """

    def rule(rows: Rows, limits: HealthSection) -> Found:
        first = next((row[key] for row in rows if key in row), 0.0) if relative else 1.0
        limit = getattr(limits, kind) * first
        for place, mean in window_means(rows, key, limits.window) if first > 0 else ():
            if mean < limit if least else mean > limit:
                of_first = f", {getattr(limits, kind):g} times the first update's," if relative else ""
                bound = f"{'at least' if least else 'at most'} {limit:.3g}{unit}{of_first}"
                return place, key, mean, _of(limits, bound)
        return None

    return rule


def _ended(rows: Rows, limits: HealthSection) -> Found:
    key = "rollout/ended"
    assert limits.ended_drop is not None
    least = rows[0].get(key, 0.0) - limits.ended_drop
    for place, mean in window_means(rows, key, limits.window):
        if mean < least:
            return place, key, mean, _of(limits, f"it began at {rows[0][key]:.3g}, and at least {least:.3g}")
    return None


def _overoptimization(rows: Rows, limits: HealthSection) -> Found:
    assert limits.overoptimization
    scores = dict(window_means(rows, SCORE, limits.window))
    best, score_then = -float("inf"), 0.0
    for place, mean in window_means(rows, INDEPENDENT, limits.window):
        score = scores.get(place, 0.0)
        if mean > best:
            best, score_then = mean, score
        elif best - mean > limits.overoptimization and score > score_then:
            told = f"it was {best:.3g}, and the score has risen from {score_then:.3g} to {score:.3g} since. At least"
            return place, INDEPENDENT, mean, _of(limits, f"{told} {best - limits.overoptimization:.3g}")
    return None


def _of(limits: HealthSection, bound: str) -> str:
    return f"{bound} is expected over {limits.window} updates"


_RULES: dict[Kind, Callable[[Rows, HealthSection], Found]] = {
    "constant_score": _constant,
    "score_drop": _drop(SCORE),
    "score_spread": _level("score_spread", SPREAD, least=True, relative=True),
    "kl_to_reference": _level("kl_to_reference", "rollout/kl_to_reference", " nats a response"),
    "kl_to_old": _level("kl_to_old", "policy/kl_to_old", " nats a token"),
    "entropy": _level("entropy", "policy/entropy", " nats", least=True, relative=True),
    "response_tokens": _level("response_tokens", "rollout/response_tokens", " tokens", relative=True),
    "ended_drop": _ended,
    "value_loss": _level("value_loss", "value/loss", relative=True),
    "overoptimization": _overoptimization,
}

ADVICE: dict[Kind, str] = {
    "constant_score": "All responses of the first rollout have the same score, so there is nothing to learn: look at "
    "the responses in samples.jsonl and at what scores them. If the score is rare by nature, raise ppo.rollout_batch",
    "score_drop": "The reward collapsed: lower ppo.learning_rate or ppo.num_ppo_epochs, or set ppo.target_kl",
    "score_spread": "The reward is saturated and no longer tells responses apart: end with fewer ppo.updates, raise "
    "ppo.kl_coef, or train the reward model on responses of this policy",
    "kl_to_reference": "The policy is far from the reference: raise ppo.kl_coef or set ppo.kl_target, lower "
    "ppo.learning_rate, and read samples.jsonl for a shortcut",
    "kl_to_old": "Steps are too large: lower ppo.learning_rate or ppo.num_ppo_epochs, or set ppo.target_kl",
    "entropy": "Responses become alike: raise ppo.kl_coef or ppo.entropy_coef, or lower ppo.learning_rate",
    "response_tokens": "The policy may be paid for length: add a part with `length` to ppo.rewards, and look at "
    "length_correlation in the reward model's calibration.json",
    "ended_drop": "Responses run into the limit: set ppo.missing_eos_penalty, or raise ppo.sampling.max_new_tokens",
    "value_loss": "The critic diverges: lower ppo.learning_rate or ppo.cliprange_value, or set ppo.score_clip",
    "overoptimization": "What the reward gains, the independent score loses: end with fewer ppo.updates, raise "
    "ppo.kl_coef, or use an ensemble (ppo.reward_model.ensemble)",
}
