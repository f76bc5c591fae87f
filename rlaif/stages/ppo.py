"""Stage `ppo`: proximal policy optimization of the policy adapter (Schulman et al. 2017; Ouyang et al. 2022).

The order of operations is that of Huang et al. 2024 (arXiv 2403.17031): (1) sample; (2) end each response at its first
end token; (3) score it, shifted so that the first rollout averages 0, and take the penalty off where it did not end;
(4) token rewards: the per-token KL to the reference as a price, without gradient, and the score at the last token;
(5) advantages by GAE, whitened over real tokens; (6) several epochs of clipped updates. Sampling temperature divides
the logits of policy and reference alike. Where the reference draws some of the responses, each counts its importance
weight (`exploration`).

Other estimators of the advantages (RLOO, GRPO, Dr. GRPO, REINFORCE) change step 5 and how step 6 sums over tokens, and
need no critic. The KL may be priced in the loss instead of the reward, and plain text may be learned beside (PPO-ptx).
With a constraint, costs have advantages as well, and the multiplier's price of them is taken off (PPO-Lagrangian).

Policy, reference, critic and reward are roles on one base. The critic is a head on the policy's trunk (one backward
pass) or an adapter of its own, started from the reward adapter (two backward passes).

Everything random is a function of (seed, update), so a checkpoint is weights, moments and counters: no random states.

Writes ``policy/`` (PEFT), ``critic/``, ``metrics.jsonl``, ``samples.jsonl`` and ``scale.json`` (what scores were
shifted and divided by).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif.maths.advantages import Advantages, gae, sequence_advantages, token_rewards
from rlaif.maths.kl import AdaptiveKl, FixedKl, k3
from rlaif.maths.losses import Aggregation, clipped_policy_loss, clipped_value_loss, explained_variance
from rlaif.maths.masking import masked_mean, masked_whiten, zero_outside
from rlaif.model import sampling
from rlaif.model.drawn import token_figures, token_states
from rlaif.model.sampling import Batch
from rlaif.recipe import PpoSection
from rlaif.stages import shares
from rlaif.stages.actors import Actors, assign_roles, calibrate, critic_values, judge_tokens, scale_of, score, use_scale
from rlaif.stages.checkpoints import COST_CRITIC, CRITIC, POLICY, restore, save
from rlaif.stages.composite import cost_files, part_figures, score_figures
from rlaif.stages.constraint import Cost, constraint_inputs
from rlaif.stages.exploration import draw, exploration_figures, policy_draws, weights_of
from rlaif.stages.gate import starting_policy
from rlaif.stages.independent import independent_figures, independent_inputs
from rlaif.stages.judged_reward import reward_inputs
from rlaif.stages.ppo_outputs import finish, record
from rlaif.stages.ppo_prompts import prompts_of, prompts_of_update, refuse_long
from rlaif.stages.ptx import Ptx, ptx_files
from rlaif.stages.reward_model import CALIBRATION
from rlaif.stages.rollouts import mismatch, rollout_inputs
from rlaif.stages.run import Run
from rlaif.stages.watching import Watch, refuse_gradient, refuse_not_finite

NAME = "ppo"


class Rollout(NamedTuple):
    """What one iteration learned from: ``B`` responses of up to ``T`` tokens."""

    batch: Batch
    logprobs: Tensor  # [B, T], of the policy that sampled
    ref_logprobs: Tensor  # [B, T], of the reference
    advantages: Tensor  # [B, T], with a critic whitened; times the tokens' importance weights
    values: Tensor  # [B, T]; 0 without a critic
    returns: Tensor  # [B, T]; 0 without a critic
    weights: Tensor  # [B, 1]: what a response counts; 1 where the policy draws them all
    cost: Cost | None = None  # with a constraint: what its critic says and learns

    def rows(self, index: Tensor) -> "Rollout":
        """Return some of the rows."""
        of_rows = self.logprobs, self.ref_logprobs, self.advantages, self.values, self.returns, self.weights
        logprobs, ref_logprobs, advantages, values, returns, weights = (part[index] for part in of_rows)
        batch, cost = Batch(*(part[index] for part in self.batch)), self.cost.rows(index) if self.cost else None
        return Rollout(batch, logprobs, ref_logprobs, advantages, values, returns, weights, cost)


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
            **ptx_files(run),
            **starting_policy(run, NAME).as_input("start"),
        },
        prompts=run.prompts_hash(prompts_of(run)),
        **reward_inputs(run),
        **independent_inputs(run),
        **constraint_inputs(run),
        **rollout_inputs(run),
    )


@shares.shared(NAME)
def ppo(run: Run) -> dict[str, Any]:
    """Run the stage; return the counts for its manifest."""
    settings = run.recipe.ppo
    prompts = prompts_of(run)
    actors = assign_roles(run)
    base = actors.base
    refuse_long(base, prompts, settings.sampling.max_new_tokens)
    trainable = {role: [p for _, p in base.named_parameters_of(role)] for role in actors.learning}
    optimizer = torch.optim.AdamW(
        [p for group in trainable.values() for p in group],
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
        weight_decay=0.0,
    )
    kl = AdaptiveKl(settings.kl_coef, settings.kl_target) if settings.kl_target else FixedKl(settings.kl_coef)
    ptx = Ptx.load(run, base)
    constraint = actors.constraint
    done, scale = shares.first_then_others(lambda: restore(run, base, optimizer, kl, constraint))
    if scale:
        use_scale(actors, scale)
    watch = Watch(run)
    with run.progress.task("updates", settings.updates - done) as task:
        for update in range(done, settings.updates):
            actors.update = update
            rows = prompts_of_update(run, prompts, update)

            # 1. Sample one response to each prompt.
            ids = [base.tokenizer.prompt(prompt.messages) for prompt in rows]
            own = policy_draws(run, actors, len(rows))
            samples = draw(run, actors, ids, own)

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
            refuse_not_finite(update, rows, score=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
            drawn = torch.where(own.unsqueeze(1), logprobs, ref_logprobs)
            gap = mismatch(actors, drawn, samples, batch, own)
            divergence = ((logprobs - ref_logprobs) * mask).sum(1)
            weights = weights_of(settings, divergence)
            price = kl.coef if settings.kl_place == "reward" else 0.0
            rewards = token_rewards(scores, logprobs, ref_logprobs, mask, price)
            if settings.whiten_rewards:
                rewards = masked_whiten(rewards, mask, center=False, weights=weights)

            # 5. Advantages.
            if constraint:
                costs = constraint.assess(update, rows, responses, own, batch, logprobs, ref_logprobs, price)
                (advantages, returns), cost = constraint.estimate(rewards, values, *costs, mask, weights)
            else:
                (advantages, returns), cost = estimate(settings, rewards, values, mask, weights), None
            weighted = gap.weights * advantages
            rollout = Rollout(batch, logprobs, ref_logprobs, weighted, values, returns, weights, cost)

            # 6. Update.
            set_learning_rate(optimizer, settings, update)
            loss_price = kl.coef if settings.kl_place == "loss" else 0.0
            figures = optimize(run, actors, optimizer, trainable, rollout, update, loss_price, ptx)
            figures |= {
                **score_figures("rollout/score", "rollout/score_std", scores[own]),
                "rollout/reward": (rewards * mask).sum(1)[own].mean().item(),
                "rollout/kl_to_reference": divergence[own].mean().item(),
                "rollout/response_tokens": mask.sum(1)[own].float().mean().item(),
                "rollout/ended": ended[own].float().mean().item(),
                **gap.figures,
                "kl/coef": kl.coef,
                **part_figures({name: values[own] for name, values in parts.items()}),
                **independent_figures(actors.independent, rows, responses, batch, own),
                **exploration_figures(actors, own, scores, weights),
                **(constraint.figures() if constraint else {}),
            }
            if settings.has_critic:
                figures["value/explained_variance"] = explained_variance(values, returns, mask).item()
                if rollout.cost:
                    figures["cost_value/explained_variance"] = explained_variance(*rollout.cost, mask).item()
            kl.update(figures["rollout/kl_to_reference"])
            shown = list(zip(rows, responses, scores, divergence, strict=True))
            record(run, actors, update, figures, shown, parts, own.tolist())
            must_stop = watch.after(update, figures)
            if must_stop or (update + 1) % settings.save_every_updates == 0:
                save(run, base, optimizer, kl, update + 1, scale_of(actors), constraint)
            if must_stop:
                watch.stop()
            note = f"score {figures['rollout/score']:.2f} kl {figures['rollout/kl_to_reference']:.2f}"
            task.advance(1, tokens=int(mask.sum()), note=note)
    return finish(run, actors)


def estimate(settings: PpoSection, rewards: Tensor, values: Tensor, mask: Tensor, weights: Tensor) -> Advantages:
    """Return what step 6 takes for the advantages, and the targets of the critic; without a critic these are 0."""
    if settings.has_critic:
        found = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        return found._replace(advantages=masked_whiten(found.advantages, mask, weights=weights))
    earned = rewards.sum(1)
    of_responses = sequence_advantages(settings.advantage_estimator, earned, mask, settings.samples_per_prompt)
    return Advantages(of_responses, torch.zeros_like(values))


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: PpoSection, update: int) -> None:
    """Set the learning rate of an update: rising in the first, then constant, or falling linearly to 0 after the last.

    Adam's first steps have the size of the learning rate in every direction, whatever the gradients' noise.
    """
    rising, left = settings.warmup_updates, settings.updates - update
    share = 1.0
    if update < rising:
        share = (update + 1) / rising
    elif settings.lr_scheduler_type == "linear":
        share = left / (settings.updates - rising)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


def optimize(
    run: Run,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    trainable: dict[str, Any],
    rollout: Rollout,
    update: int,
    kl_coef: float = 0.0,
    ptx: Ptx | None = None,
) -> dict[str, float]:
    """Take several epochs of clipped steps on one rollout; return means of the figures over all steps.

    An epoch after which the policy is further than `target_kl` from the one that sampled is the last. `kl_coef` is the
    price of a nat of KL to the reference in the loss. The first epoch visits the rows in order, in the microbatches
    they were scored in, so its first ratio is exactly 1.
    """
    settings = actors.settings
    count = len(rollout.logprobs)
    totals: dict[str, float] = {}
    of_text = ptx.figures(settings.microbatch) if ptx else {}  # as responses are, of the policy before the update
    steps, moved = 0, 0.0
    aggregation = Aggregation(settings.aggregation, settings.sampling.max_new_tokens)
    for epoch in range(settings.num_ppo_epochs):
        order = torch.arange(count)
        if epoch:
            order = torch.randperm(
                count, generator=torch.Generator().manual_seed(run.seed(NAME, update, "epoch", epoch))
            )
        for start in range(0, count, settings.minibatch):
            minibatch = rollout.rows(order[start : start + settings.minibatch].to(actors.base.device))
            whole = minibatch.batch.response_mask
            optimizer.zero_grad(set_to_none=True)
            for rows in torch.split(shares.own_rows(settings.minibatch), settings.microbatch):
                part = minibatch.rows(rows)
                mask = part.batch.response_mask
                tokens, share = mask.sum() / whole.sum(), aggregation.share(mask, whole)
                for key, value in backward(actors, part, tokens, share, aggregation, kl_coef).items():
                    weight = share if key == "policy/loss" else tokens
                    totals[key] = totals.get(key, 0.0) + value * weight.item()
            if ptx and settings.ptx_coef:
                loss = ptx.backward(run.seed(NAME, update, "ptx", steps), settings)
                totals["ptx/loss"] = totals.get("ptx/loss", 0.0) + loss
            shares.add_gradients(trainable)
            for role, parameters in trainable.items():
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
                key = {POLICY: "policy", CRITIC: "value", COST_CRITIC: "cost_value"}[role] + "/gradient_norm"
                refuse_gradient(update, key, norm)
                totals[key] = totals.get(key, 0.0) + norm / shares.count()
            optimizer.step()
            steps += 1
        before, moved = moved, shares.added(totals)["policy/kl_to_old"]
        if settings.target_kl and (moved - before) / (count // settings.minibatch) > settings.target_kl:
            break
    figures = {key: value / steps for key, value in shares.added(totals).items()} | of_text
    return figures | {"policy/learning_rate": optimizer.param_groups[0]["lr"], "policy/epochs": epoch + 1}


def backward(
    actors: Actors, part: Rollout, tokens: Tensor, share: Tensor, aggregation: Aggregation, kl_coef: float
) -> dict[str, float]:
    """Add one microbatch's gradients; return its figures.

    Args:
        actors: who takes part.
        part: the microbatch.
        tokens: its share of the minibatch's tokens, at which means over tokens count.
        share: the weight at which its policy loss counts in the minibatch's.
        aggregation: how terms of tokens become the policy's loss.
        kl_coef: the price of a nat of KL to the reference in the loss.
    """
    base, settings, mask = actors.base, actors.settings, part.batch.response_mask
    figures: dict[str, Tensor] = {}
    with base.acting_as(POLICY, training=True):
        entropy_coef = settings.entropy_coef_at(actors.update)
        states = token_states(base, part.batch)
        logprobs, spread = token_figures(base, part.batch, states, actors.temperature, learn_entropy=entropy_coef > 0)
        advantages = part.weights * part.advantages
        policy = clipped_policy_loss(logprobs, part.logprobs, advantages, mask, settings.cliprange, aggregation)
        loss = (policy.loss - entropy_coef * aggregation.mean(part.weights * spread, mask)) * share
        if settings.kl_place == "loss":
            divergence = part.weights * k3(zero_outside(logprobs - part.ref_logprobs, mask))
            loss = loss + kl_coef * aggregation.mean(divergence, mask) * share
            figures["policy/kl_to_reference"] = masked_mean(divergence.detach(), mask)
        if actors.critic == "trunk":
            figures["value/loss"] = value = value_loss(actors, part, states)
            loss = loss + settings.vf_coef * value * tokens
        torch.autograd.backward(loss)
    if actors.critic == "adapter":
        with base.acting_as(CRITIC, training=True):
            figures["value/loss"] = value = value_loss(actors, part, token_states(base, part.batch))
            torch.autograd.backward(settings.vf_coef * value * tokens)
    if actors.constraint and part.cost and settings.has_critic:
        figures["cost_value/loss"] = actors.constraint.backward(part.batch, part.cost, states, tokens, part.weights)
    figures |= {
        "policy/loss": policy.loss,
        "policy/kl_to_old": policy.kl_to_old,
        "policy/clip_fraction": policy.clip_fraction,
        "policy/ratio": policy.ratio,
        "policy/entropy": masked_mean(spread, mask),
    }
    return {key: figure.item() for key, figure in figures.items()}


def value_loss(actors: Actors, part: Rollout, states: Tensor) -> Tensor:
    """Return the critic's clipped loss on a microbatch, a mean over tokens."""
    values, mask = critic_values(actors, part.batch, states), part.batch.response_mask
    clip = actors.settings.cliprange_value
    return clipped_value_loss(values, part.values, part.returns, mask, clip, part.weights).loss


def follow(told: dict[str, Any]) -> None:
    """Take part in the training that the first of several processes orders."""
    shares.follow(ppo, told)
