"""Stage `ppo`: proximal policy optimization of the policy adapter (Schulman et al. 2017; Ouyang et al. 2022).

The order of operations is that of Huang et al. 2024 (arXiv 2403.17031): (1) sample; (2) end each response at its first
end token; (3) score it, shifted so that the first rollout averages 0, and take the penalty off where it did not end;
(4) token rewards: the per-token KL to the reference as a price, without gradient, and the score at the last token;
(5) advantages by GAE, whitened over real tokens; (6) several epochs of clipped updates. Sampling temperature divides
the logits of policy and reference alike.

Policy, reference, critic and reward are roles on one base. The critic is a head on the policy's trunk (one backward
pass) or an adapter of its own, started from the reward adapter (two backward passes).

Everything random is a function of (seed, update), so a checkpoint is weights, moments and counters: no random states.

Writes ``policy/`` (PEFT), ``critic/``, ``metrics.jsonl``, ``samples.jsonl`` and ``scale.json`` (what scores were
shifted and divided by).
"""

import random
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlaif import files
from rlaif.errors import DataError
from rlaif.maths.advantages import gae, token_rewards
from rlaif.maths.kl import AdaptiveKl, FixedKl
from rlaif.maths.losses import clipped_policy_loss, clipped_value_loss, entropy, explained_variance
from rlaif.maths.masking import masked_mean, masked_whiten
from rlaif.model import sampling
from rlaif.model.roles import SharedBase
from rlaif.model.sampling import Batch
from rlaif.recipe import PpoSection
from rlaif.records import Prompt, read_jsonl
from rlaif.stages.actors import Actors, assign_roles, calibrate, critic_values, judge_tokens, scale_of, score, use_scale
from rlaif.stages.checkpoints import CRITIC, POLICY, SAMPLES, restore, save
from rlaif.stages.composite import SCALE, cost_files, part_figures, part_scores
from rlaif.stages.judged_reward import reward_inputs
from rlaif.stages.reward_model import CALIBRATION
from rlaif.stages.run import Run
from rlaif.stages.training import METRICS

NAME = "ppo"
_SAMPLES_SHOWN = 4  # responses kept per update


class Rollout(NamedTuple):
    """What one iteration learned from: ``B`` responses of up to ``T`` tokens."""

    batch: Batch
    logprobs: Tensor  # [B, T], of the policy that sampled
    values: Tensor  # [B, T]
    advantages: Tensor  # [B, T], whitened
    returns: Tensor  # [B, T]

    def rows(self, index: Tensor) -> "Rollout":
        """Return some of the rows."""
        return Rollout(Batch(*(part[index] for part in self.batch)), *(part[index] for part in self[1:]))


def inputs(run: Run) -> dict[str, str]:
    """Return what this stage's result depends on."""
    settings = run.recipe.ppo
    return run.inputs(
        settings,
        files={
            "sft": run.stage_folder("sft") / "adapter",
            "reward": run.stage_folder("reward") / "adapter",
            "reward.calibration": run.stage_folder("reward") / CALIBRATION,
            **cost_files(run),
        },
        prompts=run.prompts_hash(run.select("train", settings.prompts_per_tag)),
        **reward_inputs(run),
    )


