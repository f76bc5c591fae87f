"""Who samples PPO's responses: the roles on the shared base, or a server that loads their adapters anew each update.

A server computes in another precision than the base that is trained, so it samples from a slightly different policy.
Its tokens count a truncated importance weight in the policy's loss (`maths.losses.truncated_weights`). Where its
log-probabilities are too far from those computed here it has another model or another adapter, and the run stops.

An adapter is served from ``served/NAME`` in the stage's folder under that NAME, which no other attempt uses. The folder
is removed once the server has forgotten the name: what is found there was left by a run that was killed.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif import files
from rlaif.endpoints import BASE
from rlaif.engines.rollouts import Drawing, RolloutEngine
from rlaif.errors import EngineError, StageError
from rlaif.maths.losses import truncated_weights
from rlaif.maths.masking import masked_mean
from rlaif.model.drawn import token_figures, token_states
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch, Sample
from rlaif.stages import shares
from rlaif.stages.actors import Actors
from rlaif.stages.checkpoints import POLICY, STAGE
from rlaif.stages.run import Run

SERVED = "served"


def sample(run: Run, actors: Actors, role: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sample]:
    """Draw one response to each prompt with a role, here or on the server that the recipe names.

    Raises:
        EngineError: the server does not load the adapter, or does not sample from it.
    """
    settings = actors.settings
    limit = settings.sampling.max_new_tokens
    if settings.sampling_engine != BASE:
        ask = partial(_ask, run, actors, role, prompts, seeds)
        return shares.samples_of_first(ask, len(prompts), limit)
    with actors.base.acting_as(role):
        return shares.sample(
            actors.base,
            prompts,
            max_new_tokens=limit,
            seeds=seeds,
            temperature=actors.temperature,
            top_p=settings.sampling.top_p,
            rows=settings.sampling_batch,
        )


def _ask(run: Run, actors: Actors, role: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Sample]:
    base, settings = actors.base, actors.settings
    vocabulary = base.lm.get_input_embeddings().num_embeddings
    drawing = Drawing(settings.sampling.max_new_tokens, actors.temperature, base.tokenizer.eos_ids, vocabulary)
    name = settings.sampling_engine
    engine = actors.sampler = actors.sampler or RolloutEngine(name, run.recipe.engines[name], run.progress.say)
    folder = run.stage_folder(STAGE) / SERVED
    for left in sorted(folder.glob("*")):
        _forget(engine, left)
    if role == BASE:
        return engine.sample(None, prompts, seeds, drawing)
    adapter = folder / f"{run.recipe.name}-{role}-{actors.update + 1}-{secrets.token_hex(4)}"
    with _served(engine, base, role, adapter):
        return engine.sample(adapter.name, prompts, seeds, drawing)


@contextmanager
def _served(engine: RolloutEngine, base: SharedBase, role: str, folder: Path) -> Iterator[None]:
    """Let the server have a role's adapter for as long as the block lasts."""
    _refuse_patterns(base, role)
    base.save_role(role, folder)
    try:
        engine.load(folder.name, folder.resolve())
        yield
    except BaseException:
        with suppress(EngineError):  # then the folder stays, and the next attempt tells the server
            _forget(engine.hasty(), folder)
        raise
    _forget(engine, folder)


def _forget(engine: RolloutEngine, folder: Path) -> None:
    engine.unload(folder.name)
    files.remove_folder(folder)
    with suppress(OSError):  # others are left
        folder.parent.rmdir()


def _refuse_patterns(base: SharedBase, role: str) -> None:
    """Refuse an adapter whose matrices have ranks or scales of their own, which vLLM does not read."""
    config = base.peft.peft_config[role]
    if config.rank_pattern or config.alpha_pattern:
        raise StageError(
            f"ppo.sampling_engine: the adapter of the {role} has a rank_pattern or an alpha_pattern, which vLLM does "
            "not read. Start from one without, or leave sampling_engine out."
        )


