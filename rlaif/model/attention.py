"""Attention over slots: rows of any length side by side in one forward pass, without padding and without copied keys.

A slot holds the keys and values of one row's tokens. A `Step` is one forward pass of a *packed* batch ``[1, N]``: first
the newest token of each live slot, then *segments*, which are the earlier tokens of rows that have just come in. All
other layers of a model see ``N`` tokens and no padding; only attention knows which token belongs to which row.

The heads that share a key head are put below each other as rows of one query, so that grouped keys and values are read
as they are stored: transformers' `sdpa` repeats them for each query head wherever there is a mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "rlaif_slots"


class Segment(NamedTuple):
    """Some tokens of one row: which slot they go to, from which position on, and where they stand in the batch."""

    slot: int
    start: int
    begin: int
    end: int


class Layout(Protocol):
    """What a packed pass attends by."""

    positions: Tensor  # [1, N]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attend in one layer: ``[heads, N, size]`` to ``[1, N, heads, size]``."""


class Store:
    """Keys and values of every layer, ``[slots, key heads, capacity, head size]``; allocated when first written to."""

    def __init__(self, slots: int, capacity: int):
        self._slots, self._capacity = slots, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the storage of one layer whose keys and values look like ``[key heads, N, head size]``."""
        if index not in self._layers:
            # Zeros, because what is masked is still multiplied by zero, and zero times what lay there may be no number.
            one, other = (
                part.new_zeros(self._slots, part.shape[0], self._capacity, part.shape[2]) for part in (key, value)
            )
            self._layers[index] = one, other
        return self._layers[index]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first tokens of one slot to another."""
        for pair in self._layers.values():
            for part in pair:
                part[target, :, :count] = part[source, :, :count]


class Step:
    """One forward pass: where each token of a packed batch belongs."""

    def __init__(self, store: Store, last: Sequence[int], segments: Sequence[Segment], device: torch.device):
        """Prepare a pass.

        Args:
            store: where keys and values are.
            last: the position of the newest token of slot 0, 1, ...; these tokens come first in the batch.
            segments: the tokens that follow, in their order.
            device: where the model is.
        """
        self._store, self._segments, self._rows = store, segments, len(last)
        self._width = max(last) + 1
        self._slots = torch.arange(len(last), device=device)
        self._last = torch.tensor(last, device=device)
        columns = torch.arange(self._width, device=device)
        places = [columns[s.start : s.start + s.end - s.begin] for s in segments]
        self.positions = torch.cat([self._last, *places]).unsqueeze(0)  # [1, N]
        # Which stored tokens each one sees: [S, 1, 1, width], and [n, start + n] for a segment.
        self._newest_sees = (columns <= self._last.unsqueeze(1))[:, None, None]
        self._sees = [
            columns[: s.start + len(own)] <= own.unsqueeze(1) for s, own in zip(segments, places, strict=True)
        ]
        self._masks: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Store keys and values and attend to all that the row has: ``[heads, N, size]`` to ``[1, N, heads, size]``."""
        keys, values = self._store.layer(layer, key, value)
        heads, total, _ = query.shape
        groups = heads // len(key)
        out = query.new_empty(total, heads, value.shape[2])
        rows, width = self._rows, self._width
        if not self._masks:  # added to the scores; the kernels would make these of boolean masks in every layer
            self._masks = [_additive(sees.repeat(groups, 1), query.dtype) for sees in self._sees]
            self._masks.append(_additive(self._newest_sees, query.dtype))
        keys[self._slots, :, self._last] = key[:, :rows].transpose(0, 1)
        values[self._slots, :, self._last] = value[:, :rows].transpose(0, 1)
        for segment, mask in zip(self._segments, self._masks[:-1], strict=True):
            here, stop = slice(segment.begin, segment.end), segment.start + segment.end - segment.begin
            keys[segment.slot, :, segment.start : stop] = key[:, here]
            values[segment.slot, :, segment.start : stop] = value[:, here]
            grouped = query[:, here].reshape(len(key), -1, query.shape[2])  # [key heads, groups * n, size]
            found = scaled_dot_product_attention(
                grouped.unsqueeze(0),
                keys[segment.slot : segment.slot + 1, :, :stop],
                values[segment.slot : segment.slot + 1, :, :stop],
                attn_mask=mask,
                scale=scaling,
            )
            out[here] = found.view(heads, -1, value.shape[2]).transpose(0, 1)
        grouped = query[:, :rows].transpose(0, 1).reshape(rows, len(key), groups, -1)
        found = scaled_dot_product_attention(
            grouped, keys[:rows, :, :width], values[:rows, :, :width], attn_mask=self._masks[-1], scale=scaling
        )
        out[:rows] = found.reshape(rows, heads, -1)
        return out.unsqueeze(0)


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -torch.inf)


_LAYOUT: ContextVar[Layout] = ContextVar("layout")


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    return _LAYOUT.get().attend(module.layer_idx, query[0], key[0], value[0], scaling), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def _instead(config: Any, layout: Layout) -> Iterator[None]:
    """Let a model attend by a layout."""
    usual, token = config._attn_implementation, _LAYOUT.set(layout)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _LAYOUT.reset(token)


def current(config: Any) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which a model attends as it does now: for layers that are recomputed after a pass."""
    layout = _LAYOUT.get(None)
    return nullcontext if layout is None else lambda: _instead(config, layout)


def forward(trunk: Callable[..., Any], config: Any, layout: Layout, ids: Sequence[int]) -> Tensor:
    """Run a packed batch of token ids through a trunk: the last hidden states, ``[N, hidden]``."""
    device = layout.positions.device
    no_mask = torch.zeros(1, 1, 1, 1, device=device)  # of four dimensions, so that no causal mask is built
    with _instead(config, layout):
        out = trunk(
            input_ids=torch.tensor([list(ids)], device=device),
            attention_mask=no_mask,
            position_ids=layout.positions,
            use_cache=False,
        )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def replaceable(lm: Any) -> bool:
    """Whether a model's attention is the plain one in all layers, so that a step can take its place."""
    config = lm.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"]
    return (
        getattr(lm, "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and set(kinds) == {"full_attention"}
    )


def agrees(base: Any, project: Callable[[Tensor], Tensor], ids: list[int], expected: Tensor) -> bool:
    """Whether a packed pass of some token ids, projected, is what the model itself computed: ``[N, V]``."""
    last = len(ids) - 1
    step = Step(Store(2, last + 1), [last, 0], [Segment(0, 0, 2, 2 + last)], base.device)
    logits = project(base.packed(step, [ids[-1], ids[0], *ids[:-1]]))
    found = torch.stack([*logits[2:], logits[0], logits[1]])
    wanted = torch.stack([*expected, expected[0]])
    tolerance = 1e-3 if base.lm.dtype == torch.float32 else 5e-2  # of half precision, rounding in another order
    return bool((found - wanted).norm() <= tolerance * wanted.norm())
