"""Rows beside each other in one pass, with gradients: nothing is padded, and common beginnings are computed once.

All tokens of all rows go through a model as one packed row ``[1, N]``: a group's prompt and its first response, then
its further responses without the prompt. A row that begins like an earlier one (a system prompt, a worked example) has
only what differs. Attention alone knows which token belongs to whom: it is replaced for the length of a pass, as it is
for generation (`rlaif.model.attention`), and each token attends to the row that it stands in. A score is what a padded
pass over whole rows would give, beyond the rounding of sums, and so are the gradients.

Models whose attention cannot be replaced take the padded pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlaif.model import sampling
from rlaif.model.roles import SharedBase
from rlaif.model.slots import MIN_SHARED_PREFIX, common


@dataclass(frozen=True)
class Group:
    """A prompt and one or more responses to it, as token ids; each response is closed by the end of a turn.

    No tuple, because `Trainer` takes tuples of its batches apart.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


class _Piece(NamedTuple):
    """What a packed pass holds of a row: its tokens after those that it begins with like an earlier row."""

    size: int
    parent: int  # the earlier row
    shared: int  # tokens that are the parent's; 0 where the piece is the whole row


class Layout:
    """Which token of a packed pass over groups belongs to whom; takes the place of `attention.Step`.

    Rows are numbered in the order of the groups and of the responses in them.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device):
        """Lay groups out; see `ids`, `positions`, `places` and `ends`."""
        self.ids: list[int] = []
        self.places: list[list[int]] = []  # of each row: where its tokens stand, those of the prompt as well
        self._pieces: list[_Piece] = []
        firsts: dict[int, list[int]] = {}  # the first row of each group
        for group in groups:
            parent, shared = -1, 0
            for number, response in enumerate(group.responses):
                row = [*group.prompt, *response]
                if not number:
                    parent, shared = _nearest(row, firsts)
                    firsts[len(self.places)] = row
                self._add(row, parent, shared)
                if not number:
                    parent, shared = len(self.places) - 1, len(group.prompt)
        self._sizes = [piece.size for piece in self._pieces]
        starts = [torch.arange(piece.shared, piece.shared + piece.size) for piece in self._pieces]
        self.positions = torch.cat(starts).unsqueeze(0).to(device)  # [1, N]
        self.ends = torch.tensor([place[-1] for place in self.places], device=device)  # of each row
        self._masks: dict[tuple[int, int], Tensor] = {}

    def _add(self, row: list[int], parent: int, shared: int) -> None:
        own = range(len(self.ids), len(self.ids) + len(row) - shared)
        self.places.append([*(self.places[parent][:shared] if shared else ()), *own])
        self._pieces.append(_Piece(len(own), parent, shared))
        self.ids += row[shared:]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Let each token attend to its row up to itself: ``[heads, N, size]`` to ``[1, N, heads, size]``."""
        # One split and one join: slices and written slices would each have a full-size gradient.
        split = (torch.split(part.unsqueeze(0), self._sizes, 2) for part in (query, key, value))
        found: list[Tensor] = []
        rows: list[tuple[Tensor, Tensor]] = []  # keys and values of whole rows
        for (size, parent, shared), queries, keys, values in zip(self._pieces, *split, strict=True):
            if shared:
                keys, values = (
                    torch.cat([whole[:, :, :shared], own], 2)
                    for whole, own in zip(rows[parent], (keys, values), strict=True)
                )
            rows.append((keys, values))
            found.append(
                scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=self._mask(shared, size, query) if shared else None,
                    is_causal=not shared,
                    scale=scaling,
                    enable_gqa=len(query) != len(key),
                )
            )
        return torch.cat(found, 2).transpose(1, 2)

    def _mask(self, shared: int, size: int, like: Tensor) -> Tensor:
        """Return what is added to the scores of a row's own tokens, ``[size, shared + size]``."""
        if (shared, size) not in self._masks:
            hidden = torch.ones(size, shared + size, dtype=torch.bool, device=like.device).triu(shared + 1)
            self._masks[shared, size] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
        return self._masks[shared, size]


def _nearest(row: list[int], earlier: dict[int, list[int]]) -> tuple[int, int]:
    """Return the earlier row that this one begins like, and for how many tokens; a row keeps its last token."""
    found = max(((common(row[:-1], other), -number) for number, other in earlier.items()), default=(0, 1))
    return (-found[1], found[0]) if found[0] >= MIN_SHARED_PREFIX else (-1, 0)


def hidden_at_ends(base: SharedBase, groups: Sequence[Group]) -> Tensor:
    """Run the acting role over groups: the last hidden state at each response's last token, ``[N, hidden]``.

    Rows are in the order of the groups and of the responses in them. Differentiable; `backward` belongs into the same
    ``with base.acting_as(role)``.
    """
    if not base.packs:
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        batch = sampling.pack(base, [prompt for prompt, _ in rows], [response for _, response in rows])
        return sampling.last_hidden(batch, sampling.hidden_states(base, batch))
    layout = Layout(groups, base.device)
    return base.packed(layout, layout.ids)[layout.ends]


def score_groups(base: SharedBase, role: str, groups: Sequence[Group]) -> Tensor:
    """Score each response with a role's head at its last token, fp32; the role must be acting.

    Returns:
        ``[N]`` for `N` responses in all, in the order of `hidden_at_ends`; ``[N, K]`` for a head with K outputs.
    """
    return base.head(role, hidden_at_ends(base, groups))
