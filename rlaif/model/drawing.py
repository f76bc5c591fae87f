"""Drawing tokens from logits: which numbers are used, and how a number becomes a token.

Shapes: ``B`` rows, ``T`` response tokens, ``V`` vocabulary.
"""

import torch
from torch import Tensor

_CHUNK = 256  # tokens whose probabilities are summed before the cumulative sum over chunks


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability of each id ``[B, T]`` under logits ``[B, T, V]``."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def uniforms(seed: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) that depend on the seed alone, on any device."""
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Choose one token a row from logits ``[B, V]``; return ids and log-probabilities, both ``[B]``.

    The token is where the cumulative distribution reaches the row's number. Probabilities are summed by chunks of the
    vocabulary, so that only the chunk in which the number falls is looked at token by token. The log-probability is NaN
    where the logits are no numbers.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, token_logprobs(logits, token)
    scaled = logits if temperature == 1 else logits / temperature
    highest = scaled.amax(-1, keepdim=True)
    weights = (scaled - highest).exp_()
    total = weights.sum(-1, dtype=torch.float64)
    if top_p < 1:
        weights = _nucleus(weights, top_p * total)
    token = _invert(weights, uniform).clamp_max(logits.shape[-1] - 1)  # beyond only where logits are no numbers
    logprobs = scaled.gather(-1, token.unsqueeze(-1)) - highest - total.log().unsqueeze(-1)
    return token, logprobs.squeeze(-1).to(logits.dtype)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the token ``[B]`` at which the running sum of the weights ``[B, V]`` passes a share of their total."""
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _CHUNK))
    chunks = weights.view(len(weights), -1, _CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.unsqueeze(1) * sums[:, -1:]
    chunk = torch.searchsorted(sums, target, right=True).clamp_max(sums.shape[1] - 1)
    before = sums.gather(1, (chunk - 1).clamp_min(0)).masked_fill(chunk == 0, 0.0)
    inside = chunks.take_along_dim(chunk.unsqueeze(-1), 1).squeeze(1).double().cumsum(-1)
    # Both sums may round differently: the last token with any weight is the latest that may be taken.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return (chunk * _CHUNK + torch.searchsorted(inside, target - before, right=True).minimum(last)).squeeze(1)


def _nucleus(weights: Tensor, enough: Tensor) -> Tensor:
    """Zero the weights ``[B, V]`` outside of the smallest set that reaches `enough` ``[B]`` (Holtzman et al. 2020)."""
    ordered, index = weights.sort(descending=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    return weights.scatter(-1, index, ordered.masked_fill(before >= enough.unsqueeze(1), 0.0))
