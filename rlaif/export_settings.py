"""A recipe's PPO in the words of other engines: which of their keys says what ours say, and what nothing there says.

verl 0.9.1: keys of ``verl/trainer/config/ppo_trainer.yaml``. OpenRLHF 0.11.2: arguments of
``openrlhf.cli.train_ppo_ray``. Both words and meanings are those of the released packages.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from rlaif.errors import ConfigError
from rlaif.recipe import Recipe

VERSIONS = {"verl": "0.9.1", "openrlhf": "0.11.2"}
_UNBOUNDED = 10**9  # what no score, and no ratio, comes near
_VERL_ESTIMATORS = {"gae": "gae", "rloo": "rloo", "grpo": "grpo", "dr_grpo": "grpo"}
_VERL_MEANS = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
_OPENRLHF_ESTIMATORS = {
    "gae": "gae",
    "rloo": "rloo",
    "grpo": "group_norm",
    "dr_grpo": "dr_grpo",
    "reinforce": "flash_reinforce",
}
_OPENRLHF_MEANS = {"token": "token-mean", "sequence": "seq-mean-token-mean"}

# What no engine has, by key, where there is more to say than that.
_ABSENT = {
    "critic": "the critic is a model of its own, with a new head on the start of the policy",
    "vf_coef": "the critic has an optimizer of its own",
    "kl_target": "the engine's target is in nats a token and its rule another one; kl_coef stays fixed",
    "target_kl": "all epochs are gone through",
    "missing_eos_penalty": "a response without an end loses nothing",
    "whiten_rewards": "token rewards are not whitened",
    "ptx_coef": "no plain text is learned beside",
    "reward_model": "`rlaif reward serve --ensemble` says it; uncertainty_coef is 0.5 there",
}
# Keys that both engines are told, in settings or in the prompts.
_CARRIED = {
    *("updates", "rollout_batch", "samples_per_prompt", "minibatch", "microbatch", "num_ppo_epochs"),
    *("advantage_estimator", "loss_aggregation", "learning_rate", "lr_scheduler_type", "warmup_updates"),
    *("adam_epsilon", "max_grad_norm"),
    *("gamma", "lam", "cliprange", "cliprange_value", "entropy_coef", "kl_coef", "kl_in", "save_every_updates"),
    *("sampling", "prompts_per_tag"),
}


class Exported(NamedTuple):
    """Settings in an engine's words, in order, and what of ours was left behind, each with the reason."""

    settings: dict[str, str]
    left: dict[str, str]


def settings_for(engine: str, recipe: Recipe, prompt_tokens: int) -> Exported:
    """Return a recipe's PPO as an engine's settings.

    Args:
        engine: `verl` or `openrlhf`.
        recipe: the recipe.
        prompt_tokens: of its longest prompt.

    Raises:
        ConfigError: a setting without which the result would be another algorithm has no counterpart there.
    """
    found, left = _ENGINES[engine](recipe, prompt_tokens)
    section = recipe.ppo
    known = _CARRIED | ({"score_clip"} if engine == "openrlhf" else set())
    absent = section.changed - known | ({"critic", "vf_coef"} if section.has_critic else set())
    left |= {key: _ABSENT.get(key, "no counterpart") for key in sorted(absent)}
    told = {f"ppo.{key}: {_plain(getattr(section, key))}": reason for key, reason in left.items()}
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        told["model.load_in_4bit, load_in_8bit"] = "the base is whole; the adapter was trained on a rounded one"
    if recipe.rejection_first:
        told["stages: rejection before ppo"] = "the policy starts from SFT, and not from what `rejection` made of it"
    if recipe.rounds.count > 1:
        told[f"rounds.count: {recipe.rounds.count}"] = "one round; the reward that answers is the last round's"
    told["(the mean of the first rollout)"] = "scores are shifted as `reward` measured them, and not by it as well"
    return Exported({key: _plain(value) for key, value in found.items()}, told)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value)


def _targets(recipe: Recipe) -> str | list[str]:
    targets = recipe.model.lora_target_modules
    odd = [name for name in targets if not re.fullmatch(r"[\w.*-]+", name)] if isinstance(targets, list) else []
    if odd:
        raise ConfigError(f"model.lora_target_modules: `{odd[0]}` cannot be written in another engine's settings.")
    return targets


