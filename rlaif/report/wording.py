"""Numbers as readers expect them, and sentences made from numbers.

Digits follow the width of the interval: what the data cannot tell apart is not written. A sentence about a
difference whose interval includes zero says that no difference was shown.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlaif import health
from rlaif.health import HealthSection
from rlaif.report.charts import Bar, short
from rlaif.report.labels import Annotators, Mean, Quality, Rate, Safety
from rlaif.report.reading import Metrics
from rlaif.report.results import Difference, WinRate

NONE = "\u2013"
SHORT_POLICIES = {
    "base": "base",
    "sft": "SFT",
    "kept": "kept before",
    "ppo": "PPO",
    "dpo": "DPO",
    "rejection": "rejection sampling",
}
POLICIES = SHORT_POLICIES | {"base": "the base model", "kept": "the policy kept before"}
TAGS = {"lookalike": "look-alike"}
RULES = {
    "longer": "the longer one",
    "shorter": "the shorter one",
    "refusal_words": "the one that refuses",
    "bag_of_words": "a bag of words",
}
METHODS = {
    "judge": "the judge\u2019s choice between two answers",
    "revision": "the revisions: a revised answer beats the one before it, a plain answer a needless refusal",
    "contrast": "contrast: an answer written under the constitution beats one written without it",
    "human": "people",
}
_NAMED = 5  # annotators in a sentence
# Characters that a screen does not show or that reorder what it shows: controls but tab and line feed, marks
# of writing direction, separators, zero-width space and byte-order mark, and halves of surrogate pairs.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Replace control characters by their pictures (U+2400 and on), other hidden ones by their number."""
    return _HIDDEN.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def policy_name(policy: str) -> str:
    """Return the name of a policy for tables."""
    return SHORT_POLICIES.get(policy, policy)


def tag_name(tag: str) -> str:
    """Return the name of a kind of prompts."""
    return TAGS.get(tag, tag) or "untagged"


def in_order(tags: Iterable[str]) -> list[str]:
    """Sort tags: harmful, ordinary, look-alike, then others by name; ``all`` comes first."""
    first = ["all", "harmful", "ordinary", "lookalike"]
    return sorted(tags, key=lambda tag: (first.index(tag) if tag in first else len(first), tag))


def known(value: float | None) -> bool:
    """Tell whether a number is there and finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Write a number with three significant digits; a dash where there is none."""
    return short(value) if value is not None and math.isfinite(value) else NONE


def count(value: int) -> str:
    """Write a whole number with thousands separators."""
    return f"{value:,}"


def percent(value: float | None) -> str:
    """Write a fraction as whole percent."""
    return f"{value * 100:.0f}\u202f%" if value is not None and math.isfinite(value) else NONE


def rate(value: Rate | WinRate | None) -> str:
    """Write a rate and its interval in percent: ``82 % [76, 87]``."""
    if value is None or value.rate is None or not known(value.rate):
        return NONE
    if value.low is None or value.high is None or not (known(value.low) and known(value.high)):
        return percent(value.rate)
    digits = _digits((value.high - value.low) * 100)
    low, high = _fixed(value.low * 100, digits), _fixed(value.high * 100, digits)
    return f"{_fixed(value.rate * 100, digits)}\u202f%\u00a0[{low},\u00a0{high}]"


def bar(label: str, value: Rate, colour: int = 0) -> Bar:
    """Return a rate as a row of an interval chart."""
    return Bar(label, value.rate, value.low, value.high, rate(value), colour)


def mean(value: Mean | None) -> str:
    """Write a mean and its interval, with as many digits as the interval supports: ``1.23 [1.10, 1.36]``."""
    if value is None or value.mean is None or not known(value.mean):
        return NONE
    if value.low is None or value.high is None or not (known(value.low) and known(value.high)):
        return number(value.mean)
    width = value.high - value.low
    if width <= 0:
        return f"{number(value.mean)}\u00a0[{number(value.low)},\u00a0{number(value.high)}]"
    digits = _supported(width)
    low, high = _fixed(value.low, digits), _fixed(value.high, digits)
    return f"{_fixed(value.mean, digits)}\u00a0[{low},\u00a0{high}]"


