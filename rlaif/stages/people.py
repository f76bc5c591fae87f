"""People's labels as the stage `label` takes them in: every file that the recipe names, in one."""

from typing import Any, NamedTuple

from rlaif.human.contradictions import mark
from rlaif.human.importers import Labelled
from rlaif.human.labels import read_labels
from rlaif.records import Comparison, Ranking, Rating, with_system
from rlaif.stages.run import Run


class People(NamedTuple):
    """What people said: usable rows by their kind, the others with a reason, and how many contradict another row."""

    comparisons: list[Comparison]
    ratings: list[Rating]
    rankings: list[Ranking]
    unused: list[dict[str, Any]]
    contradictory: int

    @property
    def more(self) -> dict[str, int]:
        """How many rows there are that are no comparisons, by the name of their file."""
        counts = {"ratings": len(self.ratings), "rankings": len(self.rankings)}
        return {name: count for name, count in counts.items() if count}


def people_labels(run: Run) -> People:
    """Read the files of people's labels that the recipe names; where it asks AI only, there are none."""
    rows: dict[str, Labelled] = {}
    unused: list[dict[str, Any]] = []
    settings = run.recipe.human
    for path in run.loaded.human_files if run.recipe.feedback != "ai" else ():
        imported = read_labels(path, tag=settings.tag, annotator=settings.annotator, seed=run.recipe.seed)
        for row in imported.rows:
            row.prompt = with_system(row.prompt, run.recipe.system_prompt)  # as the policy will be asked
            if row.id in rows:
                unused.append({"file": path.name, "reason": "stands in two files", "row": row.model_dump()})
            rows.setdefault(row.id, row)
        unused += [{"file": path.name, **row} for row in imported.unused]
    kept = list(rows.values())
    return People(
        [row for row in kept if isinstance(row, Comparison)],
        [row for row in kept if isinstance(row, Rating)],
        [row for row in kept if isinstance(row, Ranking)],
        unused,
        len(mark(kept)),  # once more, over all files
    )
