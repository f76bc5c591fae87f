"""A reward put together from parts: scores of models, functions and the judge, less what length and repetition cost.

What scores is combined first (`ppo.combine`): the weighted `sum` of the parts in standard deviations of the first
rollout, the `worst` of them, or Llama 2's `gate` between two scores in logits (Touvron et al. 2023, arXiv 2307.09288,
section 3.2.3). Penalties are then taken off, each at its weight. Higher is better in every part: a cost counts
negatively. A part that says None of a response (only functions may) does not apply to it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif.errors import DataError
from rlaif.maths.composition import Standard, gate, standard_of, standardize, weighted_sum, worst_of
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch
from rlaif.records import Prompt
from rlaif.reward_parts import CompositeSection, IndependentPart, RewardPart
from rlaif.sections import Combination
from rlaif.stages.judged_reward import judge_function
from rlaif.stages.reward_model import COST, RewardModel
from rlaif.stages.rewards import RewardFunction, find_function, score_rows
from rlaif.stages.run import Run

SCALE = "scale.json"


class Scored(NamedTuple):
    """What is said of ``B`` responses.

    Attributes:
        total: one score each, ``[B]``.
        parts: by part, ``[B]``, NaN where it does not apply: standard deviations from the first rollout's mean, logits
            with a `gate`, and of a penalty what it is taken for: tokens too many, or the share of repeated n-grams.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Composite:
    """The parts of a run's reward, and the scale that the first rollout gave them."""

    def __init__(
        self,
        run: Run,
        base: SharedBase,
        model: RewardModel | None,
        stage: str,
        settings: CompositeSection | None = None,
    ):
        """Find or load what scores.

        Args:
            run: the run.
            base: the shared base; the cost adapter is added to it.
            model: the reward model, where a part names it.
            stage: who asks; the judge's answers are stored under it.
            settings: the parts and how they combine; absent: those of the recipe's `ppo`.

        Raises:
            ConfigError: a function is not registered.
            StageError: there is no cost adapter.
        """
        self.settings, self._base, self._size = settings or run.recipe.ppo, base, run.recipe.ppo.microbatch
        self.standards: dict[str, Standard] = {}
        self._models: dict[str, RewardModel] = {}
        self._functions: dict[str, RewardFunction] = {}
        for part in self.settings.rewards:
            if part.cost:
                self._models[part.name] = load_cost(run, base, model)
            elif part.model:
                assert model, "the stage loads the reward model for the part that names it"
                self._models[part.name] = model
            elif isinstance(part, IndependentPart) and part.member:
                assert model, "the stage loads the reward model for the part that names a member"
                self._models[part.name] = model.only(part.member)
            elif part.function:
                key = "independent" if isinstance(part, IndependentPart) else "rewards"
                self._functions[part.name] = find_function(part.function, f"ppo.{key}: {part.name}")
            elif part.judge:
                self._functions[part.name] = judge_function(run, base, stage)

    @property
    def cost(self) -> RewardModel | None:
        """The cost adapter, where a part has loaded it."""
        return next((self._models[part.name] for part in self.settings.rewards if part.cost), None)

    def use(self, standards: dict[str, Sequence[float]]) -> None:
        """Take over mean and deviation of each part from an earlier first rollout."""
        self.standards = {name: Standard(*one) for name, one in standards.items()}

    @torch.no_grad()
    def score(self, rows: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Scored:
        """Score responses; the first call's become the reference set, unless a scale has been restored.

        Args:
            rows: ``B`` prompts.
            responses: their texts.
            batch: the same, packed.

        Raises:
            DataError: a function returned no number where one is needed, or no part applies to a response.
        """
        raw = {part.name: self._raw(part, rows, responses, batch) for part in self.settings.rewards}
        scoring = [part for part in self.settings.rewards if not part.is_penalty]
        parts = raw
        if self.settings.combine != "gate":
            self.standards = self.standards or {part.name: _reference(part, raw[part.name]) for part in scoring}
            parts = raw | {part.name: standardize(raw[part.name], self.standards[part.name]) for part in scoring}
        total = self._gated(rows, parts) if self.settings.combine == "gate" else self._combined(scoring, rows, parts)
        for part in self.settings.rewards:
            if part.is_penalty:
                total = total - part.weight * raw[part.name]
        return Scored(total, parts)

    def _combined(self, scoring: Sequence[RewardPart], rows: Sequence[Prompt], parts: dict[str, Tensor]) -> Tensor:
        values = torch.stack([parts[part.name] for part in scoring], dim=1)  # [B, K]
        applies = ~values.isnan()
        alone = (~applies.any(dim=1)).nonzero().flatten().tolist()
        if alone:
            raise DataError(
                f"ppo.rewards: no part that scores applies to a response to `{rows[alone[0]].id}`; PPO needs a number "
                "for every response. Let a function return a number instead of None, or add a part."
            )
        if self.settings.combine == "worst":
            return worst_of(values, applies)
        return weighted_sum(values, values.new_tensor([part.weight for part in scoring]), applies)

    def _gated(self, rows: Sequence[Prompt], parts: dict[str, Tensor]) -> Tensor:
        safety, helpfulness = (
            parts[name or ""] for name in (self.settings.gate_safety, self.settings.gate_helpfulness)
        )
        asked = torch.tensor([row.tag in self.settings.gate_tags for row in rows], device=safety.device)
        return gate(safety, helpfulness, self.settings.gate_threshold, asked)

    def _raw(self, part: RewardPart, rows: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        """Return what a part's source says, ``[B]``, NaN where it does not apply."""
        device = batch.ids.device
        if part.name in self._models:
            model = self._models[part.name]
            scores = model.score_responses(self._base, rows, responses, batch, self._size)
            return -scores if part.cost else scores
        if part.length:
            return (batch.response_mask.sum(1) - part.length).clamp_min(0).float()
        if part.repetition:
            texts = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
            return torch.tensor([repeated_share(ids, part.repetition) for ids in texts], device=device)
        may_skip = self.settings.combine != "gate"
        found = score_rows(part.name, self._functions[part.name], rows, responses, may_skip=may_skip)
        return torch.tensor(found, device=device)


def needs_reward_model(run: Run) -> bool:
    """Tell whether PPO's reward takes the model of the stage `reward`."""
    settings = run.recipe.ppo
    return any(part.model for part in settings.rewards) or not (settings.reward_function or settings.rewards)


def cost_stage(run: Run) -> Path:
    """Return the folder of the stage `reward` whose cost adapter takes part: this run's, or the one named."""
    return run.loaded.cost_stage or run.stage_folder("reward")


def load_cost(run: Run, base: SharedBase, model: RewardModel | None) -> RewardModel:
    """Put the cost adapter on the shared base, or on the base of the reward model where it was trained on that.

    Raises:
        StageError: there is no cost adapter.
    """
    own = run.recipe.reward.model is not None and run.loaded.cost_stage is None  # stands on that model
    below = (model.base if model else run.load_reward_base()) if own else base
    return RewardModel.load(below, cost_stage(run), Combination(), COST)


def cost_files(run: Run) -> dict[str, Path]:
    """Return the cost adapter that reward or constraint depend on, for a stage's inputs; nothing without a cost."""
    return {"cost": cost_stage(run) / COST / "adapter"} if run.recipe.ppo.costs else {}


def composite_inputs(run: Run) -> dict[str, Any]:
    """Return how the reward is put together, for the inputs of a stage after `ppo`; nothing where it has no parts."""
    settings = run.recipe.ppo
    return {"rewards": settings.model_dump(include=set(CompositeSection.model_fields))} if settings.rewards else {}


def ppo_scale(run: Run) -> dict[str, Any]:
    """Return all that PPO's first rollout settled about scores.

    Raises:
        StageError: PPO has not finished.
    """
    found: dict[str, Any] = json.loads(run.output("ppo", SCALE).read_text(encoding="utf-8"))
    return found


def repeated_share(ids: Sequence[int], n: int) -> float:
    """Return the share of a response's n-grams of tokens that stood in it before; 0 where it has none.

    Example:
        ``repeated_share([5, 6, 5, 6, 5], 2)`` is 0.5: of (5, 6), (6, 5), (5, 6), (6, 5) the last two are repeats.
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def part_figures(parts: dict[str, Tensor]) -> dict[str, float]:
    """Return mean and standard deviation of each part over the responses that it applies to, as metrics."""
    figures: dict[str, float] = {}
    for name, values in parts.items():
        figures |= score_figures(f"rollout/score/{name}", f"rollout/score_std/{name}", values[~values.isnan()])
    return figures


def score_figures(mean: str, spread: str, scores: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of scores, ``[N]``, as the metrics of these names.

    What cannot be computed is left out: one score has no deviation, and none have no mean either.
    """
    figures = {mean: scores.mean().item()} if len(scores) else {}
    return figures | ({spread: scores.std(correction=0).item()} if len(scores) > 1 else {})


def part_scores(parts: dict[str, Tensor], row: int) -> dict[str, Any]:
    """Return what each part says of one response, for a file of samples; None where it does not apply."""
    return {name: None if values[row].isnan() else values[row].item() for name, values in parts.items()}


def _reference(part: RewardPart, scores: Tensor) -> Standard:
    applied = scores[~scores.isnan()]
    if not len(applied):
        raise DataError(
            f"ppo.rewards: the part `{part.name}` applies to none of the first {len(scores)} responses, so its scale "
            "is unknown. Raise ppo.rollout_batch, or leave the part out."
        )
    return standard_of(applied)
