"""From the votes of judges under principles to one label: who is asked, what each said, and what it adds up to.

A vote is one judge's word on one pair under one principle, in both orders. Its logit counts with the judge's weight;
the label is the mean over all votes, in logits. A judge that abstains is left out of the mean, and where all abstain
there is no label.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.special import expit

from rlaif.constitution import Principle
from rlaif.errors import StageError
from rlaif.recipe import LabelSection
from rlaif.sections import JudgeSection
from rlaif.stages.candidates import NAME, Candidate, Engines
from rlaif.stages.judge import judge
from rlaif.stages.rating import gathered
from rlaif.stages.rewards import find_function
from rlaif.stages.run import Run
from rlaif.stages.verdicts import (
    Abstention,
    Judge,
    JudgeSettings,
    Opinion,
    Pair,
    Verdict,
    as_logit,
)

SAID = {"logprobs": "logprobs", "verdict": "reasoning", "rating": "ratings", "function": "scores"}
"""What a vote calls that which its numbers were read from, by the judge's method; one entry for each order or side."""


class Vote(NamedTuple):
    """One judge's word on one candidate under one principle (or several in one request)."""

    judge: JudgeSettings
    principles: tuple[Principle, ...]
    opinion: Opinion

    @property
    def logit(self) -> float | None:
        """What the vote says for the first answer, in logits; None where the judge abstained."""
        if isinstance(self.opinion, Abstention):
            return None
        logits = self.judge.debias == "logit"
        return self.opinion.strength if logits else as_logit(self.opinion.preference)

    def row(self) -> dict[str, Any]:
        """Return the vote as it is stored."""
        one = self.opinion
        row: dict[str, Any] = {
            "annotator": self.judge.name,
            "method": "verdict" if isinstance(one, Verdict) and one.from_text else self.judge.method,
            "principle": self.principles[0].id if len(self.principles) == 1 else None,
            **({"principles": [p.id for p in self.principles]} if len(self.principles) > 1 else {}),
            "weight": self.judge.weight,
            "abstained": one.reason if isinstance(one, Abstention) else None,
        }
        for key in ("preference", "strength", "bias", "mass", "logits"):
            row[key] = getattr(one, key, None)
        return row | {SAID[self.judge.method]: list(one.said)}


class Ballot(NamedTuple):
    """All votes on one candidate, and what they add up to for its first answer; None where all abstained."""

    votes: list[Vote]
    preference: float | None
    strength: float | None

    @property
    def verdicts(self) -> list[Verdict]:
        """The votes that say something."""
        return [vote.opinion for vote in self.votes if isinstance(vote.opinion, Verdict)]

    @property
    def reason(self) -> str:
        """Why the judges abstained, the first of them."""
        return next((vote.opinion.reason for vote in self.votes if isinstance(vote.opinion, Abstention)), "")

    @property
    def error(self) -> str:
        """What an engine said of a question that it does not answer; empty where that is not why there is no label."""
        errors = (vote.opinion.error for vote in self.votes if isinstance(vote.opinion, Abstention))
        return next(filter(None, errors), "") if self.preference is None else ""

    def rows(self) -> list[dict[str, Any]]:
        """Return the votes as they are stored."""
        return [vote.row() for vote in self.votes]


class Panel(NamedTuple):
    """The judges, and whether all principles of a pair go into one request."""

    judges: list[Judge]
    together: bool

    @property
    def name(self) -> str:
        """The annotator that rows name."""
        return self.judges[0].settings.name if len(self.judges) == 1 else "panel"


def panel_of(run: Run, engines: Engines, stage: str = NAME) -> Panel:
    """Return the judges of a stage; their answers belong to its part of the journal."""
    judges = [_judge(run, engines, one, stage) for one in judges_of(run, stage)]
    return Panel(judges, run.recipe.label.principles == "together")


def judges_of(run: Run, stage: str) -> list[JudgeSection]:
    """Return the judges of a stage as the recipe has them; but for `evaluate`, which may name one, those of `label`."""
    label = run.recipe.label
    return run.recipe.evaluate.panel(label) if stage == "evaluate" else label.panel()


def _judge(run: Run, engines: Engines, section: JudgeSection, stage: str) -> Judge:
    label = run.recipe.label
    settings = settings_of(label, section)
    common = (run.constitution, run.journal, run.progress, stage, settings)
    if section.function:
        return Judge(None, *common, section.function, find_function(section.function, "label"))
    if section.adapter:
        model = f"{run.recipe.model.model_name_or_path} with {section.adapter}"
        return Judge(engines.named(section.adapter), *common, model)
    name = section.engine or label.judge
    return Judge(engines.judge(name, chooses=section.method != "verdict"), *common, run.model_of(name))


