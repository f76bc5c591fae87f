"""The report: what a run did and what came out, as one HTML file that needs nothing else.

`write_report` reads a run folder (`reading`), turns its numbers into sentences (`wording`) and drawings
(`charts`, `curves`), picks samples by a fixed rule and fills in ``report.html.jinja``. The same run folder
gives the same bytes. The page loads nothing and runs nothing: its content security policy forbids both.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from rlaif import files
from rlaif.documents import read_text
from rlaif.errors import DataError
from rlaif.prompting import sandbox
from rlaif.recipe import OPTIONAL, ORDER
from rlaif.report import curves, evaluation, reward, wording
from rlaif.report.charts import interval_chart
from rlaif.report.overoptimization import overoptimization_figures
from rlaif.report.reading import (
    Chain,
    PpoSample,
    Quality,
    Run,
    count_of,
    read_run,
)
from rlaif.report.rounds import read_rounds

MAX_CHAINS, MAX_QUARANTINED, MAX_ANSWERS = 12, 4, 15
MAX_ANNOTATORS = 20
MAX_SAMPLED_PROMPTS, MAX_SAMPLED_UPDATES = 3, 6
FEEDBACK = {"ai": "an AI labeller", "human": "people", "mixed": "an AI labeller and people"}
_HERE = Path(__file__).resolve().parent
T = TypeVar("T")


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder from what its stages wrote, and return its path.

    A stage that did not run, or did not finish, is left out with a line that says so.

    Raises:
        DataError: the folder is no run folder, or a file of a finished stage is missing or damaged.
        JournalError: the file cannot be written; an older report stays as it was.
    """
    path = run_folder / "report.html"
    files.write_text(path, render(read_run(run_folder)))
    return path


def render(run: Run) -> str:
    """Return the page. No text of the run becomes markup, and its control characters are made visible."""
    environment = sandbox(autoescape=True)
    environment.filters.update(
        join=lambda parts, by: by.join(parts),
        count=wording.count,
        counts=wording.counts,
        duration=wording.duration,
        gib=wording.gib,
        mean=wording.mean,
        number=wording.number,
        percent=wording.percent,
        points=wording.points,
        change=wording.change,
        policy=wording.policy_name,
        rate=wording.rate,
        tag=wording.tag_name,
        in_order=wording.in_order,
    )
    template = environment.from_string(read_text(_HERE / "report.html.jinja", DataError))
    style = Markup(read_text(_HERE / "report.css", DataError))  # our own file, and no text of a run
    known = [*run.manifests, *run.unfinished]
    stages = [stage for stage in ORDER if stage in known or stage not in OPTIONAL]
    return wording.visible(template.render(style=style, stages=stages, run=run, **_content(run))) + "\n"


def _content(run: Run) -> dict[str, Any]:
    """Return what the template shows beside the run itself."""
    model = run.recipe.get("model", "not named")
    memory = [one.peak_memory_gib for one in run.manifests.values() if one.peak_memory_gib is not None]
    feedback = str(run.recipe.get("feedback", "ai"))
    return {
        "name": str(run.recipe.get("name", run.folder.name)),
        "model": str(model.get("model_name_or_path", "not named")) if isinstance(model, dict) else str(model),
        "seed": str(run.recipe.get("seed", 0)),
        "feedback": FEEDBACK.get(feedback, feedback),
        "seconds": sum(one.seconds or 0.0 for one in run.manifests.values()),
        "memory": max(memory, default=None),
        "chains": sample_chains(run.chains),
        "ppo_samples": samples_over_time(run.ppo_samples),
        "sft_figures": curves.sft_figures(run.sft),
        "reward_figures": curves.reward_figures(run.reward),
        "ppo_findings": wording.ppo_findings(run.ppo, run.recipe.get("ppo")),
        "ppo_figures": curves.ppo_figures(run.ppo, overoptimization_figures(run.ppo)),
        "versions": _versions(run),
        "rounds": read_rounds(run.folder, count_of(run.recipe)),
        **(evaluation.content(run.results) if run.results else {}),
        "answers": alternate(run.results.samples if run.results else [], lambda row: row.tag, MAX_ANSWERS),
        **(_of_labels(run.quality, people=feedback == "mixed") if run.quality else {}),
        **(reward.content(run.reward_evaluation, run.cost_evaluation) if run.reward_evaluation else {}),
    }


def _of_labels(quality: Quality, people: bool) -> dict[str, Any]:
    """Return sentences and a chart about the judge, the tests it got wrong, and the tags of labels."""
    judge = quality.judge
    bars = [wording.bar("judges" if judge.judges else "judge", judge.tests)] if judge else []
    bars += [wording.bar(one.name, one.tests, 3) for one in (judge.judges if judge else [])]
    tests = "Accuracy of the judge on the constitution\u2019s tests, with its 95 % interval"
    return {
        "judge_findings": wording.judge_findings(quality, people=people) + wording.label_findings(quality),
        "judge_chart": interval_chart([("", bars)], title=tests, reference=(0.5, "chance")),
        "wrong_tests": [test for test in judge.by_test if not test.correct] if judge else [],
        "rules": wording.RULES,
        "max_annotators": MAX_ANNOTATORS,
        "label_tags": wording.in_order({*quality.labels.by_tag, *quality.labels.chosen_refuses}),
    }


def sample_chains(chains: Sequence[Chain]) -> list[Chain]:
    """Pick up to twelve chains: up to four set aside, of different reasons, and kept ones of all tags."""
    aside = alternate([chain for chain in chains if not chain.kept], lambda row: row.reason or "", MAX_CHAINS)
    kept = alternate([chain for chain in chains if chain.kept], lambda row: row.tag, MAX_CHAINS)
    kept = kept[: MAX_CHAINS - min(MAX_QUARANTINED, len(aside))]
    return kept + aside[: MAX_CHAINS - len(kept)]


def alternate(rows: Sequence[T], group: Callable[[T], str], limit: int) -> list[T]:
    """Return the first rows of each group in turn, groups in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    turns = zip_longest(*groups.values())
    return [row for turn in turns for row in turn if row is not None][:limit]


def samples_over_time(rows: Sequence[PpoSample]) -> list[list[PpoSample]]:
    """Follow the prompts sampled most often over updates; prompts sampled once make one list."""
    prompts: dict[str, list[PpoSample]] = {}
    for row in rows:
        prompts.setdefault(row.prompt, []).append(row)
    often = sorted((group for group in prompts.values() if len(group) > 1), key=len, reverse=True)
    groups = often[:MAX_SAMPLED_PROMPTS] or ([list(rows)] if rows else [])
    return [_spread(sorted(group, key=lambda row: row.update), MAX_SAMPLED_UPDATES) for group in groups]


def _spread(rows: Sequence[T], limit: int) -> list[T]:
    """Return the first row, the last, and those evenly between them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (limit - 1))] for index in range(limit)]


def _versions(run: Run) -> dict[str, str]:
    """Return the versions of packages over all stages; several where stages ran with different ones."""
    found: dict[str, list[str]] = {}
    for manifest in run.manifests.values():
        for package, version in manifest.versions.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", then ".join(found[package]) for package in sorted(found)}
