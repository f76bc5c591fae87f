"""People's labels as the stage `label` takes them in: every file that the recipe names, in one.

Those files are of the first round. In a later one people label pairs of the newest policy: the stage writes them to
``pairs.jsonl`` beside the stages of the round and stops until ``labels.jsonl`` is there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlaif import files
from rlaif.documents import fingerprint
from rlaif.errors import StageError
from rlaif.human.contradictions import mark
from rlaif.human.importers import Labelled, why_unused
from rlaif.human.labels import read_comparisons, read_labels
from rlaif.records import Comparison, Messages, Ranking, Rating, text_of, with_system
from rlaif.rounds import LABELS
from rlaif.stages.candidates import Candidate, Engines, Unused, collect, origin_of_round
from rlaif.stages.run import Run

PAIRS = "pairs.jsonl"
Key = tuple[str, frozenset[str]]


class People(NamedTuple):
    """What people said: usable rows by their kind, the others with a reason, and how many contradict another row.

    `asked` are the ids of the candidates that were theirs to label, so that no judge does.
    """

    comparisons: list[Comparison]
    ratings: list[Rating]
    rankings: list[Ranking]
    unused: list[dict[str, Any]]
    contradictory: int
    asked: frozenset[str] = frozenset()

    @property
    def more(self) -> dict[str, int]:
        """How many rows there are that are no comparisons, by the name of their file."""
        counts = {"ratings": len(self.ratings), "rankings": len(self.rankings)}
        return {name: count for name, count in counts.items() if count}


def people_labels(run: Run, engines: Engines) -> People:
    """Read the files of people's labels that the recipe names; where it asks AI only, there are none.

    Raises:
        StageError: pairs of a later round wait for labels.
    """
    if run.round > 1:
        return _of_round(run, engines)
    kept: list[Labelled] = []
    unused: list[dict[str, Any]] = []
    seen: dict[str, tuple[str, str]] = {}
    settings = run.recipe.human
    for path in run.loaded.human_files if run.recipe.feedback != "ai" else ():
        imported = read_labels(path, tag=settings.tag, annotator=settings.annotator, seed=run.recipe.seed)
        for row in imported.rows:
            row.prompt = with_system(row.prompt, run.recipe.system_prompt)  # as the policy will be asked
            reason = why_unused(row, path.name, seen)
            if reason:
                unused.append({"file": path.name, "reason": reason, "row": row.model_dump()})
            else:
                kept.append(row)
        unused += [{"file": path.name, **row} for row in imported.unused]
    return People(
        [row for row in kept if isinstance(row, Comparison)],
        [row for row in kept if isinstance(row, Rating)],
        [row for row in kept if isinstance(row, Ranking)],
        unused,
        len(mark(kept)),  # once more, over all files
    )


def known_labels(run: Run) -> list[Labelled]:
    """Read the labels that are taken for the truth about annotators; none where the recipe names no such file."""
    if run.loaded.known is None:
        return []
    rows = read_labels(run.loaded.known, seed=run.recipe.seed).rows
    for row in rows:
        row.prompt = with_system(row.prompt, run.recipe.system_prompt)  # as in the rows that they are compared with
    return rows


# --- later rounds -------------------------------------------------------------------------------------------------


def pairs_for_people(run: Run) -> int | None:
    """Return how many pairs of a later round people label; None: all."""
    feedback, count = run.recipe.feedback, run.recipe.rounds.human_pairs
    if feedback == "ai":
        return 0
    return 0 if count is None and feedback == "mixed" else count


def _of_round(run: Run, engines: Engines) -> People:
    count = pairs_for_people(run)
    if count == 0:
        return People([], [], [], [], 0)
    found, unused = collect(run, engines)
    drawn = {one.id for one in sorted(found, key=lambda one: run.seed("people", one.id))[:count]}
    asked = [one for one in found if one.id in drawn]
    files.write_jsonl(run.round_folder / PAIRS, [_shown(run, one) for one in asked])
    rows, aside = _labelled(run, asked)
    if run.recipe.feedback == "human" or run.recipe.label.method != "judge":  # else the judge's part counts them
        aside += unused
    return People(rows, [], [], aside, len(mark(rows)), frozenset(drawn))


def _shown(run: Run, one: Candidate) -> dict[str, Any]:
    """Return a pair as people are shown it: PKU-SafeRLHF's columns, of which `better_response_id` is to be added."""
    turns: Messages = [turn for turn in one.prompt if turn["content"] != run.recipe.system_prompt]
    prompt = turns[0]["content"] if len(turns) == 1 else turns
    return {"id": one.id, "tag": one.tag, "prompt": prompt, "response_0": one.first, "response_1": one.second}


def _labelled(run: Run, asked: Sequence[Candidate]) -> tuple[list[Comparison], Unused]:
    """Return the labels of these pairs, and all pairs and labels without the other, with the reason."""
    path = run.round_folder / LABELS
    if not path.is_file():
        raise StageError(
            f"round {run.round}: {len(asked)} pairs of answers of the newest policy wait for people's labels in "
            f"{run.round_folder / PAIRS}. Add `better_response_id`, 0 or 1, to its rows and save them as {path}, or "
            "put there a file of these pairs in any other form that `rlaif human import` reads. Then run the same "
            "command again; nothing done so far is lost."
        )
    imported = read_comparisons(path, seed=run.recipe.seed)
    pairs = {_key(one.prompt, [one.first, one.second]): one for one in asked}
    unused: Unused = [{"file": path.name, **row} for row in imported.unused]
    rows: dict[str, Comparison] = {}
    labelled: set[str] = set()
    for row in imported.comparisons:
        texts = [text_of(row.chosen), text_of(row.rejected)]
        one = pairs.get(_key(row.prompt, texts))
        if one is None:
            unused.append({"file": path.name, "reason": "no pair of this round", "row": row.model_dump()})
            continue
        name = f"{one.prompt_id}-{fingerprint([*texts, row.annotator])[:8]}"
        if name in rows:
            unused.append({"file": path.name, "reason": "stands there twice", "row": row.model_dump()})
            continue
        labelled.add(one.id)
        origin = row.provenance | {"prompt_id": one.prompt_id, **one.origin, **origin_of_round(run)}
        known = {"id": name, "prompt": one.prompt, "tag": one.tag, "split": one.split, "provenance": origin}
        rows[name] = row.model_copy(update=known)
    if not rows:
        raise StageError(
            f"{path}: none of its {len(imported.comparisons)} labels is of a pair in {run.round_folder / PAIRS}. Label "
            "those pairs, with their texts as they stand."
        )
    unused += [
        {"id": one.prompt_id, "reason": "no label by people", "texts": [one.first, one.second]}
        for one in asked
        if one.id not in labelled
    ]
    return list(rows.values()), unused


def _key(prompt: Messages, answers: Sequence[str]) -> Key:
    """Return what a pair and its label have in common, whatever white space a tool has changed."""
    return " ".join(prompt[-1]["content"].split()), frozenset(" ".join(text.split()) for text in answers)