def asked(run: Run, stage: str = NAME) -> list[Any]:
    """Return what the answers of a stage's judges depend on besides the questions."""
    return [
        run.asked(one.engine or run.recipe.label.judge, chooses=one.method != "verdict")
        for one in judges_of(run, stage)
        if not one.function and not one.adapter
    ]


def settings_of(label: LabelSection, section: JudgeSection) -> JudgeSettings:
    """Return how a judge of a recipe is asked."""
    return JudgeSettings(
        name=section.name,
        method=section.method,
        few_shot=label.few_shot if section.few_shot is None else section.few_shot,
        debias=label.debias,
        verdict_clamp=label.verdict_clamp,
        max_reasoning_tokens=label.max_reasoning_tokens,
        min_option_mass=label.min_option_mass,
        weight=section.weight,
        function=section.function or "",
    )


def cast(panel: Panel, candidates: Sequence[Candidate], title: str) -> list[Ballot]:
    """Ask every judge about every candidate, under each of its principles or under all at once."""
    asked: list[tuple[int, tuple[Principle, ...], Pair]] = []
    for index, one in enumerate(candidates):
        groups = [one.principles] if panel.together else [(principle,) for principle in one.principles]
        for group in groups:
            name = one.id if len(groups) == 1 else f"{one.id}@{group[0].id}"
            pair = Pair(name, one.asked, one.first, one.second, gathered(group), one.tag)
            asked.append((index, group, pair))
    votes: list[list[Vote]] = [[] for _ in candidates]
    for who in panel.judges:
        own = title if len(panel.judges) == 1 else f"{title}: {who.settings.name}"
        pairs = [pair._replace(id=_item(panel, who, pair)) for _, _, pair in asked]
        opinions = judge(who, pairs, own)
        for (index, group, _), opinion in zip(asked, opinions, strict=True):
            votes[index].append(Vote(who.settings, group, opinion))
    return [count(group) for group in votes]


def _item(panel: Panel, who: Judge, pair: Pair) -> str:
    return pair.id if len(panel.judges) == 1 else f"{pair.id}~{who.settings.name}"


def count(votes: list[Vote]) -> Ballot:
    """Add votes up: the mean of their logits, each with its judge's weight."""
    heard = [(vote.logit, vote.judge.weight) for vote in votes]
    known = [(logit, weight) for logit, weight in heard if logit is not None]
    if not known:
        return Ballot(votes, None, None)
    strength = sum(logit * weight for logit, weight in known) / sum(weight for _, weight in known)
    return Ballot(votes, float(expit(strength)), strength)


def swap_test(panel: Panel, candidates: Sequence[Candidate], tolerance: float) -> dict[str, Any]:
    """Ask about candidates as they are and with their answers exchanged; P must become 1 - P.

    The exchanged pairs make the very same requests, so they are asked in batches of the same shapes as the others, and
    rounding is the same. It finds a labeller that mixes up sides, or answers a question otherwise when asked again.

    Raises:
        StageError: a label does not turn around with its pair.
    """
    given = cast(panel, candidates, "swap test")
    exchanged = cast(panel, [one.exchanged for one in candidates], "swap test, exchanged")
    errors: list[float] = []
    for candidate, there, back in zip(candidates, given, exchanged, strict=True):
        if there.preference is None and back.preference is None:
            continue
        if there.preference is None or back.preference is None:
            found = f"the judges abstain with the answers in one place only ({there.reason or back.reason})"
        else:
            errors.append(abs(there.preference + back.preference - 1))
            if errors[-1] <= tolerance:
                continue
            found = (
                f"P(first is better) is {there.preference:.8f}, and {back.preference:.8f} with the answers exchanged"
            )
        worst = _least_stable(there, back)
        raise StageError(
            f"label: the labeller contradicts itself: for `{candidate.id}` {found}; the two must add up to 1 within "
            f"label.swap_tolerance {tolerance:g}. The judge `{worst}` differs most. Nothing was labelled. Use a "
            "judge that answers the same question alike (no sampling, one precision), or raise label.swap_tolerance."
        )
    return {
        "rows": len(candidates),
        "compared": len(errors),
        "max_error": max(errors, default=None),
        "tolerance": tolerance,
    }


def _least_stable(there: Ballot, back: Ballot) -> str:
    """Return the name of the judge whose votes turn around worst."""

    def error(pair: tuple[Vote, Vote]) -> float:
        logits = pair[0].logit, pair[1].logit
        return abs(logits[0] + logits[1]) if logits[0] is not None and logits[1] is not None else float("inf")

    return max(zip(there.votes, back.votes, strict=True), key=error)[0].judge.name
