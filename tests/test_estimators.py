"""PPO without a critic, the KL in the loss and the early stop, on the tiny model."""

import pytest
import tiny_ppo
import tiny_runs
import torch
from tiny_ppo import ONE_SIZE, assert_close, cut_off, made_up_rollout, metrics, results, step_of

from rlaif.maths.advantages import SEQUENCE_ESTIMATORS
from rlaif.model import sampling
from rlaif.stages import ppo
from rlaif.stages.actors import POLICY, REFERENCE, assign_roles, judge_tokens
from rlaif.stages.checkpoints import CRITIC

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
ESTIMATORS = pytest.mark.parametrize("estimator", sorted(SEQUENCE_ESTIMATORS))
PAIRS = {"samples_per_prompt": 2, "rollout_batch": 2}
functions, opened = tiny_ppo.functions, tiny_ppo.opened


def with_actors(opened, **settings):
    run = opened(reward_function="small_letters", **settings)
    return run, assign_roles(run)


# --- what takes part -------------------------------------------------------------------------------------------------


@ESTIMATORS
def test_without_gae_there_is_no_critic_in_memory_in_checkpoints_in_files_or_in_metrics(
    opened, functions, estimator, monkeypatch
):
    run = opened(reward_function="small_letters", advantage_estimator=estimator, updates=1, **PAIRS)
    seen, finish = [], ppo.finish
    monkeypatch.setattr(ppo, "finish", lambda run, actors: seen.append(actors) or finish(run, actors))
    counts = ppo.ppo(run)
    assert counts["critic"] == "none"
    assert seen[0].base.named_parameters_of(CRITIC) == []
    assert not (run.stage_folder("ppo") / "critic").exists()
    state = run.stage_folder("ppo") / "checkpoints" / "checkpoint-1" / "state.safetensors"
    assert b"lora_A.policy" in state.read_bytes() and b"critic" not in state.read_bytes()
    assert [key for key in metrics(run)[0] if key.startswith("value/")] == []
    assert "of PPO with" in (run.stage_folder("ppo") / "policy" / "README.md").read_text()


@ESTIMATORS
def test_on_the_first_minibatch_the_ratio_is_one_whatever_the_estimator(opened, functions, estimator, monkeypatch):
    run = opened(reward_function="small_letters", advantage_estimator=estimator, updates=2, **PAIRS)
    figures, backward = [], ppo.backward
    monkeypatch.setattr(ppo, "backward", lambda *args: figures.append(backward(*args)) or figures[-1])
    ppo.ppo(run)
    assert len(figures) == 8  # 2 updates of 2 epochs of 2 microbatches
    for first in figures[0:2] + figures[4:6]:
        assert (first["policy/ratio"], first["policy/kl_to_old"], first["policy/clip_fraction"]) == (1.0, 0.0, 0.0)
    assert all(later["policy/kl_to_old"] > 0.0 for later in figures[2:4] + figures[6:8])


@pytest.mark.parametrize(
    ("estimator", "kl_in"), [*((name, "reward") for name in sorted(SEQUENCE_ESTIMATORS)), ("rloo", "loss")]
)
def test_advantages_of_a_rollout_are_those_of_its_sequences(opened, functions, estimator, kl_in, monkeypatch):
    run = opened(
        reward_function="small_letters", advantage_estimator=estimator, kl_in=kl_in, kl_coef=0.5, updates=2,
        learning_rate=1e-2, samples_per_prompt=4, rollout_batch=2, minibatch=8,
    )  # fmt: skip
    seen, optimize = [], ppo.optimize
    monkeypatch.setattr(ppo, "optimize", lambda *args: seen.append(args[4]) or optimize(*args))
    kept, record = [], ppo.record
    monkeypatch.setattr(ppo, "record", lambda *args: kept.append(args[4]) or record(*args))
    ppo.ppo(run)
    rows = kept[1]  # of the second update: the policy has left the reference
    assert [rows[0][0].id] * 4 == [row[0].id for row in rows[:4]] and rows[4][0].id != rows[0][0].id
    price = 0.5 if kl_in == "reward" else 0.0
    earned = torch.stack([score - price * divergence for _, _, score, divergence in rows])
    assert max(abs(row[3].item()) for row in rows) > 1e-3
    expected = SEQUENCE_ESTIMATORS[estimator](earned, 4)
    mask = seen[1].batch.response_mask
    assert (seen[1].advantages - expected.unsqueeze(1) * mask).abs().max().item() < 1e-5
    assert expected.abs().max().item() > 0.1


