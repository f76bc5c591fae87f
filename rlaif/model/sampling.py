"""Generate and score with the acting role: batches of token ids in, token ids, log-probabilities and scores out.

Shapes: ``B`` rows, ``P`` prompt tokens, ``T`` response tokens, ``V`` vocabulary. For scoring, prompts are padded on the
left and responses on the right, positions count real tokens only; generation goes through slots (`rlaif.model.slots`)
or, where a model's attention cannot be replaced, through padded batches (`rlaif.model.padded`). Either way padding and
batch composition change no result beyond the rounding of floating-point sums.

Row ``b``'s token ``t`` is drawn with a number that depends on the row's own seed and ``t`` alone: which rows share a
batch does not matter.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif.errors import ModelError
from rlaif.model import drawing, padded, slots
from rlaif.model.roles import SharedBase


class Sample(NamedTuple):
    """One response: its ids (up to and including the end), their log-probabilities, and whether it ended itself."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


token_logprobs = drawing.token_logprobs


class Batch(NamedTuple):
    """Prompts and responses side by side: ids, masks of real tokens and positions, all ``[B, P + T]``."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    response_ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T], True for real response tokens


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


def in_microbatches(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into batches of so many rows, in order; the last one holds what is left."""
    return [Batch(*(part[start : start + size] for part in batch)) for start in range(0, len(batch.ids), size)]


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


def response_logprobs(base: SharedBase, batch: Batch) -> Tensor:
    """Return the log-probability of each whole response at temperature 1, ``[B]``. A role must be acting."""
    logits = response_logits(base, batch, hidden_states(base, batch))
    return (token_logprobs(logits, batch.response_ids) * batch.response_mask).sum(1)


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
    rows: int | None = None,
) -> list[Sample]:
    """Draw one response to each prompt with the acting role.

    Args:
        base: the shared base; a role must be acting.
        prompts: token ids, one list a row.
        max_new_tokens: length at which a response is cut.
        seeds: one a row; a row's draws depend on its own seed only.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: draw from the smallest set of tokens with at least this probability.
        rows: how many are in work at a time, which bounds the memory; all where absent.

    Returns:
        One `Sample` a prompt. `logprobs` are those of the distribution at this temperature (before `top_p`).

    Raises:
        ModelError: a token whose probability is no finite number.
    """
    uniforms = torch.stack([drawing.uniforms(seed, max_new_tokens) for seed in seeds]).to(base.device)
    stops = set(base.tokenizer.eos_ids)
    results = [Sample([], [], False) for _ in prompts]

    def extend(live: list[int], logits: Tensor) -> list[int | None]:
        steps = [len(results[row].ids) for row in live]
        tokens, logprobs = drawing.draw(logits, uniforms[live, steps], temperature, top_p)
        following: list[int | None] = []
        for row, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
            if not math.isfinite(logprob):
                raise ModelError(
                    f"model `{base.tokenizer.name}`, role `{base.acting}`: the probabilities of token "
                    f"{len(results[row].ids) + 1} of response {row + 1} are no numbers. Its weights have grown too far "
                    "(lower the learning rate and train again), or its numbers do not fit the precision (model.dtype)."
                )
            results[row].ids.append(token)
            results[row].logprobs.append(logprob)
            if token in stops:
                results[row] = results[row]._replace(ended=True)
            done = token in stops or len(results[row].ids) == max_new_tokens
            following.append(None if done else token)
        return following

    _run(base, prompts, rows, max_new_tokens, extend)
    return results


@torch.no_grad()
def next_logprobs(
    base: SharedBase, prompts: Sequence[Sequence[int]], options: Sequence[int], rows: int | None = None
) -> Tensor:
    """Return the log-probabilities of option tokens right after each prompt, over the whole vocabulary.

    Returns:
        ``[B, len(options)]``, fp32; their exponentials sum to the probability mass on the options.
    """
    result = torch.empty(len(prompts), len(options), device=base.device)

    def extend(live: list[int], logits: Tensor) -> list[int | None]:
        result[live] = logits[:, list(options)] - logits.logsumexp(-1, keepdim=True)
        return [None] * len(live)

    _run(base, prompts, rows, 0, extend)
    return result


def _run(
    base: SharedBase, prompts: Sequence[Sequence[int]], rows: int | None, max_new_tokens: int, extend: slots.Extend
) -> None:
    run = slots.run if base.packs else padded.run
    run(base, prompts, slots=rows or len(prompts), max_new_tokens=max_new_tokens, extend=extend)
