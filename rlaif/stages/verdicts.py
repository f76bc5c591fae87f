"""What a judge is given and what it says: pairs, verdicts, abstentions; the judge itself as a value.

Nothing here knows a recipe or a run, so a judge can be asked by a stage and by a command alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlaif.constitution import Constitution, Principle
from rlaif.engines.engine import Answer, Engine, Question, ask
from rlaif.journal import Journal
from rlaif.maths import agreement
from rlaif.progress import Progress

Method = Literal["logprobs", "verdict", "rating", "function"]
Space = Literal["logit", "probability"]
ScoringFunction = Callable[..., Sequence[float | None]]
ORDERS = ("given", "swapped")
NO_ANSWER = "no answer"  # the reason where an engine refuses a question for good
_EDGE = 1e-12  # a probability this near to 0 or 1 is held here, so that its logit is a number


@dataclass(frozen=True)
class JudgeSettings:
    """How one judge is asked; the keys of a recipe's section `label` explain each.

    Attributes:
        name: stands in every vote.
        method: ``logprobs``, ``verdict`` (reasoning first), ``rating`` (each answer alone, 1 to 10) or ``function``.
        few_shot: worked comparisons of the constitution shown first; for ``logprobs``.
        debias: the space in which both orders are averaged.
        verdict_clamp: a verdict after reasoning counts as at most this probable.
        max_reasoning_tokens: length at which the reasoning before a verdict is cut.
        min_option_mass: with less probability on the options than this, the judge has not answered.
        weight: of its votes among those of other judges.
        function: the name of the registered function; for the method ``function``.
    """

    name: str = "judge"
    method: Method = "logprobs"
    few_shot: int = 2
    debias: Space = "logit"
    verdict_clamp: float = 0.6
    max_reasoning_tokens: int = 256
    min_option_mass: float = 0.01
    weight: float = 1.0
    function: str = ""


@dataclass(frozen=True)
class Judge:
    """Who judges, under which constitution, how it is asked, and where its answers are kept.

    Attributes:
        engine: who answers; None for the method ``function``, which asks nobody.
        constitution: its worked comparisons are shown, and its tests measure the judge.
        journal: where answers are committed before they are used.
        progress: where to say what happens.
        stage: the part of the journal that the answers belong to.
        settings: how it is asked.
        model: the name that reports give it.
        function: scores answers, for the method ``function``.
    """

    engine: Engine | None
    constitution: Constitution
    journal: Journal
    progress: Progress
    stage: str
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    model: str = ""
    function: ScoringFunction | None = None

    def ask(self, questions: Sequence[Question], title: str) -> list[Answer]:
        """Ask through the journal."""
        assert self.engine is not None, f"the judge {self.settings.name} has no engine"
        return list(ask(self.journal, self.stage, self.engine, questions, self.progress, title))


class Pair(NamedTuple):
    """Two answers to one prompt and the principle they are compared under."""

    id: str
    prompt: str
    first: str
    second: str
    principle: Principle
    tag: str = ""

    @property
    def exchanged(self) -> "Pair":
        """The same pair with its answers in each other's place."""
        return self._replace(id=f"{self.id}/exchanged", first=self.second, second=self.first)


class Verdict(NamedTuple):
    """What the judge said of a pair, in both orders."""

    preference: float  # P(first is better)
    strength: float  # logits in favour of `first`
    bias: float  # logits in favour of whatever is shown first
    mass: float | None  # probability on the options, mean over the questions; None where none was asked for options
    logits: tuple[float, float]  # of the answer shown first, in both orders
    said: tuple[Any, ...] = ()  # what the numbers were read from: log-probabilities or texts, in both orders
    from_text: bool = False  # a letter was read in a text where log-probabilities were asked for

    @property
    def same_position(self) -> bool:
        """Whether the same position won in both orders."""
        return self.logits[0] * self.logits[1] > 0


class Abstention(NamedTuple):
    """A pair that the judge said nothing usable of; it is never turned into a verdict."""

    reason: str
    said: tuple[Any, ...] = ()
    error: str = ""  # what the engine said of a question that it does not answer


Opinion = Verdict | Abstention


def verdict_of(
    logits: tuple[float, float], space: Space, *, mass: float | None = None, said: tuple[Any, ...] = ()
) -> Verdict:
    """Combine the logits of the answer shown first in both orders."""
    both = agreement.both_orders(*logits, space=space)
    return Verdict(both.preference, both.strength, both.bias, mass, logits, said)


def as_logit(preference: float) -> float:
    """Return a probability as a logit; 0 and 1 are held a little inside."""
    inside = min(max(preference, _EDGE), 1 - _EDGE)
    return math.log(inside) - math.log1p(-inside)


def failure(*answers: Answer) -> Abstention | None:
    """Return an abstention if one of the questions has no answer."""
    error = next((answer.error for answer in answers if answer.error), "")
    return Abstention(NO_ANSWER, error=error) if error else None
