"""People's labels as rows, from a file of any known form."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlaif.errors import DataError
from rlaif.human.contradictions import FLAG, WHY
from rlaif.human.importers import Imported, Labelled, import_file, sorted_out
from rlaif.human.json_objects import Fields
from rlaif.records import Comparison, Ranking, Rating, read_jsonl, read_numbered
from rlaif.transcripts import Unusable, refuse_odd_turns

OWN = "rlaif"
_OWN_COLUMNS = {"provenance", "source", "annotator", "split"}
_KINDS: dict[str, type[Comparison] | type[Rating] | type[Ranking]] = {
    "chosen": Comparison,
    "rating": Rating,
    "ranks": Ranking,
}


def read_labels(
    path: Path, *, tag: str = "", annotator: str = "human", seed: int = 0, eval_fraction: float = 0.0
) -> Imported:
    """Read rows in this package's form as they are, and import a file of any other known form.

    Of both, rows whose turns are no conversation are kept aside.

    Args:
        path: the file.
        tag: the tag of rows that bring none.
        annotator: the annotator of imported rows that name none.
        seed: chooses which imported rows are held out.
        eval_fraction: the share of them; 0 leaves the choice to the reward stage.

    Raises:
        DataError: the file cannot be read, or its columns are of no known form.
    """
    kind = _own_kind(path)
    if kind is None:
        return import_file(path, tag=tag, annotator=annotator, seed=seed, eval_fraction=eval_fraction)
    rows: list[Labelled] = []
    unused: list[Fields] = []
    for line, fields, row in read_numbered(path, kind):
        try:
            _refuse_odd_turns(row)
        except Unusable as reason:
            unused.append({"line": line, "reason": str(reason), "row": fields})
        else:
            rows.append(row.model_copy(update={"tag": row.tag or tag}))
    return sorted_out(rows, unused, OWN)


def _refuse_odd_turns(row: Labelled) -> None:
    """Check that a user asks last and the assistant answers.

    Raises:
        Unusable: the turns are in another order, or one is empty.
    """
    refuse_odd_turns(row.prompt)
    if isinstance(row, Comparison):
        answers = [row.chosen, row.rejected]
    else:
        answers = row.responses if isinstance(row, Ranking) else [row.response]
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        raise Unusable("last turn is not the assistant's")


def read_comparisons(path: Path, *, tag: str = "", seed: int = 0) -> Imported:
    """Read the labels of a file where only pairs are of use.

    Raises:
        DataError: as `read_labels`, or the file holds ratings or rankings.
    """
    imported = read_labels(path, tag=tag, seed=seed)
    if imported.kind != "comparisons":
        raise DataError(f"{path}: holds {imported.kind}; pairs of which one answer was preferred are expected here.")
    return imported


def _own_kind(path: Path) -> type[Comparison] | type[Rating] | type[Ranking] | None:
    """Return what the rows of a file of this package are, or None for another project's file."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return None
    first = next((row for _, row in read_jsonl(path, finite=False)), {})
    if not first.keys() >= _OWN_COLUMNS:
        return None
    return next((kind for column, kind in _KINDS.items() if column in first), None)


def count_reasons(unused: Sequence[Fields]) -> dict[str, int]:
    """Count rows set aside by their reason, the most frequent first, whichever earlier line a reason names."""
    return dict(Counter(re.sub(r"\bline \d+", "an earlier line", row["reason"]) for row in unused).most_common())


def summary(imported: Imported, output: Path, unused: Path) -> str:
    """Say what became of the rows of a file."""
    kept = imported.rows
    lines = [
        f"{len(kept) + len(imported.unused)} rows ({imported.format}): {len(kept)} {imported.kind} -> {output}",
        f"  for training {sum(row.split == 'train' for row in kept)}, held out "
        f"{sum(row.split == 'eval' for row in kept)}",
    ]
    flags = Counter(flag for row in imported.comparisons for flag in row.flags if flag != FLAG)
    lines += [f"  {flag}: {count}" for flag, count in flags.most_common()]
    if imported.contradictory:
        places = {row.id: row.provenance.get("line", row.id) for row in kept}
        shown = [f"{places[one]} against {places[other]}" for one, other in imported.contradictory.items()]
        lines.append(f"  {FLAG} {len(shown)} (kept; {WHY}): line {', '.join(shown[:5])}{', ...' * (len(shown) > 5)}")
    if imported.unused:
        lines.append(f"  not usable {len(imported.unused)} -> {unused}")
        for reason, count in count_reasons(imported.unused).items():
            lines.append(f"    {reason}: {count}")
    return "\n".join(lines)
