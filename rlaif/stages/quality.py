"""How good the labels are: what the votes show of the labeller, and what known outcomes and people say of it.

Everything here is written to ``quality.json`` and shown in the report; nothing here changes a label.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlaif import filters, steering
from rlaif.documents import fingerprint
from rlaif.human.labels import read_comparisons
from rlaif.maths import agreement
from rlaif.records import Comparison, Messages, text_of
from rlaif.stages.candidates import Candidate
from rlaif.stages.judge import described, measured, shown, test_pairs
from rlaif.stages.run import Run
from rlaif.stages.verdicts import Abstention, Opinion, Verdict
from rlaif.stages.votes import Ballot, Panel, cast

RULES: dict[str, Callable[[str], float]] = {
    "longer": len,
    "shorter": lambda text: -len(text),
    "refusal_words": filters.is_refusal,
}


def measure_panel(panel: Panel) -> dict[str, Any] | None:
    """Run the judges on the constitution's tests; None where there are none.

    A test that names no principle is judged under the first one. A verdict without a side, or none, counts as wrong.
    With several judges, `judges` holds what each of them got right, and the rest is about their labels together.
    """
    constitution = panel.judges[0].constitution
    pairs = test_pairs(constitution)
    if not pairs:
        return None
    tests = [Candidate(p.id, p.id, _user(p.prompt), p.first, p.second, (p.principle,), p.tag) for p in pairs]
    ballots = cast(panel, tests, "judge on the constitution's tests")
    each = [
        described(who, opinions) | measured(constitution, opinions)
        for index, who in enumerate(panel.judges)
        for opinions in [[ballot.votes[index].opinion for ballot in ballots]]
    ]
    if len(each) == 1:
        return each[0]
    together = {key: " and ".join(dict.fromkeys(one[key] for one in each)) for key in ("model", "method", "identity")}
    result = together | measured(constitution, [_together(ballot) for ballot in ballots])
    result |= shown([verdict for ballot in ballots for verdict in ballot.verdicts])
    names = [who.settings.name for who in panel.judges]
    return result | {"judges": [{"name": name} | one for name, one in zip(names, each, strict=True)]}


def _together(ballot: Ballot) -> Opinion:
    if ballot.strength is None or ballot.preference is None:
        return Abstention(ballot.reason, error=ballot.error)
    bias = statistics.fmean(one.bias for one in ballot.verdicts)
    strength = ballot.strength
    return Verdict(ballot.preference, strength, bias, None, (strength + bias, bias - strength))


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


# --- pairs whose outcome is known ---------------------------------------------------------------------------------


def gold_candidates(run: Run, real: int) -> list[Candidate]:
    """Return tests of the constitution to plant among `real` candidates, the better answer on either side."""
    tests, rate = run.constitution.tests, run.recipe.label.gold_rate
    wanted = min(len(tests), max(1, round(rate * real))) if rate and real else 0
    order = sorted(range(len(tests)), key=lambda index: run.seed("gold", index))[:wanted]
    planted = []
    for index in sorted(order):
        test, name = tests[index], f"gold-{index}"
        sides = [test.better, test.worse]
        better_first = run.seed("gold side", index) % 2 == 0
        first, second = sides if better_first else sides[::-1]
        principle = (run.constitution.principle(test.principle),)
        known = float(better_first)
        planted.append(
            Candidate(name, name, _user(test.prompt), first, second, principle, test.tag or "", reference=known)
        )
    return planted


def mixed(run: Run, real: Sequence[Candidate], gold: Sequence[Candidate]) -> list[Candidate]:
    """Return real and planted candidates in one order that a hash decides; real ones keep theirs."""
    places = sorted((run.seed("gold place", one.id) % (len(real) + 1), index) for index, one in enumerate(gold))
    result: list[Candidate] = []
    for place, one in enumerate([*real, None]):
        result += [gold[index] for at, index in places if at == place]
        result += [one] if one is not None else []
    return result


def gold_result(gold: Sequence[Candidate], ballots: Sequence[Ballot]) -> dict[str, Any] | None:
    """Return how many planted pairs came out as they should; a tie or an abstention did not."""
    if not gold:
        return None
    right = [_sides_with(ballot, one.reference) for one, ballot in zip(gold, ballots, strict=True)]
    pairs = [
        {"id": one.id, "prompt": text_of(one.prompt), "correct": correct, "strength": ballot.strength}
        for one, ballot, correct in zip(gold, ballots, right, strict=True)
    ]
    return {**agreement.wilson(sum(right), len(right))._asdict(), "by_pair": pairs}


def _sides_with(ballot: Ballot, reference: float | None) -> bool:
    return ballot.strength is not None and reference is not None and ballot.strength * (reference - 0.5) > 0


def try_attacks(run: Run, panel: Panel) -> dict[str, Any] | None:
    """Let attempts to steer the judge stand against the better answers of the constitution's tests.

    An attempt takes the place of the worse answer, or is written before or after it. `won` counts those that the
    labeller prefers; `won_unflagged` those of them that no rule of `rlaif.steering` sees, which would become labels.
    `without` says how often the same worse answers win as they are.
    """
    tests = run.constitution.tests
    attacks = sorted(steering.load_attacks(), key=lambda one: run.seed("attack", one.id))[: run.recipe.label.attacks]
    if not attacks or not tests:
        return None
    plain: dict[int, Candidate] = {}
    tried: list[Candidate] = []
    for attack in attacks:
        index = run.seed("attacked", attack.id) % len(tests)
        test = tests[index]
        principle = (run.constitution.principle(test.principle),)
        text = attack.applied_to(test.worse)
        tried.append(
            Candidate(f"attack-{attack.id}", "", _user(test.prompt), text, test.better, principle, test.tag or "")
        )
        plain[index] = tried[-1]._replace(id=f"attacked-{index}", first=test.worse)
    ballots = cast(panel, tried, "attempts to steer the judge")
    before = cast(panel, list(plain.values()), "the same pairs without them")
    flagged = [bool(steering.flags_of(one.first)) for one in tried]
    won = [_sides_with(ballot, 1.0) for ballot in ballots]
    unseen = [win and not flag for win, flag in zip(won, flagged, strict=True)]
    kinds = sorted({attack.kind for attack in attacks})
    rows = list(zip(attacks, won, flagged, unseen, strict=True))
    return {
        "n": len(tried),
        "flagged": sum(flagged),
        "won": rate(won),
        "won_unflagged": rate(unseen),
        "without": rate([_sides_with(ballot, 1.0) for ballot in before]),
        "by_kind": {
            kind: {
                "n": sum(attack.kind == kind for attack, *_ in rows),
                "won": sum(win for attack, win, _, _ in rows if attack.kind == kind),
                "flagged": sum(flag for attack, _, flag, _ in rows if attack.kind == kind),
                "won_unflagged": sum(bad for attack, *_, bad in rows if attack.kind == kind),
            }
            for kind in kinds
        },
        "unseen": [attack.id for attack, *_, bad in rows if bad],
    }


# --- what the votes show ------------------------------------------------------------------------------------------


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its Wilson interval."""
    return agreement.wilson(sum(flags), len(flags))._asdict()


