"""A constraint on PPO: what a response costs, the cost's critic, and the multiplier that prices it (Safe RLHF).

Dai et al. 2023 (arXiv 2310.12773): beside a score each response has a cost, whose mean is to stay at or below a
threshold. The multiplier sees costs as they are. For advantages they are treated as scores are: shifted and scaled by
the first rollout, given at the last token, judged by a critic. The KL enters both, as a loss of reward and as a cost,
so that its price does not depend on the multiplier.

Nothing here touches what plain PPO computes: the cost's critic is an adapter of its own, or a head that reads the
policy's hidden states and sends no gradient into them. With a multiplier of 0 the policy is that of plain PPO to the
bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif.maths.advantages import Advantages, gae, sequence_advantages, token_rewards
from rlaif.maths.composition import Standard, standard_of, standardize
from rlaif.maths.lagrange import Multiplier, combine, combine_whitened
from rlaif.maths.losses import clipped_value_loss
from rlaif.model.drawn import laid_out, token_states
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch, in_microbatches
from rlaif.records import Prompt
from rlaif.stages import shares
from rlaif.stages.checkpoints import COST_CRITIC, POLICY
from rlaif.stages.composite import load_cost, score_figures
from rlaif.stages.reward_model import RewardModel
from rlaif.stages.rewards import find_function, score_rows
from rlaif.stages.run import Run


class Cost(NamedTuple):
    """What the cost's critic said of a rollout, and what it is to learn; 0 without a critic."""

    values: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    def rows(self, index: Tensor) -> "Cost":
        """Return some of the rows."""
        return Cost(self.values[index], self.returns[index])


