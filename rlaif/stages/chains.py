"""Chains: a prompt, the response to it, critiques and revisions; as rows, and read back by stages that use them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlaif.constitution import Principle
from rlaif.errors import StageError
from rlaif.prompting import Template
from rlaif.records import Prompt, read_jsonl
from rlaif.stages.run import Run, templates


@dataclass
class Step:
    """One critique and the revision that follows it."""

    principle: Principle
    critique: str = ""
    revision: str = ""
    ended: bool = True


@dataclass
class Chain:
    """A prompt, the response to it and what became of it."""

    prompt: Prompt
    response: str
    ended: bool
    steps: list[Step] = field(default_factory=list)
    sample: int = 0
    error: str = ""  # why it went no further than this

    @property
    def id(self) -> str:
        """The prompt's id, and the number of the sample after the first."""
        return f"{self.prompt.id}~{self.sample}" if self.sample else self.prompt.id

    @property
    def before(self) -> str:
        """The version that the last step revised."""
        return self.steps[-2].revision if len(self.steps) > 1 else self.response

    @property
    def text(self) -> str:
        """The latest version of the answer."""
        return self.steps[-1].revision if self.steps else self.response


def parts(run: Run) -> dict[str, Template]:
    """Return what a model is asked for in each step, with the template of the request."""
    if run.recipe.revise.critique:
        return templates("critique", "revise")
    return {"revise": templates("revise_directly")["revise_directly"]}


def chain_row(chain: Chain, reason: str | None) -> dict[str, Any]:
    """Return a chain with all its texts as a row."""
    return {
        "id": chain.id,
        "prompt_id": chain.prompt.id,
        "sample": chain.sample,
        "prompt": chain.prompt.prompt,
        "tag": chain.prompt.tag,
        "split": chain.prompt.split,
        "response": chain.response,
        "ended": chain.ended,
        "steps": [
            {
                "principle": s.principle.id,
                "principle_hash": s.principle.hash,
                "title": s.principle.title,
                "critique": s.critique,
                "revision": s.revision,
                "ended": s.ended,
            }
            for s in chain.steps
        ],
        "kept": reason is None,
        "reason": reason,
        "error": chain.error,
    }


def revised_chains(run: Run) -> list[tuple[Prompt, dict[str, Any]]]:
    """Return the chains of the revise stage: the first so many of each named tag, or all where no tag is named.

    Raises:
        StageError: a chain's prompt is not in the prompt sets (any more).
    """
    path, wanted = run.output("revise", "chains.jsonl"), run.recipe.label.prompts_per_tag
    known = {prompt.id: prompt for prompt in run.prompts}
    seen: Counter[str] = Counter()
    result = []
    for line, row in read_jsonl(path):
        prompt = known.get(row["prompt_id"])
        if prompt is None:
            raise StageError(
                f"{path}:{line}: the prompt `{row['prompt_id']}` is not in the recipe's prompt sets. Run the stage "
                f"`revise` again: rlaif revise {run.loaded.path}"
            )
        first = not row["sample"]  # one comparison for a prompt
        seen[prompt.tag] += first
        if first and (not wanted or seen[prompt.tag] <= wanted.get(prompt.tag, 0)):
            result.append((prompt, row))
    return result
