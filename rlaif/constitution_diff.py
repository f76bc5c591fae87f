"""What changed between two constitutions, and what of a run that would do again: `rlaif constitution diff`.

Principles and examples are compared by id, worked comparisons and tests by prompt and principle. Only what a model can
be shown counts, and how often; `constitution.diff` and `Constitution.hash` have the rule.
"""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.constitution import Constitution, applying, diff, draw, tagged
from rlaif.errors import ConstitutionError, DataError
from rlaif.principles import Example, JudgeTest, Principle, WorkedComparison
from rlaif.prompting import load_template
from rlaif.recipe import Recipe, load_recipe
from rlaif.records import Comparison, Prompt, read_jsonl, read_rows
from rlaif.requests import worked_comparisons, worked_examples

_KEPT_WORDS = 4  # of an unchanged stretch, at either end
NONE_APPLIES = "no principle applies any more"
RETRAINED = "the policy that wrote the responses is trained again"


def compare(old: Constitution, new: Constitution) -> dict[str, Any]:
    """Return all differences as JSON; `equal` tells whether a run would notice none."""
    changed = diff(old, new)
    before, after = ({p.id: p for p in whole.principles} for whole in (old, new))
    return {
        "equal": old.hash == new.hash,
        "principles": {
            "added": changed.added,
            "removed": changed.removed,
            "reworded": [{"id": i, **_wordings(before[i], after[i])} for i in changed.reworded],
            "reweighted": [{"id": i, **_frequencies(before[i], after[i])} for i in changed.reweighted],
            "reordered": _reordered([p.id for p in old.principles], [p.id for p in new.principles]),
        },
        "examples": _entries(old.examples, new.examples),
        "comparisons": _entries(old.comparisons, new.comparisons),
        "tests": _entries(old.tests, new.tests),
    }


def _wordings(old: Principle, new: Principle) -> dict[str, list[str | None]]:
    keys = ("text", "critique", "revision", "comparison")
    return {key: [getattr(old, key), getattr(new, key)] for key in keys if getattr(old, key) != getattr(new, key)}


def _frequencies(old: Principle, new: Principle) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    if old.weight != new.weight:
        found["weight"] = [old.weight, new.weight]
    if set(old.applies_to) != set(new.applies_to):
        found["applies_to"] = [old.applies_to, new.applies_to]
    return found


def _reordered(old: Sequence[str], new: Sequence[str]) -> bool:
    """Tell whether what both have stands in another order."""
    return [name for name in old if name in new] != [name for name in new if name in old]


def _entries(
    old: Sequence[Example | WorkedComparison | JudgeTest], new: Sequence[Example | WorkedComparison | JudgeTest]
) -> dict[str, Any]:
    before, after = _named(old), _named(new)
    return {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and before[name] != after[name]],
        "reordered": _reordered(list(before), list(after)),
    }


def _named(entries: Sequence[Example | WorkedComparison | JudgeTest]) -> dict[str, dict[str, Any]]:
    """Return entries by id, or by prompt and principle, numbered where several have the same."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.id if isinstance(entry, Example) else f"{entry.prompt} ({entry.principle or 'first principle'})"
        times = sum(known == name or known.startswith(f"{name} #") for known in found)
        found[f"{name} #{times + 1}" if times else name] = entry.model_dump(exclude={"tag"})
    return found


def as_text(found: dict[str, Any]) -> str:
    """Write differences for people: one line for each, old and new words of what was reworded."""
    lines: list[str] = []
    principles = found["principles"]
    lines += [f"+ principle {name}" for name in principles["added"]]
    lines += [f"- principle {name}" for name in principles["removed"]]
    for one in principles["reworded"]:
        lines.append(f"~ principle {one['id']}: reworded")
        for key, (old, new) in _pairs(one):
            lines.append(f"    {key}: {changed_words(old or '(built from text)', new or '(built from text)')}")
    for one in principles["reweighted"]:
        parts = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in _pairs(one)]
        lines.append(f"~ principle {one['id']}: {'; '.join(parts)}")
    for part, word in (("examples", "example"), ("comparisons", "comparison"), ("tests", "test")):
        for sign, kind in (("+", "added"), ("-", "removed"), ("~", "changed")):
            lines += [f"{sign} {word} {name}" for name in found[part][kind]]
    parts = [part for part in ("principles", "examples", "comparisons", "tests") if found[part]["reordered"]]
    lines += [f"~ {part}: in another order" for part in parts]
    if found["equal"]:
        lines.append("No difference that a model could see.")
    return "\n".join(lines)


def _pairs(one: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(key, value) for key, value in one.items() if key != "id"]


def _short(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else f"{value:g}"


def changed_words(old: str, new: str) -> str:
    """Write two texts as one: ``[-old words-]{+new words+}``, long unchanged stretches left out."""
    before, after = (re.findall(r"\S+", text) for text in (old, new))
    parts: list[str] = []
    steps = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for number, (kind, start, end, new_start, new_end) in enumerate(steps):
        if kind == "equal":
            head = [] if number == 0 else before[start : start + _KEPT_WORDS]
            tail = [] if number == len(steps) - 1 else before[max(start, end - _KEPT_WORDS) : end]
            short = end - start <= len(head) + len(tail)
            parts.append(" ".join(before[start:end] if short else [*head, "…", *tail]))
            continue
        removed, added = " ".join(before[start:end]), " ".join(after[new_start:new_end])
        parts.append((f"[-{removed}-]" if removed else "") + (f"{{+{added}+}}" if added else ""))
    return " ".join(parts)


# --- what a run would do again ------------------------------------------------------------------------------------


class Redone(NamedTuple):
    """How many of a run's chains, or of its votes, would be done again, and why."""

    all: int
    again: int
    reasons: dict[str, int]


