"""What is wrong with a constitution, and what is odd about it: `rlaif constitution check`.

Errors are what `constitution.load` refuses. Warnings are what a run would go on with, and hardly any author means:
entries that stand twice, principles that are never or almost never drawn, tests that contradict what the judge is
shown, requests that may not fit a model's context. No model is loaded; lengths in tokens are estimates.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from rlaif.constitution import Placed, Reading, read
from rlaif.constitution_length import TEXTS, estimated_tokens, lengths
from rlaif.documents import Problem
from rlaif.principles import Example, Principle, WorkedComparison
from rlaif.records import Prompt, read_rows

NEAR_PRINCIPLES = 0.5  # share of three-word sequences in common
NEAR_ENTRIES = 0.8
RARE = 1 / 1000


class Kinds(NamedTuple):
    """What is known of the prompts: how many of each tag and category, and the longest text in tokens."""

    files: list[str]
    counts: Counter[tuple[str, str]]
    longest: int

    @property
    def names(self) -> list[str]:
        """Every tag and category."""
        return sorted({name for pair in self.counts for name in pair if name})


def read_prompts(paths: Sequence[Path]) -> Kinds:
    """Read prompt sets.

    Raises:
        DataError: a file that cannot be read, or a broken row.
    """
    rows = [row for path in paths for row in read_rows(path, Prompt)]
    counts = Counter((row.tag, row.category) for row in rows)
    return Kinds([path.name for path in paths], counts, max(estimated_tokens(row.prompt) for row in rows))


def check(path: Path, kinds: Kinds, *, max_tokens: int) -> list[Problem]:
    """Return every problem of a constitution and of what it extends, in the order of files and lines.

    An entry with a fault takes part in each comparison whose fields could be read.

    Args:
        path: the file.
        kinds: the prompts it is to serve.
        max_tokens: the model's context, in tokens.
    """
    reading = read(path)
    entries = _effective(reading)
    texts = [one for one in entries if one.has(*TEXTS[one.part])]
    named = [one for one in texts if one.has("id" if one.part == "principles" else "principle")]
    found = [*reading.problems, *_twice(texts), *_contradictions(named, entries), *_names(entries, kinds)]
    principles = [one for one in entries if one.part == "principles"]
    if reading.complete and all(one.has("id", "weight", "applies_to") for one in principles):
        found += _draws(principles, kinds, reading)
    if reading.complete:
        found += lengths(named, kinds.longest, max_tokens)
    order = {str(document.path): number for number, document in enumerate(reading.documents)}
    return sorted(dict.fromkeys(found), key=lambda p: (order.get(p.file, -1), p.line or 0, p.column or 0))


def as_json(problems: Sequence[Problem]) -> str:
    """Return problems as a JSON list for programs."""
    keys = ("file", "line", "column", "severity", "code", "message")
    return json.dumps([{key: getattr(one, key) for key in keys} for one in problems], indent=2, ensure_ascii=False)


def _effective(reading: Reading) -> list[Placed]:
    """Return the entries that count: of those with one id, the last file's."""
    chosen: dict[tuple[str, str], Placed] = {}
    for index, placed in enumerate(reading.entries):
        entry = placed.entry
        key = placed.part, entry.id if isinstance(entry, Principle | Example) and placed.has("id") else f"#{index}"
        repeats = key in chosen and chosen[key].document is placed.document  # an error of its own
        chosen[(placed.part, f"#{index}") if repeats else key] = placed
    return list(chosen.values())


def _called(placed: Placed) -> str:
    entry = placed.entry
    return entry.id if isinstance(entry, Principle) and placed.has("id") else f"principles.{placed.number}"


def _line(placed: Placed, document: object) -> str:
    problem = placed.problem("", "", "")
    return f"line {problem.line}" if placed.document is document else f"line {problem.line} of {problem.file}"