class Constraint:
    """The cost, its critic and the multiplier of a run."""

    def __init__(self, run: Run, base: SharedBase, model: RewardModel | None, critic: str):
        """Load the cost adapter or find the function; the critic's role is added by whoever adds the reward's.

        Args:
            run: the run, whose recipe has a constraint.
            base: the shared base.
            model: the reward model, where there is one.
            critic: ``none``, ``trunk`` or ``adapter``, as for the reward's critic.

        Raises:
            ConfigError: the function is not registered.
            StageError: there is no cost adapter.
        """
        settings = run.recipe.ppo.constraint
        assert settings, "a constraint is put together where the recipe has one"
        self._settings, self._base, self._critic = run.recipe.ppo, base, critic
        self._name = settings.function or ""
        self._function = find_function(self._name, "ppo.constraint.function") if self._name else None
        self.model = load_cost(run, base, model) if settings.cost else None
        self.multiplier = Multiplier(
            settings.lambda_init,
            threshold=settings.threshold,
            learning_rate=settings.lambda_lr,
            maximum=settings.lambda_max,
            delay=settings.lambda_update_delay_steps,
            window=settings.episode_cost_window_size,
        )
        self.critic_offset = 0.0  # taken off what the critic's head says, to be in units of the cost
        self._standard = Standard(0.0, 1.0)  # of the first rollout's costs
        self.latest = torch.zeros(0)  # [B], the costs of the newest rollout
        self._own = torch.zeros(0, dtype=torch.bool)  # [B], which of them are the policy's own

    @torch.no_grad()
    def assess(
        self,
        update: int,
        rows: Sequence[Prompt],
        responses: Sequence[str],
        own: Tensor,
        batch: Batch,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        kl_coef: float,
    ) -> tuple[Tensor, Tensor]:
        """Say what the responses of an update cost, and move the multiplier.

        Args:
            update: counts from 0; the first settles shift and scale.
            rows: ``B`` prompts.
            responses: their texts.
            own: which of them the policy has drawn itself, ``[B]``: those that the multiplier sees.
            batch: the same, packed.
            logprobs: of the sampled tokens under the policy, ``[B, T]``.
            ref_logprobs: of the same tokens under the reference, ``[B, T]``.
            kl_coef: the price of a nat of KL in the reward.

        Returns:
            Token costs, and what the critic expects before each token (0 without one), ``[B, T]`` each.

        Raises:
            DataError: the function returned no finite number for a response.
        """
        self.latest = self._score(rows, responses, batch)
        if update == 0:
            self._standard = standard_of(self.latest)
        self._own = own
        self.multiplier.update(self.latest[own].tolist(), update)
        costs = standardize(self.latest, self._standard)
        tokens = token_rewards(costs, logprobs, ref_logprobs, batch.response_mask, -kl_coef)
        return tokens, torch.zeros_like(tokens) if self._critic == "none" else self._values(batch)

    def estimate(
        self, rewards: Tensor, values: Tensor, costs: Tensor, cost_values: Tensor, mask: Tensor, weights: Tensor
    ) -> tuple[Advantages, Cost]:
        """Return the advantages of reward and cost combined, and what each critic is to learn.

        Args:
            rewards: per token, ``[B, T]``.
            values: of the reward's critic, ``[B, T]``.
            costs: per token, ``[B, T]``.
            cost_values: of the cost's critic, ``[B, T]``.
            mask: ``[B, T]``.
            weights: what responses count, ``[B, 1]``.
        """
        settings, price = self._settings, self.multiplier.value
        if self._critic == "none":
            earned = combine(rewards, costs, price).sum(1)
            advantages = sequence_advantages(settings.advantage_estimator, earned, mask, settings.samples_per_prompt)
            return Advantages(advantages, torch.zeros_like(values)), Cost(cost_values, torch.zeros_like(cost_values))
        ours = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        theirs = gae(costs, cost_values, mask, gamma=settings.gamma, lam=settings.lam)
        advantages = combine_whitened(ours.advantages, theirs.advantages, price, mask, weights)
        return ours._replace(advantages=advantages), Cost(cost_values, theirs.returns)

    def backward(self, batch: Batch, cost: Cost, states: Tensor, weight: Tensor, weights: Tensor) -> Tensor:
        """Add the gradients of the cost's critic on a microbatch; return its clipped loss, a mean over tokens.

        Args:
            batch: the microbatch.
            cost: what the critic said and is to learn.
            states: the policy's before each token, ``[N, hidden]``; an adapter does not read them.
            weight: at which the loss counts.
            weights: what responses count in it, ``[B, 1]``.
        """
        if self._critic == "trunk":
            return self._backward(batch, cost, states.detach(), weight, weights)
        with self._base.acting_as(COST_CRITIC, training=True):
            return self._backward(batch, cost, token_states(self._base, batch), weight, weights)

    def figures(self) -> dict[str, float]:
        """Return the metrics of the newest rollout."""
        costs = self.latest[self._own]
        return {
            **score_figures("rollout/cost", "rollout/cost_std", costs),
            "rollout/unsafe": (costs > 0).float().mean().item(),
            "constraint/mean_cost": self.multiplier.mean_cost,
            "constraint/threshold": self.multiplier.threshold,
            "constraint/lambda": self.multiplier.value,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the critic's weights."""
        return {"standard": list(self._standard), **self.multiplier.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._standard = Standard(*state["standard"])
        self.multiplier.load_state_dict(state)

    def _score(self, rows: Sequence[Prompt], responses: Sequence[str], batch: Batch) -> Tensor:
        """Return the cost of each response, ``[B]``, as the adapter or the function gives it."""
        if self.model:
            return self.model.score_responses(self._base, rows, responses, batch, self._settings.microbatch)
        assert self._function, "a constraint has an adapter or a function"
        return torch.tensor(score_rows(self._name, self._function, rows, responses), device=batch.ids.device)

    @shares.by_rows
    def _values(self, batch: Batch) -> Tensor:
        """Return the cost expected before each response token, ``[B, T]``, by a pass of its own."""
        role, values = POLICY if self._critic == "trunk" else COST_CRITIC, []
        for part in in_microbatches(batch, self._settings.microbatch):
            with self._base.acting_as(role, training=True):
                values.append(self._head(part, token_states(self._base, part)))
        return torch.cat(values)

    def _backward(self, batch: Batch, cost: Cost, states: Tensor, weight: Tensor, weights: Tensor) -> Tensor:
        values, clip = self._head(batch, states), self._settings.cliprange_value
        loss = clipped_value_loss(values, cost.values, cost.returns, batch.response_mask, clip, weights).loss
        torch.autograd.backward(self._settings.vf_coef * loss * weight)
        return loss.detach()

    def _head(self, batch: Batch, states: Tensor) -> Tensor:
        values = self._base.head(COST_CRITIC, states)
        if self._critic == "adapter" and self.model is not None and self.model.base is self._base:
            values = standardize(values - self.critic_offset, self._standard)  # started from the cost, in its units
        return laid_out(values, batch.response_mask)


def constraint_inputs(run: Run) -> dict[str, Any]:
    """Return the constraint, for the inputs of the stage; nothing where there is none."""
    settings = run.recipe.ppo.constraint
    return {"constraint": settings.model_dump()} if settings else {}
