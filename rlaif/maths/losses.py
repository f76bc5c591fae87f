"""The losses of PPO, and the figures that say whether they are healthy.

Shapes: `B` rows, `T` response tokens, `V` vocabulary. Masks are True at what counts. Log-probabilities,
values and scores should be float32. Figures that are only reported carry no gradient.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlaif.maths.kl import k2
from rlaif.maths.masking import masked_mean, masked_var, zero_outside


class Aggregation(NamedTuple):
    """How terms of single tokens become one loss.

    ``token`` averages over all tokens, so that long responses weigh more. ``sequence`` averages over the tokens of each
    response and then over responses (GRPO, arXiv 2402.03300, equation 3): a token of a long response weighs less.
    ``constant`` sums over tokens and divides by one length for all and by the number of responses (Dr. GRPO, arXiv
    2503.20783): up to that constant the log-probability of a whole response, which REINFORCE's gradient is about.

    Attributes:
        over: which of these.
        max_tokens: the length that `constant` divides by.
    """

    over: Literal["token", "sequence", "constant"]
    max_tokens: int = 1

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return one number of `x`, `[B, T]`, at what the mask keeps."""
        if self.over == "token":
            return masked_mean(x, mask)
        if self.over == "sequence":
            return masked_mean(x, mask, dim=1).mean()
        return zero_outside(x, mask).sum() / (len(x) * self.max_tokens)

    def share(self, part: Tensor, whole: Tensor) -> Tensor:
        """Return the weight at which the mean over a few rows counts in the mean over all; both are masks."""
        if self.over == "token":
            return part.sum() / whole.sum()
        return torch.tensor(len(part) / len(whole), device=part.device)


TOKEN_MEAN = Aggregation("token")


class PolicyLoss(NamedTuple):
    """What `clipped_policy_loss` returns: scalars; the figures are means over the masked tokens.

    Attributes:
        loss: to minimize.
        ratio: new over old probability; exactly 1 before the first step.
        clip_fraction: the part of the tokens whose clipped term is the larger one, so that they push nothing.
        kl_to_old: half the mean squared difference of log-probabilities, in nats.
    """

    loss: Tensor
    ratio: Tensor
    clip_fraction: Tensor
    kl_to_old: Tensor


class ValueLoss(NamedTuple):
    """What `clipped_value_loss` returns: scalars, means over the masked tokens.

    Attributes:
        loss: to minimize, before any coefficient.
        clip_fraction: the part of the tokens whose clipped term is the larger one.
    """

    loss: Tensor
    clip_fraction: Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    aggregation: Aggregation = TOKEN_MEAN,
) -> PolicyLoss:
    """Return the clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7), negated.

    Per token ``max(-A * ratio, -A * clamp(ratio, 1 - clip, 1 + clip))``. At ratio 1 its gradient is that of
    ``-A * logprobs``. `kl_to_old` is half the mean squared difference, the figure of Huang et al. 2024 (arXiv
    2403.17031): an estimate for small steps, not the KL itself.

    Args:
        logprobs: of the sampled tokens under the policy being trained, `[B, T]`.
        old_logprobs: under the policy that sampled them, `[B, T]`; no gradient.
        advantages: `[B, T]`; no gradient.
        mask: `[B, T]`.
        clip: half-width of the trusted range of ratios; `math.inf` turns clipping off.
        aggregation: how the tokens' terms become the loss.

    Returns:
        The loss and three figures.
    """
    advantages = advantages.detach()
    log_ratio = zero_outside(logprobs - old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    return PolicyLoss(
        loss=aggregation.mean(torch.maximum(unclipped, clipped), mask),
        ratio=masked_mean(ratio.detach(), mask),
        clip_fraction=masked_mean(clipped > unclipped, mask),
        kl_to_old=masked_mean(k2(log_ratio.detach()), mask),
    )


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    weights: Tensor | float = 1.0,
) -> ValueLoss:
    """Return half the squared error of the values, pessimistic about moves beyond the clip range.

    Per token ``0.5 * max((v - R)^2, (v' - R)^2)``, where v' is v kept within `clip` of the old value (Huang
    et al. 2024, arXiv 2403.17031). A value that moved away from its target is pulled back at full strength.

    Args:
        values: of the value function being trained, `[B, T]`.
        old_values: at the time of the rollout, `[B, T]`; no gradient.
        returns: the targets, `[B, T]`; no gradient.
        mask: `[B, T]`.
        clip: in units of the values; `math.inf` turns clipping off.
        weights: what rows count, `[B, 1]`; no gradient.

    Returns:
        The loss and one figure.
    """
    values = zero_outside(values, mask)  # keeps the gradient outside finite, whatever stands there
    old_values, returns = old_values.detach(), returns.detach()
    within = old_values + (values - old_values).clamp(-clip, clip)
    unclipped = (values - returns).square()
    clipped = (within - returns).square()
    return ValueLoss(
        loss=0.5 * masked_mean(torch.maximum(unclipped, clipped) * weights, mask),
        clip_fraction=masked_mean(clipped > unclipped, mask),
    )


