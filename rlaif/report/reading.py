"""What the stages wrote into a run folder, read and checked; the only part of the report that touches files.

Every file has a model here that names the keys the report needs; other keys are ignored, so a stage may write
more. A stage has run when its folder holds ``manifest.json``, which each stage writes last.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlaif.documents import load_yaml, read_text
from rlaif.errors import DataError
from rlaif.recipe import FOLDERS
from rlaif.records import read_jsonl
from rlaif.report.labels import Judge as Judge
from rlaif.report.labels import Mean, Part, Rate
from rlaif.report.labels import Quality as Quality
from rlaif.report.results import Results
from rlaif.rounds import ONCE, round_folder

Metrics = list[dict[str, Any]]


class Manifest(Part):
    """``manifest.json`` of a stage."""

    stage: str
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    counts: dict[str, Any] = {}
    seconds: float | None = None
    peak_memory_gib: float | None = None
    versions: dict[str, str] = {}


class Step(Part):
    """One critique and revision."""

    principle: str
    title: str | None = None
    critique: str
    revision: str


class Chain(Part):
    """One row of ``chains.jsonl``."""

    id: str
    prompt: str
    tag: str = ""
    response: str
    steps: list[Step]
    kept: bool
    reason: str | None = None


class Slice(Part):
    """Accuracy on the pairs whose covariate lies between two values."""

    low: float
    high: float
    accuracy: Rate


class Reliability(Part):
    """One bin of how sure the model is, and how often it is right there."""

    count: int
    confidence: float | None
    accuracy: Rate | None


class Temperature(Part):
    """What scores are divided by for the best likelihood; None where no number is best, and why."""

    temperature: float | None
    nll: float
    found: str


class Swapped(Part):
    """How far scores move when names or pronouns are exchanged, in deviations of a score."""

    answers: int
    mean: Mean | None
    mean_absolute: float | None


class Disagreement(Part):
    """A property of rows whose labels a reference speaks against more often than against others."""

    kind: str
    name: str
    reference: str
    rows: int
    against: float
    others_against: float
    q: float
    turned: Rate | None = None


class RewardEvaluation(Part):
    """``calibration.json`` of the reward stage."""

    heldout: dict[str, Rate]
    nll: float | None = None
    ece: float | None = None
    reliability: list[Reliability] = []
    temperature: Temperature | None = None
    by_source: dict[str, Rate] = {}
    by_length_difference: list[Slice] = []
    length_correlation: dict[str, float | None] = {}
    counterfactual: dict[str, Swapped] = {}
    disagreements: list[Disagreement] | None = None
    baselines: dict[str, Rate] = {}
    min_heldout_accuracy: float | None = None
    offset: float | None = None
    scale: float | None = None
    reference: str | None = None
    train_pairs: int
    heldout_pairs: int


class CostEvaluation(Part):
    """``cost/calibration.json`` of the reward stage."""

    sign: Rate | None
    sign_of_unsafe: Rate | None = None
    sign_of_safe: Rate | None = None
    unsafe: Rate | None = None
    order: Rate | None = None


class PpoSample(Part):
    """One row of ``samples.jsonl`` of the PPO stage."""

    update: int
    prompt: str
    response: str
    score: float | None
    kl: float | None


@dataclass(frozen=True)
class Run:
    """Everything the report shows of a run folder; None or empty where a stage did not run."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    constitution: str
    manifests: dict[str, Manifest]
    unfinished: list[str]
    chains: list[Chain]
    sft: Metrics
    quality: Quality | None
    reward: Metrics
    reward_evaluation: RewardEvaluation | None
    cost_evaluation: CostEvaluation | None
    ppo: Metrics
    ppo_samples: list[PpoSample]
    results: Results | None


M = TypeVar("M", bound=Part)
T = TypeVar("T")


def count_of(recipe: dict[str, Any]) -> int:
    """Return how many rounds a recipe as resolved has."""
    rounds = recipe.get("rounds", 1)
    count = rounds.get("count", 1) if isinstance(rounds, dict) else rounds
    return count if isinstance(count, int) else 1


def folder_of(run_folder: Path, stage: str, number: int) -> Path:
    """Return a stage's folder in a round."""
    parent = run_folder if stage in ONCE else round_folder(run_folder, number)
    return parent / f"{FOLDERS.index(stage) + 1}-{stage}"