# --- entries that stand twice -------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def similarity(first: str, second: str, frame: Set[tuple[str, ...]] = frozenset()) -> float:
    """Return the share of three-word sequences that two texts have in common, 0 to 1; those of a frame do not count."""
    one, other = _shingles(first), _shingles(second)
    if one - frame and other - frame:
        one, other = one - frame, other - frame
    return len(one & other) / len(one | other)


def _twice(entries: Sequence[Placed]) -> Iterator[Problem]:
    """Yield principles that say nearly the same, and other entries that stand twice; each once, with its nearest."""
    principles = [one.entry for one in entries if isinstance(one.entry, Principle)]
    frames = [_frame([p.text for p in principles]), _frame([_wordings(p) for p in principles])]
    nearest: dict[int, tuple[float, Placed, Placed]] = {}
    for one, other in combinations(entries, 2):
        first, second = one.entry, other.entry
        if isinstance(first, Principle) and isinstance(second, Principle):
            texts = similarity(first.text, second.text, frames[0])
            same = max(texts, similarity(_wordings(first), _wordings(second), frames[1]))
            least = NEAR_PRINCIPLES
        elif type(first) is type(second):
            same, least = similarity(_whole(one), _whole(other)), NEAR_ENTRIES
        else:
            continue
        if same >= max(least, nearest.get(id(other), (0.0,))[0]):
            nearest[id(other)] = same, one, other
    for same, one, other in nearest.values():
        first, second = one.entry, other.entry
        if isinstance(first, Principle) and isinstance(second, Principle):
            message = (
                f"`{_called(other)}` says nearly the same as `{_called(one)}` in {_line(one, other.document)} "
                f"({same:.0%} of their three-word sequences), so its subject is drawn twice as often. "
                "Merge or distinguish them."
            )
        else:
            message = f"nearly the same as the one in {_line(one, other.document)}. Remove one, or change its subject."
        yield other.warning("", "near-duplicate", message)


