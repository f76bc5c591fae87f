"""Who takes part in PPO: the roles on the shared base, and what each says of a batch of responses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlaif.engines.rollouts import RolloutEngine
from rlaif.errors import StageError
from rlaif.maths.composition import Standard, standard_of
from rlaif.model.drawn import laid_out, token_figures, token_states
from rlaif.model.roles import BASE, SharedBase
from rlaif.model.sampling import Batch, in_microbatches
from rlaif.recipe import PpoSection
from rlaif.records import Prompt
from rlaif.stages import shares
from rlaif.stages.checkpoints import COST_CRITIC, CRITIC, POLICY
from rlaif.stages.composite import Composite, Scored, cost_stage, needs_reward_model
from rlaif.stages.constraint import Constraint
from rlaif.stages.gate import first_policy, starting_policy
from rlaif.stages.independent import independent_of, needs_model, optimized
from rlaif.stages.judged_reward import reward_function
from rlaif.stages.reward_model import COST, RewardModel, read_calibration
from rlaif.stages.rewards import RewardFunction, score_rows
from rlaif.stages.run import Run

REFERENCE = "reference"


@dataclass
class Actors:
    """Who takes part: the shared base with its roles, and what turns a score into a reward."""

    base: SharedBase
    settings: PpoSection
    reference: str
    critic: Literal["none", "trunk", "adapter"]  # a head on the policy's trunk, or an adapter of its own
    function: RewardFunction | None
    model: RewardModel | None = None
    composite: Composite | None = None
    independent: Composite | None = None  # scores what the policy does not optimize
    constraint: Constraint | None = None
    sampler: RolloutEngine | None = None  # samples in place of the roles here
    offset: float = 0.0
    scale: float = 1.0
    critic_offset: float = 0.0  # taken off what the critic's head says, to be in units of the reward model
    update: int = 0  # from 0; says where the schedules are

    @property
    def learning(self) -> tuple[str, ...]:
        """The roles that change."""
        if self.critic == "none":
            return (POLICY,)
        return (POLICY, CRITIC, COST_CRITIC) if self.constraint else (POLICY, CRITIC)

    @property
    def temperature(self) -> float:
        """What divides the logits of policy and reference in this update, wherever they are asked."""
        return self.settings.temperature_at(self.update)

    @property
    def starts_critic(self) -> bool:
        """Whether an adapter critic starts from the reward model, which must stand on the same base for that."""
        return self.model is not None and self.model.base is self.base


def assign_roles(run: Run) -> Actors:
    """Give the roles to the shared base.

    Raises:
        StageError: the reward model's held-out accuracy, or the cost model's, is below its floor.
    """
    settings = run.recipe.ppo
    if settings.costs.keys() - {"ppo.independent"}:
        refuse_weak_cost(run, read_calibration(cost_stage(run) / COST))
    base = run.load_base()
    has_sft = "sft" in run.recipe.stages
    base.add_role(POLICY, trainable=True, adapter=starting_policy(run, "ppo").found(run))
    if has_sft:
        base.add_role(REFERENCE, adapter=first_policy(run).found(run))
    actors = Actors(base, settings, REFERENCE if has_sft else BASE, which_critic(base, settings), None)
    whole = reward_model(run, base) if needs_reward_model(run) or needs_model(run) else None
    actors.independent = independent_of(run, base, whole)
    model = optimized(run, whole) if whole and needs_reward_model(run) else None
    if settings.rewards:
        actors.composite = Composite(run, base, model, "ppo")
    elif model:
        actors.model = model
        actors.offset, actors.scale = model.scale
    else:
        actors.function = reward_function(run, base, "ppo")
    add_critics(run, actors)
    return actors


def which_critic(base: SharedBase, settings: PpoSection) -> Literal["none", "trunk", "adapter"]:
    """Return what the critic stands on; `auto` is an adapter on a GPU and the policy's trunk on a CPU."""
    if not settings.has_critic:
        return "none"
    if settings.critic == "auto":
        return "adapter" if base.device.type == "cuda" else "trunk"
    return settings.critic