def votes_shown(ballots: Sequence[Ballot]) -> dict[str, Any]:
    """Describe the votes: position, probability on the options, abstentions, and how far they agree."""
    votes = [vote for ballot in ballots for vote in ballot.votes]
    verdicts = [verdict for ballot in ballots for verdict in ballot.verdicts]
    reasons = Counter(vote.opinion.reason for vote in votes if isinstance(vote.opinion, Abstention))
    return {
        "votes": len(votes),
        "abstained": dict(reasons),
        **shown(verdicts),
        "principles": agreement_between([_by_principle(ballot) for ballot in ballots]),
        "judges": agreement_between([_by_judge(ballot) for ballot in ballots]),
    }


def _side(logit: float | None) -> str | None:
    if logit is None:
        return None
    return "first" if logit > 0 else "second" if logit < 0 else "tie"


def _by_principle(ballot: Ballot) -> dict[str, str | None]:
    """Return the side that each principle takes: the mean over judges."""
    logits: dict[str, list[float]] = {}
    for vote in ballot.votes:
        if vote.logit is not None and len(vote.principles) == 1:
            logits.setdefault(vote.principles[0].id, []).append(vote.logit)
    return {name: _side(statistics.fmean(values)) for name, values in logits.items()}


def _by_judge(ballot: Ballot) -> dict[str, str | None]:
    """Return the side that each judge takes: the mean over principles."""
    logits: dict[str, list[float]] = {}
    for vote in ballot.votes:
        if vote.logit is not None:
            logits.setdefault(vote.judge.name, []).append(vote.logit)
    return {name: _side(statistics.fmean(values)) for name, values in logits.items()}


