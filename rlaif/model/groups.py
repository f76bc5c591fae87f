"""Score the responses of a prompt together, with gradients: each prompt is computed once, and nothing is padded.

All tokens of all groups go through a model as one packed row ``[1, N]``: a group's prompt, its first response, its
second one and so on. The positions of every response begin at the prompt's length, and attention alone knows which
token belongs to whom: it is replaced for the length of a pass, as it is for generation (`rlaif.model.attention`). A
prompt and its first response are one causal sequence; each further response attends to the prompt and to itself. A
score is what a padded pass over whole rows would give, beyond the rounding of sums, and so are the gradients.

Models whose attention cannot be replaced take the padded pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlaif.model import sampling
from rlaif.model.roles import SharedBase


@dataclass(frozen=True)
class Group:
    """A prompt and one or more responses to it, as token ids; each response is closed by the end of a turn.

    No tuple, because `Trainer` takes tuples of its batches apart.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]


def joined(groups: Sequence[Group]) -> Group:
    """Make one group of several whose prompts begin alike; what differs of a prompt comes before each response to it.

    Its responses are those of the first group, of the second one and so on, and are scored as they were.
    """
    alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*(group.prompt for group in groups), strict=False))
    shared = [ids[0] for ids in alike]
    responses = [[*group.prompt[len(shared) :], *response] for group in groups for response in group.responses]
    return Group(shared, responses)


class Layout:
    """Which token of a packed pass over groups belongs to whom; takes the place of `attention.Step`."""

    def __init__(self, groups: Sequence[Group], device: torch.device):
        """Lay groups out; see `ids`, `positions` and `ends`."""
        self.ids = [token for group in groups for part in (group.prompt, *group.responses) for token in part]
        # Pieces of the packed row: [prompt, first response], then each further response; and the prompt's length.
        self._pieces = [
            (len(group.prompt) * (not index) + len(response), len(group.prompt), not index)
            for group in groups
            for index, response in enumerate(group.responses)
        ]
        self._sizes = [size for size, _, _ in self._pieces]
        starts = [0 if first else prompt for _, prompt, first in self._pieces]
        places = [torch.arange(start, start + size) for start, size in zip(starts, self._sizes, strict=True)]
        self.positions = torch.cat(places).unsqueeze(0).to(device)  # [1, N]
        self.ends = torch.tensor(list(accumulate(self._sizes)), device=device) - 1  # of each response, in order
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Let each token attend to its prompt and its response: ``[heads, N, size]`` to ``[1, N, heads, size]``."""
        # One split and one join: slices and written slices would each have a full-size gradient.
        queries, keys, values = (torch.split(part.unsqueeze(0), self._sizes, 2) for part in (query, key, value))
        found: list[Tensor] = []
        own_key = own_value = prompt_key = prompt_value = key
        for index, (size, prompt, first) in enumerate(self._pieces):
            if first:
                own_key, own_value = keys[index], values[index]
                prompt_key, prompt_value = own_key[:, :, :prompt], own_value[:, :, :prompt]
            else:
                own_key = torch.cat([prompt_key, keys[index]], 2)
                own_value = torch.cat([prompt_value, values[index]], 2)
            found.append(
                scaled_dot_product_attention(
                    queries[index],
                    own_key,
                    own_value,
                    attn_mask=None if first else self._mask(prompt, size, query),
                    is_causal=first,
                    scale=scaling,
                    enable_gqa=len(query) != len(key),
                )
            )
        return torch.cat(found, 2).transpose(1, 2)

    def _mask(self, prompt: int, size: int, like: Tensor) -> Tensor:
        """Return what is added to the scores of a further response, ``[size, prompt + size]``."""
        if (prompt, size) not in self._masks:
            hidden = torch.ones(size, prompt + size, dtype=torch.bool, device=like.device).triu(prompt + 1)
            self._masks[prompt, size] = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
        return self._masks[prompt, size]


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
