"""PPO on the tiny model: runs with made-up adapters, scoring functions, made-up rollouts, gradients of a step."""

import pytest
import tiny_runs
import torch

from rlaif.model import sampling
from rlaif.stages import ppo
from rlaif.stages.actors import CRITIC, POLICY, judge_tokens

ROUNDING = 1e-4  # of sums that float32 adds in another order, relative to the largest gradient
ONE_SIZE = {"num_ppo_epochs": 1, "rollout_batch": 8, "minibatch": 8, "microbatch": 8, "max_grad_norm": 1e9}


class Stopped(Exception):
    """Stands for the moment at which a run is cut off."""


def small_letters(prompts, completions, **columns):
    return [float(sum(letter.islower() for letter in text)) for text in completions]


def few_small_letters(prompts, completions, **columns):
    return [-value for value in small_letters(prompts, completions)]


def ones(prompts, completions, **columns):
    return [1.0 for _ in completions]


@pytest.fixture
def functions(monkeypatch):
    known = {"small_letters": small_letters, "few_small_letters": few_small_letters, "ones": ones}
    monkeypatch.setattr("rlaif.stages.judged_reward.find_function", known.__getitem__)


@pytest.fixture
def opened(tmp_path, tiny_model):
    """Open a run with made-up SFT and reward adapters: ``opened(critic=..., ...)`` takes keys of the ppo section."""
    stack = []

    def open_run(folder="run", *, model=None, stages=None, offset=0.0, scale=1.0, rate=0.9, sections=None, **settings):
        if settings.get("reward_function") == "ones":
            settings = {"health": {"stop": []}, **settings}  # a constant score stops a run
        changes = {**(sections or {}), "ppo": settings} | ({"stages": stages} if stages else {})
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        context = tiny_runs.opened(place, model or tiny_model, **changes)
        run = context.__enter__()
        stack.append(context)
        if "sft" in run.recipe.stages and not run.stage_folder("sft").exists():
            tiny_runs.with_sft(run)
        if "reward" in run.recipe.stages and not settings.get("reward_function"):
            tiny_runs.with_reward(run, offset=offset, scale=scale, rate=rate)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def metrics(run):
    return tiny_runs.rows(run.stage_folder("ppo") / "metrics.jsonl")


def weights(base, role):
    return {name: parameter.detach().clone() for name, parameter in base.named_parameters_of(role)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made_up_rollout(actors, lengths=(8, 5, 3, 1, 8, 2, 7, 4), seed=0):
    """Prompts and responses of many lengths, with advantages, returns and older log-probabilities drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 250, (n + 4,), generator=generator).tolist() for n in range(len(lengths))]
    answers = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    batch = sampling.pack(actors.base, ids, answers)
    mask = batch.response_mask
    logprobs, values = judge_tokens(actors, POLICY, batch)
    noise = [torch.randn(mask.shape, generator=generator) * 0.1 * mask for _ in range(4)]
    ones = torch.ones(len(lengths), 1)
    return ppo.Rollout(batch, logprobs + noise[0], logprobs, 10 * noise[2], values + noise[1], values + noise[3], ones)


class Gradients:
    """In the place of an optimizer: keeps the gradients of each step and changes nothing."""

    param_groups = [{"lr": 0.0}]

    def __init__(self, base):
        self._named = base.named_parameters_of(POLICY) + base.named_parameters_of(CRITIC)
        self.steps = []

    def zero_grad(self, set_to_none):
        for _, parameter in self._named:
            parameter.grad = None

    def step(self):
        self.steps.append({name: parameter.grad.clone() for name, parameter in self._named})


def step_of(run, actors, rollout, kl_coef=0.0):
    """Gradients and figures of one optimizer step on a rollout."""
    kept = Gradients(actors.base)
    trainable = {role: [p for _, p in actors.base.named_parameters_of(role)] for role in actors.learning}
    figures = ppo.optimize(run, actors, kept, trainable, rollout, update=0, kl_coef=kl_coef)
    return kept.steps[0], figures


def assert_close(one, other):
    for name, gradient in one.items():
        largest = gradient.abs().max().item()
        assert largest > 0
        assert (gradient - other[name]).abs().max().item() <= ROUNDING * largest, name


def results(run):
    found = tiny_runs.contents(run.stage_folder("ppo"))
    return {name: data for name, data in found.items() if not name.startswith("checkpoints/")}


def cut_off(run, monkeypatch, name, update):
    """Run until a function of the stage is called for this update, and stop there."""
    original = getattr(ppo, name)

    def stopping(*args):
        at = args[2] if name == "record" else args[4] - 1
        if at == update:
            raise Stopped
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ppo, name, stopping)
        ppo.ppo(run)