@ESTIMATORS
def test_a_constant_score_moves_nothing_without_a_critic(opened, functions, estimator):
    run = opened(reward_function="ones", advantage_estimator=estimator, updates=1, num_ppo_epochs=1, **PAIRS)
    ppo.ppo(run)
    sft = tiny_runs.contents(run.stage_folder("sft") / "adapter", "*.safetensors")
    assert tiny_runs.contents(run.stage_folder("ppo") / "policy", "*.safetensors") == sft
    assert metrics(run)[0]["policy/gradient_norm"] == 0.0


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_one_microbatch_of_eight_equals_eight_of_one_however_tokens_are_summed(opened, functions, aggregation, kl_in):
    run, actors = with_actors(
        opened, loss_aggregation=aggregation, kl_in=kl_in, entropy_coef=0.1, critic="trunk", **ONE_SIZE
    )
    rollout = made_up_rollout(actors)
    rollout = rollout._replace(ref_logprobs=rollout.ref_logprobs - 0.3 * rollout.batch.response_mask)
    whole, figures = step_of(run, actors, rollout, kl_coef=0.5)
    actors.settings = actors.settings.model_copy(update={"microbatch": 1})
    parts, figures_of_parts = step_of(run, actors, rollout, kl_coef=0.5)
    parts.pop(f"heads.{CRITIC}.weight"), whole.pop(f"heads.{CRITIC}.weight")
    assert_close(whole, parts)
    assert figures == pytest.approx(figures_of_parts, rel=tiny_ppo.ROUNDING, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_at_ratio_one_the_step_is_reinforces(opened, functions, aggregation):
    run, actors = with_actors(opened, advantage_estimator="reinforce", loss_aggregation=aggregation, **ONE_SIZE)
    rollout = made_up_rollout(actors)
    logprobs, _ = judge_tokens(actors, POLICY, rollout.batch)
    found, _ = step_of(run, actors, rollout._replace(logprobs=logprobs))
    base, mask = actors.base, rollout.batch.response_mask
    for _, parameter in base.named_parameters_of(POLICY):
        parameter.grad = None
    lengths = {"token": mask.sum() / 8, "sequence": mask.sum(1, keepdim=True), "constant": 8}[aggregation]
    with base.acting_as(POLICY, training=True):
        logits = sampling.response_logits(base, rollout.batch, sampling.hidden_states(base, rollout.batch))
        terms = sampling.token_logprobs(logits, rollout.batch.response_ids) * rollout.advantages * mask
        (-(terms / lengths).sum() / 8).backward()
    assert_close({name: p.grad for name, p in base.named_parameters_of(POLICY)}, found)


def test_rloo_steps_in_the_direction_of_dr_grpo(opened, functions):
    """The advantages are G / (G - 1) times as large, and both sum over tokens at one constant."""
    run, actors = with_actors(opened, advantage_estimator="rloo", kl_in="reward", samples_per_prompt=2, **{
        **ONE_SIZE, "rollout_batch": 4
    })  # fmt: skip
    rollout = made_up_rollout(actors)
    mask = rollout.batch.response_mask
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    found = {}
    for estimator in ("rloo", "dr_grpo"):
        actors.settings = actors.settings.model_copy(update={"advantage_estimator": estimator})
        advantages, _ = ppo.estimate(actors.settings, rewards, torch.zeros_like(rewards), mask, rollout.weights)
        found[estimator], _ = step_of(run, actors, rollout._replace(advantages=advantages))
    assert_close(found["rloo"], {name: 2 * gradient for name, gradient in found["dr_grpo"].items()})


# --- the KL in the loss ----------------------------------------------------------------------------------------------


def test_the_kl_of_the_loss_pulls_a_policy_that_left_the_reference_back(opened, functions, monkeypatch):
    run, actors = with_actors(opened, kl_in="loss", critic="trunk", **ONE_SIZE)
    with torch.no_grad():
        for name, parameter in actors.base.named_parameters_of(POLICY):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    rollout = made_up_rollout(actors)
    ref_logprobs, _ = judge_tokens(actors, REFERENCE, rollout.batch)
    logprobs, _ = judge_tokens(actors, POLICY, rollout.batch)
    zero = torch.zeros_like(logprobs)
    rollout = rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, advantages=zero, returns=rollout.values)
    actors.settings = actors.settings.model_copy(update={"vf_coef": 0.0})
    gradients, figures = step_of(run, actors, rollout, kl_coef=0.5)
    assert figures["policy/kl_to_reference"] > 1e-3
    with torch.no_grad():
        for name, parameter in actors.base.named_parameters_of(POLICY):
            parameter -= 0.05 * gradients[name]
    _, after = step_of(run, actors, rollout, kl_coef=0.5)
    assert after["policy/kl_to_reference"] < 0.98 * figures["policy/kl_to_reference"]