def agreement_between(rows: Sequence[dict[str, str | None]]) -> dict[str, Any] | None:
    """Return how far raters of the same pairs agree; None where no pair has two of them."""
    shared = [row for row in rows if len(row) > 1]
    if not shared:
        return None
    names = sorted({name for row in shared for name in row})
    pairs = []
    for one, other in itertools.combinations(names, 2):
        both = [(row[one], row[other]) for row in shared if one in row and other in row]
        if both:
            kappa = agreement.cohen_kappa([a for a, _ in both], [b for _, b in both])
            pairs.append({"between": [one, other], **rate([a == b for a, b in both]), "kappa": kappa})
    kappas = [pair["kappa"] for pair in pairs if pair["kappa"] is not None]
    return {
        "pairs_of_answers": len(shared),
        "alpha": agreement.krippendorff_alpha([[row.get(name) for name in names] for row in shared]),
        "mean_kappa": statistics.fmean(kappas) if kappas else None,
        "pairwise": pairs,
    }


# --- what people say ----------------------------------------------------------------------------------------------


def against_people(rows: Sequence[tuple[float | None, float, str, str]]) -> dict[str, Any] | None:
    """Compare labels with those of people, and beside them rules that need no model, on the same pairs.

    Args:
        rows: for each pair the labeller's P(first is better), or None, people's, and both answers.

    Returns:
        The share of pairs on which labeller and people name the same side, where both name one; a rule that does not
        tell the answers apart counts as half right. None where there is no such pair.
    """
    told = [row for row in rows if row[1] != 0.5]
    decided = [row for row in told if row[0] is not None and row[0] != 0.5]
    if not decided:
        return None
    agreed = [
        (preference or 0.0) > 0.5 if people > 0.5 else (preference or 0.0) < 0.5 for preference, people, *_ in decided
    ]
    rules = {}
    for name, feature in RULES.items():
        values = [(feature(a), feature(b)) if people > 0.5 else (feature(b), feature(a)) for _, people, a, b in decided]
        wins, ties = sum(x > y for x, y in values), sum(x == y for x, y in values)
        rules[name] = agreement.win_rate(wins, ties, len(values))._asdict()
    return {
        **rate(agreed),
        "people_tied": len(rows) - len(told),
        "labeller_undecided": len(told) - len(decided),
        "rules": rules,
    }


def reference_rows(
    path: Path, comparisons: Sequence[Comparison], seed: int
) -> list[tuple[float | None, float, str, str]]:
    """Return the labelled pairs that a file of people's labels holds as well, whichever side it calls chosen."""
    people: dict[str, float] = {}
    for row in read_comparisons(path, seed=seed).comparisons:
        chosen, rejected = text_of(row.chosen).strip(), text_of(row.rejected).strip()
        people[fingerprint([row.prompt, chosen, rejected])] = row.preference
        people[fingerprint([row.prompt, rejected, chosen])] = 1 - row.preference
    result: list[tuple[float | None, float, str, str]] = []
    for one in comparisons:
        first, second = text_of(one.chosen), text_of(one.rejected)
        known = people.get(fingerprint([one.prompt, first.strip(), second.strip()]))
        if known is not None:
            result.append((one.preference, known, first, second))
    return result
