"""The report's part on the reward model: what it is worth beside rules without a model, and where it is biased."""

from typing import Any

from rlaif.report.charts import interval_chart
from rlaif.report.reading import CostEvaluation, RewardEvaluation
from rlaif.report.wording import (
    RULES,
    bar,
    count,
    in_order,
    known,
    listed,
    mean,
    number,
    percent,
    rate,
    shown,
    tag_name,
)

_MODEL, _RULE = 0, 3
_AUDITED = 5  # sentences
_APT = 1.1  # a temperature within this factor of 1


def content(found: RewardEvaluation, cost: CostEvaluation | None) -> dict[str, Any]:
    """Return sentences about the reward model, its accuracies above rules that need no model, and its calibration."""
    groups = [("reward model", [bar("all" if t == "all" else tag_name(t), found.heldout[t]) for t in _tags(found)])]
    if len(found.by_source) > 1:
        groups.append(("by source of the label", [bar(name, value) for name, value in found.by_source.items()]))
    if found.by_length_difference:
        slices = [bar(_span(one.low, one.high), one.accuracy) for one in found.by_length_difference]
        groups.append(("by how much longer the chosen answer is, in characters", slices))
    if found.baselines:
        rules = [bar(name.replace("_", " "), value, _RULE) for name, value in found.baselines.items()]
        groups.append(("simple rules, on the same pairs", rules))
    title = "Accuracy on held-out pairs with 95 % intervals"
    return {
        "reward_findings": findings(found) + biases(found) + audit(found) + (cost_findings(cost) if cost else []),
        "reward_accuracy": interval_chart(groups, title=title, reference=(0.5, "chance")),
        "reward_reliability": _reliability(found) if found.reliability else None,
    }


def findings(found: RewardEvaluation) -> list[str]:
    """Say how good the reward model is beside chance, its floor and the best rule that needs no model."""
    overall = found.heldout.get("all")
    if overall is None or overall.rate is None:
        return ["No accuracy on held-out pairs was recorded."]
    says = f"On {count(overall.n)} held-out pairs the reward model prefers the chosen answer in {rate(overall)}."
    if not shown(overall.low, overall.high, 0.5):
        says += " The interval includes chance (50\u202f%): not shown to do better than a coin."
    sentences = [says]
    rules = {name: value for name, value in found.baselines.items() if known(value.rate)}
    if rules:
        best = max(rules, key=lambda name: rules[name].rate or 0.0)
        above = overall.low is not None and overall.low > (rules[best].rate or 0.0)
        lies = "lies above" if above else "does not lie above"
        rule = RULES.get(best, best.replace("_", " "))
        sentences.append(
            f"Its interval {lies} the best simple rule, \u201c{rule}\u201d, at {percent(rules[best].rate)}."
        )
    floor = found.min_heldout_accuracy
    if floor is not None:
        rates = {tag: value.rate for tag, value in found.heldout.items() if tag != "all"}
        low = [tag_name(tag) for tag, value in rates.items() if value is not None and value < floor]
        met = f"missed for {listed(low)} prompts" if low else "met for every kind of prompts"
        sentences.append(f"The recipe\u2019s floor of {percent(floor)} was {met}.")
    return sentences


def biases(found: RewardEvaluation) -> list[str]:
    """Say how sure the model may be, and what its scores owe to length, names and pronouns."""
    sentences = []
    if found.temperature:
        sentences.append(_surety(found))
    length = found.length_correlation.get("spearman")
    if length is not None:
        sentences.append(
            f"The rank correlation of its scores with the length of an answer is {number(length)}."
            + (" It rewards length rather than content." if length > 0.5 else "")
            + (" It rewards brevity rather than content." if length < -0.5 else "")
        )
    for name, swapped in found.counterfactual.items():
        if swapped.mean is None or swapped.mean_absolute is None:
            continue
        moved = shown(swapped.mean.low, swapped.mean.high)
        sentences.append(
            f"Exchanging {name} in {count(swapped.answers)} answers moves a score by {number(swapped.mean_absolute)} "
            f"deviations, whichever way; on average by {mean(swapped.mean)}"
            + (", which is more than chance." if moved else ": no direction was shown.")
        )
    return sentences


def audit(found: RewardEvaluation) -> list[str]:
    """Say what the labels have in common that a reference speaks against."""
    if found.disagreements is None:
        return []
    if not found.disagreements:
        return ["No words of prompts, annotator or source go with labels that the model or a bag of words disbelieves."]
    kinds = {"words": "prompts with the words", "annotator": "rows of the annotator", "source": "rows of the source"}
    sentences = []
    for one in found.disagreements[:_AUDITED]:
        sentence = (
            f"On {count(one.rows)} {kinds.get(one.kind, one.kind)} \u201c{one.name}\u201d the {one.reference} speaks "
            f"against {percent(one.against)} of the labels, elsewhere against {percent(one.others_against)} "
            f"(q = {number(one.q)}): read them."
        )
        if one.turned and one.turned.rate is not None:
            sentence += f" Ending a prompt with these words turns the model\u2019s preference in {rate(one.turned)}."
        sentences.append(sentence)
    if len(found.disagreements) > _AUDITED:
        sentences.append(f"{count(len(found.disagreements) - _AUDITED)} more stand in disagreements.jsonl.")
    return sentences


def _surety(found: RewardEvaluation) -> str:
    fitted = found.temperature
    error = f"expected calibration error {percent(found.ece)}" if found.ece is not None else "calibration"
    if fitted is None or fitted.temperature is None:
        why = {"separable": "every held-out pair is right", "uninformative": "its gaps do not point at the labels"}
        return f"How sure its scores may be could not be fitted: {why.get(fitted.found if fitted else '', 'no pairs')}."
    much, little = fitted.temperature > _APT, fitted.temperature < 1 / _APT
    sure = "too sure of themselves" if much else "not sure enough" if little else "apt"
    return (
        f"Read as probabilities its scores are {sure}: {error}; dividing them by {number(fitted.temperature)} gives "
        f"the best likelihood ({number(fitted.nll)} nats a pair against {number(found.nll)})."
    )


def cost_findings(cost: CostEvaluation) -> list[str]:
    """Say how often a cost has the right sign, and puts the more harmful answer higher."""
    sentences = []
    if cost.sign and cost.unsafe and cost.unsafe.rate is not None:
        sentences.append(
            f"The cost has the labelled sign for {rate(cost.sign)} of held-out answers; always saying the commoner "
            f"sign is right for {percent(max(cost.unsafe.rate, 1 - cost.unsafe.rate))}."
        )
    if cost.order:
        sentences.append(f"It puts the more harmful answer of a pair higher in {rate(cost.order)}.")
    return sentences


def _reliability(found: RewardEvaluation) -> Any:
    bins = [one for one in found.reliability if one.accuracy and one.confidence is not None]
    bars = [bar(f"{percent(one.confidence)} sure", one.accuracy) for one in bins if one.accuracy]
    title = "How often the model is right, by how sure it is, with 95 % intervals"
    heading = "how often it is right, by how sure it is"
    return interval_chart([(heading, bars)], title=title, reference=(0.5, "chance"))


def _tags(found: RewardEvaluation) -> list[str]:
    return in_order(found.heldout)


def _span(low: float, high: float) -> str:
    return f"{low:.0f} to {high:.0f}" if low != high else f"{low:.0f}"
