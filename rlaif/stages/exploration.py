"""Responses that the reference draws in place of the policy, and what all responses of an update then count.

A response is the reference's with probability `ppo.reference_share`, but for the first of an update, which is always
the policy's own. Whoever drew it, it counts its importance weight in every loss (`maths.losses.mixture_weights`), so
that losses stay means over the policy's responses; `docs/ppo.md` has the derivation. Which rows the reference draws is
a function of seed, update and row.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from rlaif.maths.losses import mixture_weights
from rlaif.model import sampling
from rlaif.recipe import PpoSection
from rlaif.stages import rollouts
from rlaif.stages.actors import Actors
from rlaif.stages.checkpoints import POLICY, STAGE
from rlaif.stages.run import Run


def policy_draws(run: Run, actors: Actors, rows: int) -> Tensor:
    """Tell which responses of an update the policy draws, ``[B]``; the reference draws the others."""
    share = actors.settings.reference_share
    coins = [random.Random(run.seed(STAGE, actors.update, row, "reference")).random() for row in range(rows)]
    return torch.tensor([row == 0 or coin >= share for row, coin in enumerate(coins)], device=actors.base.device)


def draw(run: Run, actors: Actors, ids: Sequence[Sequence[int]], own: Tensor) -> list[sampling.Sample]:
    """Sample one response to each prompt, by the policy where it is its own, else by the reference."""
    found: dict[int, sampling.Sample] = {}
    for role, rows in ((POLICY, own), (actors.reference, ~own)):
        places = rows.nonzero().flatten().tolist()
        if not places:
            continue
        seeds = [run.seed(STAGE, actors.update, row) for row in places]
        samples = rollouts.sample(run, actors, role, [ids[row] for row in places], seeds)
        found |= dict(zip(places, samples, strict=True))
    return [found[row] for row in range(len(ids))]


def weights_of(settings: PpoSection, divergence: Tensor) -> Tensor:
    """Return what each response counts, ``[B, 1]``, from log policy - log reference of each, ``[B]``."""
    share = torch.full_like(divergence, 1 - settings.reference_share)
    share[0] = 1.0  # the policy always draws the first
    return mixture_weights(divergence, share).unsqueeze(1)


def exploration_figures(actors: Actors, own: Tensor, scores: Tensor, weights: Tensor) -> dict[str, float]:
    """Return the metrics of an update that explores; none where nothing is scheduled and all responses are its own."""
    settings = actors.settings
    figures: dict[str, float] = {}
    if settings.final_temperature is not None:
        figures["rollout/temperature"] = actors.temperature
    if settings.final_entropy_coef is not None:
        figures["policy/entropy_coef"] = settings.entropy_coef_at(actors.update)
    if not own.all():
        figures["rollout/reference_score"] = scores[~own].mean().item()
        figures["rollout/reference_weight"] = weights[~own].mean().item()
    return figures