def newest_round(run_folder: Path, count: int) -> int:
    """Return the last round in which a stage has finished; the first where none has."""
    repeated = [stage for stage in FOLDERS if stage not in ONCE]
    return next(
        (
            number
            for number in range(count, 1, -1)
            if any((folder_of(run_folder, stage, number) / "manifest.json").is_file() for stage in repeated)
        ),
        1,
    )


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder holds no ``recipe.yaml``, or a file of a finished stage is missing or damaged
            (naming the file, and the line or key).
    """
    recipe_path = folder / "recipe.yaml"
    if not recipe_path.is_file():
        raise DataError(f"{folder}: not a run folder: it holds no recipe.yaml. Name a folder that `rlaif run` made.")
    recipe = load_yaml(recipe_path, DataError).data
    last = newest_round(folder, count_of(recipe))
    places = {stage: folder_of(folder, stage, last) for stage in FOLDERS}
    manifests = {
        stage: read_object(place / "manifest.json", Manifest)
        for stage, place in places.items()
        if (place / "manifest.json").is_file()
    }
    done = {stage: places[stage] for stage in manifests}
    reward, cost = (places["reward"] / part / "calibration.json" for part in ("", "cost"))
    return Run(
        folder=folder,
        recipe=recipe,
        constitution=_constitution(done) or Path(str(recipe.get("constitution", "not named"))).stem,
        recipe_text=read_text(recipe_path, DataError),
        manifests=manifests,
        unfinished=[stage for stage, place in places.items() if place.is_dir() and stage not in manifests],
        chains=list(_rows(done["revise"] / "chains.jsonl", Chain)) if "revise" in done else [],
        sft=_kept(_metrics(places["sft"]), "sft" in done),
        quality=read_object(done["label"] / "quality.json", Quality) if "label" in done else None,
        reward=_kept(_metrics(places["reward"]), "reward" in done),
        reward_evaluation=read_object(reward, RewardEvaluation) if "reward" in done else None,
        cost_evaluation=read_object(cost, CostEvaluation) if cost.is_file() else None,
        ppo=_kept(_metrics(places["ppo"]), "ppo" in done),
        ppo_samples=_kept(_rows(places["ppo"] / "samples.jsonl", PpoSample), "ppo" in done),
        results=_results(done["evaluate"] / "results.json") if "evaluate" in done else None,
    )


def _constitution(done: dict[str, Path]) -> str | None:
    """Return name and version of the constitution as the first row that knows them says."""
    names = {"revise": ("demonstrations.jsonl", "quarantine.jsonl"), "label": ("comparisons.jsonl",)}
    for path in (done[stage] / name for stage in names if stage in done for name in names[stage]):
        for _, row in read_jsonl(path) if path.is_file() else ():
            provenance = row.get("provenance")
            if isinstance(provenance, dict) and isinstance(provenance.get("constitution"), str):
                return str(provenance["constitution"])
            break
    return None


def _metrics(place: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in read_jsonl(place / "metrics.jsonl"))


def _rows(path: Path, model: type[M]) -> Iterator[M]:
    return (_checked(row, f"{path}:{number}", model) for number, row in read_jsonl(path))


def _kept(rows: Iterator[T], finished: bool) -> list[T]:
    """Return the rows of a stage's file; of a stage that has not finished, those before the first that is torn."""
    found: list[T] = []
    try:
        for row in rows:
            found.append(row)
    except DataError:
        if finished:
            raise
    return found


def read_object(path: Path, model: type[M]) -> M:
    """Read a JSON object and check it."""
    try:
        value = json.loads(read_text(path, DataError))
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{path}:{problem.lineno}: not readable as JSON: {problem.msg} at column {problem.colno}. " + _again(path)
        ) from None
    return _checked(value, str(path), model)


def _results(path: Path) -> Results:
    """Read the results, and check that every policy they list was measured."""
    results = read_object(path, Results)
    unmeasured = [policy for policy in results.policies if policy not in results.metrics]
    if unmeasured:
        raise DataError(f"{path}: metrics.{unmeasured[0]}: missing, though `policies` lists it. {_again(path)}")
    return results


def _checked(value: Any, where: str, model: type[M]) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as problems:
        lines = [
            f"{where}: {'.'.join(map(str, item['loc'])) or '(file)'}: {item['msg'].lower()}"
            for item in problems.errors(include_url=False)
        ]
        raise DataError("\n".join([*lines[:10], _again(Path(where))])) from None


def _again(path: Path) -> str:
    return f"Run the stage again: `rlaif run RECIPE --from {path.parent.name.partition('-')[2]}`."
