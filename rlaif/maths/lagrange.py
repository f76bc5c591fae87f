"""The price of a constraint: PPO-Lagrangian (Dai et al. 2023, arXiv 2310.12773).

The problem "maximize the expected reward where the expected cost of a response is at most a threshold" becomes a game:
the policy maximizes ``reward - lambda * cost``, and the multiplier lambda rises while the cost is above the threshold
and falls while it is below. Where both stand still, the multiplier is what a unit of cost is worth in reward.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif.maths.masking import WHITEN_EPSILON, weighted_moments, zero_outside


def combine(reward: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """Return ``(reward - lambda * cost) / (1 + lambda)``: of advantages, or of what they are linear in, any shape.

    The division keeps the size of steps when lambda grows. Lambda 0 returns the reward to the bit.
    """
    return (reward - multiplier * cost) / (1.0 + multiplier)


@torch.no_grad()
def combine_whitened(
    reward: Tensor, cost: Tensor, multiplier: float, mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return combined advantages with mean 0, divided by the larger deviation of theirs and of the reward's.

    Divided by their own alone, what is left where reward and cost balance each other would be noise at full size;
    divided by the reward's alone, costs would have no bound where rewards no longer differ. Lambda 0 gives the reward's
    advantages whitened, to the bit.

    Args:
        reward: advantages, `[B, T]`.
        cost: the same of the cost, `[B, T]`.
        multiplier: lambda.
        mask: `[B, T]`.
        weights: what rows count in mean and deviations, `[B, 1]`; None: 1 each.

    Returns:
        `[B, T]`, 0 outside the mask.
    """
    combined = combine(reward, cost, multiplier)
    mean, own = weighted_moments(combined, mask, weights)
    largest = torch.maximum(weighted_moments(reward, mask, weights)[1], own)
    return zero_outside((combined - mean) * torch.rsqrt(largest + WHITEN_EPSILON), mask)


class Multiplier:
    """Lambda, moved by gradient ascent on its logarithm, so that it stays positive.

    With C for the mean cost of the latest responses, ``log lambda += learning_rate * lambda * (C - threshold)``, kept
    at or below ``log maximum``. A lambda of 0 stays 0.
    """

    def __init__(
        self, init: float, *, threshold: float, learning_rate: float, maximum: float, delay: int, window: int
    ) -> None:
        """Set where lambda starts and how it moves.

        Args:
            init: its first value, at least 0 and at most `maximum`.
            threshold: the highest mean cost of a response that is allowed.
            learning_rate: of the logarithm.
            maximum: lambda's highest value.
            delay: updates that leave it at `init`.
            window: how many of the latest responses C is the mean of.
        """
        self.threshold, self._learning_rate, self._delay = threshold, learning_rate, delay
        self._log, self._log_maximum = _log(init), math.log(maximum)
        self._costs: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """Lambda."""
        return math.exp(self._log)

    @property
    def mean_cost(self) -> float:
        """The mean cost of the responses in the window, NaN before the first ones."""
        return math.fsum(self._costs) / len(self._costs) if self._costs else math.nan

    def update(self, costs: Sequence[float], update: int) -> None:
        """Take in the costs of an update's responses, and move.

        Args:
            costs: as they are, neither shifted nor scaled.
            update: counts from 0.

        Raises:
            ValueError: a cost is not finite.
        """
        self._costs.extend(costs)
        if not math.isfinite(self.mean_cost):
            raise ValueError(f"the mean cost of the responses is {self.mean_cost}; the policy has diverged")
        if update >= self._delay:
            step = self._learning_rate * self.value * (self.mean_cost - self.threshold)
            self._log = min(self._log + step, self._log_maximum)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; the rest comes from the recipe."""
        return {"log_lambda": self._log, "costs": list(self._costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._log = state["log_lambda"]
        self._costs.extend(state["costs"])


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf
