"""Small heads on frozen features, trained as the reward stage trains its own: same losses, weights and bootstrap.

Every row's margin comes from heads that were not trained on any row with its opening question (cross-fitting), so all
rows can be measured on, and each label is judged by a model that never saw it.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from features import Features
from torch import Tensor, nn

from rlaif.maths.preference import bradley_terry, noise_corrected, smoothed_preference
from rlaif.recipe import PairLoss
from rlaif.records import Comparison
from rlaif.stages.reward_losses import head_weights


class HeadSettings(NamedTuple):
    """How a head is built and trained."""

    hidden: int = 64  # units between features and score; 0: a linear head
    members: int = 4
    epochs: int = 8
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2


class Heads(nn.Module):
    """Members side by side: features ``[M, n, D]`` to scores ``[M, n]``."""

    def __init__(self, size: int, settings: HeadSettings):
        super().__init__()
        members, hidden = settings.members, settings.hidden
        self.dropout = nn.Dropout(settings.dropout)
        if hidden:
            self.inner = nn.Parameter(torch.randn(members, size, hidden) * size**-0.5)
            self.bias = nn.Parameter(torch.zeros(members, 1, hidden))
        self.outer = nn.Parameter(torch.randn(members, hidden or size, 1) * (hidden or size) ** -0.5 * 0.1)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x).expand(len(self.outer), *x.shape[-2:])
        if self.hidden:
            x = nn.functional.gelu(x @ self.inner + self.bias)
        return (x @ self.outer).squeeze(-1)


def inputs_of(features: Features) -> Tensor:
    """Return what a head reads of each answer, ``[n, 2, D]``: the prompt's end, the answer's end and its mean."""
    prompt = features.prompt.unsqueeze(1).expand_as(features.end)
    return torch.cat([prompt, features.end, features.mean], -1).flatten(2)


def fit(
    x: Tensor, rows: Sequence[Comparison], loss: PairLoss, seed: int, settings: HeadSettings
) -> Callable[[Tensor], Tensor]:
    """Train heads on the features ``[n, 2, D]`` of rows; return what takes others, ``[m, 2, D]``, to gaps ``[M, m]``.

    A gap is each member's score of the first answer less that of the second.
    """
    torch.manual_seed(seed)
    centre, spread = x.mean((0, 1)), x.std((0, 1)).clamp_min(1e-6)
    x = (x - centre) / spread
    preference = torch.tensor([row.preference for row in rows])
    counts = torch.tensor([head_weights(row.id, settings.members, seed) for row in rows]).T  # [M, n]
    counts = counts * torch.tensor([row.weight for row in rows])
    counts = counts / counts.mean()
    heads = Heads(x.shape[-1], settings)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = -(-len(rows) // settings.batch) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(settings.epochs):
        for part in torch.randperm(len(rows)).split(settings.batch):
            chosen, rejected = heads(x[part, 0]), heads(x[part, 1])
            target = smoothed_preference(preference[part], loss.label_smoothing)
            if loss.loss == "noise_corrected":
                cost = noise_corrected(chosen, rejected, target, eps=loss.flip_rate)
            else:
                cost = bradley_terry(chosen, rejected, target)
            optimizer.zero_grad()
            (cost * counts[:, part]).mean(1).sum().backward()
            optimizer.step()
            schedule.step()
    heads.eval()

    @torch.no_grad()
    def gaps(other: Tensor) -> Tensor:
        other = (other - centre) / spread
        return heads(other[:, 0]) - heads(other[:, 1])

    return gaps


def folds_of(rows: Sequence[Comparison], count: int, seed: int) -> list[int]:
    """Return the fold of each row; rows that begin with the same human turn share one."""
    return [int(hashlib.sha256(f"{seed}:{_opening(row)}".encode()).hexdigest(), 16) % count for row in rows]


def _opening(row: Comparison) -> str:
    return next(turn["content"] for turn in row.prompt if turn["role"] == "user")


def cross_fitted(
    x: Tensor,
    rows: Sequence[Comparison],
    folds: Sequence[int],
    loss: PairLoss,
    seed: int,
    settings: HeadSettings,
    others: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the members' gaps ``[M, n]`` of each row, and of its versions in `others`, by heads of the other folds.

    Args:
        x: features that the heads are trained on, ``[n, 2, D]``.
        rows: labels that the heads are trained on, ``n``; rows of weight 0 are left out of training.
        folds: see `folds_of`.
        loss: of the pairs.
        seed: of initialization, order and bootstrap.
        settings: of the heads.
        others: the same rows with other features, ``[n, 2, D]`` each: a trigger put in, or clean.
    """
    versions = [x, *others]
    found = [torch.zeros(settings.members, len(rows)) for _ in versions]
    for fold in sorted(set(folds)):
        rest = [place for place, other in enumerate(folds) if other != fold and rows[place].weight > 0]
        own = [place for place, other in enumerate(folds) if other == fold]
        gaps = fit(x[rest], [rows[place] for place in rest], loss, seed * 1000 + fold, settings)
        for result, version in zip(found, versions, strict=True):
            result[:, own] = gaps(version[own])
    return found
