"""The judge: which of two answers is better under a principle, from the log-probabilities of the option letters.

Every pair is shown in both orders. With ``s`` for strength and ``b`` for position bias, the judge's logit for the
answer shown first is ``s + b`` in one order and ``-s + b`` in the other; averaging removes ``b`` (Lee et al. 2023,
arXiv 2309.00267, section 2.2, who average probabilities; averaging logits recovers ``s`` exactly).
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rlaif import requests
from rlaif.constitution import Constitution, Principle
from rlaif.documents import canonical_json
from rlaif.engines.engine import Answer, Engine, Question, ask
from rlaif.journal import Journal
from rlaif.maths import agreement
from rlaif.progress import Progress
from rlaif.prompting import Template
from rlaif.recipe import Recipe
from rlaif.records import Message, Messages
from rlaif.requests import OPTIONS
from rlaif.stages.run import templates


class Bench(Protocol):
    """What a judge is given: a `Run` is one, and so is `rlaif.judging.Setting` outside of a run."""

    @property
    def recipe(self) -> Recipe:
        """Its section `label` says how many worked comparisons are shown and how both orders are combined."""
        ...

    @property
    def constitution(self) -> Constitution:
        """Where principles, worked comparisons and tests come from."""
        ...

    @property
    def journal(self) -> Journal:
        """Where answers are kept."""
        ...

    @property
    def progress(self) -> Progress:
        """Who is told."""
        ...

    def model_of(self, name: str) -> str:
        """Return the name of an engine's model."""
        ...


class Pair(NamedTuple):
    """Two answers to one prompt and the principle they are compared under."""

    id: str
    prompt: str
    first: str
    second: str
    principle: Principle


class Verdict(NamedTuple):
    """What the judge said of a pair, in both orders."""

    preference: float  # P(first is better)
    strength: float  # logits in favour of `first`
    bias: float  # logits in favour of whatever is shown first
    mass: float  # probability on the two option letters, mean over both orders
    logits: tuple[float, float]  # of the answer shown first, in both orders
    method: str = "logprobs"  # or ``verdict``: the letters were read in written texts
    error: str = ""  # why there is no verdict; its numbers then say nothing

    @property
    def same_position(self) -> bool:
        """Whether the same position won in both orders."""
        return self.logits[0] * self.logits[1] > 0


def judge(run: Bench, stage: str, engine: Engine, pairs: Sequence[Pair], title: str) -> list[Verdict]:
    """Ask for each pair in both orders."""
    template = templates("compare")["compare"]
    shown = worked_comparisons(run, template)
    questions = [
        Question(
            item_id=f"{pair.id}/{order}",
            messages=[*shown, _request(template, pair, swapped=order == "swapped")],
            options=OPTIONS,
        )
        for pair in pairs
        for order in ("given", "swapped")
    ]
    answers = list(ask(run.journal, stage, engine, questions, run.progress, title))
    return [
        _verdict(answers[index], answers[index + 1], run.recipe.label.debias) for index in range(0, len(answers), 2)
    ]


def worked_comparisons(run: Bench, template: Template) -> Messages:
    """Return the constitution's worked comparisons as turns, as many as the recipe shows to the judge."""
    return requests.worked_comparisons(run.constitution, template, run.recipe.label.few_shot)


def _request(template: Template, pair: Pair, *, swapped: bool = False) -> Message:
    first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    return requests.comparison_request(template, pair.principle, prompt=pair.prompt, first=first, second=second)


def _verdict(first: Answer, second: Answer, space: str) -> Verdict:
    if first.error or second.error:
        return Verdict(0.5, 0.0, 0.0, 0.0, (0.0, 0.0), error=first.error or second.error)
    given, swapped = first.logprobs, second.logprobs
    logits = (given[0] - given[1], swapped[0] - swapped[1])
    both = agreement.both_orders(*logits, space="logit" if space == "logit" else "probability")
    mass = statistics.fmean(sum(map(math.exp, row)) for row in (given, swapped))
    method = "verdict" if "verdict" in (first.method, second.method) else "logprobs"
    return Verdict(both.preference, both.strength, both.bias, mass, logits, method)


def measure(run: Bench, stage: str, engine: Engine) -> dict[str, Any] | None:
    """Run the judge on the constitution's tests; None where there are none.

    A test that names no principle is judged under the first one. A verdict without a side counts as wrong.
    """
    tests = run.constitution.tests
    if not tests:
        return None
    pairs = [
        Pair(f"test-{index}", test.prompt, test.better, test.worse, run.constitution.principle(test.principle))
        for index, test in enumerate(tests)
    ]
    verdicts = judge(run, stage, engine, pairs, "judge on the constitution's tests")
    right = [verdict.strength > 0 for verdict in verdicts]
    given = [verdict for verdict in verdicts if not verdict.error] or verdicts
    measured = [verdict for verdict in given if verdict.method == "logprobs" and not verdict.error]
    return {
        "model": run.model_of(run.recipe.label.judge),
        "method": "verdict" if any(verdict.method == "verdict" for verdict in verdicts) else "logprobs",
        "failed": sum(bool(verdict.error) for verdict in verdicts),
        "identity": canonical_json(engine.identity),
        "tests": {
            **agreement.wilson(sum(right), len(right))._asdict(),
            "correct": sum(right),
            "interval": "Wilson 95 %",
        },
        **positions(verdicts),
        "mean_abs_bias": statistics.fmean(abs(verdict.bias) for verdict in given),
        "median_abs_strength": statistics.median(abs(verdict.strength) for verdict in given),
        "option_mass": {
            "mean": statistics.fmean(verdict.mass for verdict in measured),
            "min": min(verdict.mass for verdict in measured),
        }
        if measured
        else None,
        "by_test": [
            {
                "prompt": test.prompt,
                "better": test.better,
                "worse": test.worse,
                "principle": test.principle,
                "strength": verdict.strength,
                "bias": verdict.bias,
                "correct": verdict.strength > 0,
            }
            for test, verdict in zip(tests, verdicts, strict=True)
        ],
    }


def positions(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return how often the same position won in both orders, and which one it mostly was."""
    verdicts = [verdict for verdict in verdicts if not verdict.error]
    same = [verdict for verdict in verdicts if verdict.same_position]
    first = sum(verdict.logits[0] > 0 for verdict in same)
    return {
        "same_position": agreement.wilson(len(same), len(verdicts))._asdict() if verdicts else None,
        "same_position_choice": None if not same else "first" if 2 * first >= len(same) else "second",
    }