def _refuse_estimator(engine: str, estimator: str, known: dict[str, str]) -> None:
    if estimator not in known:
        raise ConfigError(
            f"ppo.advantage_estimator: {engine} {VERSIONS[engine]} has nothing like `{estimator}`; it has "
            f"{', '.join(known)} of ours. Choose one of them, or export to another engine."
        )


Found = tuple[dict[str, object], dict[str, str]]  # settings; keys of ours that they only come near to, and why


def _verl(recipe: Recipe, prompt_tokens: int) -> Found:
    ppo, model = recipe.ppo, recipe.model
    _refuse_estimator("verl", ppo.advantage_estimator, _VERL_ESTIMATORS)
    if ppo.minibatch % ppo.samples_per_prompt:
        raise ConfigError(
            f"ppo.minibatch: verl counts minibatches in prompts, and {ppo.minibatch} responses are no whole number of "
            f"prompts with samples_per_prompt {ppo.samples_per_prompt}. Choose a multiple of it."
        )
    in_loss = ppo.kl_place == "loss"
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    found: dict[str, object] = {
        "data.train_batch_size": ppo.rollout_batch,
        "data.max_prompt_length": prompt_tokens,
        "data.max_response_length": ppo.sampling.max_new_tokens,
        "data.shuffle": False,
        "data.seed": recipe.seed,
        "algorithm.adv_estimator": _VERL_ESTIMATORS[ppo.advantage_estimator],
        "algorithm.norm_adv_by_std_in_grpo": ppo.advantage_estimator == "grpo",
        "algorithm.gamma": ppo.gamma,
        "algorithm.lam": ppo.lam,
        "algorithm.use_kl_in_reward": not in_loss,
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_ctrl.kl_coef": ppo.kl_coef,
        f"{actor}.use_kl_loss": in_loss,
        f"{actor}.kl_loss_coef": ppo.kl_coef,
        f"{actor}.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.model.lora_rank": model.lora_r,
        "actor_rollout_ref.model.lora_alpha": model.lora_alpha,
        "actor_rollout_ref.model.target_modules": _targets(recipe),
        "actor_rollout_ref.model.enable_gradient_checkpointing": model.gradient_checkpointing,
        f"{actor}.ppo_mini_batch_size": ppo.minibatch // ppo.samples_per_prompt,
        f"{actor}.ppo_micro_batch_size_per_gpu": ppo.microbatch,
        f"{actor}.ppo_epochs": ppo.num_ppo_epochs,
        f"{actor}.clip_ratio": ppo.cliprange,
        f"{actor}.clip_ratio_low": ppo.cliprange,
        f"{actor}.clip_ratio_high": ppo.cliprange,
        f"{actor}.clip_ratio_c": _UNBOUNDED,
        f"{actor}.entropy_coeff": ppo.entropy_coef,
        f"{actor}.loss_agg_mode": _VERL_MEANS[ppo.aggregation],
        f"{actor}.loss_scale_factor": ppo.sampling.max_new_tokens if ppo.aggregation == "constant" else "null",
        **_verl_optimizer(actor, recipe),
        f"{rollout}.name": "vllm",
        f"{rollout}.load_format": "safetensors",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.temperature": ppo.sampling.temperature,
        f"{rollout}.top_p": ppo.sampling.top_p,
        f"{rollout}.n": ppo.samples_per_prompt,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": ppo.microbatch,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": ppo.microbatch,
        "reward.reward_manager.name": "naive",
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": ppo.updates,
        "trainer.save_freq": ppo.save_every_updates,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.logger": ["console"],
        "trainer.project_name": "rlaif",
        "trainer.experiment_name": recipe.name,
    }
    if ppo.has_critic:
        found |= {
            "critic.model.lora_rank": model.lora_r,
            "critic.model.lora_alpha": model.lora_alpha,
            "critic.model.target_modules": _targets(recipe),
            "critic.ppo_micro_batch_size_per_gpu": ppo.microbatch,
            "critic.cliprange_value": ppo.cliprange_value,
            **_verl_optimizer("critic", recipe),
        }
    near = "its FSDP engine knows `constant` and `cosine`; `constant` is written"
    return found, {} if ppo.lr_scheduler_type == "constant" else {"lr_scheduler_type": near}


