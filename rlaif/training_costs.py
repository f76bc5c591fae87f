"""What the stages that train compute: steps, tokens, and passes over them, from a recipe and the rows that are there.

Passes are counted in tokens of one forward pass of the recipe's model. A backward pass costs as much as two, and a pass
of another base as many times more as it has parameters.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rlaif.endpoints import BASE
from rlaif.memory import scorers_of
from rlaif.memory_advice import lengths_of_rows, shape_of, tokens_of
from rlaif.recipe import Recipe, TrainingSection
from rlaif.records import Prompt
from rlaif.stages.judged_reward import rated_under
from rlaif.stages.rating import question
from rlaif.stages.run import Run
from rlaif.stages.training import steps_of

_BACKWARD = 3.0  # a forward and a backward pass cost about this many forward passes


class Work(NamedTuple):
    """What a training takes."""

    steps: int
    written: int  # tokens sampled here
    read: int  # tokens that a pass goes over, each counted once
    passes: float  # tokens times the passes over them
    rated: int = 0  # questions to the judge about responses


def work_of(run: Run, stage: str) -> Work:
    """Return what a stage's training, and what it scores by itself, would take."""
    if stage == "ppo":
        return _ppo(run)
    if stage == "rejection":
        return _rejection(run)
    settings: TrainingSection = getattr(run.recipe, stage)
    found = lengths_of_rows(run, stage)
    # A comparison is read on both sides; the lengths are those of its longer one.
    whole = (1 if stage == "sft" else 2) * statistics.fmean(found or [0])
    of_base = _ratio(run.recipe) if stage == "reward" else 1.0
    models = run.recipe.reward.num_adapters + run.recipe.reward.cost if stage == "reward" else 1
    steps, tokens = _trained(run, settings, len(found), whole)
    return Work(steps, 0, round(tokens), tokens * models * of_base * (_BACKWARD + (stage == "dpo")))


def _trained(run: Run, settings: TrainingSection, rows: int, length: float) -> tuple[int, float]:
    """Return the steps of a training, and the tokens that it reads once."""
    heldout: float = settings.heldout_fraction  # type: ignore[attr-defined]
    steps = steps_of(settings, max(1, round(rows * (1 - heldout))), run.processes)
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * run.processes
    return steps, steps * per_step * length


def _ppo(run: Run) -> Work:
    settings = run.recipe.ppo
    responses = settings.updates * settings.rollout_batch * settings.samples_per_prompt
    written = responses * settings.sampling.max_new_tokens
    prompts = run.select("train", settings.prompts_per_tag)
    whole = written + responses * statistics.fmean(tokens_of(row.prompt) for row in prompts)
    # The policy and the reference read each response once, and so does every adapter that scores.
    passes = whole * (2 + scorers_of(run.recipe) * _ratio(run.recipe) + _BACKWARD * settings.num_ppo_epochs)
    text = measured = 0
    if settings.ptx_file:
        measured = settings.updates * settings.ptx_heldout * settings.ptx_length
    if settings.ptx_coef:
        optimizer_steps = responses // settings.minibatch * settings.num_ppo_epochs
        text = optimizer_steps * settings.ptx_batch * settings.ptx_length
    rated, tokens = _ratings(run, prompts, responses) if settings.is_judged else (0, 0.0)
    # What a server writes or reads takes no time here.
    here, judged = (written if settings.sampling_engine == BASE else 0), (tokens if run.rater == BASE else 0.0)
    read = round(whole + tokens) + text + measured
    return Work(settings.updates, here, read, passes + judged + _BACKWARD * text + measured, rated)


def _ratings(run: Run, prompts: Sequence[Prompt], responses: int) -> tuple[int, float]:
    """Return how many questions to the judge the responses of PPO make, and how many tokens these have."""
    asked = [[question("", row.prompt, "", principle) for principle in rated_under(run, row)] for row in prompts]
    tokens = [sum(tokens_of(one.messages[0]["content"]) for one in group) for group in asked]
    count = responses * statistics.fmean(map(len, asked))
    return round(count), responses * statistics.fmean(tokens) + count * run.recipe.ppo.sampling.max_new_tokens


def _rejection(run: Run) -> Work:
    """Count the scoring of all samples and the training on the best ones; the samples are questions of their own."""
    settings = run.recipe.rejection
    prompts = [tokens_of(row.prompt) for row in run.select("train", settings.prompts_per_tag)]
    length = statistics.fmean(prompts) + settings.sampling.max_new_tokens
    scored = len(prompts) * settings.samples_per_prompt * length
    steps, trained = _trained(run, settings, len(prompts), length)
    passes = scored * run.recipe.reward.num_adapters * _ratio(run.recipe) + _BACKWARD * trained
    return Work(steps, 0, round(scored + trained), passes)


def _ratio(recipe: Recipe) -> float:
    """Return how much more a pass of `reward.model` costs than one of the recipe's model; 1 where one is not known."""
    if recipe.reward.model is None:
        return 1.0
    own, other = shape_of(recipe.model), shape_of(recipe.reward_base())
    return other.parameters / own.parameters if own and other else 1.0