def redone(run: Path, old: Constitution, new: Constitution) -> dict[str, Any]:
    """Return what of a run would be done again with another constitution, as JSON.

    Args:
        run: the run folder.
        old: the constitution that the run was made with.
        new: the one that would take its place.

    Raises:
        DataError: it is no run folder, holds neither chains nor comparisons, or names a principle that `old` lacks.
    """
    if not (run / "recipe.yaml").is_file():
        raise DataError(f"{run}: not a run folder: it holds no recipe.yaml. Name a folder that `rlaif run` made.")
    loaded = load_recipe(run / "recipe.yaml")
    prompts = {row.id: row for path in loaded.prompts for row in read_rows(path, Prompt)}
    chains, votes = run / "1-revise" / "chains.jsonl", run / "3-label" / "comparisons.jsonl"
    if not chains.is_file() and not votes.is_file():
        raise DataError(f"{run}: holds no {chains.name} and no {votes.name} yet. Run the stage `revise` first.")
    again = _Again(loaded.recipe, prompts, old, new)
    return {
        "run": str(run),
        "chains": again.chains(chains)._asdict() if chains.is_file() else None,
        "votes": again.votes(votes)._asdict() if votes.is_file() else None,
    }


class _Again:
    """Looks at a run's rows under two constitutions."""

    def __init__(self, recipe: Recipe, prompts: dict[str, Prompt], old: Constitution, new: Constitution):
        self.recipe, self.prompts, self.old, self.new = recipe, prompts, old, new
        self.chains_again: set[str] = set()
        few, shown = recipe.revise.few_shot, recipe.label.few_shot
        templates = [load_template(name) for name in ("critique", "revise")]
        self.new_examples = any(worked_examples(old, t, few) != worked_examples(new, t, few) for t in templates)
        template = load_template("compare")
        self.new_comparisons = worked_comparisons(old, template, shown) != worked_comparisons(new, template, shown)

    def chains(self, path: Path) -> Redone:
        """Count the chains of which a step would be asked again."""
        count, reasons = 0, Counter[str]()
        for line, row in read_jsonl(path):
            count += 1
            prompt = self._prompt(row["prompt_id"], f"{path}:{line}")
            for step, one in enumerate(row["steps"]):
                reason = self._revision(prompt, one["principle"], step, f"{path}:{line}")
                if reason:
                    reasons[reason] += 1
                    self.chains_again.add(prompt.id)
                    break
        return Redone(count, sum(reasons.values()), dict(reasons))

    def votes(self, path: Path) -> Redone:
        """Count the votes that would be asked again, or be about new responses."""
        count, reasons = 0, Counter[str]()
        for row in read_rows(path, Comparison):
            for vote in row.votes:
                count += 1
                reason = self._vote(row, vote, str(path))
                if reason:
                    reasons[reason] += 1
        return Redone(count, sum(reasons.values()), dict(reasons))

    def _vote(self, row: Comparison, vote: dict[str, Any], where: str) -> str | None:
        """Tell why a vote would be asked again; votes of people and of functions never are."""
        if row.source == "human" or vote.get("method") == "function":
            return None
        if row.source == "ai":
            reason = self._judged(row, vote, where)
        elif vote.get("annotator") == "contrast":
            changed = _texts(self.old, row.tag) != _texts(self.new, row.tag)
            reason = "the principles of its system prompt changed" if changed else None
        else:
            prompt = self._prompt(row.provenance["prompt_id"], where)
            tags = self.recipe.revise.revise_tags
            if prompt.tag in tags:
                return "its chain is done again" if prompt.id in self.chains_again else None
            return self._revision(prompt, vote["principle"], 0, where, tag=(tags or ["harmful"])[0])
        if reason or not self.chains_again or self.recipe.label.candidates == "file":
            return reason
        if self.recipe.label.candidates == "revision" and row.source == "ai":
            return "its chain is done again" if row.provenance["prompt_id"] in self.chains_again else None
        return RETRAINED if "sft" in self.recipe.stages else None

    def _judged(self, row: Comparison, vote: dict[str, Any], where: str) -> str | None:
        """Tell why a judge would be asked again about a pair as it stands."""
        label, about = self.recipe.label, vote.get("about", "")
        alone = vote.get("method") == "rating" or about in ("chosen_safe", "rejected_safe")
        request = "text" if alone else "comparison_question"
        new = self.new
        if label.safety:
            try:
                new = tagged(self.new, label.harmless_tags if about else label.helpful_tags)
            except ConstitutionError:
                return NONE_APPLIES
        identifier = row.provenance["prompt_id"]
        category = self.prompts[identifier].category if identifier in self.prompts else ""
        prompt = Prompt(id=identifier, prompt="?", tag=row.tag, category=category)
        if label.principles == "one":
            reason = self._drawn(prompt, vote["principle"], 0, where, "", (request,), new)
        else:
            named = vote.get("principles") or [vote["principle"]]
            reason = self._all(prompt, named, where, request, label.principles == "together", new)
        shown = self.new_comparisons and vote.get("method") == "logprobs" and not alone
        return reason or ("the worked comparisons changed" if shown else None)

    def _all(
        self, prompt: Prompt, named: Sequence[str], where: str, request: str, together: bool, new: Constitution
    ) -> str | None:
        """Compare the principles of a vote with those that apply now, where all that apply are asked about."""
        before = [self._known(identifier, where) for identifier in named]
        try:
            now = {p.id: p for p in applying(new, prompt.tag, prompt.category)}
        except ConstitutionError:
            return NONE_APPLIES
        if any(p.id not in now for p in before) or (together and list(now) != list(named)):
            return "other principles apply"
        differs = any(_said(p, request) != _said(now[p.id], request) for p in before)
        return "its principle is reworded" if differs else None

    def _revision(self, prompt: Prompt, principle: str, step: int, where: str, *, tag: str = "") -> str | None:
        reason = self._drawn(prompt, principle, step, where, tag, ("critique_request", "revision_request"))
        return reason or ("the worked examples changed" if self.new_examples else None)

    def _drawn(
        self,
        prompt: Prompt,
        identifier: str,
        step: int,
        where: str,
        tag: str,
        requests: Sequence[str],
        new: Constitution | None = None,
    ) -> str | None:
        before = self._known(identifier, where)
        try:
            now = draw(
                new or self.new,
                seed=self.recipe.seed,
                prompt_id=prompt.id,
                step=step,
                tag=tag or prompt.tag,
                category="" if tag else prompt.category,
            )
        except ConstitutionError:
            return NONE_APPLIES
        if now.id != identifier:
            return "another principle is drawn"
        differs = any(_said(before, request) != _said(now, request) for request in requests)
        return "its principle is reworded" if differs else None

    def _known(self, identifier: str, where: str) -> Principle:
        known = {p.id: p for p in self.old.principles}
        if identifier not in known:
            raise DataError(
                f"{where}: was made under the principle `{identifier}`, which {self.old.name} lacks. Give the "
                "constitution that the run was made with as OLD."
            )
        return known[identifier]

    def _prompt(self, identifier: str, where: str) -> Prompt:
        if identifier not in self.prompts:
            raise DataError(f"{where}: the prompt `{identifier}` is not in the run's prompt sets any more.")
        return self.prompts[identifier]


def _said(principle: Principle, request: str) -> str:
    return principle.text if request == "text" else str(getattr(principle, request)())


def _texts(constitution: Constitution, tag: str) -> list[str]:
    return [p.text for p in constitution.principles if p.applies(tag)]


def made_with(run: Path, constitution: Constitution) -> bool:
    """Tell whether a run's chains were made under these principles and examples; True where there are none."""
    rows = run / "1-revise" / "demonstrations.jsonl"
    wanted = constitution.hash_of("principles", "examples")
    first = next((row for _, row in read_jsonl(rows)), None) if rows.is_file() else None
    return first is None or first["provenance"].get("constitution_hash", wanted) == wanted


def redone_as_text(found: dict[str, Any]) -> str:
    """Write what would be done again, with the reasons."""
    lines = [f"in {found['run']}, with the new file:"]
    for part in ("chains", "votes"):
        if found[part] is not None:
            lines.append(f"  {found[part]['again']} of {found[part]['all']} {part} would be done again")
            lines += [f"    {count}: {reason}" for reason, count in found[part]["reasons"].items()]
    return "\n".join(lines)
