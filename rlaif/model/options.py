"""Log-probabilities of answers that are known beforehand, such as two letters or the numbers from 1 to 10."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlaif.model import sampling
from rlaif.model.roles import SharedBase

_CERTAIN = -1e-12  # a log-probability held below 0, so that what it leaves to others has a logarithm


@torch.no_grad()
def option_logprobs(
    base: SharedBase, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]], rows: int | None = None
) -> Tensor:
    """Return the log-probability that the answer to each prompt is this option and none of the longer ones.

    An option of one token is read off the next-token distribution. One of several tokens has the product of their
    probabilities; where ``10`` is written with the tokens ``1`` and ``0``, what it has is taken off ``1``, whose token
    it begins with. That takes one more forward pass for each further token.

    Args:
        base: the shared base; a role must be acting.
        prompts: token ids, one list a row.
        options: token ids of each option; two options may share a beginning.
        rows: how many prompts are in work at a time; all where absent.

    Returns:
        ``[B, len(options)]``, fp32.
    """
    result = sampling.next_logprobs(base, prompts, [option[0] for option in options], rows)
    for column, option in enumerate(options):
        for length in range(1, len(option)):
            begun = [[*prompt, *option[:length]] for prompt in prompts]
            result[:, column] += sampling.next_logprobs(base, begun, [option[length]], rows)[:, 0]
    whole = result.clone()
    for column, option in enumerate(options):
        longer = [i for i, other in enumerate(options) if len(other) > len(option) and _begins(other, option)]
        if longer:
            share = (whole[:, longer].logsumexp(1) - whole[:, column]).clamp_max(_CERTAIN)
            result[:, column] = whole[:, column] + torch.log1p(-share.exp())
    return result


def _begins(option: Sequence[int], with_these: Sequence[int]) -> bool:
    return list(option[: len(with_these)]) == list(with_these)
