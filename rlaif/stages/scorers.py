"""What `evaluate` scores responses with: what PPO optimized, as it saw that, and beside it what it did not optimize."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rlaif.maths.composition import Standard, standardize
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch
from rlaif.records import Prompt
from rlaif.sections import Combination
from rlaif.stages.composite import Composite, cost_stage, load_cost, ppo_scale
from rlaif.stages.independent import independent_inputs, independent_of, independent_scores, optimized
from rlaif.stages.judged_reward import reward_function
from rlaif.stages.reward_model import COST, RewardModel
from rlaif.stages.rewards import RewardFunction, find_function
from rlaif.stages.run import Run

MICROBATCH = 8
SCORE, INDEPENDENT, COSTS = "score", "independent_score", "cost"
BESIDE = (INDEPENDENT, COSTS)  # in the results only where the run has them
Scorer = Callable[[Sequence[Prompt], Sequence[str], Batch], Tensor]  # gives one number a response, [B]


def scorers_of(run: Run, base: SharedBase) -> dict[str, Scorer]:
    """Return what gives each response its numbers, by their names; one that the run has no source for is left out.

    The score is on PPO's scale and without penalties for a missing end: that of the parts of its reward, or of the
    reward model without the members that PPO did without. What registered functions say, `functions_of` has.

    Raises:
        StageError: PPO has not finished, or there is no cost adapter.
    """
    has_ppo, settings = "ppo" in run.recipe.stages, run.recipe.ppo
    found: dict[str, Scorer] = {}
    whole = _reward_model(run, base)
    model = optimized(run, whole) if whole else None
    composite = Composite(run, base, model, "evaluate") if has_ppo and settings.rewards else None
    if composite:
        found[SCORE] = _on_ppo_scale(run, composite)
    elif model and not (has_ppo and settings.reward_function):
        offset, scale = model.scale
        raw = _of_model(model, base)
        found[SCORE] = lambda rows, texts, batch: (raw(rows, texts, batch) - offset) / scale
    independent = independent_of(run, base, whole, "evaluate") if has_ppo else None
    if independent:
        independent.use(ppo_scale(run)["independent"])
        found[INDEPENDENT] = lambda rows, texts, batch: independent_scores(independent, rows, texts, batch)
    if _has_cost_adapter(run) and not _cost_function(run) and (whole or run.recipe.ppo.costs):
        known = [one.cost for one in (composite, independent) if one and one.cost]
        found[COSTS] = _of_model(known[0] if known else load_cost(run, base, whole), base)
    return found


def functions_of(run: Run, base: SharedBase) -> dict[str, tuple[str, RewardFunction]]:
    """Return the functions that PPO was given, with their names: `ppo.reward_function` and that of its constraint.

    They are asked for all responses of a policy at once.

    Raises:
        ConfigError: one is not registered.
    """
    found, name, cost = {}, run.recipe.ppo.reward_function, _cost_function(run)
    if name and "ppo" in run.recipe.stages:
        found[SCORE] = name, reward_function(run, base, "evaluate")
    if cost:
        found[COSTS] = cost, find_function(cost, "ppo.constraint.function")
    return found


def _has_cost_adapter(run: Run) -> bool:
    """Tell whether PPO takes a cost adapter, or one that the stage `reward` trains gives responses their cost."""
    trained = "reward" in run.recipe.stages and run.recipe.reward.cost
    return bool(run.recipe.ppo.costs) or (trained and not _cost_function(run))


def _cost_function(run: Run) -> str | None:
    """Return the name of the function whose mean PPO limits; where there is one, it gives responses their cost."""
    constraint = run.recipe.ppo.constraint if "ppo" in run.recipe.stages else None
    return constraint.function if constraint else None


def cost_input(run: Run) -> dict[str, Any]:
    """Return the cost adapter as a file that `evaluate` reads; nothing where it reads none."""
    return {"cost": cost_stage(run) / COST / "adapter"} if _has_cost_adapter(run) else {}


def combination_input(run: Run) -> dict[str, Any]:
    """Return how members become a score, for the stage's inputs; with PPO its policy depends on that already."""
    combination = run.recipe.ppo.reward_model
    alone = "reward" in run.recipe.stages and "ppo" not in run.recipe.stages
    return {"reward_model": combination.model_dump()} if alone and combination != Combination() else {}


def beside_inputs(run: Run) -> dict[str, Any]:
    """Return what is measured beside the score, for the stage's inputs; nothing where nothing is."""
    independent = independent_inputs(run) if "ppo" in run.recipe.stages else {}
    function = _cost_function(run)
    measured = bool(independent), _has_cost_adapter(run) or bool(function)
    beside = [name for name, used in zip(BESIDE, measured, strict=True) if used]
    return independent | ({"beside": beside} if beside else {}) | ({"cost_function": function} if function else {})


def _reward_model(run: Run, base: SharedBase) -> RewardModel | None:
    if not run.has_output("reward"):
        return None
    own = run.load_reward_base() if run.recipe.reward.model else base
    return RewardModel.load(own, run.stage_folder("reward"), run.recipe.ppo.reward_model)


def _on_ppo_scale(run: Run, composite: Composite) -> Scorer:
    scale = ppo_scale(run)
    composite.use(scale["parts"])
    whole = Standard(scale["offset"], scale["scale"])
    return lambda rows, texts, batch: standardize(composite.score(rows, texts, batch).total, whole)


def _of_model(model: RewardModel, base: SharedBase) -> Scorer:
    return lambda rows, texts, batch: model.score_responses(base, rows, texts, batch, MICROBATCH)
