"""What a role says of each token of some responses, with gradients: log-probabilities, entropies, the states before.

Rows go through the model without padding (`rlaif.model.groups`), and only the states that response tokens were drawn
from are projected to the vocabulary, a few at a time: logits of a whole batch never exist.

Shapes: ``B`` rows, ``T`` response tokens, ``N`` real response tokens of all rows in their order, ``V`` vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif.maths.losses import entropy
from rlaif.model import sampling
from rlaif.model.drawing import token_logprobs
from rlaif.model.groups import Group, Layout
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch

_CHUNK = 256  # states projected to the vocabulary at a time


class Drawn(NamedTuple):
    """How probable the response tokens are, and how open their choice was; 0 where there is none."""

    logprobs: Tensor  # [B, T]
    entropies: Tensor  # [B, T], in nats; without a gradient unless it was asked for


def token_states(base: SharedBase, batch: Batch) -> Tensor:
    """Run the acting role over a batch; return the last hidden state before each response token, ``[N, hidden]``."""
    if not base.packs:
        hidden = sampling.hidden_states(base, batch)
        return hidden[:, -batch.response_ids.shape[1] - 1 : -1][batch.response_mask]
    groups, rows = _grouped(batch)
    layout = Layout(groups, base.device)
    lengths = batch.response_mask.sum(1).tolist()
    before: list[int] = []
    for row, length in zip(rows, lengths, strict=True):
        prompt, place = row[1], layout.places[row[0]]
        before += place[prompt - 1 : prompt - 1 + length]
    return base.packed(layout, layout.ids)[torch.tensor(before, device=base.device)]


def _grouped(batch: Batch) -> tuple[list[Group], list[tuple[int, int]]]:
    """Return groups of a batch's rows with one prompt, and of each row its number among them and its prompt's length.

    The last token of a response is left out where there are others: nothing is drawn after it.
    """
    width = batch.ids.shape[1] - batch.response_ids.shape[1]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    responses = []
    for index, (ids, mask) in enumerate(zip(batch.ids.cpu(), batch.mask.bool().cpu(), strict=True)):
        by_prompt.setdefault(tuple(ids[:width][mask[:width]].tolist()), []).append(index)
        response = ids[width:][mask[width:]].tolist()
        responses.append(response[:-1] or response)
    groups = [Group(prompt, [responses[index] for index in rows]) for prompt, rows in by_prompt.items()]
    order = [(index, len(prompt)) for prompt, rows in by_prompt.items() for index in rows]
    numbers = {index: (number, length) for number, (index, length) in enumerate(order)}
    return groups, [numbers[index] for index in range(len(responses))]


def token_figures(
    base: SharedBase, batch: Batch, states: Tensor, temperature: float = 1.0, *, learn_entropy: bool = False
) -> Drawn:
    """Return log-probabilities and entropies of the distributions that response tokens were drawn from.

    Args:
        base: the shared base; the role of `states` must be acting.
        batch: prompts and responses.
        states: what `token_states` returned for them, ``[N, hidden]``.
        temperature: the logits are divided by it.
        learn_entropy: whether the entropies have a gradient.

    Returns:
        Both ``[B, T]``, fp32.
    """
    ids = batch.response_ids[batch.response_mask]
    if any(parameter.requires_grad for parameter in base.lm.get_output_embeddings().parameters()):
        logits = _logits(base, states, temperature)
        found = token_logprobs(logits, ids), entropy(logits if learn_entropy else logits.detach())
    else:
        apply: Any = _Drawn.apply
        found = apply(states, ids, base, temperature, learn_entropy)
    return Drawn(*(laid_out(part, batch.response_mask) for part in found))


def laid_out(values: Tensor, response_mask: Tensor) -> Tensor:
    """Put one number for each real response token, ``[N]``, where the token stands: ``[B, T]``, 0 elsewhere."""
    out = values.new_zeros(response_mask.shape)
    out[response_mask] = values
    return out


def _logits(base: SharedBase, states: Tensor, temperature: float) -> Tensor:
    logits = base.logits(states)
    return logits if temperature in (0.0, 1.0) else logits / temperature


class _Drawn(torch.autograd.Function):
    """Log-probabilities and entropies of ``[N]`` tokens drawn after ``[N, hidden]`` states, by a frozen projection.

    Each depends on its own state alone, so its gradient with respect to that is computed while the logits are there and
    kept in their place: ``[N, hidden]`` instead of ``[N, V]``.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, ids: Tensor, base: SharedBase, temperature: float, learn_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        parts = [
            _chunk(base, part, own, temperature, wanted, wanted and learn_entropy)
            for part, own in zip(torch.split(states, _CHUNK), torch.split(ids, _CHUNK), strict=True)
        ]
        logprobs, entropies, *gradients = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        found = None
        for gradient, local in zip(of_outputs, ctx.saved_tensors, strict=False):  # entropies may have none
            if gradient is not None:
                term = gradient.unsqueeze(1).to(local.dtype) * local
                found = term if found is None else found + term
        return found, None, None, None, None


def _chunk(
    base: SharedBase, states: Tensor, ids: Tensor, temperature: float, wanted: bool, learn_entropy: bool
) -> list[Tensor]:
    """Return log-probabilities and entropies, ``[n]``, and as asked the gradients of each, ``[n, hidden]``."""
    states = states.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        projected = _logits(base, states, temperature)
    logits = projected.detach()
    whole = logits.logsumexp(-1, keepdim=True)
    chosen = ids.unsqueeze(1)
    logprobs = (logits.gather(1, chosen) - whole).squeeze(1)
    shares = (logits - whole).exp_()
    entropies = whole.squeeze(1) - (shares * logits).nansum(-1)  # a forbidden token is 0 times minus infinity
    slopes = []  # of each by the logits
    if learn_entropy:
        slopes.append((shares * (whole - entropies.unsqueeze(1) - logits)).nan_to_num_(0.0))
    if wanted:
        slopes.insert(0, shares.neg_().scatter_add_(1, chosen, torch.ones_like(chosen, dtype=shares.dtype)))
    found = [torch.autograd.grad(projected, states, slope, retain_graph=True)[0] for slope in slopes]
    return [logprobs, entropies, *found]