def ppo(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings = run.recipe.ppo
    prompts = run.select("train", settings.prompts_per_tag)
    actors = assign_roles(run)
    base = actors.base
    refuse_long(base, prompts, settings.sampling.max_new_tokens)
    trainable = {role: [p for _, p in base.named_parameters_of(role)] for role in (POLICY, CRITIC)}
    optimizer = torch.optim.AdamW(
        [p for group in trainable.values() for p in group],
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
        weight_decay=0.0,
    )
    kl = AdaptiveKl(settings.kl_coef, settings.kl_target) if settings.kl_target else FixedKl(settings.kl_coef)
    done, scale = restore(run, base, optimizer, kl)
    if scale:
        use_scale(actors, scale)
    with run.progress.task("updates", settings.updates - done) as task:
        for update in range(done, settings.updates):
            rows = prompts_of_update(run, prompts, update)

            # 1. Sample one response to each prompt.
            ids = [base.tokenizer.prompt(prompt.messages) for prompt in rows]
            with base.acting_as(POLICY):
                samples = sampling.sample(
                    base,
                    ids,
                    max_new_tokens=settings.sampling.max_new_tokens,
                    seeds=[run.seed(NAME, update, row) for row in range(len(rows))],
                    temperature=settings.sampling.temperature,
                    top_p=settings.sampling.top_p,
                )

            # 2. A response is what was sampled up to and including its first end token.
            responses = [base.tokenizer.decode(s.ids) for s in samples]
            batch = sampling.pack(base, ids, [s.ids for s in samples])
            mask = batch.response_mask

            # 3. Score each response.
            raw, parts = score(actors, rows, responses, batch)
            if update == 0:
                calibrate(actors, raw)
            ended = torch.tensor([s.ended for s in samples], device=base.device)
            scores = (raw - actors.offset) / actors.scale - settings.missing_eos_penalty * ~ended
            if settings.score_clip:
                scores = scores.clamp(-settings.score_clip, settings.score_clip)

            # 4. Token rewards: the price of leaving the reference, and the score at the end.
            logprobs, values = judge_tokens(actors, POLICY, batch)
            ref_logprobs, _ = judge_tokens(actors, actors.reference, batch)
            rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl.coef)
            if settings.whiten_rewards:
                rewards = masked_whiten(rewards, mask, center=False)

            # 5. Advantages.
            estimate = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
            rollout = Rollout(batch, logprobs, values, masked_whiten(estimate.advantages, mask), estimate.returns)

            # 6. Update.
            set_learning_rate(optimizer, settings, update)
            figures = optimize(run, actors, optimizer, trainable, rollout, update)
            divergence = ((logprobs - ref_logprobs) * mask).sum(1)
            sampled = torch.tensor([s.logprobs + [0.0] * (mask.shape[1] - len(s.ids)) for s in samples])
            figures |= {
                "rollout/score": scores.mean().item(),
                "rollout/score_std": scores.std(correction=0).item(),
                "rollout/reward": (rewards * mask).sum(1).mean().item(),
                "rollout/kl_to_reference": divergence.mean().item(),
                "rollout/response_tokens": mask.sum(1).float().mean().item(),
                "rollout/ended": ended.float().mean().item(),
                "rollout/logprob_gap": ((logprobs - sampled.to(logprobs)) * mask).abs().max().item(),
                "value/explained_variance": explained_variance(values, estimate.returns, mask).item(),
                "kl/coef": kl.coef,
                **part_figures(parts),
            }
            kl.update(divergence.mean().item())
            record(run, actors, update, figures, list(zip(rows, responses, scores, divergence, strict=True)), parts)
            if (update + 1) % settings.save_every_updates == 0:
                save(run, base, optimizer, kl, update + 1, scale_of(actors))
            task.advance(1, tokens=int(mask.sum()), note=f"score {scores.mean():.2f} kl {divergence.mean():.2f}")
    return finish(run, actors)


def refuse_long(base: SharedBase, prompts: list[Prompt], max_new_tokens: int) -> None:
    """Stop where a prompt and its response do not fit the model's context.

    Raises:
        DataError: the first such prompt, with its length.
    """
    for prompt in prompts:
        length = len(base.tokenizer.prompt(prompt.messages))
        if length + max_new_tokens > base.max_length:
            raise DataError(
                f"ppo: `{prompt.id}`: {length} prompt tokens and {max_new_tokens} new ones; the model's context holds "
                f"{base.max_length}. Shorten the prompt, or lower ppo.sampling.max_new_tokens."
            )


def prompts_of_update(run: Run, prompts: list[Prompt], update: int) -> list[Prompt]:
    """Return the prompts of one update: epochs over a shuffled order, each repeated `samples_per_prompt` times."""
    settings = run.recipe.ppo
    chosen: list[Prompt] = []
    for position in range(update * settings.rollout_batch, (update + 1) * settings.rollout_batch):
        epoch, index = divmod(position, len(prompts))
        order = list(range(len(prompts)))
        random.Random(run.seed(NAME, "order", epoch)).shuffle(order)
        chosen += [prompts[order[index]]] * settings.samples_per_prompt
    return chosen


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: PpoSection, update: int) -> None:
    """Set the learning rate of an update: constant, or falling linearly to 0 after the last."""
    share = 1 - update / settings.updates if settings.lr_scheduler_type == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


