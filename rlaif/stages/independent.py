"""A score that the policy does not optimize, to see over-optimization: the reward rises, and what it stands for falls.

Gao et al. 2023 (arXiv 2210.10760) draw both against the square root of the KL to the reference. The parts of
`ppo.independent` are scored as those of `ppo.rewards` are, and averaged by their weights; nothing of it reaches a
gradient. A `member` of the reward model is taken out of the reward, which then does without.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlaif import health
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch
from rlaif.records import Prompt
from rlaif.reward_parts import CompositeSection
from rlaif.stages.composite import Composite, score_figures
from rlaif.stages.judged_reward import judge_inputs
from rlaif.stages.reward_model import RewardModel
from rlaif.stages.run import Run


def needs_model(run: Run) -> bool:
    """Tell whether the independent score takes the reward model, or one of its members."""
    return any(part.model or part.member for part in run.recipe.ppo.independent)


def independent_of(run: Run, base: SharedBase, model: RewardModel | None, stage: str = "ppo") -> Composite | None:
    """Return what gives the independent score; None where the recipe asks for none.

    Args:
        run: the run.
        base: the shared base; a cost adapter is added to it.
        model: the whole reward model, where `needs_model`.
        stage: who asks; the judge's answers are stored under it.
    """
    parts = run.recipe.ppo.independent
    return Composite(run, base, model, stage, CompositeSection(rewards=list(parts))) if parts else None


def kept_out(run: Run) -> list[int]:
    """Return the members of the reward model that no stage optimizes; none where there is no `ppo` to watch."""
    parts = run.recipe.ppo.independent if "ppo" in run.recipe.stages else []
    return sorted({part.member for part in parts if part.member})


def optimized(run: Run, model: RewardModel) -> RewardModel:
    """Return the reward model without the members that are kept for the independent score."""
    kept, numbers = kept_out(run), range(1, len(model.scales) + 1)
    return model.only(*(number for number in numbers if number not in kept)) if kept else model


def independent_scores(
    independent: Composite, rows: Sequence[Prompt], responses: Sequence[str], batch: Batch
) -> Tensor:
    """Return the independent score of each response, ``[B]``, in deviations of the first rollout."""
    weights = sum(part.weight for part in independent.settings.rewards)
    return independent.score(rows, responses, batch).total / weights


def independent_figures(
    independent: Composite | None, rows: Sequence[Prompt], responses: Sequence[str], batch: Batch, own: Tensor
) -> dict[str, float]:
    """Return mean and deviation of the independent score of a rollout, in deviations of the first one, as metrics.

    They are of the responses that the policy has drawn itself (`own`, ``[B]``).
    """
    if independent is None:
        return {}
    scores = independent_scores(independent, rows, responses, batch)[own]
    return score_figures(health.INDEPENDENT, health.INDEPENDENT_SPREAD, scores)


def independent_inputs(run: Run) -> dict[str, Any]:
    """Return what the independent score depends on, for the stage's inputs; nothing where there is none."""
    parts = run.recipe.ppo.independent
    found = {"independent": [part.model_dump() for part in parts]} if parts else {}
    judged = judge_inputs(run) if any(part.judge for part in parts) else {}
    return found | {f"independent.{name}": value for name, value in judged.items()}