@pytest.mark.slow
def test_the_kl_is_priced_in_the_loss_or_in_the_reward_and_not_in_both(opened, functions):
    runs = {}
    for place in ("reward", "loss"):
        runs[place] = opened(
            place, reward_function="small_letters", kl_in=place, kl_coef=2.0, updates=2, learning_rate=1e-2
        )
        ppo.ppo(runs[place])
    first, second = metrics(runs["loss"])
    assert first["policy/kl_to_reference"] >= 0 and second["policy/kl_to_reference"] > 1e-4
    assert second["rollout/reward"] == pytest.approx(second["rollout/score"], abs=1e-5)
    first, second = metrics(runs["reward"])
    assert "policy/kl_to_reference" not in first
    expected = second["rollout/score"] - 2.0 * second["rollout/kl_to_reference"]
    assert second["rollout/reward"] == pytest.approx(expected, abs=1e-4)
    assert abs(second["rollout/kl_to_reference"]) > 1e-3


# --- the early stop --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_update_ends_with_the_epoch_that_went_further_than_the_target_kl(opened, functions):
    settings = {"reward_function": "small_letters", "updates": 1, "num_ppo_epochs": 4, "learning_rate": 1e-2}
    two = opened("two", **{**settings, "num_ppo_epochs": 2})
    ppo.ppo(two)
    # The first epoch is one step, at ratio 1 and KL 0; the second sees what that did, and the mean is over both.
    second = 2 * metrics(two)[0]["policy/kl_to_old"]
    epochs = {}
    for share in (0.99, 1.01, 1e6):
        run = opened(f"at-{share:g}", **settings, target_kl=share * second)
        ppo.ppo(run)
        epochs[share] = metrics(run)[0]["policy/epochs"]
        policy = tiny_runs.contents(run.stage_folder("ppo") / "policy", "*.safetensors")
        same = policy == tiny_runs.contents(two.stage_folder("ppo") / "policy", "*.safetensors")
        assert same == (share == 0.99)
    assert epochs[0.99] == metrics(two)[0]["policy/epochs"] == 2
    assert 2 < epochs[1.01] <= epochs[1e6] == 4


# --- resuming and learning -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
def test_a_run_without_a_critic_cut_off_and_resumed_equals_one_that_was_not(opened, functions, estimator, monkeypatch):
    settings = {"reward_function": "small_letters", "advantage_estimator": estimator, "updates": 3, **PAIRS}
    settings |= {"kl_target": 0.5, "target_kl": 1e-3, "learning_rate": 1e-3}
    whole = opened("whole", **settings)
    counts = ppo.ppo(whole)
    resumed = opened("resumed", **settings)
    cut_off(resumed, monkeypatch, "record", update=1)
    cut_off(resumed, monkeypatch, "record", update=2)
    assert ppo.ppo(resumed) == counts
    assert results(resumed) == results(whole)


@pytest.mark.slow
@ESTIMATORS
def test_against_a_known_reward_the_score_rises_without_a_critic(opened, functions, estimator):
    settings = {"updates": 20, "num_ppo_epochs": 2, "rollout_batch": 16, "minibatch": 64, "microbatch": 64}
    settings |= {"samples_per_prompt": 4, "learning_rate": 4e-3, "lr_scheduler_type": "linear", "kl_coef": 0.05}
    settings |= {"prompts_per_tag": {"harmful": 16, "ordinary": 16}, "sections": tiny_runs.ALL_PROJECTIONS}
    run = opened(reward_function="small_letters", advantage_estimator=estimator, **settings)
    ppo.ppo(run)
    rows = metrics(run)
    # In standard deviations of the first rollout. Where it ends (0.9 to 1.9) hangs on the seed and on rounding.
    assert sum(row["rollout/score"] for row in rows[-4:]) / 4 > 0.7
    assert max(row["rollout/kl_to_reference"] for row in rows) < 10
