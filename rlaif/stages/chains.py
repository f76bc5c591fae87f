"""The chains that the stage `revise` wrote, read back by the stages that use them."""

from collections import Counter
from typing import Any

from rlaif.errors import StageError
from rlaif.records import Prompt, read_jsonl
from rlaif.stages.run import Run


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
        seen[prompt.tag] += 1
        if not wanted or seen[prompt.tag] <= wanted.get(prompt.tag, 0):
            result.append((prompt, row))
    return result