def _verl_optimizer(role: str, recipe: Recipe) -> dict[str, object]:
    return {
        f"{role}.optim.lr": recipe.ppo.learning_rate,
        f"{role}.optim.lr_scheduler_type": "constant",
        f"{role}.optim.lr_warmup_steps": recipe.ppo.warmup_updates,
        f"{role}.optim.weight_decay": 0.0,
        f"{role}.optim.clip_grad": recipe.ppo.max_grad_norm,
        f"{role}.optim.override_optimizer_config": f"{{eps:{recipe.ppo.adam_epsilon}}}",
    }


def _openrlhf(recipe: Recipe, prompt_tokens: int) -> Found:
    ppo, model = recipe.ppo, recipe.model
    _refuse_estimator("openrlhf", ppo.advantage_estimator, _OPENRLHF_ESTIMATORS)
    if recipe.reward.model:
        raise ConfigError(
            "reward.model: OpenRLHF sends texts in the policy's chat template, and this reward model has another one. "
            "Export to verl, which sends turns."
        )
    in_loss, clip = ppo.kl_place == "loss", ppo.score_clip or _UNBOUNDED
    found: dict[str, object] = {
        "data.max_len": prompt_tokens + ppo.sampling.max_new_tokens,
        "rollout.batch_size": ppo.rollout_batch,
        "rollout.micro_batch_size": ppo.microbatch,
        "rollout.n_samples_per_prompt": ppo.samples_per_prompt,
        "rollout.max_new_tokens": ppo.sampling.max_new_tokens,
        "rollout.temperature": ppo.sampling.temperature,
        "rollout.top_p": ppo.sampling.top_p,
        "train.batch_size": ppo.minibatch,
        "train.micro_batch_size": ppo.microbatch,
        "train.max_epochs": ppo.num_ppo_epochs,
        "train.num_episodes": 1,
        "train.seed": recipe.seed,
        "algo.advantage.estimator": _OPENRLHF_ESTIMATORS[ppo.advantage_estimator],
        "algo.advantage.gamma": ppo.gamma,
        "algo.advantage.lambd": ppo.lam,
        "algo.kl.init_coef": ppo.kl_coef,
        "algo.kl.estimator": "k3" if in_loss else "k1",
        "reward.clip_range": f"-{clip} {clip}",
        "actor.eps_clip": ppo.cliprange,
        "actor.loss_agg_mode": _OPENRLHF_MEANS.get(ppo.aggregation, "token-mean"),
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": model.attn_implementation,
        "ckpt.save_steps": ppo.save_every_updates,
        **_openrlhf_optimizer("actor", recipe),
    }
    if ppo.has_critic:
        found |= {"critic.value_clip": ppo.cliprange_value, **_openrlhf_optimizer("critic", recipe)}
    if ppo.entropy_coef:
        found["actor.entropy_coef"] = ppo.entropy_coef
    if in_loss:
        found["algo.kl.use_loss"] = ""
    if model.gradient_checkpointing:
        found["actor.gradient_checkpointing_enable"] = ""
    left = {"learning_rate": "a rate for an adapter; all weights are trained there, with the engine's own default"}
    if ppo.aggregation not in _OPENRLHF_MEANS:
        left["loss_aggregation"] = "`constant` is not there; the mean over tokens is written"
    return found, left


def _openrlhf_optimizer(role: str, recipe: Recipe) -> dict[str, object]:
    return {
        f"{role}.adam.betas": "0.9 0.999",
        f"{role}.adam.eps": recipe.ppo.adam_epsilon,
        f"{role}.adam.weight_decay": 0.0,
        f"{role}.lr_scheduler": recipe.ppo.lr_scheduler_type,
        f"{role}.lr_warmup_ratio": recipe.ppo.warmup_updates / recipe.ppo.updates,
        f"{role}.max_norm": recipe.ppo.max_grad_norm,
    }


_ENGINES: dict[str, Callable[[Recipe, int], Found]] = {"verl": _verl, "openrlhf": _openrlhf}
