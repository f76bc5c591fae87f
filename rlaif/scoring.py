"""Score answers with a trained reward model: what `rlaif reward score` and `rlaif reward serve` share."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlaif.conversations import Answers, refuse
from rlaif.errors import ConfigError, ModelError
from rlaif.maths import agreement
from rlaif.model.base import is_classifier
from rlaif.model.groups import Group
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import batches_by_length
from rlaif.pipeline import open_run
from rlaif.progress import Progress
from rlaif.recipe import ModelSection
from rlaif.rounds import newest_of
from rlaif.sections import Combination
from rlaif.stages.reward_model import (
    CALIBRATION,
    COST,
    REWARD,
    RewardModel,
    Scale,
    encode_group,
    read_calibration,
    roles_of,
)

_STAGE = "4-reward"
_PLAIN = Scale(0.0, 1.0)


class Place(NamedTuple):
    """What a path names: the adapters, the scales of their members where they are known, and the base."""

    adapters: list[Path]
    scales: list[Scale]  # empty: not known
    base: ModelSection
    classifier: bool  # the base is a reward model itself


class Score(NamedTuple):
    """The score of one answer, and those of the members of an ensemble, on their own scales."""

    score: float
    members: list[float]


def find(path: Path, base: str | None) -> Place:
    """Find what a run folder, the folder of its stage `reward`, or an adapter folder holds.

    Args:
        path: the folder.
        base: a model to put an adapter on, in place of the one that its folder names.

    Raises:
        ModelError: the folder is none of these.
        StageError: the stage has not finished, or an earlier version has written it.
    """
    stage = newest_of(path, _STAGE) if (path / "recipe.yaml").is_file() else path
    if (stage / "adapter_config.json").is_file():
        adapters, scales = [stage], _scales_beside(stage)
    elif stage != path or (stage / CALIBRATION).is_file() or (stage / "adapter").is_dir():
        measured = read_calibration(stage)
        names = [COST] if stage.name == COST else roles_of(REWARD, len(list(stage.glob(f"{REWARD}-[0-9]*"))) + 1)
        adapters = [(stage if name in (REWARD, COST) else stage / name) / "adapter" for name in names]
        scales = [Scale(one["offset"], one["scale"]) for one in measured["members"]]
    else:
        raise ModelError(
            f"{path}: neither a run folder (recipe.yaml), nor its `{_STAGE}` ({CALIBRATION}), nor an adapter folder "
            "(adapter_config.json). Name one of these."
        )
    return Place(adapters, scales, *_base_of(adapters[0], base))


def _scales_beside(adapter: Path) -> list[Scale]:
    """Return the scales of an adapter's members as the stage beside it has measured them; none where there is none."""
    part = adapter.parent
    if adapter.name != "adapter":
        return []
    number = re.fullmatch(rf"{REWARD}-(\d+)", part.name)
    measured = part.parent / CALIBRATION if number else part / CALIBRATION
    if not measured.is_file():
        return []
    members = [Scale(one["offset"], one["scale"]) for one in json.loads(measured.read_bytes())["members"]]
    if part.name == COST:
        return members
    folders = measured.parent
    each = len(members) // (len(list(folders.glob(f"{REWARD}-[0-9]*"))) + 1)  # every adapter has as many heads
    first = (int(number[1]) - 1) * each if number else 0
    return members[first : first + each]


def _base_of(adapter: Path, wanted: str | None) -> tuple[ModelSection, bool]:
    """Return the base that an adapter stands on: what was asked for, its run's, or the one that its folder names."""
    if wanted is None:
        run = next((folder for folder in adapter.resolve().parents if (folder / "recipe.yaml").is_file()), None)
        if run is not None and any(part.name == _STAGE for part in adapter.resolve().parents):
            recipe = open_run(run).recipe
            return recipe.reward_base(), recipe.reward.model is not None
    try:
        stored = json.loads((adapter / "adapter_config.json").read_bytes())
        name, revision = stored["base_model_name_or_path"], stored.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ModelError(f"{adapter}: its adapter_config.json cannot be read: {problem}.") from None
    if wanted is not None:
        name, revision = wanted, None
    if not isinstance(name, str) or not name:
        raise ModelError(f"{adapter}: its adapter_config.json names no base model. Name it with --base.")
    settings = ModelSection(model_name_or_path=name, model_revision=revision)
    return settings, is_classifier(settings)