def points(value: Difference) -> str:
    """Write a difference and its interval in percentage points: ``+68 [60, 76]``."""
    return _difference(value, 100, _digits)


def change(value: Difference | None) -> str:
    """Write a difference of means and its interval: ``+0.16 [-0.12, 0.45]``."""
    return NONE if value is None else _difference(value, 1, _supported)


def _difference(value: Difference, unit: int, digits_of: Callable[[float], int]) -> str:
    if value.difference is None or not known(value.difference):
        return NONE
    if value.low is None or value.high is None or not (known(value.low) and known(value.high)):
        return _signed(value.difference * unit, digits_of(abs(value.difference) * unit))
    digits = digits_of((value.high - value.low) * unit)
    low, high = _fixed(value.low * unit, digits), _fixed(value.high * unit, digits)
    return f"{_signed(value.difference * unit, digits)}\u00a0[{low},\u00a0{high}]"


def duration(seconds: float | None) -> str:
    """Write seconds as a reader would say them."""
    if seconds is None or not known(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def gib(value: float | None) -> str:
    """Write gibibytes with as many digits as matter."""
    return f"{value:.1f} GiB" if value is not None and math.isfinite(value) else NONE


def counts(values: dict[str, Any]) -> str:
    """Write the counts of a manifest in one line; a nested table goes into brackets."""
    parts = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
            if inner:
                parts.append(f"{key.replace('_', ' ')} ({inner})")
        else:
            parts.append(f"{key.replace('_', ' ')} {_plain(value)}")
    return " \u00b7 ".join(parts)


def shown(low: float | None, high: float | None, null: float = 0.0) -> bool | None:
    """Tell whether an interval excludes a value; None where there is no interval."""
    if low is None or high is None or not (known(low) and known(high)):
        return None
    return not low <= null <= high


def ppo_findings(rows: Metrics, settings: Any) -> list[str]:
    """Say what was wrong with the run of PPO, by the rules and limits of `ppo.health`, and what to do about it.

    Args:
        rows: of ``metrics.jsonl``.
        settings: the recipe's section `ppo`.
    """
    given = settings.get("health") if isinstance(settings, dict) else None
    limits = HealthSection(**{key: value for key, value in (given or {}).items() if key in HealthSection.model_fields})
    numbers = [{key: v for key, v in row.items() if isinstance(v, int | float) and math.isfinite(v)} for row in rows]
    found = health.findings([row for row in numbers if "update" in row], limits)
    if found:
        return [f"From {one}." for one in found]
    return [f"In {count(len(rows))} updates no limit of ppo.health was passed."]


def judge_findings(quality: Quality, *, people: bool = False) -> list[str]:
    """Say how good the judge is beside chance, how often place decided, and where the labels come from.

    Args:
        quality: what the label stage measured.
        people: whether the labels of people were added to those of the method.
    """
    source = METHODS.get(quality.labels.method, quality.labels.method)
    source += " \u2013 and from people" if people and quality.labels.method != "human" else ""
    if quality.judge is None:
        return [f"No judge was measured. The labels come from {source}."]
    tests, same = quality.judge.tests, quality.judge.same_position
    says = f"On the constitution\u2019s {count(tests.n)} tests the judge was right in {rate(tests)};"
    says += f" chance is {percent(0.5)}."
    if shown(tests.low, tests.high, 0.5):
        above = (tests.rate or 0.0) > 0.5
        says += f" The interval lies {'above' if above else 'below'} chance."
    else:
        says += " The interval includes chance: this judge is not shown to do better than a coin."
    if quality.min_judge_accuracy is not None and tests.rate is not None:
        met = "met" if tests.rate >= quality.min_judge_accuracy else "not met"
        says += f" The recipe\u2019s floor of {percent(quality.min_judge_accuracy)} was {met}."
    place = quality.judge.same_position_choice
    which = f", mostly the {place} one" if place else ""
    swapped = f"With the answers swapped, it named the same place again in {rate(same)} of the tests{which}."
    own = "come from" if quality.judge_labels else "do not come from this judge but from"
    return [says, swapped, f"The labels {own} {source}."]


def label_findings(quality: Quality) -> list[str]:
    """Say what known outcomes, steering attempts and people say of the labels; nothing where none of them was tried."""
    sentences = []
    if quality.gold is not None:
        sentences.append(
            f"Of {count(quality.gold.n)} pairs with a known outcome planted among the others, the labeller got "
            f"{rate(quality.gold)} right."
        )
    if quality.attacks is not None:
        tried = quality.attacks
        sentences.append(
            f"Of {count(tried.n)} answers that try to steer the judge, {rate(tried.won)} beat the better answer, "
            f"and {rate(tried.won_unflagged)} won without being flagged; the same answers as they are win in "
            f"{rate(tried.without)}."
        )
    found = quality.reference
    if found is not None and found.rules:
        best = max(found.rules, key=lambda name: found.rules[name].rate or 0.0)
        above = found.low is not None and found.low > (found.rules[best].rate or 0.0)
        sentences.append(
            f"On {count(found.n)} pairs that people labelled, labels agree with theirs in {rate(found)}. The interval "
            f"{'lies above' if above else 'does not lie above'} the best simple rule, \u201c{RULES[best]}\u201d, at "
            f"{percent(found.rules[best].rate)}."
        )
    if quality.safety is not None:
        sentences += _safety(quality.safety)
    if quality.annotators is not None:
        sentences += _annotators(quality.annotators)
    labels = quality.labels
    more = [f"{count(n)} {name}" for name, n in (("ratings", labels.ratings), ("rankings", labels.rankings)) if n]
    if more:
        sentences.append(f"People\u2019s files also hold {' and '.join(more)}.")
    if labels.contradictory:
        sentences.append(
            f"{count(labels.contradictory)} rows by people contradict another row of the same annotator about the same "
            "answers. All are kept, because nothing tells which one was meant."
        )
    return sentences


def _safety(found: Safety) -> list[str]:
    signs = found.safe + found.unsafe
    sentences = [
        f"Safety was judged apart on {count(found.pairs)} pairs. {count(found.safe)} of {count(signs)} answers with a "
        f"sign are called safe, and {count(sum(found.without_sign.values()))} have none. In {rate(found.same_order)} "
        "of the pairs the safer answer is the better one as well."
    ]
    if found.tests is not None:
        sentences.append(f"On the answers of the constitution\u2019s tests the sign is right in {rate(found.tests)}.")
    if found.without_principle:
        sentences.append(f"No harmless principle applies to {count(found.without_principle)} pairs.")
    return sentences


def _annotators(found: Annotators) -> list[str]:
    odd = [one.annotator for one in found.annotators if one.stands_out]
    about = f"Of {count(len(found.annotators))} annotators who share {count(found.shared)} pairs of answers"
    if not odd:
        return [f"{about}, none is shown to agree less with the others than they do."]
    named = f"{listed(odd[:_NAMED])}{' and others' if len(odd) > _NAMED else ''}"
    return [
        f"{about}, {named} {'agrees' if len(odd) == 1 else 'agree'} less with the others than they do: read their "
        "labels, or set reward.skill_weights, which lets a label count what its annotator is worth."
    ]


def listed(parts: Sequence[str]) -> str:
    """Join words with commas."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _digits(width: float) -> int:
    return 0 if width >= 5 else 1


def _supported(width: float) -> int:
    """Return how many digits after the point an interval of this width supports."""
    return max(0, 1 - math.floor(math.log10(width))) if width > 0 else 2


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "\u2212")


def _signed(value: float, digits: int) -> str:
    text = _fixed(value, digits)
    return text if text.startswith("\u2212") or float(text.replace(",", "")) == 0 else f"+{text}"


def _plain(value: Any) -> str:
    return count(value) if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)
