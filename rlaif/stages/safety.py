"""Safety labels beside the preference: which of two answers is the safer one, and whether each of them is safe.

Helpfulness and harmlessness are judged apart, each under principles of its own (`label.helpful_tags`,
`label.harmless_tags`), because a single order of both mixes two things that pull against each other: the two orders and
the signs of Dai et al. 2023 (arXiv 2310.12773, section 3.1). The order is asked as the preference is. A sign comes from
the question whether an answer is safe by a principle, its two options in both orders, whose logits are averaged, so
that neither the place nor the letter of an option counts. An answer is as safe as the principle says that it keeps
least: one that is broken is enough.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlaif.constitution import Constitution, Principle, tagged
from rlaif.documents import fingerprint
from rlaif.engines.engine import Question
from rlaif.errors import ConstitutionError
from rlaif.human.pairs import AGAINST_SIGNS, against_signs
from rlaif.maths import agreement
from rlaif.prompting import load_template
from rlaif.records import Comparison, text_of
from rlaif.requests import OPTIONS, fence_of
from rlaif.sections import READS_OPTIONS
from rlaif.stages.candidates import Candidate, Unused, principles_of
from rlaif.stages.judge import read_orders
from rlaif.stages.rating import gathered
from rlaif.stages.run import Run
from rlaif.stages.verdicts import ORDERS, Judge, Opinion
from rlaif.stages.votes import Ballot, Panel, Vote, cast, count

WEAK = "too weak for a sign"
NOT_HELPFUL = "no helpful principle applies"


class Answer(NamedTuple):
    """One answer to ask about."""

    prompt_id: str
    prompt: str
    text: str
    principles: tuple[Principle, ...]

    @property
    def id(self) -> str:
        """A name that pairs with the same answer share, so that it is asked about once."""
        return f"{self.prompt_id}/safe-{fingerprint([self.text, [p.id for p in self.principles]])[:8]}"


def parts(run: Run) -> dict[str, list[str]]:
    """Return the ids of the principles of both parts, where the recipe wants them apart.

    Raises:
        ConstitutionError: a part has no principles.
    """
    label = run.recipe.label
    if not label.safety:
        return {}
    tags = {"helpful": label.helpful_tags, "harmless": label.harmless_tags}
    return {name: [p.id for p in tagged(run.constitution, named).principles] for name, named in tags.items()}


def under(run: Run, part: Constitution, candidates: Sequence[Candidate]) -> list[Candidate | None]:
    """Return candidates under the principles of one part; None where none of these applies."""
    categories = {prompt.id: prompt.category for prompt in run.prompts}
    found: list[Candidate | None] = []
    for one in candidates:
        try:
            drawn = principles_of(run, one.prompt_id, one.tag, categories.get(one.prompt_id, ""), part)
        except ConstitutionError:
            found.append(None)
        else:
            found.append(one._replace(principles=drawn))
    return found


def helpful(run: Run, candidates: Sequence[Candidate], unused: Unused) -> list[Candidate]:
    """Return candidates under helpful principles, setting those aside that none applies to."""
    placed = under(run, tagged(run.constitution, run.recipe.label.helpful_tags), candidates)
    unused += [
        {"id": one.prompt_id, "reason": NOT_HELPFUL, "texts": [one.first, one.second]}
        for one, found in zip(candidates, placed, strict=True)
        if found is None
    ]
    return [one for one in placed if one is not None]


def add_safety(run: Run, panel: Panel, labelled: Sequence[tuple[Candidate, Comparison]]) -> dict[str, Any]:
    """Put the safety order and the signs into labelled rows; return what was found.

    A pair that no harmless principle applies to gets neither, and is counted.
    """
    part = tagged(run.constitution, run.recipe.label.harmless_tags)
    placed = under(run, part, [one for one, _ in labelled])
    asked = [(one, row) for one, (_, row) in zip(placed, labelled, strict=True) if one is not None]
    orders = cast(panel, [one._replace(id=f"{one.id}/safer") for one, _ in asked], "safety comparisons")
    signs = ask_signs(panel, [answer for one, row in asked for answer in _answers(one, row)], "safety of answers")
    least = run.recipe.label.min_strength
    for index, ((one, row), order) in enumerate(zip(asked, orders, strict=True)):
        turned = text_of(row.chosen) != one.first
        if order.preference is not None:
            row.safer = 1 - order.preference if turned else order.preference
        first = "rejected" if turned else "chosen"
        row.votes += [vote | {"first": first, "about": "safer"} for vote in order.rows()]
        chosen, rejected = signs[2 * index : 2 * index + 2]
        row.chosen_safe, row.rejected_safe = _sign(chosen, least), _sign(rejected, least)
        row.votes += [vote | {"about": "chosen_safe"} for vote in chosen.rows()]
        row.votes += [vote | {"about": "rejected_safe"} for vote in rejected.rows()]
        if against_signs(row):
            row.flags.append(AGAINST_SIGNS)
    found = _found([row for _, row in asked], orders, signs, least)
    return found | {"without_principle": len(labelled) - len(asked), "tests": measure_signs(run, panel, part)}


def _answers(one: Candidate, row: Comparison) -> list[Answer]:
    return [Answer(one.prompt_id, one.asked, text_of(side), one.principles) for side in (row.chosen, row.rejected)]


def ask_signs(panel: Panel, answers: Sequence[Answer], title: str) -> list[Ballot]:
    """Ask the judges whose probabilities can be read about each answer; a ballot's preference is P(it is safe)."""
    once = {answer.id: answer for answer in answers}
    groups = {
        key: [answer.principles] if panel.together else [(principle,) for principle in answer.principles]
        for key, answer in once.items()
    }
    asked = [(key, group) for key in once for group in groups[key]]
    votes: dict[str, list[Vote]] = {key: [] for key in once}
    for who in panel.judges:
        if who.settings.method not in READS_OPTIONS:
            continue
        opinions = _opinions(who, [(once[key], group) for key, group in asked], title)
        for (key, group), opinion in zip(asked, opinions, strict=True):
            votes[key].append(Vote(who.settings, group, opinion))
    ballots = {key: _worst(cast_on) for key, cast_on in votes.items()}
    return [ballots[answer.id] for answer in answers]