def rollout_inputs(run: Run) -> dict[str, Any]:
    """Return what the server is asked with, for the inputs of the stage; nothing where none samples."""
    name = run.recipe.ppo.sampling_engine
    return {} if name == BASE else {"sampling": run.asked(name)}


class Mismatch(NamedTuple):
    """How far those who sampled are from the roles here.

    Attributes:
        weights: what a token counts in the policy's loss, ``[B, T]``; 1 where nothing is corrected.
        figures: its metrics.
    """

    weights: Tensor | float
    figures: dict[str, float]


def mismatch(actors: Actors, logprobs: Tensor, samples: Sequence[Sample], batch: Batch, own: Tensor) -> Mismatch:
    """Compare the log-probabilities that tokens were sampled with to those computed here.

    Args:
        actors: who takes part.
        logprobs: of the sampled tokens under the role that drew them, ``[B, T]``.
        samples: ``B`` of them.
        batch: the same, packed.
        own: which of them the policy drew, ``[B]``.

    Raises:
        StageError: a server is further away than another precision explains, or leaves the temperature out.
    """
    settings, mask = actors.settings, batch.response_mask
    width = mask.shape[1]
    sampled = torch.tensor([one.logprobs + [0.0] * (width - len(one.ids)) for one in samples]).to(logprobs)
    gap = ((logprobs - sampled) * mask).abs()
    figures = {"rollout/logprob_gap": gap.max().item()}
    if settings.sampling_engine == BASE:
        return Mismatch(1.0, figures)
    if actors.temperature != 1:
        _refuse_raw(actors, gap, sampled, batch, own)
    mean = masked_mean(gap, mask).item()
    _refuse_other_model(actors, mean)
    figures["rollout/mean_logprob_gap"] = mean
    if settings.importance_cap is None:
        return Mismatch(1.0, figures)
    weights = truncated_weights(logprobs, sampled, settings.importance_cap)
    figures["rollout/importance_weight"] = masked_mean(weights, mask).item()
    figures["rollout/importance_cut"] = masked_mean(weights >= settings.importance_cap, mask).item()
    return Mismatch(weights, figures)


@torch.no_grad()
def _refuse_raw(actors: Actors, gap: Tensor, sampled: Tensor, batch: Batch, own: Tensor) -> None:
    """Refuse log-probabilities from before the temperature, which is what vLLM sends by default.

    A microbatch tells: they are then much closer to those at temperature 1.
    """
    rows = own.nonzero().flatten()[: actors.settings.microbatch]
    part = Batch(*(whole[rows] for whole in batch))
    with actors.base.acting_as(POLICY, training=True):
        plain = token_figures(actors.base, part, token_states(actors.base, part), 1.0).logprobs
    of_raw = masked_mean((plain - sampled[rows]).abs(), part.response_mask)
    if 2 * of_raw < masked_mean(gap[rows], part.response_mask):
        raise StageError(
            f"{_beginning(actors)} are those before the temperature of {actors.temperature:g}. Start the server with "
            "--logprobs-mode processed_logprobs; then run the same command again."
        )


def _refuse_other_model(actors: Actors, gap: float) -> None:
    limit = actors.settings.max_logprob_gap
    if limit is not None and not gap <= limit:
        raise StageError(
            f"{_beginning(actors)} are {gap:.2f} nats a token from those of the policy here; at most "
            f"ppo.max_logprob_gap = {limit:g} is expected. No step was taken from its responses, and the newest "
            "checkpoint is kept. Check that every url serves the recipe's model (--model, and its quantization), and "
            "that the server reads the adapter from this run's folder and not from a copy. Then run the same command "
            "again."
        )


def _beginning(actors: Actors) -> str:
    engine = actors.settings.sampling_engine
    return f"ppo: update {actors.update + 1}: the log-probabilities of the engine `{engine}`"
