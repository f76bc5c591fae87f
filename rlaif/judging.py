"""Judges outside of a run: `rlaif constitution test` runs a constitution's tests, `rlaif.induce` asks for votes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif.constitution import load, read
from rlaif.engines.engine import Engine
from rlaif.errors import ConstitutionError
from rlaif.journal import Journal
from rlaif.maths import agreement
from rlaif.progress import Progress
from rlaif.recipe import Loaded
from rlaif.stages.candidates import Engines
from rlaif.stages.quality import measure_panel
from rlaif.stages.run import Run
from rlaif.stages.votes import panel_of

STAGE = "test"


@contextmanager
def open_run(loaded: Loaded, progress: Progress, journal: Path | None) -> Iterator[Run]:
    """Open a recipe as a run that only answers questions.

    Args:
        loaded: the recipe.
        progress: who is told.
        journal: where answers are kept; with None they are forgotten at the end.

    Raises:
        ConfigError: a judge of the recipe needs a key or a package that is not there.
    """
    with (
        tempfile.TemporaryDirectory(prefix="rlaif-") as folder,
        Journal(journal or Path(folder) / "journal.db") as book,
    ):
        run = Run(loaded, loaded.recipe.folder(), book, progress)
        run.check_keys(["label"])
        try:
            yield run
        finally:
            run.release()


def engine_of(run: Run) -> Engine:
    """Return the engine that a recipe's section `label` names as its judge, which is asked to choose and to write."""
    return Engines(run).judge(run.recipe.label.judge, chooses=True)


def run_tests(path: Path, loaded: Loaded, progress: Progress, *, journal: Path | None = None) -> dict[str, Any]:
    """Run the tests of a constitution against judges; return what came out, as JSON.

    Args:
        path: the constitution.
        loaded: a recipe, whose section `label` says who judges and how.
        progress: who is told.
        journal: where answers are kept, so that a second time asks only what has changed; None keeps none.

    Raises:
        ConstitutionError: the file has a fault, or holds no tests.
    """
    constitution = load(path)
    if not constitution.tests:
        raise ConstitutionError(
            f"{path}: no tests to run. Add a `tests:` section with prompts, better and worse answers."
        )
    with open_run(loaded.model_copy(update={"constitution": path}), progress, journal) as run:
        measured = measure_panel(panel_of(run, Engines(run), STAGE))
    assert measured is not None, "there are tests"
    tests = [placed for placed in read(path).entries if placed.part == "tests"]
    for row, placed in zip(measured["by_test"], tests, strict=True):
        row["principle"] = row["principle"] or constitution.principles[0].id
        row["place"] = placed.problem("", "", "").place
    return {
        "constitution": f"{constitution.name} {constitution.version}",
        "constitution_hash": constitution.hash,
        **measured,
        "ties": sum(row["strength"] == 0 for row in measured["by_test"]),
        "by_principle": _by_principle(measured["by_test"]),
    }


def _by_principle(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(row["principle"] for row in rows)
    groups = {name: [row["correct"] for row in rows if row["principle"] == name] for name in names}
    return {name: agreement.wilson(sum(right), len(right))._asdict() for name, right in groups.items()}


def results_as_text(found: dict[str, Any]) -> str:
    """Write what came out of the tests for people."""
    tests, same, mass = found["tests"], found["same_position"] or {"count": 0, "n": 0}, found["option_mass"]
    most = f", mostly the {found['same_position_choice']}" if found["same_position_choice"] else ""
    silent = f"; not answered: {found['abstained']}" if found["abstained"] else ""
    way = "" if found["method"] == "logprobs" else f" ({found['method']})"
    lines = [
        f"{found['constitution']}, judged by {found['model']}{way}: {tests['correct']} of {tests['n']} tests right: "
        f"{_percent(tests)}",
        f"  same position in both orders: {same['count']:.0f} of {same['n']}{most}; ties: {found['ties']}{silent}",
    ]
    if mass is not None:  # None where nothing was answered
        options = "letters A and B" if found["method"] == "logprobs" else "options"
        lines.append(f"  probability on the {options}: {mass['mean']:.2f} on average, {mass['min']:.2f} at least")
    lines.append("  by principle:")
    width = max(map(len, found["by_principle"]))
    for name, rate in found["by_principle"].items():
        lines.append(f"    {name:{width}}  {rate['count']:.0f} of {rate['n']}: {_percent(rate)}")
    answered = [row for row in found["by_test"] if row["abstained"] is None]
    wrong = sorted((row for row in answered if not row["correct"]), key=lambda row: float(row["strength"]))
    if wrong:
        lines.append("  wrong, the surest first (logits for the worse answer):")
    lines += [f"    {row['place']}: {-row['strength']:.2f}: {' '.join(row['prompt'].split())[:60]}" for row in wrong]
    return "\n".join(lines)


def _percent(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.0%} (95 % interval {rate['low']:.0%} to {rate['high']:.0%})"