def _opinions(who: Judge, asked: Sequence[tuple[Answer, tuple[Principle, ...]]], title: str) -> list[Opinion]:
    """Ask one judge, with the options in both orders; an opinion's preference is P(safe)."""
    template = load_template("safe")
    questions = [
        Question(
            item_id=f"{answer.id}@{'+'.join(p.id for p in group)}~{who.settings.name}/{order}",
            messages=[
                {
                    "role": "user",
                    "content": template.render(
                        prompt=answer.prompt,
                        response=answer.text,
                        principle=gathered(group).text,
                        order=order,
                        fence=fence_of(answer.prompt, answer.text, gathered(group).text),
                    ),
                }
            ],
            options=OPTIONS,
        )
        for answer, group in asked
        for order in ORDERS
    ]
    answers = who.ask(questions, title)
    return [read_orders(who, answers[index : index + 2]) for index in range(0, len(answers), 2)]


def _worst(votes: list[Vote]) -> Ballot:
    """Add up the votes under each principle, and take the principle that says the least for the answer."""
    by_principle: dict[tuple[str, ...], list[Vote]] = {}
    for vote in votes:
        by_principle.setdefault(tuple(p.id for p in vote.principles), []).append(vote)
    counted = [count(group) for group in by_principle.values()]
    known = [(ballot.strength, ballot.preference) for ballot in counted if ballot.strength is not None]
    strength, preference = min(known, default=(None, None))
    return Ballot(votes, preference, strength)


def _sign(ballot: Ballot, least: float) -> bool | None:
    return None if ballot.strength is None or abs(ballot.strength) <= least else ballot.strength > 0


def _found(
    rows: Sequence[Comparison], orders: Sequence[Ballot], signs: Sequence[Ballot], least: float
) -> dict[str, Any]:
    """Describe the safety labels: how many, what is missing and why, and how they go together."""
    told = [row for row in rows if row.safer is not None and row.safer != 0.5]
    same = sum(row.safer > 0.5 for row in told if row.safer is not None)
    both = [_sign(ballot, least) for ballot in signs]
    missing = Counter(ballot.reason or WEAK for ballot, sign in zip(signs, both, strict=True) if sign is None)
    return {
        "pairs": len(rows),
        "orders": sum(ballot.preference is not None for ballot in orders),
        "without_order": dict(Counter(ballot.reason for ballot in orders if ballot.preference is None)),
        "same_order": agreement.wilson(same, len(told))._asdict() if told else None,
        "safe": both.count(True),
        "unsafe": both.count(False),
        "without_sign": dict(missing),
        "against_signs": sum(AGAINST_SIGNS in row.flags for row in rows),
    }


def measure_signs(run: Run, panel: Panel, part: Constitution) -> dict[str, Any] | None:
    """Ask about the answers of the constitution's tests of harmless principles: the better is safe, the worse not."""
    known = {p.id: p for p in part.principles}
    tests = [test for test in run.constitution.tests if test.principle in known]
    if not tests:
        return None
    asked = [
        Answer(f"sign-test-{index}", test.prompt, text, (known[str(test.principle)],))
        for index, test in enumerate(tests)
        for text in (test.better, test.worse)
    ]
    ballots = ask_signs(panel, asked, "safety of the answers of the constitution's tests")
    signs = [_sign(ballot, 0.0) for ballot in ballots]
    right = [sign is (index % 2 == 0) for index, sign in enumerate(signs)]
    return agreement.wilson(sum(right), len(right))._asdict() | {"called_safe": signs.count(True)}
