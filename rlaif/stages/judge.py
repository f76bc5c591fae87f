"""The judge: which of two answers is better under a principle, from the log-probabilities of the option letters.

Every pair is shown in both orders. With ``s`` for strength and ``b`` for position bias, the judge's logit for the
answer shown first is ``s + b`` in one order and ``-s + b`` in the other; averaging removes ``b`` (Lee et al. 2023,
arXiv 2309.00267, section 2.2, who average probabilities; averaging logits recovers ``s`` exactly).

`judge` asks a `Judge`: an engine, a constitution, a journal, and how to ask. `measured` describes what was said of the
constitution's tests.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rlaif import requests
from rlaif.constitution import Constitution
from rlaif.documents import canonical_json
from rlaif.engines.engine import Answer, Question
from rlaif.maths import agreement
from rlaif.prompting import Template, load_template
from rlaif.records import Message, Messages
from rlaif.requests import OPTIONS
from rlaif.stages.verdicts import (
    ORDERS,
    Abstention,
    Judge,
    Opinion,
    Pair,
    Verdict,
    failure,
    verdict_of,
)


def by_logprobs(who: Judge, pairs: Sequence[Pair], title: str) -> list[Opinion]:
    """Read the verdict from the log-probabilities of the two letters."""
    template = load_template("compare")
    examples = worked_comparisons(who, template)
    questions = [
        Question(
            item_id=f"{pair.id}/{order}",
            messages=[*examples, request(template, pair, swapped=order == "swapped")],
            options=OPTIONS,
        )
        for pair in pairs
        for order in ORDERS
    ]
    answers = who.ask(questions, title)
    return [read_orders(who, answers[index : index + 2]) for index in range(0, len(answers), 2)]


def read_orders(who: Judge, answers: Sequence[Answer]) -> Opinion:
    """Return what the letters say of the first option in both orders together, or why they say nothing."""
    failed = failure(*answers)
    if failed:
        return failed
    given, swapped = (answer.logprobs for answer in answers)
    said = (list(given), list(swapped))
    if not all(map(math.isfinite, (*given, *swapped))):
        return Abstention("an option has no probability", said)
    masses = [math.fsum(map(math.exp, row)) for row in (given, swapped)]
    if min(masses) < who.settings.min_option_mass:
        return Abstention("too little probability on the options", said)
    logits = (given[0] - given[1], swapped[0] - swapped[1])
    if any(answer.method == "verdict" for answer in answers):
        return verdict_of(logits, who.settings.debias, said=said)._replace(from_text=True)
    return verdict_of(logits, who.settings.debias, mass=statistics.fmean(masses), said=said)


def worked_comparisons(who: Judge, template: Template) -> Messages:
    """Return the constitution's worked comparisons as turns, as many as this judge is shown."""
    return requests.worked_comparisons(who.constitution, template, who.settings.few_shot)


def request(template: Template, pair: Pair, *, swapped: bool = False) -> Message:
    """Return the request to compare a pair, in one of its orders."""
    first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    return requests.comparison_request(template, pair.principle, prompt=pair.prompt, first=first, second=second)


def judge(who: Judge, pairs: Sequence[Pair], title: str) -> list[Opinion]:
    """Ask a judge about pairs, by its method; those that show both answers at once show them in both orders."""
    from rlaif.stages.rating import by_function, by_rating
    from rlaif.stages.reasoning import by_verdict

    ways = {"logprobs": by_logprobs, "verdict": by_verdict, "rating": by_rating, "function": by_function}
    return ways[who.settings.method](who, pairs, title) if pairs else []


def described(who: Judge, opinions: Sequence[Opinion]) -> dict[str, Any]:
    """Return who judges, and how: with letters that were read in texts, the method is ``verdict``."""
    identity = canonical_json(who.engine.identity) if who.engine else who.settings.function
    read = any(isinstance(one, Verdict) and one.from_text for one in opinions)
    return {"model": who.model, "method": "verdict" if read else who.settings.method, "identity": identity}


def test_pairs(constitution: Constitution) -> list[Pair]:
    """Return the constitution's tests as pairs whose first answer is the better one."""
    return [
        Pair(f"test-{i}", test.prompt, test.better, test.worse, constitution.principle(test.principle), test.tag or "")
        for i, test in enumerate(constitution.tests)
    ]


def measured(constitution: Constitution, opinions: Sequence[Opinion]) -> dict[str, Any]:
    """Describe what was said of each test of the constitution."""
    verdicts = [one for one in opinions if isinstance(one, Verdict)]
    right = [isinstance(one, Verdict) and one.strength > 0 for one in opinions]
    return {
        "tests": {
            **agreement.wilson(sum(right), len(right))._asdict(),
            "correct": sum(right),
            "interval": "Wilson 95 %",
        },
        "abstained": len(opinions) - len(verdicts),
        "failed": sum(isinstance(one, Abstention) and bool(one.error) for one in opinions),
        **shown(verdicts),
        "by_test": [
            {
                "prompt": test.prompt,
                "better": test.better,
                "worse": test.worse,
                "principle": test.principle,
                "strength": one.strength if isinstance(one, Verdict) else None,
                "bias": one.bias if isinstance(one, Verdict) else None,
                "correct": correct,
                "abstained": one.reason if isinstance(one, Abstention) else None,
            }
            for test, one, correct in zip(constitution.tests, opinions, right, strict=True)
        ],
    }


def shown(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what verdicts show of a judge whether or not they are right: position, bias, strength, option mass."""
    masses = [one.mass for one in verdicts if one.mass is not None]
    return {
        **positions(verdicts),
        "mean_abs_bias": statistics.fmean(abs(one.bias) for one in verdicts) if verdicts else None,
        "median_abs_strength": statistics.median(abs(one.strength) for one in verdicts) if verdicts else None,
        "option_mass": {"mean": statistics.fmean(masses), "min": min(masses)} if masses else None,
    }


def positions(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return how often the same position won in both orders, and which one it mostly was."""
    same = [verdict for verdict in verdicts if verdict.same_position]
    first = sum(verdict.logits[0] > 0 for verdict in same)
    return {
        "same_position": agreement.wilson(len(same), len(verdicts))._asdict() if verdicts else None,
        "same_position_choice": None if not same else "first" if 2 * first >= len(same) else "second",
    }