@torch.no_grad()
def mixture_weights(log_ratio: Tensor, share: Tensor) -> Tensor:
    """Return what a response counts that was drawn from policy or reference, so that means are those of the policy.

    With probability `share` the policy p draws it, else the reference q: its probability is ``b = share * p + (1 -
    share) * q``. With the importance weight ``p / b`` the mean of ``weight * f`` over such responses is the mean of f
    over the policy's. The weight does not ask who drew the response (the balance heuristic, Veach and Guibas 1995,
    "Optimally Combining Sampling Techniques"), and is never above ``1 / share``, so nothing has to be truncated. By
    Bayes' rule it is the probability that the policy drew the response, divided by `share`.

    Args:
        log_ratio: log policy - log reference of whole responses, `[B]`.
        share: above 0, at most 1, `[B]`.

    Returns:
        `[B]`, exactly 1 where `share` is 1.
    """
    return torch.sigmoid(torch.logit(share) + log_ratio) / share


@torch.no_grad()
def truncated_weights(logprobs: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """Return what tokens count that another computation of the policy has sampled: ``min(p / q, cap)``.

    Without the cap the mean of ``weight * f(token)`` over tokens of q is that over tokens of p, the policy. The cap
    bounds what a token can weigh, at the price of a bias (Ionides 2008, "Truncated Importance Sampling"). Per token, as
    in Yao et al. 2025 ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"): how often q reaches
    the text before a token is not corrected.

    Args:
        logprobs: log p of the sampled tokens, `[B, T]`.
        sampled: log q of the same tokens, `[B, T]`.
        cap: above 0; `math.inf` turns the truncation off.

    Returns:
        `[B, T]`.
    """
    return (logprobs - sampled).exp().clamp(max=cap)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each next-token distribution, in nats.

    Computed in float32 or wider. A logit of minus infinity (a forbidden token) counts 0. The working memory
    is a few times that of `logits`; for the figure alone, call it under `torch.no_grad()` and in slices.

    Args:
        logits: `[..., V]`.

    Returns:
        `[...]`, between 0 and log V.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)  # 0 * -inf would be NaN, forwards and backwards
    return -(logprobs.exp() * finite).sum(dim=-1)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return ``1 - var(returns - values) / var(returns)`` over the masked tokens.

    Args:
        values: `[B, T]`.
        returns: `[B, T]`.
        mask: `[B, T]`.

    Returns:
        A scalar of at most 1: 1 for a perfect value function, 0 for a constant one, below 0 for one that is
        worse than a constant. 0 where the returns vary by no more than rounding: there is nothing to explain.
    """
    spread = masked_var(returns, mask)
    missed = masked_var(returns - values, mask)
    rounding = (16 * torch.finfo(returns.dtype).eps) ** 2 * masked_mean(returns.square(), mask)
    return torch.where(spread > rounding, 1.0 - missed / spread, torch.zeros_like(spread))