class Scorer:
    """A reward model in memory that turns conversations into scores."""

    def __init__(self, model: RewardModel, *, shift: bool, batch_size: int):
        """Take a model.

        Args:
            model: the reward model.
            shift: whether the score of a single member is shifted and scaled as `calibration.json` says; those of
                several are before they are put together.
            batch_size: answers in a forward pass.
        """
        self.model, self.batch_size = model, batch_size
        self._scale = model.scale if shift else _PLAIN

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        ensemble: str | None = None,
        raw: bool = False,
        batch_size: int = 16,
        base: str | None = None,
    ) -> "Scorer":
        """Load a reward model from a folder; see `find`.

        Raises:
            ModelError: no reward model is there, or it does not fit its base.
            ConfigError: `ensemble` for a single member, or scores on a scale that nobody has measured.
        """
        place = find(path, base)
        shared = SharedBase.load(place.base, classifier=place.classifier)
        roles = roles_of(REWARD, len(place.adapters))
        for role, adapter in zip(roles, place.adapters, strict=True):
            shared.add_role(role, adapter=adapter)
            if role not in shared.heads:
                raise ModelError(f"{adapter}: has no head, so it scores nothing. Name the adapter of a reward model.")
        members = sum(len(shared.head_weight(role)) for role in roles)
        if not raw and not place.scales:
            raise ConfigError(
                f"{path}: no {CALIBRATION} beside it, so the scale of its scores is not known. Add --raw to have them "
                "as they are."
            )
        if ensemble is not None and members == 1:
            raise ConfigError(f"--ensemble: {path} has a single member, which is its score. Leave the option out.")
        combination = Combination.model_validate({"ensemble": ensemble or "mean"})
        scales = [_PLAIN] * members if raw else place.scales
        return cls(RewardModel(shared, roles, scales, combination), shift=not raw, batch_size=batch_size)

    @property
    def max_length(self) -> int:
        """How many tokens a conversation may have."""
        return self.model.base.max_length

    def score(self, groups: Sequence[Group], progress: Progress | None = None) -> list[list[Score]]:
        """Score the answers of each group, in batches of groups of similar length."""
        lengths = [len(group.prompt) + sum(map(len, group.responses)) for group in groups]
        found: list[list[Score]] = [[] for _ in groups]
        with (progress or Progress(quiet=True)).task("scoring", len(groups)) as task:
            for part in batches_by_length(lengths, self.batch_size):
                members = self.model.members([groups[index] for index in part])
                scores = ((self.model.combine(members) - self._scale.offset) / self._scale.scale).tolist()
                each = iter(zip(scores, members.tolist(), strict=True))
                for index in part:
                    found[index] = [Score(*next(each)) for _ in groups[index].responses]
                task.advance(len(part), tokens=sum(lengths[index] for index in part))
        return found


def score_rows(scorer: Scorer, path: Path, rows: Sequence[Answers], progress: Progress) -> list[dict[str, Any]]:
    """Score the answers of a file's rows; return the rows as they came, with what was found.

    One answer gives `score`; a comparison `score_chosen`, `score_rejected` and `score_gap`; a ranking
    `score_responses`. Where there are several members, `members` stands beside each, on their own scales.

    Raises:
        DataError: names each row that is longer than the model's context, or has such a column already.
    """
    groups = [encode_group(scorer.model, row.prompt, [*_flat(row)]) for row in rows]
    problems = []
    for row, group in zip(rows, groups, strict=True):
        taken = sorted(name for name in row.row if name in _columns(row))
        longest = len(group.prompt) + max(map(len, group.responses))
        if taken:
            problems.append(f"{path}:{row.line}: has a column `{taken[0]}` already. Rename it, or remove it.")
        elif longest > scorer.max_length:
            problems.append(
                f"{path}:{row.line}: {longest} tokens; the model's context holds {scorer.max_length}. Shorten the row."
            )
    refuse(problems)
    several = len(scorer.model.scales) > 1
    result = []
    for row, scores in zip(rows, scorer.score(groups, progress), strict=True):
        own = iter(scores)
        columns: dict[str, Any] = {}
        for name, answers in row.answers.items():
            some = [next(own) for _ in answers]
            ending = f"_{name}" if len(_flat(row)) > 1 or name == "responses" else ""
            columns[f"score{ending}"] = [one.score for one in some] if name == "responses" else some[0].score
            if several:
                columns[f"members{ending}"] = [one.members for one in some] if name == "responses" else some[0].members
        if "chosen" in row.answers:
            columns["score_gap"] = columns["score_chosen"] - columns["score_rejected"]
        result.append({**row.row, **columns})
    return result


def _flat(row: Answers) -> list[Any]:
    return [answer for answers in row.answers.values() for answer in answers]


def _columns(row: Answers) -> set[str]:
    endings = {f"_{name}" for name in row.answers} if {"chosen", "responses"} & set(row.answers) else {""}
    gap = {"score_gap"} if "chosen" in row.answers else set()
    return gap | {f"{what}{ending}" for what in ("score", "members") for ending in endings}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Say in one line what was found: how many rows, their mean score, how often the chosen answer is higher."""
    gaps = [row["score_gap"] for row in rows if "score_gap" in row]
    single = [row["score"] for row in rows if "score_gap" not in row and "score" in row]
    parts = [f"{len(rows)} rows"]
    if single:
        parts.append(f"mean score {torch.tensor(single).mean().item():.3f}")
    if gaps:
        rate = agreement.wilson(sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps), len(gaps))
        parts.append(
            f"chosen above rejected in {rate.rate:.0%} of {len(gaps)} comparisons (95 % interval {rate.low:.0%} to "
            f"{rate.high:.0%})"
        )
    return "; ".join(parts)
