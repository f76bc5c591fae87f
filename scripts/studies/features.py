"""Hidden states of a frozen model on comparisons, computed once and kept in a folder.

A head on such features trains in seconds, so that a study can afford many rates, losses and seeds. Kept are the states
at the prompt's last token, at each answer's last token, and their mean over each answer, at a few layers. A
comparison's prompt is computed once, for both answers (`rlaif.model.groups`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rlaif.documents import fingerprint
from rlaif.files import write_bytes
from rlaif.model.groups import Group, Layout
from rlaif.model.roles import BASE, SharedBase
from rlaif.progress import Progress
from rlaif.records import Comparison, text_of

_TOKENS = 2048  # of a packed pass, about


class Features(NamedTuple):
    """States of `n` comparisons at `S` layers, fp32; the second axis of answers is chosen, rejected as in the rows."""

    prompt: Tensor  # [n, S, hidden], at the prompt's last token
    end: Tensor  # [n, 2, S, hidden], at the answer's last token
    mean: Tensor  # [n, 2, S, hidden], over the answer's tokens

    def exchanged(self, places: Sequence[int]) -> "Features":
        """Return the features with the two answers of some comparisons exchanged."""
        end, mean = self.end.clone(), self.mean.clone()
        end[places], mean[places] = end[places].flip(1), mean[places].flip(1)
        return Features(self.prompt, end, mean)

    def replaced(self, places: Sequence[int], other: "Features") -> "Features":
        """Return the features with some comparisons' taken from the same places of another set."""
        result = [part.clone() for part in self]
        for mine, theirs in zip(result, other, strict=True):
            mine[places] = theirs[places]
        return Features(*result)


def frozen(
    base: SharedBase, rows: Sequence[Comparison], layers: Sequence[int], folder: Path, progress: Progress
) -> Features:
    """Return the features of rows, of which those in the folder are read and all others computed and written there.

    Args:
        base: the model; no adapter acts.
        rows: comparisons.
        layers: after which layers, counted from 1; the last one's states are those after the final norm.
        folder: one file for each prompt with its two answers, named by what determines its numbers.
        progress: shows the computation.
    """
    groups = [
        Group(base.tokenizer.prompt(row.prompt), [base.tokenizer.response(text_of(side)) for side in _sides(row)])
        for row in rows
    ]
    identity = fingerprint([base.identity, list(layers)])[:12]
    paths = [folder / identity / f"{fingerprint([list(one.prompt), one.responses])}.safetensors" for one in groups]
    # Longest first: whoever waits sees an estimate that only gets better.
    wanted = sorted({path: group for path, group in zip(paths, groups, strict=True) if not path.is_file()}.items(),
                    key=lambda item: -_length(item[1]))  # fmt: skip
    with progress.task("features", len(wanted)) as task:
        for part in _batches(wanted):
            for path, states in zip([p for p, _ in part], _states(base, [g for _, g in part], layers), strict=True):
                write_bytes(path, save(states))
            task.advance(len(part))
    found = [_read(path) for path in paths]
    return Features(*(torch.stack([one[name] for one in found]) for name in Features._fields))


def _sides(row: Comparison) -> tuple[list, list]:
    return row.chosen, row.rejected


def _length(group: Group) -> int:
    return len(group.prompt) + sum(map(len, group.responses))


def _batches(wanted: Sequence[tuple[Path, Group]]) -> Iterator[list[tuple[Path, Group]]]:
    part: list[tuple[Path, Group]] = []
    for item in wanted:
        if part and sum(_length(group) for _, group in part) + _length(item[1]) > _TOKENS:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


@torch.no_grad()
def _states(base: SharedBase, groups: Sequence[Group], layers: Sequence[int]) -> list[dict[str, Tensor]]:
    """Run the frozen model over groups; return each group's features."""
    layout = Layout(groups, base.device)
    with base.acting_as(BASE), _captured(base, layers) as seen:
        seen[len(base.lm.get_decoder().layers)] = base.packed(layout, layout.ids)
    states = torch.stack([seen[layer].reshape(len(layout.ids), -1) for layer in layers], 1).float().cpu()  # [N, S, H]
    found, places = [], iter(layout.places)
    for group in groups:
        rows = [next(places) for _ in group.responses]
        own = [states[row[len(group.prompt) :]] for row in rows]
        ends, means = torch.stack([part[-1] for part in own]), torch.stack([part.mean(0) for part in own])
        found.append({"prompt": states[rows[0][len(group.prompt) - 1]].clone(), "end": ends, "mean": means})
    return found


@contextmanager
def _captured(base: SharedBase, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what the named layers give, by their number; the last one's own output is not normed and is not kept."""
    seen: dict[int, Tensor] = {}
    modules = base.lm.get_decoder().layers
    handles = [
        modules[layer - 1].register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.__setitem__(
                layer, output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in layers
        if layer < len(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in Features._fields}
