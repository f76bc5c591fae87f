"""What the report says of the evaluation: refusals, scores, differences between policies, the judge's preference."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlaif.report import wording
from rlaif.report.charts import interval_chart
from rlaif.report.results import Difference, Results, WinRate

_SCORES = (
    ("score", "Reward score", wording.mean),
    ("independent_score", "Independent score", wording.mean),
    ("cost", "Cost", wording.mean),
    ("unsafe", "Judged unsafe", wording.rate),
)


class Column(NamedTuple):
    """One number of the evaluation in words, by policy and tag; `tags` are those without ``all``, in order."""

    title: str
    tags: list[str]
    cells: dict[str, dict[str, str]]


def content(results: Results) -> dict[str, Any]:
    """Return sentences, the chart of refusals, scores, and differences by pair of policies."""
    tags = wording.in_order({tag for one in results.metrics.values() for tag in one.refusal})
    groups = []
    for tag in tags:
        measured = [name for name in results.policies if tag in results.metrics[name].refusal]
        bars = [
            wording.bar(wording.policy_name(p), results.metrics[p].refusal[tag], _colour(results, p)) for p in measured
        ]
        groups.append((f"{wording.tag_name(tag)} prompts", bars))
    changes: dict[str, dict[str, Difference]] = {}
    shifts: dict[str, dict[str, Difference]] = {}
    for one in results.differences:
        pair = f"{wording.policy_name(one.policy)} against {wording.policy_name(one.against)}"
        found, key = (changes, one.tag) if one.metric == "refusal" else (shifts, one.metric)
        found.setdefault(pair, {})[key] = one
    columns = [_column(results, *one) for one in _SCORES]
    return {
        "findings": findings(results),
        "refusals": {
            "tags": tags,
            "chart": interval_chart(groups, title="Refusal rates with 95 % intervals"),
        },
        "changes": list(changes.items()),
        "shifts": list(shifts.items()),
        "shifted": [(key, title) for key, title, _ in _SCORES if any(key in by_key for by_key in shifts.values())],
        "scores": [column for column in columns if column.cells],
        "beside": [column for column in columns[1:] if column.cells],
        "has_cost": any(one.cost for one in results.metrics.values()),
    }


def findings(results: Results) -> list[str]:
    """Say in plain sentences what the evaluation showed: refusals first, then scores, then the judge's preference.

    The last policy is compared first. Every pair of policies has its sentences, but for scores, where a table has them
    all: there the last policy alone has.
    """
    refusals = [one for one in results.differences if one.metric == "refusal"]
    pairs = list(dict.fromkeys((one.policy, one.against) for one in refusals))
    rank = {policy: place for place, policy in enumerate(results.policies)}
    pairs.sort(key=lambda pair: (-rank.get(pair[0], -1), rank.get(pair[1], -1)))
    sentences = []
    for policy, against in pairs:
        of_pair = [one for one in refusals if (one.policy, one.against) == (policy, against)]
        sentences.append(_comparison(results, policy, against, of_pair))
    scores = [one for one in results.differences if (one.metric, one.policy) == ("score", results.policies[-1])]
    return sentences + [_shift(one) for one in scores] + [_preference(one) for one in results.win_rates]


def _column(results: Results, key: str, title: str, write: Callable[[Any], str]) -> Column:
    """Return a number of all policies; no cells where none of them has it."""
    found = {policy: getattr(results.metrics[policy], key) or {} for policy in results.policies}
    tags = wording.in_order({tag for by_tag in found.values() for tag in by_tag})
    cells = {policy: {tag: write(by_tag.get(tag)) for tag in ("all", *tags)} for policy, by_tag in found.items()}
    return Column(title, [tag for tag in tags if tag != "all"], cells if tags else {})


def _colour(results: Results, policy: str) -> int:
    """Return grey for the base model and a colour for each other policy."""
    others = [name for name in results.policies if name != "base"]
    return 3 if policy == "base" else others.index(policy) % 3


def _comparison(results: Results, policy: str, against: str, differences: Sequence[Difference]) -> str:
    """Say where one policy refuses more, fewer, or shows no difference."""
    changed: list[str] = []
    same: list[str] = []
    ordered = wording.in_order(one.tag for one in differences)
    for one in sorted(differences, key=lambda item: ordered.index(item.tag)):
        rates = [results.metrics[name].refusal.get(one.tag) for name in (policy, against) if name in results.metrics]
        known_rates = [wording.percent(value.rate) for value in rates if value is not None]
        against_words = f"{' against '.join(known_rates)}; " if len(known_rates) == 2 else ""
        detail = f"{wording.tag_name(one.tag)} prompts ({against_words}{wording.points(one)} points)"
        if not wording.shown(one.low, one.high):
            same.append(detail)
        else:
            changed.append(f"{'more' if (one.difference or 0) > 0 else 'fewer'} {detail}")
    name, other = _names(policy, against)
    words = []
    if changed:
        words.append(f"Compared with {other}, {name} refuses {wording.listed(changed)}.")
    if same:
        lead = "No difference shown on" if changed else f"Between {name} and {other}, no difference shown on"
        words.append(f"{lead} {wording.listed(same)}.")
    return " ".join(words)


def _names(*policies: str) -> list[str]:
    """Return the names of policies in sentences."""
    return [wording.POLICIES.get(policy, policy) for policy in policies]


def _shift(one: Difference) -> str:
    name, other = _names(one.policy, one.against)
    differs = wording.shown(one.low, one.high)
    unknown = "" if differs or differs is None else ": the interval includes zero, so no difference shown"
    return f"In reward score, {name} less {other} is {wording.change(one)}{unknown}."


def _preference(one: WinRate) -> str:
    name, other = _names(one.policy, one.against)
    pairs = f"{wording.count(one.n)} {'pair' if one.n == 1 else 'pairs'} of answers"
    says = f"Of {pairs}, the judge prefers {name}\u2019s to {other}\u2019s in {wording.rate(one)}"
    differs = wording.shown(one.low, one.high, 0.5)
    if differs is None:
        return says + "."
    return says + ("." if differs else ": the interval includes one half, so no preference shown.")
