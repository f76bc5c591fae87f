"""Who takes part in PPO: the roles on the shared base, and what each says of a batch of responses."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlaif.errors import StageError
from rlaif.model import sampling
from rlaif.model.roles import BASE, SharedBase
from rlaif.model.sampling import Batch
from rlaif.recipe import PpoSection
from rlaif.records import Prompt, assistant
from rlaif.stages.checkpoints import CRITIC, POLICY
from rlaif.stages.judged_reward import reward_function
from rlaif.stages.reward_model import RewardModel, encode_group, read_calibration
from rlaif.stages.rewards import RewardFunction, call_function
from rlaif.stages.run import Run

REFERENCE = "reference"


@dataclass
class Actors:
    """Who takes part: the shared base with its roles, and what turns a score into a reward."""

    base: SharedBase
    settings: PpoSection
    reference: str
    own_critic: bool  # the critic has an adapter of its own
    function: RewardFunction | None
    model: RewardModel | None = None
    offset: float = 0.0
    scale: float = 1.0
    critic_offset: float = 0.0  # taken off what the critic's head says, to be in units of the reward model

    @property
    def starts_critic(self) -> bool:
        """Whether an adapter critic starts from the reward model, which must stand on the same base for that."""
        return self.model is not None and self.model.base is self.base


def assign_roles(run: Run) -> Actors:
    """Give the roles to the shared base.

    Raises:
        StageError: the reward model's held-out accuracy is below its floor.
    """
    settings = run.recipe.ppo
    base = run.load_base()
    has_sft = "sft" in run.recipe.stages
    adapter = run.output("sft", "adapter") if has_sft else None
    base.add_role(POLICY, trainable=True, adapter=adapter)
    if has_sft:
        base.add_role(REFERENCE, adapter=adapter)
    own_critic = settings.critic == "adapter" or (settings.critic == "auto" and base.device.type == "cuda")
    actors = Actors(base, settings, REFERENCE if has_sft else BASE, own_critic, None)
    if settings.reward_function:
        actors.function = reward_function(run, base, "ppo")
    else:
        stage = run.output("reward", "adapter").parent
        refuse_weak_reward(run, read_calibration(stage))
        own = run.load_reward_base() if run.recipe.reward.model else base
        actors.model = RewardModel.load(own, stage, settings.reward_model)
        actors.offset, actors.scale = actors.model.scale
    if own_critic and actors.starts_critic:
        assert actors.model
        weight, actors.critic_offset = actors.model.critic_start()
        base.add_role(CRITIC, trainable=True, adapter=run.output("reward", "adapter"), outputs=1)
        with torch.no_grad():
            base.head_weight(CRITIC).copy_(weight)
    elif own_critic:
        base.add_role(CRITIC, trainable=True, head=True)
    else:
        base.add_head_on(POLICY, CRITIC)
    return actors


def refuse_weak_reward(run: Run, measured: dict[str, Any]) -> None:
    """Stop where the reward model does not tell better from worse for some kind of prompt."""
    settings = run.recipe.reward
    rates = {tag: rate for tag, rate in measured["heldout"].items() if tag != "all"} or measured["heldout"]
    weak = [
        f"{tag}: {rate['count']} of {rate['n']} pairs right ({rate['rate']:.0%}, 95 % interval {rate['low']:.0%} to "
        f"{rate['high']:.0%})"
        for tag, rate in rates.items()
        if rate["rate"] < settings.min_heldout_accuracy
    ]
    if not weak:
        return
    floor = f"{settings.min_heldout_accuracy:.0%}"
    found = f"the reward model is below reward.min_heldout_accuracy {floor} on {'; '.join(weak)}"
    if settings.allow_weak_reward:
        run.progress.say(f"  warning: {found}. Going on, because reward.allow_weak_reward is set.")
        return
    raise StageError(
        f"ppo: {found}. Optimization would follow its mistakes. Label more pairs of that kind, train longer, look at "
        "the pairs in 3-label/comparisons.jsonl; or set reward.allow_weak_reward: true."
    )


@torch.no_grad()
def score(actors: Actors, rows: list[Prompt], responses: list[str], batch: Batch) -> Tensor:
    """Return the raw score of each response, ``[B]``: the reward role's, or a function's."""
    if actors.function is not None:
        name = actors.settings.reward_function or ""
        columns = {"tag": [row.tag for row in rows], "id": [row.id for row in rows]}
        values = call_function(name, actors.function, [row.prompt for row in rows], responses, **columns)
        return torch.tensor(values, device=actors.base.device)
    assert actors.model, "without a function a reward model scores"
    if actors.model.base is not actors.base:  # another vocabulary: from the texts, never from the policy's ids
        pairs = [([*row.messages], assistant(text)) for row, text in zip(rows, responses, strict=True)]
        groups = [encode_group(actors.model, prompt, [answer]) for prompt, answer in pairs]
        size = actors.settings.microbatch
        parts = [actors.model.score(groups[start : start + size]) for start in range(0, len(groups), size)]
        return torch.cat(parts).to(actors.base.device)
    return torch.cat([actors.model.score(part) for part in in_microbatches(batch, actors.settings)])


def calibrate(actors: Actors, raw: Tensor) -> dict[str, float]:
    """Return the shift and scale of scores, from the first rollout, which the reference itself has written.

    The shift makes the reference's responses average 0 (Stiennon et al. 2020, arXiv 2009.01325): a critic that starts
    at 0 is right about them, where an unshifted score would pull all late tokens the same way. A function's scores
    are also brought to unit standard deviation; a reward model brings its own scale.
    """
    actors.offset = raw.mean().item()
    if actors.function is not None:
        spread = raw.std(correction=0).item()
        actors.scale = spread if spread > 1e-6 * raw.abs().max().item() else 1.0  # less is rounding
    return {"offset": actors.offset, "scale": actors.scale}


@torch.no_grad()
def judge_tokens(actors: Actors, role: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the response tokens' log-probabilities and, for the policy, the critic's values, ``[B, T]``."""
    base = actors.base
    logprobs, values = [], []
    for part in in_microbatches(batch, actors.settings):
        with base.acting_as(role):
            hidden = sampling.hidden_states(base, part)
            logits = sampling.response_logits(base, part, hidden, actors.settings.sampling.temperature)
            logprobs.append(sampling.token_logprobs(logits, part.response_ids) * part.response_mask)
            if role == POLICY and not actors.own_critic:
                values.append(critic_values(actors, part, hidden))
        if role == POLICY and actors.own_critic:
            with base.acting_as(CRITIC):
                values.append(critic_values(actors, part, sampling.hidden_states(base, part)))
    return torch.cat(logprobs), torch.cat(values) if values else torch.empty(0)


def critic_values(actors: Actors, batch: Batch, hidden: Tensor) -> Tensor:
    """Return the value of the state before each response token, ``[B, T]``, on the scale of the rewards."""
    length = batch.response_ids.shape[1]
    values = actors.base.head(CRITIC, hidden[:, -length - 1 : -1])
    if actors.own_critic and actors.starts_critic:  # started from the reward model, in its units
        values = (values - actors.critic_offset - actors.offset) / actors.scale
    return values * batch.response_mask


def in_microbatches(batch: Batch, settings: PpoSection) -> list[Batch]:
    """Split a batch into the microbatches that an unshuffled epoch visits."""
    size = settings.microbatch
    return [Batch(*(part[start : start + size] for part in batch)) for start in range(0, len(batch.ids), size)]
