"""The judge that reasons first: it weighs both answers in writing, then gives a verdict, which is read from its text.

The last verdict in the text counts, because reasoning may quote one from an answer. One that cannot be read leaves the
pair unscored; no default stands in for it. A model that has argued itself into a side is more certain than it is right
(Bai et al. 2022, arXiv 2212.08073, section 4.1), so a verdict counts as a probability of `verdict_clamp` at most.
"""

import math
import re
from collections.abc import Sequence

from rlaif.engines.engine import Answer, Question
from rlaif.prompting import load_template
from rlaif.stages.judge import request
from rlaif.stages.verdicts import ORDERS, Abstention, Judge, Opinion, Pair, failure, verdict_of

_MARK = re.compile(r"verdict[\s*_]*:", re.IGNORECASE)
_CHOICE = re.compile(r"[\s*_\"'(\[]*(?:[Aa]nswer\s+)?(A|B|(?i:tie))(?![\w'’])(?!\s*(?:/|\||,|and\b|or\b))")
SIDES = {"A": 1.0, "B": -1.0, "TIE": 0.0}


def by_verdict(who: Judge, pairs: Sequence[Pair], title: str) -> list[Opinion]:
    """Ask for reasoning and a verdict in both orders, without sampling: the most probable words."""
    template = load_template("weigh")
    questions = [
        Question(
            item_id=f"{pair.id}/weigh-{order}",
            messages=[request(template, pair, swapped=order == "swapped")],
            max_new_tokens=who.settings.max_reasoning_tokens,
            temperature=0.0,
        )
        for pair in pairs
        for order in ORDERS
    ]
    answers = who.ask(questions, title)
    return [_read(who, answers[index : index + 2]) for index in range(0, len(answers), 2)]


def _read(who: Judge, answers: Sequence[Answer]) -> Opinion:
    failed = failure(*answers)
    if failed:
        return failed
    said = tuple(answer.text for answer in answers)
    sides = [read_verdict(text) for text in said]
    if sides[0] is None or sides[1] is None:
        cut = any(side is None and not answer.ended for side, answer in zip(sides, answers, strict=True))
        return Abstention("reasoning cut off before a verdict" if cut else "unreadable verdict", said)
    clamp = who.settings.verdict_clamp
    size = math.log(clamp) - math.log1p(-clamp)
    return verdict_of((sides[0] * size, sides[1] * size), who.settings.debias, said=said)


def read_verdict(text: str) -> float | None:
    """Return 1 for A, -1 for B, 0 for a tie, from the last verdict of a text; None where that cannot be read."""
    marks = list(_MARK.finditer(text))
    choice = _CHOICE.match(text[marks[-1].end() :].partition("\n\n")[0]) if marks else None
    return SIDES[choice[1].upper()] if choice else None
