"""From a score per response to an advantage per token.

With a critic each token has its own advantage (`gae`). Without one a whole response is one action: what it earned is
compared with what others earned, and all its tokens have the same advantage.

All of this is about a finished rollout: nothing here carries a gradient. Shapes: `B` rows, `T` response tokens, `G`
responses to each prompt, which are neighbours: rows 0 to G - 1 answer the first prompt, and so on. A `response_mask` is
True, without gaps, from a response's first token to its last; an end token is part of the response.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif.maths.kl import k1
from rlaif.maths.masking import last_true_index, zero_outside

_ROUNDING = 1e-6  # of a group's largest number: deviations below it are those of a mean in floating point


class Advantages(NamedTuple):
    """What `gae` returns.

    Attributes:
        advantages: `[B, T]`, not whitened.
        returns: `[B, T]`, the targets of the value function: advantages + values.
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Charge each token for leaving the reference, and give the score at the last token.

    Ouyang et al. 2022 (arXiv 2203.02155, equation 2), placed on tokens as in Huang et al. 2024 (arXiv
    2403.17031). The estimate is `k1`, which may be negative and is not clamped: clamping would bias the sum
    upwards.

    Args:
        scores: `[B]`.
        logprobs: of the sampled tokens under the policy that sampled them, `[B, T]`.
        ref_logprobs: of the same tokens under the reference, `[B, T]`.
        response_mask: `[B, T]`; each row keeps at least one token.
        kl_coef: the price of one nat.

    Returns:
        `[B, T]`, 0 outside the mask. A row sums to score - kl_coef * (log policy - log reference).
    """
    last = last_true_index(response_mask)
    assert bool((last >= 0).all()), "a row has no response token, so its score has no place"
    kl = zero_outside(k1(logprobs.detach() - ref_logprobs.detach()), response_mask)
    return (-kl_coef * kl).scatter_add(1, last.unsqueeze(1), scores.detach().to(kl.dtype).unsqueeze(1))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Return generalized advantage estimates (Schulman et al. 2015, arXiv 1506.02438, equation 16).

    With ``delta_t = reward_t + gamma * value_{t+1} - value_t``, advantage_t is the sum over k of
    ``(gamma * lam)^k * delta_{t+k}``. The value after a response's last token counts 0, also for a response
    that was cut off at the length limit. `lam` 1 gives return minus value, `lam` 0 gives delta.

    Args:
        rewards: `[B, T]`.
        values: of the states *before* each token, `[B, T]`.
        response_mask: `[B, T]`.
        gamma: the discount per token.
        lam: the trust in what came later over `values`.

    Returns:
        Advantages and returns, 0 outside the mask.
    """
    rewards, values = zero_outside(rewards, response_mask), zero_outside(values, response_mask)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # [B]
    following = torch.zeros_like(next_value)  # [B]: the advantage one token later
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    advantages = zero_outside(advantages, response_mask)
    return Advantages(advantages, advantages + values)


@torch.no_grad()
def rloo(returns: Tensor, group: int) -> Tensor:
    """Return each response's return minus the mean of the others' to its prompt.

    REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740). The baseline does not depend on the
    response itself, so the gradient is unbiased. Equals ``G / (G - 1)`` times `dr_grpo`.

    Args:
        returns: what each response earned, `[B]`.
        group: G, at least 2; divides B.

    Returns:
        `[B]`.
    """
    return dr_grpo(returns, group) * (group / (group - 1))


@torch.no_grad()
def grpo(returns: Tensor, group: int) -> Tensor:
    """Return deviations from the group's mean in its standard deviations, those over G - 1.

    Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). Groups that hardly differ
    weigh as much as those that do; a group whose numbers differ by rounding alone gives 0.

    Args:
        returns: `[B]`.
        group: G, at least 2; divides B.

    Returns:
        `[B]`.
    """
    deviations = dr_grpo(returns, group).view(-1, group)
    spread = deviations.square().sum(1, keepdim=True).div(group - 1).sqrt()
    return torch.where(spread > 0, deviations / spread, 0.0).flatten()


@torch.no_grad()
def dr_grpo(returns: Tensor, group: int) -> Tensor:
    """Return deviations from the group's mean (Liu et al. 2025, arXiv 2503.20783).

    Args:
        returns: `[B]`.
        group: G, at least 2; divides B.

    Returns:
        `[B]`, exactly 0 in groups whose numbers differ by rounding alone.
    """
    groups = returns.view(-1, group)
    deviations = groups - groups.mean(1, keepdim=True)
    rounding = _ROUNDING * groups.abs().amax(1, keepdim=True)
    return torch.where(deviations.abs().amax(1, keepdim=True) > rounding, deviations, 0.0).flatten()


@torch.no_grad()
def reinforce(returns: Tensor, group: int = 1) -> Tensor:
    """Return deviations from the mean over the batch, the baseline of Williams 1992, `[B]`: prompts are not told apart.

    Args:
        returns: `[B]`, at least 2.
        group: not read: other prompts' responses count as much as those to the same one.
    """
    return dr_grpo(returns, len(returns))


SEQUENCE_ESTIMATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "reinforce": reinforce,
}


def sequence_advantages(estimator: str, returns: Tensor, response_mask: Tensor, group: int) -> Tensor:
    """Give every token of a response the advantage of the whole.

    Args:
        estimator: a key of `SEQUENCE_ESTIMATORS`.
        returns: what each response earned: its score, less the price of its KL where that is part of the reward, `[B]`.
        response_mask: `[B, T]`.
        group: responses to each prompt.

    Returns:
        `[B, T]`, 0 outside the mask.
    """
    return SEQUENCE_ESTIMATORS[estimator](returns, group).unsqueeze(1) * response_mask
