"""How far a policy is from its reference, and the coefficient that prices it.

`log_ratio` is log policy(token) - log reference(token) for tokens that the **policy** sampled, any shape.
The three estimators are Schulman's ("Approximating KL Divergence", 2020), in nats.

As a reward use `k1`. As a loss, the gradient of `k2` is that of KL(policy, reference) in expectation;
the gradient of `k3` is that of KL(reference, policy), and the gradient of `k1` is 0 in expectation.
"""

import math

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """Return the log-ratio itself: unbiased, high variance, may be negative."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return half the squared log-ratio: biased, low variance, never negative."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Return 1/ratio - 1 + log ratio: unbiased, lower variance than `k1`, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


def best_of_n(samples: int) -> float:
    """Return KL(best of N samples, the policy they are drawn from) in nats: log N - (N - 1) / N.

    For scores that differ and answers that do not repeat (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3); else
    it is an upper bound (Beirami et al. 2024, arXiv 2401.01879, theorem 1).

    Raises:
        ValueError: there is no sample.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    return math.log(samples) - (samples - 1) / samples


class FixedKl:
    """A KL coefficient that stays as it is."""

    def __init__(self, coef: float) -> None:
        """Set the coefficient; 0 means no penalty.

        Raises:
            ValueError: the coefficient is negative or not finite.
        """
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"the KL coefficient is {coef}; a finite number of at least 0 is expected")
        self.coef = coef

    def update(self, kl: float) -> None:
        """Accept a measurement and change nothing.

        Raises:
            ValueError: the measurement is not finite.
        """
        _check_measurement(kl)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.coef = state["coef"]


class AdaptiveKl:
    """A KL coefficient that is steered towards a target KL.

    Ziegler et al. 2019 (arXiv 1909.08593, section 2.2): ``e = clip(kl / target - 1, -0.2, 0.2)`` and
    ``coef = coef * (1 + gain * e)``. One update changes the coefficient by at most ``0.2 * gain`` of itself.
    """

    MAX_ERROR = 0.2

    def __init__(self, coef: float, target: float, gain: float = 0.1) -> None:
        """Set the starting coefficient.

        Args:
            coef: above 0; the rule multiplies, so 0 could never be left.
            target: the wanted KL in nats, in the unit that `update` is given (per response or per token).
            gain: the paper's K, above 0 and at most 1.

        Raises:
            ValueError: an argument is outside its range.
        """
        for name, value in (("coefficient", coef), ("target", target)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the KL {name} is {value}; a finite number above 0 is expected")
        if not 0 < gain <= 1:
            raise ValueError(f"the KL gain is {gain}; a number above 0 and at most 1 is expected")
        self.coef = coef
        self.target = target
        self.gain = gain

    def update(self, kl: float) -> None:
        """Raise the coefficient where the KL was above the target, lower it where it was below.

        Args:
            kl: the batch's mean KL to the reference, in nats; an estimate may be negative.

        Raises:
            ValueError: the measurement is not finite.
        """
        _check_measurement(kl)
        error = min(max(kl / self.target - 1.0, -self.MAX_ERROR), self.MAX_ERROR)
        self.coef *= 1.0 + self.gain * error

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint needs; the target and the gain come from the recipe."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.coef = state["coef"]


def _check_measurement(kl: float) -> None:
    if not math.isfinite(kl):
        raise ValueError(f"the measured KL to the reference is {kl}; the policy has diverged")