def add_critics(run: Run, actors: Actors) -> None:
    """Give the critics their roles, where the advantages need them: the reward's, and with a constraint the cost's."""
    base, kind = actors.base, actors.critic
    if kind != "none":
        folder = run.stage_folder("reward") / "adapter"
        actors.critic_offset = add_critic(base, CRITIC, kind, actors.model, folder)
    if run.recipe.ppo.constraint:
        actors.constraint = Constraint(run, base, actors.model, kind)
        if kind != "none":
            model, folder = actors.constraint.model, cost_stage(run) / COST / "adapter"
            actors.constraint.critic_offset = add_critic(base, COST_CRITIC, kind, model, folder)


def add_critic(base: SharedBase, role: str, kind: str, model: RewardModel | None, folder: Path) -> float:
    """Give one critic its role; return what is to be taken off its head's numbers.

    Args:
        base: the shared base.
        role: the critic's.
        kind: `trunk` or `adapter`.
        model: what an adapter critic starts from, where that stands on the shared base.
        folder: that model's first adapter.
    """
    if kind == "trunk":
        base.add_head_on(POLICY, role)
        return 0.0
    if model is None or model.base is not base:
        base.add_role(role, trainable=True, head=True)
        return 0.0
    weight, offset = model.critic_start()
    base.add_role(role, trainable=True, adapter=folder, outputs=1)
    with torch.no_grad():
        base.head_weight(role).copy_(weight)
    return offset


def reward_model(run: Run, base: SharedBase, stage: str = "ppo") -> RewardModel:
    """Put the reward model of the stage `reward` on the base, for a stage that optimizes it.

    Raises:
        StageError: the stage `reward` has not run, or its model is too weak.
    """
    folder = run.output("reward", "adapter").parent
    refuse_weak_reward(run, read_calibration(folder), stage)
    own = run.load_reward_base() if run.recipe.reward.model else base
    return RewardModel.load(own, folder, run.recipe.ppo.reward_model)


def refuse_weak_reward(run: Run, measured: dict[str, Any], stage: str = "ppo") -> None:
    """Stop where the reward model does not tell better from worse for some kind of prompt."""
    settings = run.recipe.reward
    rates = {tag: rate for tag, rate in measured["heldout"].items() if tag != "all"} or measured["heldout"]
    weak = [
        f"{tag}: {rate['count']} of {rate['n']} pairs right ({rate['rate']:.0%}, 95 % interval {rate['low']:.0%} to "
        f"{rate['high']:.0%})"
        for tag, rate in rates.items()
        if rate["rate"] < settings.min_heldout_accuracy
    ]
    pairs = run.stage_folder("label").relative_to(run.folder) / "comparisons.jsonl"
    advice = f"Label more pairs of that kind, train longer, look at the pairs in {pairs}"
    _refuse(run, stage, "reward", weak, advice)


def refuse_weak_cost(run: Run, measured: dict[str, Any]) -> None:
    """Stop where the cost model does not tell safe answers from unsafe ones, or which of two is the more harmful.

    Its signs count by the mean of what it finds of unsafe and of safe answers: whoever calls all of them unsafe is at a
    half, however common these are.
    """
    floor = run.recipe.reward.min_heldout_accuracy
    unsafe, safe, order = (measured.get(key) for key in ("sign_of_unsafe", "sign_of_safe", "order"))
    weak = []
    if unsafe and safe and (unsafe["rate"] + safe["rate"]) / 2 < floor:
        weak.append(f"signs: right of {_share(unsafe)} unsafe and of {_share(safe)} safe answers")
    if order and order["rate"] < floor:
        weak.append(f"the more harmful of two answers: {_share(order)} pairs right")
    if not (unsafe and safe) and not order:
        weak.append("nothing: no held-out answers of both signs and no pair with a safer one")
    advice = "Bring more rows with `safer`, `chosen_safe` or `rejected_safe` (label.safety), or train longer"
    _refuse(run, "ppo", "cost", weak, advice)


def _share(rate: dict[str, Any]) -> str:
    return f"{rate['count']:g} of {rate['n']}"


def _refuse(run: Run, stage: str, name: str, weak: list[str], advice: str) -> None:
    """Stop because of what is weak, or warn of it where the recipe allows that."""
    settings = run.recipe.reward
    if not weak:
        return
    found = f"the {name} model is below reward.min_heldout_accuracy {settings.min_heldout_accuracy:.0%} on "
    found += "; ".join(weak)
    if settings.allow_weak_reward:
        run.progress.say(f"  warning: {found}. Going on, because reward.allow_weak_reward is set.")
        return
    raise StageError(
        f"{stage}: {found}. Optimization would follow its mistakes. {advice}; or set reward.allow_weak_reward: true."
    )


@torch.no_grad()
def score(actors: Actors, rows: list[Prompt], responses: list[str], batch: Batch) -> Scored:
    """Return the raw score of each response, ``[B]``: the reward model's, a function's, or that of several parts."""
    if actors.composite:
        return actors.composite.score(rows, responses, batch)
    if actors.function is not None:
        name = actors.settings.reward_function or ""
        values = score_rows(name, actors.function, rows, responses)
        return Scored(torch.tensor(values, device=actors.base.device), {})
    assert actors.model, "without a function a reward model scores"
    return Scored(actors.model.score_responses(actors.base, rows, responses, batch, actors.settings.microbatch), {})


def calibrate(actors: Actors, raw: Tensor) -> None:
    """Settle the shift and scale of scores by the first rollout, written by the policy as it starts.

    That is the reference in the first round. The shift makes its responses average 0 (Stiennon et al. 2020, arXiv
    2009.01325): a critic that starts at 0 is right about them, where an unshifted score would pull all late tokens the
    same way. Scores of a function or of several parts are also brought to unit standard deviation; a reward model alone
    brings its own scale.
    """
    actors.offset, spread = standard_of(raw)
    if actors.model is None:
        actors.scale = spread


def scale_of(actors: Actors) -> dict[str, Any]:
    """Return all that the first rollout settled about scores, for a checkpoint."""
    parts = actors.composite.standards if actors.composite else {}
    found = {"offset": actors.offset, "scale": actors.scale, "parts": _listed(parts)}
    return found | ({"independent": _listed(actors.independent.standards)} if actors.independent else {})


def _listed(parts: dict[str, Standard]) -> dict[str, list[float]]:
    return {name: list(one) for name, one in parts.items()}


def use_scale(actors: Actors, scale: dict[str, Any]) -> None:
    """Take over what `scale_of` returned."""
    actors.offset, actors.scale = scale["offset"], scale["scale"]
    if actors.composite:
        actors.composite.use(scale["parts"])
    if actors.independent:
        actors.independent.use(scale["independent"])


@torch.no_grad()
@shares.by_rows
def judge_tokens(actors: Actors, role: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the response tokens' log-probabilities and, for the policy, the critic's values or 0, ``[B, T]``.

    The passes are those of training, operation by operation, so that the first ratio is exactly 1.
    """
    base = actors.base
    logprobs, values = [], []
    for part in in_microbatches(batch, actors.settings.microbatch):
        with base.acting_as(role, training=True):
            states = token_states(base, part)
            logprobs.append(token_figures(base, part, states, actors.temperature).logprobs)
            if role == POLICY and actors.critic == "trunk":
                values.append(critic_values(actors, part, states))
        if role == POLICY and actors.critic == "adapter":
            with base.acting_as(CRITIC, training=True):
                values.append(critic_values(actors, part, token_states(base, part)))
    return torch.cat(logprobs), torch.cat(values) if values else torch.zeros_like(
        batch.response_mask, dtype=torch.float
    )


def critic_values(actors: Actors, batch: Batch, states: Tensor) -> Tensor:
    """Return the value of the state before each response token, ``[B, T]``, on the scale of the rewards.

    `states` is what `token_states` returned, ``[N, hidden]``.
    """
    values = actors.base.head(CRITIC, states)
    if actors.critic == "adapter" and actors.starts_critic:  # started from the reward model, in its units
        values = (values - actors.critic_offset - actors.offset) / actors.scale
    return laid_out(values, batch.response_mask)
