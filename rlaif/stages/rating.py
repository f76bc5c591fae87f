"""Judges that see one answer at a time: a rating from 1 to 10, or a registered function; and the rating as a reward.

The rating is the expected value over the probabilities of the ten numbers (d-RLAIF in Lee et al. 2023, arXiv
2309.00267, section 2.3), so it is no whole number and has no position. Between two answers, the difference of their
ratings, or of a function's scores, is taken as the logit of a preference.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rlaif.constitution import Principle
from rlaif.engines.engine import Answer, Question
from rlaif.maths import agreement
from rlaif.prompting import load_template
from rlaif.requests import fence_of
from rlaif.stages.rewards import call_where_it_applies
from rlaif.stages.verdicts import Abstention, Judge, Opinion, Pair, failure, verdict_of

NUMBERS = tuple(map(str, range(1, 11)))


class Rating(NamedTuple):
    """One answer rated alone."""

    expected: float  # 1 to 10
    mass: float  # probability on the ten numbers
    logprobs: list[float]


def by_rating(who: Judge, pairs: Sequence[Pair], title: str) -> list[Opinion]:
    """Rate both answers of each pair, each without the other."""
    rated = rate(
        who,
        [
            (f"{pair.id}/rate-{side}", pair.prompt, text, pair.principle)
            for pair in pairs
            for side, text in (("first", pair.first), ("second", pair.second))
        ],
        title,
    )
    opinions: list[Opinion] = []
    for one, other in zip(rated[::2], rated[1::2], strict=True):
        if isinstance(one, Abstention) or isinstance(other, Abstention):
            opinions.append(one if isinstance(one, Abstention) else other)  # type: ignore[arg-type]
            continue
        gap = one.expected - other.expected
        mass = statistics.fmean((one.mass, other.mass))
        said = (one.logprobs, other.logprobs)
        opinions.append(verdict_of((gap, -gap), who.settings.debias, mass=mass, said=said))
    return opinions


def rate(who: Judge, items: Sequence[tuple[str, str, str, Principle]], title: str) -> list[Rating | Abstention]:
    """Rate answers under principles; an item is an id, a prompt, an answer and a principle."""
    return [_read(who, answer) for answer in who.ask([question(*item) for item in items], title)]


def question(identifier: str, prompt: str, response: str, principle: Principle) -> Question:
    """Return what a judge is asked about one answer."""
    text = load_template("rate").render(
        prompt=prompt,
        response=response,
        principle=principle.text,
        fence=fence_of(prompt, response, principle.text),
    )
    return Question(item_id=identifier, messages=[{"role": "user", "content": text}], options=NUMBERS)


def _read(who: Judge, answer: Answer) -> Rating | Abstention:
    failed = failure(answer)
    if failed:
        return failed
    expected, mass = agreement.expected_rating(answer.logprobs)
    if expected is None or mass < who.settings.min_option_mass:
        return Abstention("too little probability on the options", (list(answer.logprobs),))
    return Rating(expected, mass, list(answer.logprobs))


def by_function(who: Judge, pairs: Sequence[Pair], title: str) -> list[Opinion]:
    """Score both answers of each pair with a function; where it gives no score, there is no verdict."""
    assert who.function is not None, f"the judge {who.settings.name} has no function"
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    answers = [text for pair in pairs for text in (pair.first, pair.second)]
    tags, names = [pair.tag for pair in pairs for _ in range(2)], [pair.id for pair in pairs for _ in range(2)]
    scores = call_where_it_applies(who.settings.function, who.function, prompts, answers, tag=tags, id=names)
    opinions: list[Opinion] = []
    for one, other in zip(scores[::2], scores[1::2], strict=True):
        if one is None or other is None:
            opinions.append(Abstention("the function gave no score", (one, other)))
        else:
            opinions.append(verdict_of((one - other, other - one), who.settings.debias, said=(one, other)))
    return opinions


def gathered(principles: Sequence[Principle]) -> Principle:
    """Return several principles as one, for a single request under all of them."""
    if len(principles) == 1:
        return principles[0]
    listed = "\n".join(f"- {principle.text}" for principle in principles)
    question = load_template("gather").render(principles=listed)
    return Principle(id="together", title="All that apply", text=f"\n{listed}", comparison=question)