def optimize(
    run: Run,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    trainable: dict[str, Any],
    rollout: Rollout,
    update: int,
) -> dict[str, float]:
    """Take several epochs of clipped steps on one rollout; return means of the figures over all steps.

    The first epoch visits the rows in order, in the microbatches they were scored in, so its first ratio is exactly 1.
    """
    settings = actors.settings
    count = len(rollout.logprobs)
    totals: dict[str, float] = {}
    steps = 0
    for epoch in range(settings.num_ppo_epochs):
        order = torch.arange(count)
        if epoch:
            order = torch.randperm(
                count, generator=torch.Generator().manual_seed(run.seed(NAME, update, "epoch", epoch))
            )
        for start in range(0, count, settings.minibatch):
            minibatch = rollout.rows(order[start : start + settings.minibatch].to(actors.base.device))
            tokens = minibatch.batch.response_mask.sum()
            optimizer.zero_grad(set_to_none=True)
            for first in range(0, settings.minibatch, settings.microbatch):
                part = minibatch.rows(torch.arange(first, min(first + settings.microbatch, settings.minibatch)))
                weight = part.batch.response_mask.sum() / tokens
                for key, value in backward(actors, part, weight).items():
                    totals[key] = totals.get(key, 0.0) + value * weight.item()
            for role, parameters in trainable.items():
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
                key = {POLICY: "policy", CRITIC: "value"}[role] + "/gradient_norm"
                totals[key] = totals.get(key, 0.0) + norm
            optimizer.step()
            steps += 1
    figures = {key: value / steps for key, value in totals.items()}
    return figures | {"policy/learning_rate": optimizer.param_groups[0]["lr"]}


def backward(actors: Actors, part: Rollout, weight: Tensor) -> dict[str, float]:
    """Add one microbatch's gradients, weighted by its share of the minibatch's tokens; return its figures."""
    base, settings, mask = actors.base, actors.settings, part.batch.response_mask
    with base.acting_as(POLICY, training=True):
        hidden = sampling.hidden_states(base, part.batch)
        logits = sampling.response_logits(base, part.batch, hidden, settings.sampling.temperature)
        logprobs = sampling.token_logprobs(logits, part.batch.response_ids)
        policy = clipped_policy_loss(logprobs, part.logprobs, part.advantages, mask, settings.cliprange)
        spread = masked_mean(entropy(logits) if settings.entropy_coef else entropy(logits.detach()), mask)
        loss = policy.loss - settings.entropy_coef * spread
        if not actors.own_critic:
            value = clipped_value_loss(
                critic_values(actors, part.batch, hidden),
                part.values,
                part.returns,
                mask,
                settings.cliprange_value,
            )
            loss = loss + settings.vf_coef * value.loss
        torch.autograd.backward(loss * weight)
    if actors.own_critic:
        with base.acting_as(CRITIC, training=True):
            values = critic_values(actors, part.batch, sampling.hidden_states(base, part.batch))
            value = clipped_value_loss(values, part.values, part.returns, mask, settings.cliprange_value)
            torch.autograd.backward(settings.vf_coef * value.loss * weight)
    return {
        "policy/loss": policy.loss.item(),
        "policy/kl_to_old": policy.kl_to_old.item(),
        "policy/clip_fraction": policy.clip_fraction.item(),
        "policy/ratio": policy.ratio.item(),
        "policy/entropy": spread.item(),
        "value/loss": value.loss.item(),
    }


def record(
    run: Run, actors: Actors, update: int, figures: dict[str, float], rows: list[Any], parts: dict[str, Tensor]
) -> None:
    """Append the figures of an update and a few of its responses to the stage's files."""
    folder = run.stage_folder(NAME)
    files.append_jsonl(folder / METRICS, {"step": update + 1, "update": update + 1, **figures})
    if update % actors.settings.sample_every_updates:
        return
    for index, (prompt, response, value, divergence) in enumerate(rows[:_SAMPLES_SHOWN]):
        row = {
            "id": f"ppo-{update + 1}-{index}",
            "prompt_id": prompt.id,
            "seed": run.seed(NAME, update, index),
            "step": update + 1,
            "update": update + 1,
            "prompt": prompt.prompt,
            "tag": prompt.tag,
            "response": response,
        }
        row |= {"score": value.item(), "kl": divergence.item()}
        files.append_jsonl(folder / SAMPLES, row | ({"parts": part_scores(parts, index)} if parts else {}))


def finish(run: Run, actors: Actors) -> dict[str, Any]:
    """Write the trained roles; return the counts for the manifest."""
    folder = run.stage_folder(NAME)
    files.write_json(folder / SCALE, scale_of(actors))
    actors.base.save_role(POLICY, folder / "policy")
    if actors.own_critic:
        actors.base.save_role(CRITIC, folder / "critic")
    else:
        head = {"score.weight": actors.base.heads[CRITIC].state_dict()["weight"].cpu()}
        with files.fresh_folder(folder / "critic") as fresh:
            save_file(head, fresh / "value_head.safetensors")
    rows = [row for _, row in read_jsonl(folder / METRICS)]
    return {
        "updates": len(rows),
        "responses": len(rows) * actors.settings.rollout_batch * actors.settings.samples_per_prompt,
        "critic": "adapter" if actors.own_critic else "trunk",
        "first_score": rows[0]["rollout/score"],
        "last_score": rows[-1]["rollout/score"],
        "last_kl_to_reference": rows[-1]["rollout/kl_to_reference"],
    }
