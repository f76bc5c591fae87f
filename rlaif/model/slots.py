"""The slots of a batch: prompts come in as places fall free, rows leave when they are done.

Every forward pass takes the newest token of each live row and, in the same packed batch, the prompts that come in. What
a prompt shares with one that a slot still holds (worked examples, the other order of a pair, another sample) is copied
and not computed; one that would share much with a prompt of the very same pass waits for the next.

Which prompt comes in when depends on the prompts and on which rows are done, and on nothing else.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlaif.model.attention import Segment, Step, Store
from rlaif.model.roles import SharedBase

MIN_SHARED_PREFIX = 16  # tokens; below this, copying what a prompt begins with does not pay
TOKENS_PER_SLOT = 64  # of prompts that come in with one pass; bounds the memory of a pass

# Given the live rows and the logits after their newest tokens ``[S, V]``: the next token of each, or None where done.
Extend = Callable[[list[int], Tensor], Sequence[int | None]]


@torch.no_grad()
def run(base: SharedBase, prompts: Sequence[Sequence[int]], *, slots: int, max_new_tokens: int, extend: Extend) -> None:
    """Run prompts through the acting role until each is done.

    Args:
        base: the shared base; a role must be acting.
        prompts: token ids, one list a row.
        slots: how many rows are live at most.
        max_new_tokens: how much longer than its prompt a row gets at most.
        extend: called after each pass, see `Extend`.
    """
    slots = min(slots, len(prompts))
    state = _Slots(prompts, Store(slots, max(map(len, prompts)) + max_new_tokens), slots)
    while state.admit():
        ids = [tokens[-1] for tokens in state.tokens]
        segments = []
        for slot, start in state.fresh:
            earlier = state.tokens[slot][start:-1]
            if earlier:
                segments.append(Segment(slot, start, len(ids), len(ids) + len(earlier)))
                ids += earlier
        step = Step(state.store, [len(tokens) - 1 for tokens in state.tokens], segments, base.device)
        hidden = base.packed(step, ids)
        state.extend(extend(list(state.rows), base.logits(hidden[: len(state.rows)])))


class _Slots:
    """Which row has which slot. Live rows have the slots from 0 on, without gaps while a pass runs."""

    def __init__(self, prompts: Sequence[Sequence[int]], store: Store, slots: int):
        self.store, self._prompts, self._slots = store, prompts, slots
        self._waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        self._prefixes = Prefixes(prompts)
        self._free: list[int] = []  # slots of rows that are done, ascending
        self._held: dict[int, int] = {}  # by slot, the row whose prompt lies there, done or not
        self.rows: list[int] = []  # live rows by slot
        self.tokens: list[list[int]] = []  # of each live row: prompt and response so far
        self.fresh: list[tuple[int, int]] = []  # slots of this pass's prompts, and where they must be computed from

    def admit(self) -> bool:
        """Let prompts in where there is room, and close the gaps that remain; False when all rows are done."""
        self.fresh = []
        stored = {self._prefixes.place[row]: (slot, len(self._prompts[row])) for slot, row in self._held.items()}
        coming: dict[int, tuple[int, int]] = {}  # by place among the prefixes: the slot, and how much it has already
        budget, used = self._slots * TOKENS_PER_SLOT, 0
        for row in self._waiting:
            if not self._free and len(self.rows) == self._slots:
                break
            own, here = len(self._prompts[row]) - 1, self._prefixes.place[row]  # the last token is always computed
            count, source = max(self._source(here, own, stored), self._source(here, own, coming))
            start = count if count >= MIN_SHARED_PREFIX else 0
            if used and used + own - start > budget:
                break
            if min(self._prefixes.longest(here, sorted(coming))[0], own) - start >= MIN_SHARED_PREFIX:
                continue
            slot = self._free.pop(0) if self._free else len(self.rows)
            if start:
                self.store.copy(source, slot, start)
            stored = {place: held for place, held in stored.items() if held[0] != slot}
            self._put(slot, row, list(self._prompts[row]))
            coming[here] = slot, start
            self.fresh.append((slot, start))
            used += own - start
        admitted = {self.rows[slot] for slot, _ in self.fresh}
        self._waiting = [row for row in self._waiting if row not in admitted]
        self._close_gaps()
        return bool(self.rows)

    def _source(self, here: int, own: int, places: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Return how many tokens of a prompt can be copied from the nearest of some prompts, and from which slot."""
        shared, place = self._prefixes.longest(here, sorted(places))
        slot, has = places.get(place, (0, 0))
        return min(shared, own, has), slot

    def extend(self, following: Sequence[int | None]) -> None:
        """Give each live row its next token, or free its slot."""
        for slot, token in enumerate(following):
            if token is None:
                self._free.append(slot)
            else:
                self.tokens[slot].append(token)

    def _put(self, slot: int, row: int, tokens: list[int]) -> None:
        if slot == len(self.rows):
            self.rows.append(row)
            self.tokens.append(tokens)
        self.rows[slot], self.tokens[slot], self._held[slot] = row, tokens, row

    def _close_gaps(self) -> None:
        """Move rows from the last slots to those that nobody came into."""
        for slot in reversed(self._free):
            last = len(self.rows) - 1
            if slot != last:
                self.store.copy(last, slot, len(self.tokens[last]) - 1)
                self._put(slot, self.rows[last], self.tokens[last])
            self.rows.pop()
            self.tokens.pop()
        self._free = []


class Prefixes:
    """How many tokens prompts begin with in common. In lexicographic order, the nearest prompts share the most."""

    def __init__(self, prompts: Sequence[Sequence[int]]):
        order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
        self.place = {row: place for place, row in enumerate(order)}
        self._lengths = [len(prompts[row]) for row in order]
        self._shared = [common(prompts[one], prompts[other]) for one, other in pairwise(order)]  # by neighbours

    def longest(self, here: int, places: Sequence[int]) -> tuple[int, int]:
        """Return the most tokens that the prompt of a place shares with one of some places (ascending), and which."""
        right = bisect(places, here)
        found = (0, -1)
        for other in places[max(right - 1, 0) : right + 1]:
            low, high = min(here, other), max(here, other)
            found = max(found, (min(self._shared[low:high], default=self._lengths[here]), other))
        return found


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
