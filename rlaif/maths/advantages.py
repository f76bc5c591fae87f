"""From a score per response to an advantage per token.

All of this is about a finished rollout: nothing here carries a gradient. Shapes: `B` rows, `T` response
tokens. A `response_mask` is True, without gaps, from a response's first token to its last; an end token is
part of the response.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlaif.maths.kl import k1
from rlaif.maths.masking import last_true_index, zero_outside


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