def _frame(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """Return the sequences that many texts share, as a phrase that all requests begin with: they tell nothing apart."""
    counts = Counter(shingle for text in texts for shingle in _shingles(text))
    return {shingle for shingle, count in counts.items() if count > max(3, len(texts) / 5)}


def _wordings(principle: Principle) -> str:
    given = [text for text in (principle.critique, principle.revision, principle.comparison) if text]
    return " | ".join(given) or principle.text


def _whole(placed: Placed) -> str:
    return " | ".join(getattr(placed.entry, key) for key in TEXTS[placed.part])


# --- contradictions -----------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    placed: Placed
    principle: str
    prompt: str
    better: str
    worse: str


def _verdicts(entries: Sequence[Placed], first: str) -> Iterator[_Verdict]:
    """Yield what entries say is better, as plain texts; an example's revision is better than its response."""
    for placed in entries:
        entry = placed.entry
        if isinstance(entry, Principle):
            continue
        if isinstance(entry, Example):
            better, worse = entry.revision, entry.response
        elif isinstance(entry, WorkedComparison):
            better, worse = (entry.first, entry.second) if entry.better == "first" else (entry.second, entry.first)
        else:
            better, worse = entry.better, entry.worse
        if _plain(better) != _plain(worse):
            yield _Verdict(placed, entry.principle or first, _plain(entry.prompt), _plain(better), _plain(worse))


def _contradictions(judged: Sequence[Placed], entries: Sequence[Placed]) -> Iterator[Problem]:
    """Yield tests that an example, a worked comparison or another test denies, or whose answer they give away."""
    first = next((_called(placed) for placed in entries if placed.part == "principles"), "")
    for one, other in combinations(_verdicts(judged, first), 2):
        if (one.principle, one.prompt) != (other.principle, other.prompt):
            continue
        kind = {"examples": "example", "comparisons": "worked comparison", "tests": "test"}[one.placed.part]
        where = f"the {kind} in {_line(one.placed, other.placed.document)}"
        named = f"under `{other.principle}`"
        is_test = other.placed.part == "tests"
        if (one.better, one.worse) == (other.worse, other.better):
            message = f"says the opposite of {where} {named}. Swap the sides of one, or name another principle."
            yield other.placed.warning("", "contradiction", message)
        elif is_test and kind == "example" and other.better == one.worse:
            message = f"is what {where} criticizes {named}. Give a better answer, or another principle."
            yield other.placed.warning("better", "contradiction", message)
        elif is_test and kind == "worked comparison" and (one.better, one.worse) == (other.better, other.worse):
            message = f"repeats {where}, which the judge is shown with its answer. Test with another prompt."
            yield other.placed.warning("", "given-away", message)


# --- draws --------------------------------------------------------------------------------------------------------


def _names(entries: Sequence[Placed], kinds: Kinds) -> Iterator[Problem]:
    """Yield names in `applies_to` that no prompt has as a tag or a category."""
    for placed in entries:
        if not isinstance(placed.entry, Principle) or not placed.has("applies_to"):
            continue
        unknown = [name for name in placed.entry.applies_to if name not in kinds.names]
        if unknown and len(unknown) == len(placed.entry.applies_to):
            message = f"no prompt can draw `{_called(placed)}`: {_no_prompt(unknown, kinds)}"
            yield placed.warning("applies_to", "never-drawn", message)
        elif unknown:
            yield placed.warning("applies_to", "unknown-tag", _no_prompt(unknown, kinds))


def _no_prompt(unknown: Sequence[str], kinds: Kinds) -> str:
    near = [match for name in unknown for match in difflib.get_close_matches(name, kinds.names, n=1, cutoff=0.6)]
    tags = sorted({tag for tag, _ in kinds.counts})
    others = len(kinds.names) - len(tags)
    there = ", ".join(tags) + f" and {others} categories" if others > 9 else ", ".join(kinds.names)
    hint = f"Did you mean `{near[0]}`?" if near else f"There are: {there}."
    named = ", ".join(f"`{name}`" for name in unknown)
    return f"no prompt of {', '.join(kinds.files)} has the tag or category {named}. {hint}"


def _draws(entries: Sequence[Placed], kinds: Kinds, reading: Reading) -> Iterator[Problem]:
    """Yield principles that others keep from being drawn, and tags that nothing applies to; `draw` has the rule."""
    placed = {one.entry.id: one for one in entries if isinstance(one.entry, Principle)}
    principles = [one.entry for one in placed.values() if isinstance(one.entry, Principle)]
    share: dict[str, float] = {}
    shadows: dict[str, set[str]] = {}
    for tag, category in kinds.counts:
        specific = [p for p in principles if category and category in p.applies_to]
        general = [p for p in principles if p.applies(tag)]
        drawn = specific or general
        total = math.fsum(p.weight for p in drawn)
        for principle in drawn:
            share[principle.id] = max(share.get(principle.id, 0.0), principle.weight / total)
        for principle in general if specific else []:
            shadows.setdefault(principle.id, set()).update(p.id for p in specific)
    for tag in sorted({tag for tag, _ in kinds.counts}):
        if not any(p.applies(tag) for p in principles):
            message = f"no principle applies to prompts tagged `{tag}`. Name the tag in an `applies_to`, or empty one."
            yield reading.documents[-1].problem(["principles"], "tag-without-principle", message, "warning")
    for name, one in placed.items():
        if name in share and share[name] < RARE:
            message = f"`{name}` gets at most {share[name]:.2g} of the draws of any kind of prompt. Raise its weight."
            yield one.warning("weight", "rarely-drawn", message)
        elif name not in share and name in shadows:
            others = ", ".join(f"`{other}`" for other in sorted(shadows[name] - {name}))
            message = (
                f"no prompt of {', '.join(kinds.files)} can draw `{name}`: {others} name the category of every prompt "
                "it applies to, and go first. Name a category here too, or take some from theirs."
            )
            yield one.warning("applies_to", "never-drawn", message)
