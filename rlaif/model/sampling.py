"""Generate and score with the acting role: batches of token ids in, token ids, log-probabilities and scores out.

Shapes: ``B`` rows, ``P`` prompt tokens, ``T`` response tokens, ``V`` vocabulary. Prompts are padded on the left and
responses on the right, positions count real tokens only, so padding and batch composition change no result beyond the
rounding of floating-point sums.

Sampling draws row ``b``'s token ``t`` by inverting the cumulative distribution at a uniform number that depends on the
row's own seed and ``t`` alone: which rows share a batch does not matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from rlaif.model.roles import SharedBase

MIN_SHARED_PREFIX = 16  # tokens; below this, computing a common prefix once does not pay


class Sample(NamedTuple):
    """One response: its ids (up to and including the end), their log-probabilities, and whether it ended itself."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


class Batch(NamedTuple):
    """Prompts and responses side by side: ids, masks of real tokens and positions, all ``[B, P + T]``."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    response_ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T], True for real response tokens


class _Prefilled(NamedTuple):
    logits: Tensor  # [B, V], at the last prompt token
    cache: DynamicCache
    mask: Tensor  # [B, P]


def pack(base: SharedBase, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Put prompts (left-padded) and responses (right-padded) side by side."""
    width = max(map(len, prompts))
    length = max(map(len, responses))
    pad = base.tokenizer.pad_id
    ids = [
        [pad] * (width - len(p)) + list(p) + list(r) + [pad] * (length - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    mask = [
        [0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    id_tensor = torch.tensor(ids, device=base.device)
    mask_tensor = torch.tensor(mask, device=base.device)
    positions = (mask_tensor.cumsum(1) - 1).clamp_min(0)
    return Batch(id_tensor, mask_tensor, positions, id_tensor[:, width:], mask_tensor[:, width:].bool())


def hidden_states(base: SharedBase, batch: Batch) -> Tensor:
    """Run the acting role over prompts and responses: ``[B, P + T, hidden]``."""
    out = base.trunk(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def response_logits(base: SharedBase, batch: Batch, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the logits that each response token was drawn from, divided by the temperature: ``[B, T, V]``."""
    length = batch.response_ids.shape[1]
    logits = base.logits(hidden[:, -length - 1 : -1])
    return logits if temperature in (0.0, 1.0) else logits / temperature


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability of each id ``[B, T]`` under logits ``[B, T, V]``."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def last_hidden(batch: Batch, hidden: Tensor) -> Tensor:
    """Return the hidden state at each row's last real token: ``[B, hidden]``."""
    last = (batch.mask * torch.arange(batch.mask.shape[1], device=batch.mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def scores(base: SharedBase, role: str, batch: Batch) -> Tensor:
    """Score each response with a role's scalar head at its last token: ``[B]``, fp32. The role must be acting."""
    return base.head(role, last_hidden(batch, hidden_states(base, batch)))


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split indices into batches of similar length, longest first, in an order that depends on the lengths alone."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def sample(
    base: SharedBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Sample]:
    """Draw one response to each prompt of one batch with the acting role.

    Args:
        base: the shared base; a role must be acting.
        prompts: token ids, one list a row.
        max_new_tokens: length at which a response is cut.
        seeds: one a row; a row's draws depend on its own seed only.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: draw from the smallest set of tokens with at least this probability.

    Returns:
        One `Sample` a prompt. `logprobs` are those of the distribution at this temperature (before `top_p`).
    """
    filled = _prefill(base, prompts)
    uniforms = torch.stack([_uniforms(seed, max_new_tokens) for seed in seeds]).to(base.device)
    stops = torch.tensor(base.tokenizer.eos_ids, device=base.device)
    results: list[Sample] = [Sample([], [], False) for _ in prompts]
    rows = torch.arange(len(prompts), device=base.device)  # which prompt each live row answers
    logits, cache, mask = filled
    position = mask.sum(1, keepdim=True)
    for step in range(max_new_tokens):
        token, logprob = _draw(logits, uniforms[rows, step], temperature, top_p)
        ended = torch.isin(token, stops)
        for row, one, value, end in zip(rows.tolist(), token.tolist(), logprob.tolist(), ended.tolist(), strict=True):
            results[row].ids.append(one)
            results[row].logprobs.append(value)
            if end:
                results[row] = results[row]._replace(ended=True)
        alive = (~ended).nonzero().squeeze(1)
        if len(alive) == 0 or step == max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            rows, token, mask, position = rows[alive], token[alive], mask[alive], position[alive]
            cache.batch_select_indices(alive)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        out = base.trunk(
            input_ids=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=position,
            cache=cache,
            use_cache=True,
        )
        position = position + 1
        logits = base.logits(out.last_hidden_state[:, -1])
    return results


@torch.no_grad()
def next_logprobs(base: SharedBase, prompts: Sequence[Sequence[int]], options: Sequence[int]) -> Tensor:
    """Return the log-probabilities of option tokens right after each prompt, over the whole vocabulary.

    Returns:
        ``[B, len(options)]``, fp32; their exponentials sum to the probability mass on the options.
    """
    logits = _prefill(base, prompts).logits
    return logits.log_softmax(-1)[:, list(options)]


def _prefill(base: SharedBase, prompts: Sequence[Sequence[int]]) -> _Prefilled:
    """Run the prompts through the acting role; what all of them begin with is computed once."""
    shared = _common_prefix(prompts)
    cache = DynamicCache(config=base.lm.config)
    if shared:
        prefix = torch.tensor([list(prompts[0][:shared])], device=base.device)
        base.trunk(input_ids=prefix, cache=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    rest = [list(prompt[shared:]) for prompt in prompts]
    width = max(map(len, rest))
    pad = base.tokenizer.pad_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rest], device=base.device)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rest], device=base.device)
    mask = torch.cat([own.new_ones(len(rest), shared), own], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, shared:]
    out = base.trunk(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    return _Prefilled(base.logits(out.last_hidden_state[:, -1]), cache, mask)


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with, leaving each at least one of its own; 0 where it does not pay."""
    if len(prompts) < 2:
        return 0
    low, high = min(map(list, prompts)), max(map(list, prompts))  # in lexicographic order these two differ the earliest
    limit = min(map(len, prompts)) - 1
    shared = next((i for i in range(limit) if low[i] != high[i]), limit)
    return shared if shared >= MIN_SHARED_PREFIX else 0


def _uniforms(seed: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) that depend on the seed alone, on any device."""
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Choose one token a row from logits ``[B, V]``; return ids and log-probabilities, both ``[B]``."""
    if temperature == 0:
        token = logits.argmax(-1)
        return token, token_logprobs(logits, token)
    scaled = logits / temperature
    probabilities = scaled.softmax(-1, dtype=torch.float64)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return token, token_logprobs(scaled, token)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero the tokens outside of the smallest set with probability `top_p` (Holtzman et al. 2020)."""
    ordered, index = probabilities.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))
