"""People's labels as comparisons, from a file of any known form."""

from collections import Counter
from pathlib import Path

from rlaif.human.importers import Imported, import_file
from rlaif.records import Comparison, read_jsonl, read_rows

OWN = "rlaif"
_OWN_COLUMNS = {"votes", "provenance", "source"}


def read_labels(
    path: Path, *, tag: str = "", annotator: str = "human", seed: int = 0, eval_fraction: float = 0.0
) -> Imported:
    """Read comparisons that this package wrote as they are, and import a file of any other known form.

    Args:
        path: the file.
        tag: the tag of rows that bring none.
        annotator: the annotator of imported rows that name none.
        seed: chooses which imported rows are held out.
        eval_fraction: the share of them; 0 leaves the choice to the reward stage.

    Raises:
        DataError: the file cannot be read, or its columns are of no known form.
    """
    if _is_own(path):
        rows = read_rows(path, Comparison)
        return Imported([row.model_copy(update={"tag": row.tag or tag}) for row in rows], [], OWN)
    return import_file(path, tag=tag, annotator=annotator, seed=seed, eval_fraction=eval_fraction)


def _is_own(path: Path) -> bool:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return False
    first = next((row for _, row in read_jsonl(path)), {})
    return first.keys() >= _OWN_COLUMNS


def summary(imported: Imported, output: Path, unused: Path) -> str:
    """Say what became of the rows of a file."""
    kept = imported.comparisons
    lines = [
        f"{len(kept) + len(imported.unused)} rows ({imported.format}): {len(kept)} comparisons -> {output}",
        f"  for training {sum(row.split == 'train' for row in kept)}, held out "
        f"{sum(row.split == 'eval' for row in kept)}",
    ]
    if imported.unused:
        lines.append(f"  not usable {len(imported.unused)} -> {unused}")
        for reason, count in Counter(row["reason"] for row in imported.unused).most_common():
            lines.append(f"    {reason}: {count}")
    return "\n".join(lines)
