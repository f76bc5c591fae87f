"""A constitution from comparisons: inverse constitutional AI (Findeis et al. 2024, arXiv 2406.06560).

Comparisons are split by a hash of their prompt. For each pair of one half a model proposes rules that could explain
which answer was preferred; rules that say nearly the same are one candidate. A judge then votes on the pairs of the
other half under each candidate, in both orders. A candidate is kept if its votes agree with the labels more often than
chance would: its Wilson interval, widened for the number of candidates, lies above one half.

Departures: rules are grouped by the words they share and not by embeddings; a vote is a log-probability and no text;
the judge without any principle is measured beside the candidates, since a judge may agree with the labels anyway.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.constitution import Constitution, Principle
from rlaif.constitution_import import slugged
from rlaif.documents import file_sha256, fingerprint
from rlaif.engines.engine import Engine, Question, ask
from rlaif.errors import DataError
from rlaif.human.labels import read_comparisons
from rlaif.journal import Journal
from rlaif.maths import agreement
from rlaif.progress import Progress
from rlaif.prompting import load_template
from rlaif.records import Comparison, Messages, text_of
from rlaif.requests import OPTIONS
from rlaif.stages.judge import judge
from rlaif.stages.verdicts import Judge, Opinion, Pair, Verdict

STAGE = "induce"
ALIKE = 0.5  # share of telling words in common that makes two rules one candidate
LENGTHS = range(3, 41)  # words of a rule
_MARK = re.compile(r"""^\s*(?:[-*+•]|\(?\d+[.):]|Rule\s*\d*\s*:)?\s*["'“]?(.*?)["'”]?\s*$""", re.IGNORECASE)
_ABOUT_THE_PAIR = re.compile(  # or about the task
    r"\b(?:answers?|options?|responses?|sentences?)\s+[AB]\b|\bneither\b|\bboth answers\b|\brules?\b|[\"“]the answer",
    re.IGNORECASE,
)
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an and any are as at be been being but by can could do does for from has have if in into is it its of on or
        should so some such than that the their them then there these they this those to too up was were when which
        while who whose will with would answer answers response better best good more most very person people
        user users human question""",
    )
)


@dataclass(frozen=True)
class Options:
    """How much is asked, and what is kept."""

    seed: int = 0
    max_propose: int = 40
    max_heldout: int = 60
    max_candidates: int = 12
    min_strength: float = 0.0
    keep_all: bool = False


class Halves(NamedTuple):
    """The rows that rules are proposed from, those that they are tested on, and how many are of no use."""

    propose: list[Comparison]
    heldout: list[Comparison]
    ties: int


@dataclass
class Candidate:
    """A rule, who proposed it in which words, and how its votes went."""

    text: str
    proposals: list[tuple[str, str]] = field(default_factory=list)  # id of the row, words of the rule
    votes: list[float] = field(default_factory=list)  # strength of each vote, above 0 for the label
    same_position: int = 0
    tie: float = 0.0
    confidence: float = agreement.CONFIDENCE

    @property
    def evidence(self) -> dict[str, Any]:
        """How well the votes reconstruct the labels."""
        said = [vote for vote in self.votes if abs(vote) > self.tie]
        right = sum(vote > 0 for vote in said)
        return {
            "heldout": len(self.votes),
            "coverage": len(said) / len(self.votes),
            "accuracy": agreement.wilson(right, len(said), self.confidence)._asdict() if said else None,
            "same_position": self.same_position,
        }

    @property
    def dropped(self) -> str | None:
        """Why it is not kept, or None."""
        accuracy = self.evidence["accuracy"]
        if accuracy is None:
            return "no vote has a side"
        if accuracy["high"] < 0.5:
            return "speaks against the labels"
        return "no better than chance" if accuracy["low"] <= 0.5 else None


class Induced(NamedTuple):
    """What came out: the constitution (None if nothing is kept), a note for each principle, the evidence."""

    constitution: Constitution | None
    notes: dict[str, str]
    evidence: dict[str, Any]


def induce(path: Path, model: str, engine: Engine, journal: Journal, progress: Progress, options: Options) -> Induced:
    """Find principles that reconstruct the labels of a file of comparisons.

    Args:
        path: comparisons of any form that `human.labels.read_comparisons` knows.
        model: the name that reports give the engine.
        engine: who proposes and votes.
        journal: where answers are kept.
        progress: who is told.
        options: how much is asked, and what is kept.

    Raises:
        DataError: the file cannot be read, or one half has no pair with a side.
    """
    halves = split(path, read_comparisons(path).comparisons, options)
    progress.say(f"{len(halves.propose)} pairs to propose from, {len(halves.heldout)} to test on")
    proposals, unusable = propose(engine, journal, progress, halves.propose, options.seed)
    candidates = cluster(proposals)[: options.max_candidates]
    if not candidates:
        raise DataError(
            f"{path}: no rule was proposed from {len(halves.propose)} pairs; {unusable} lines were no rules. Take a "
            "stronger judge, or more pairs."
        )
    for candidate in candidates:  # Bonferroni: with 95 % each, one of twenty would pass by luck
        candidate.confidence = 1 - (1 - agreement.CONFIDENCE) / len(candidates)
    baseline = Candidate("Which of the two answers is better?")
    constitution = _constitution(path, model, halves, [baseline, *candidates])
    who = Judge(engine, constitution, journal, progress, STAGE)
    for number, candidate in enumerate([baseline, *candidates]):
        principle = constitution.principles[number]
        if candidate is baseline:
            principle = principle.model_copy(update={"comparison": baseline.text})
        title = f"votes {number} of {len(candidates)}"
        _count(candidate, judge(who, _pairs(halves.heldout, principle), title), options.min_strength)
    ranked = sorted(candidates, key=lambda one: _rank(one), reverse=True)
    kept = [one for one in ranked if options.keep_all or one.dropped is None]
    evidence = {
        "file": path.name,
        "sha256": file_sha256(path),
        "model": model,
        "propose": len(halves.propose),
        "heldout": len(halves.heldout),
        "ties": halves.ties,
        "lines_that_were_no_rules": unusable,
        "confidence": candidates[0].confidence,
        "proposals": len(proposals),
        "judge_without_a_principle": baseline.evidence,
        "candidates": [
            {"text": one.text, "kept": one in kept, "dropped": one.dropped, **one.evidence, "proposals": one.proposals}
            for one in ranked
        ],
    }
    if not kept:
        return Induced(None, {}, evidence)
    whole = _constitution(path, model, halves, kept)
    notes = {p.id: describe(one) for p, one in zip(whole.principles, kept, strict=True)}
    return Induced(whole, notes, evidence)


def split(path: Path, rows: Sequence[Comparison], options: Options) -> Halves:
    """Split rows by a hash of their prompt, so that no prompt is on both sides; ties are of no use."""
    sides: tuple[list[Comparison], list[Comparison]] = ([], [])
    ties = 0
    for row in sorted(rows, key=lambda row: fingerprint([options.seed, row.id])):
        if row.preference == 0.5:
            ties += 1
        else:
            sides[int(fingerprint([options.seed, "half", row.prompt])[0], 16) % 2].append(row)
    if not sides[0] or not sides[1]:
        raise DataError(
            f"{path}: {len(sides[0])} pairs to propose from and {len(sides[1])} to test on ({ties} ties); at least one "
            "of each is needed, and some dozens to tell anything. Add comparisons with other prompts."
        )
    return Halves(sides[0][: options.max_propose], sides[1][: options.max_heldout], ties)


def propose(
    engine: Engine, journal: Journal, progress: Progress, rows: Sequence[Comparison], seed: int
) -> tuple[list[tuple[str, str]], int]:
    """Ask for rules that could explain each row; return them with the row's id, and how many lines were no rules."""
    template = load_template("propose")
    questions = []
    for row in rows:
        number = int(fingerprint([seed, "order", row.id])[:12], 16)
        answers = [text_of(row.chosen), text_of(row.rejected)]
        swapped = number % 2 == 1  # the better answer is the first one half of the time
        first, second = reversed(answers) if swapped else answers
        text = template.render(prompt=_asked(row.prompt), first=first, second=second, better=OPTIONS[swapped])
        message: Messages = [{"role": "user", "content": text}]
        questions.append(Question(f"{row.id}/propose", message, max_new_tokens=96, temperature=0.7, seed=number))
    found, unusable = [], 0
    answers_ = ask(journal, STAGE, engine, questions, progress, "rules")
    for row, answer in zip(rows, answers_, strict=True):
        lines = [line for line in answer.text.split("\n") if line.strip()]  # none where there is only an error
        if not answer.ended and len(lines) > 1:
            lines = lines[:-1]  # cut by the limit
        for line in lines:
            rule = rule_of(line)
            unusable += rule is None
            if rule is not None:
                found.append((row.id, rule))
    return found, unusable


def _asked(prompt: Messages) -> str:
    """Return a prompt as one text: the last turn, with those before it where there are any."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def rule_of(line: str) -> str | None:
    """Return a proposed line as a sentence, or None where it is no rule that could hold for other answers."""
    match = _MARK.match(line)
    text = " ".join((match[1] if match else line).replace("**", "").split())
    if len(text.split()) not in LENGTHS or text.endswith((":", "?")) or _ABOUT_THE_PAIR.search(text):
        return None
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!" else ".")


def telling_words(text: str) -> frozenset[str]:
    """Return the words of a rule without those that rules share, and without endings."""
    plain = re.sub(r"n['’]t\b", " not", text.casefold())
    words = [word for word in re.findall(r"[^\W_]+", plain) if word not in _COMMON]
    return frozenset(re.sub(r"(?<=\w{3})(?:ing|ly|ed|es|s|e)$", "", word) for word in words)


def _alike(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second) if first and second else 0.0


def cluster(proposals: Sequence[tuple[str, str]]) -> list[Candidate]:
    """Group rules around those that are most like all others: a rule joins the first of them that it resembles.

    The rule in the middle of a group speaks for it; groups that most rows propose come first.
    """
    words = [telling_words(text) for _, text in proposals]
    closeness = [sum(_alike(one, other) for other in words) for one in words]
    middles: list[tuple[frozenset[str], Candidate]] = []
    for index in sorted(range(len(proposals)), key=lambda index: (-closeness[index], index)):
        if not words[index]:
            continue
        near = next((one for middle, one in middles if _alike(middle, words[index]) >= ALIKE), None)
        if near is None:
            near = Candidate(proposals[index][1])
            middles.append((words[index], near))
        near.proposals.append(proposals[index])
    return sorted((one for _, one in middles), key=lambda one: -len({row for row, _ in one.proposals}))


def _pairs(rows: Sequence[Comparison], principle: Principle) -> list[Pair]:
    key = principle.hash[:12]
    return [
        Pair(f"{row.id}/{key}", _asked(row.prompt), text_of(row.chosen), text_of(row.rejected), principle)
        for row in rows
    ]


def _count(candidate: Candidate, opinions: Sequence[Opinion], tie: float) -> None:
    """Note what was said; an abstention takes no side, as a vote of 0 does."""
    candidate.votes = [one.strength if isinstance(one, Verdict) else 0.0 for one in opinions]
    candidate.same_position = sum(one.same_position for one in opinions if isinstance(one, Verdict))
    candidate.tie = tie


def _rank(one: Candidate) -> tuple[float, float, int]:
    accuracy = one.evidence["accuracy"]
    return (accuracy["low"], accuracy["rate"], len(one.proposals)) if accuracy else (-1.0, 0.0, 0)


def _constitution(path: Path, model: str, halves: Halves, candidates: Sequence[Candidate]) -> Constitution:
    """Return candidates as a constitution, in their order."""
    principles: list[Principle] = []
    for one in candidates:
        slug = "-".join(slugged(word) for word in one.text.split() if telling_words(word) and slugged(word)) or "rule"
        slug = "-".join(slug.split("-")[:5])
        taken = sum(p.id == slug or p.id.startswith(f"{slug}-") for p in principles)
        title = one.text.rstrip(".")
        principles.append(Principle(id=f"{slug}-{taken + 1}" if taken else slug, title=title, text=one.text))
    return Constitution(
        name=slugged(path.stem) or "induced",
        version="1",
        description=(
            f"Induced from {path.name} (SHA-256 {file_sha256(path)[:16]}) by {model}: "
            f"{len(halves.propose)} pairs to propose from, {len(halves.heldout)} to test on."
        ),
        principles=principles,
    )


def describe(one: Candidate) -> str:
    """Say in a line how well a candidate reconstructs the labels."""
    evidence = one.evidence
    rows = len({row for row, _ in one.proposals})
    if evidence["accuracy"] is None:
        return f"No vote has a side on {evidence['heldout']} held-out pairs; proposed from {rows} pairs."
    accuracy = evidence["accuracy"]
    return (
        f"Agrees with {accuracy['count']:.0f} of {accuracy['n']} labels ({accuracy['rate']:.0%}, {one.confidence:.1%} "
        f"interval {accuracy['low']:.0%} to {accuracy['high']:.0%}), takes a side on {evidence['coverage']:.0%}; "
        f"proposed from {rows} pairs."
    )


def summary(evidence: dict[str, Any]) -> str:
    """Write the evidence for people: the judge alone, then each candidate, the best first."""
    lines = [
        f"{evidence['proposals']} rules from {evidence['propose']} pairs; {len(evidence['candidates'])} candidates, "
        f"each tested on {evidence['heldout']} other pairs "
        f"({evidence['confidence']:.1%} intervals, 95% over all of them)",
        f"  {_share(evidence['judge_without_a_principle'])}  the judge without a principle",
    ]
    for one in evidence["candidates"]:
        reason = f" ({one['dropped']})" if one["dropped"] else ""
        lines.append(f"  {_share(one)}  {one['text']}{reason}")
    return "\n".join(lines)


def _share(one: dict[str, Any]) -> str:
    accuracy = one["accuracy"]
    if accuracy is None:
        return f"{'no side':>22}"
    return f"{accuracy['rate']:4.0%} ({accuracy['low']:.0%} to {accuracy['high']:.0%}, n {accuracy['n']})"
