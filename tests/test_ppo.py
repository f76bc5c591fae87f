"""PPO on the tiny model: the invariants of its first step, what moves and what does not, and resuming to the bit."""

import json

import pytest
import tiny_ppo
import tiny_runs
import torch
from tiny_ppo import (
    ONE_SIZE,
    ROUNDING,
    Stopped,
    assert_close,
    cut_off,
    equal,
    made_up_rollout,
    metrics,
    results,
    small_letters,
    step_of,
    weights,
)

from rlaif.errors import DataError, StageError
from rlaif.model import sampling
from rlaif.recipe import PpoSection
from rlaif.stages import actors as actors_module
from rlaif.stages import checkpoints, ppo
from rlaif.stages.actors import CRITIC, POLICY, REFERENCE, assign_roles, judge_tokens, score
from rlaif.stages.reward_model import REWARD

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
CRITICS = pytest.mark.parametrize("critic", ["trunk", "adapter"])


functions, opened = tiny_ppo.functions, tiny_ppo.opened


# --- the first step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("critic", "four_bit"), [("trunk", False), ("adapter", False), ("trunk", True)])
def test_on_the_first_minibatch_the_ratio_is_one_and_nothing_is_clipped(
    opened, tiny_model_64, critic, four_bit, monkeypatch
):
    settings = {"critic": critic, "sampling": {"max_new_tokens": 6, "temperature": 0.7}, "updates": 2}
    run = opened(model=tiny_model_64, sections={"model": {"load_in_4bit": four_bit}}, **settings)
    figures, backward = [], ppo.backward
    monkeypatch.setattr(ppo, "backward", lambda *args: figures.append(backward(*args)) or figures[-1])
    ppo.ppo(run)
    assert len(figures) == 8  # 2 updates of 2 epochs of 2 microbatches
    for first in figures[0:2] + figures[4:6]:
        assert first["policy/ratio"] == 1.0
        assert first["policy/kl_to_old"] == 0.0
        assert first["policy/clip_fraction"] == 0.0
    for later in figures[2:4] + figures[6:8]:
        assert later["policy/kl_to_old"] > 0.0


@pytest.mark.parametrize("stages", [None, ["ppo"]])
def test_at_the_first_update_the_policy_is_the_reference(opened, functions, stages):
    settings = {"reward_function": "small_letters"} if stages else {}
    run = opened(stages=stages, updates=2, learning_rate=1e-2, **settings)
    ppo.ppo(run)
    first, second = metrics(run)
    assert first["rollout/kl_to_reference"] == 0.0
    assert second["rollout/kl_to_reference"] != 0.0
    assert first["rollout/logprob_gap"] < 1e-4  # of a sampled token, with and without the cache of keys and values


def test_a_rollouts_advantages_have_mean_0_and_variance_1_over_real_tokens(opened, monkeypatch):
    run = opened(updates=1)
    seen = []
    monkeypatch.setattr(ppo, "optimize", lambda *args: seen.append(args[4]) or {})
    ppo.ppo(run)
    kept = seen[0].advantages[seen[0].batch.response_mask]
    assert abs(kept.mean().item()) < 1e-6
    assert abs(kept.var(correction=0).item() - 1) < 1e-5


# --- the same numbers, however they are batched ----------------------------------------------------------------------


@CRITICS
def test_eight_microbatches_of_one_give_the_gradients_of_one_of_eight(opened, critic):
    run = opened(critic=critic, **ONE_SIZE)
    actors = assign_roles(run)
    rollout = made_up_rollout(actors)
    whole, figures = step_of(run, actors, rollout)
    actors.settings = actors.settings.model_copy(update={"microbatch": 1})
    parts, figures_of_parts = step_of(run, actors, rollout)
    assert_close(whole, parts)
    assert figures["policy/clip_fraction"] > 0
    assert figures == pytest.approx(figures_of_parts, rel=ROUNDING, abs=1e-6)


@CRITICS
def test_further_columns_of_padding_change_nothing(opened, critic):
    run = opened(critic=critic, **ONE_SIZE)
    actors = assign_roles(run)
    rollout = made_up_rollout(actors)
    batch, pad = rollout.batch, actors.base.tokenizer.pad_id
    wide = torch.nn.functional.pad
    mask = wide(batch.mask, (5, 3))
    wider = ppo.Rollout(
        sampling.Batch(
            wide(batch.ids, (5, 3), value=pad),
            mask,
            (mask.cumsum(1) - 1).clamp_min(0),
            wide(batch.response_ids, (0, 3), value=pad),
            wide(batch.response_mask, (0, 3)),
        ),
        *(wide(part, (0, 3)) for part in rollout[1:6]),
        rollout.weights,
    )
    narrow, figures = step_of(run, actors, rollout)
    padded, figures_of_padded = step_of(run, actors, wider)
    assert_close(narrow, padded)
    assert figures == pytest.approx(figures_of_padded, rel=ROUNDING, abs=1e-6)
    assert score(actors, [], [], wider.batch).total.tolist() == pytest.approx(
        score(actors, [], [], batch).total.tolist(), abs=ROUNDING
    )


@CRITICS
def test_tokens_after_the_end_of_a_response_change_nothing(opened, critic):
    run = opened(critic=critic, **ONE_SIZE)
    actors = assign_roles(run)
    rollout = made_up_rollout(actors)
    other = torch.where(rollout.batch.response_mask, rollout.batch.response_ids, 77)
    width = rollout.batch.ids.shape[1] - other.shape[1]
    ids = torch.cat([rollout.batch.ids[:, :width], other], 1)
    changed = rollout._replace(batch=rollout.batch._replace(ids=ids, response_ids=other))
    assert not torch.equal(ids, rollout.batch.ids)
    gradients, figures = step_of(run, actors, rollout)
    gradients_of_changed, figures_of_changed = step_of(run, actors, changed)
    assert equal(gradients, gradients_of_changed)
    # Entropy is a mean over real tokens; all figures are the same number.
    assert figures == figures_of_changed
    assert torch.equal(score(actors, [], [], rollout.batch).total, score(actors, [], [], changed.batch).total)


# --- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("four_bit", "critic"), [(False, "trunk"), (True, "adapter")])
def test_ppo_moves_policy_and_critic_and_leaves_base_reference_and_reward_as_they_were(
    opened, tiny_model_64, critic, four_bit, monkeypatch
):
    run = opened(model=tiny_model_64, critic=critic, updates=2, sections={"model": {"load_in_4bit": four_bit}})
    kept = {}

    def watched(run):
        actors = assign_roles(run)
        kept["base"] = actors.base
        kept["before"] = {name: p.detach().clone() for name, p in actors.base.lm.named_parameters()}
        kept["heads"] = {name: p.detach().clone() for name, p in actors.base.heads.named_parameters()}
        kept["old policy"] = weights(actors.base, POLICY)
        return actors

    monkeypatch.setattr(ppo, "assign_roles", watched)
    ppo.ppo(run)
    base = kept["base"]
    after = dict(base.lm.named_parameters())
    moved = {name for name, old in kept["before"].items() if not torch.equal(old, after[name])}
    moved |= {name for name, p in base.heads.named_parameters() if not torch.equal(kept["heads"][name], p)}
    expected = {name for name, _ in base.named_parameters_of(POLICY)}
    expected |= {name.removeprefix("heads.") for name, _ in base.named_parameters_of(CRITIC)}
    assert moved == expected
    assert f"{CRITIC}.weight" in moved
    assert any(name.endswith(f"lora_B.{POLICY}.weight") for name in moved)
    assert any(f".{CRITIC}." in name for name in moved) == (critic == "adapter")
    assert equal({k.replace(REFERENCE, POLICY): v for k, v in weights(base, REFERENCE).items()}, kept["old policy"])
    assert len(weights(base, REWARD)) == len(weights(base, POLICY)) + 1


def test_the_saved_policy_is_the_trained_one(opened, monkeypatch):
    run = opened(critic="trunk", updates=1)
    seen, finish = [], ppo.finish
    monkeypatch.setattr(ppo, "finish", lambda run, actors: seen.append(actors) or finish(run, actors))
    ppo.ppo(run)
    base = run.load_base()
    base.add_role(POLICY, adapter=run.stage_folder("ppo") / "policy")
    assert equal(weights(base, POLICY), weights(seen[0].base, POLICY))


def test_a_constant_score_moves_nothing(opened, functions):
    """It is 0 after the shift, the first values and the KL are 0 too, and whitening leaves equal advantages at 0."""
    run = opened(reward_function="ones", updates=1, num_ppo_epochs=1, critic="trunk")
    ppo.ppo(run)
    sft = tiny_runs.contents(run.stage_folder("sft") / "adapter", "*.safetensors")
    assert tiny_runs.contents(run.stage_folder("ppo") / "policy", "*.safetensors") == sft
    figures = metrics(run)[0]
    zero = ["policy/loss", "policy/gradient_norm", "value/loss", "value/gradient_norm", "rollout/score"]
    assert {name: figures[name] for name in zero} == dict.fromkeys(zero, 0.0)


@CRITICS
def test_advantages_that_are_equal_are_whitened_to_0_and_send_no_gradient_into_the_policy(opened, functions, critic):
    run = opened(reward_function="ones", critic=critic, **ONE_SIZE)
    actors = assign_roles(run)
    rollout = made_up_rollout(actors)
    mask = rollout.batch.response_mask
    flat = ppo.masked_whiten(torch.full_like(rollout.advantages, 0.25), mask)
    assert flat.abs().max().item() == 0.0
    gradients, figures = step_of(run, actors, rollout._replace(advantages=flat))
    assert figures["policy/loss"] == 0.0
    assert figures["policy/kl_to_old"] > 0.0
    for name, gradient in gradients.items():
        assert (gradient.abs().max().item() > 0) == (name == f"heads.{CRITIC}.weight"), name


# --- scores ----------------------------------------------------------------------------------------------------------


def scores_of(run):
    return [row["score"] for row in tiny_runs.rows(run.stage_folder("ppo") / "samples.jsonl")]


def test_scores_of_a_reward_model_are_divided_by_its_scale_and_average_0_in_the_first_rollout(opened):
    plain = opened("plain", updates=1)
    ppo.ppo(plain)
    scaled = opened("scaled", updates=1, offset=3.0, scale=0.5)
    ppo.ppo(scaled)
    assert len(scores_of(plain)) == 4
    shown = tiny_runs.rows(plain.stage_folder("ppo") / "samples.jsonl")
    assert [row["id"] for row in shown] == ["ppo-1-0", "ppo-1-1", "ppo-1-2", "ppo-1-3"]
    first = ppo.prompts_of_update(plain, plain.select("train", plain.recipe.ppo.prompts_per_tag), 0)
    assert [row["prompt_id"] for row in shown] == [prompt.id for prompt in first]
    assert [row["seed"] for row in shown] == [plain.seed("ppo", 0, row) for row in range(4)]
    assert scores_of(scaled) == pytest.approx([2 * value for value in scores_of(plain)], abs=1e-5)
    assert metrics(plain)[0]["rollout/score"] == pytest.approx(0.0, abs=1e-6)
    assert metrics(plain)[0]["rollout/score_std"] > 0.1


def test_scores_of_a_function_have_mean_0_and_deviation_1_in_the_first_rollout_and_keep_that_scale(opened, functions):
    run = opened(reward_function="small_letters", updates=2)
    ppo.ppo(run)
    first = metrics(run)[0]
    assert first["rollout/score"] == pytest.approx(0.0, abs=1e-6)
    assert first["rollout/score_std"] == pytest.approx(1.0, abs=1e-5)
    rows = tiny_runs.rows(run.stage_folder("ppo") / "samples.jsonl")
    letters = small_letters([], [row["response"] for row in rows])
    assert len(letters) == 8
    mean = sum(letters[:4]) / 4
    deviation = (sum((value - mean) ** 2 for value in letters[:4]) / 4) ** 0.5
    assert scores_of(run) == pytest.approx([(value - mean) / deviation for value in letters], abs=1e-5)


@pytest.mark.slow
def test_the_judges_rating_can_be_the_reward_and_is_asked_once_for_each_response(opened):
    """The tiny model rates as the base role, with nearly nothing on the numbers: the floor is taken away."""
    run = opened(reward_function="judge", updates=2, sections={"label": {"min_option_mass": 0.0}})
    ppo.ppo(run)
    first = metrics(run)[0]
    assert first["rollout/score"] == pytest.approx(0.0, abs=1e-5)
    assert first["rollout/score_std"] == pytest.approx(1.0, abs=1e-3)
    kept = [unit for unit in run.journal.known("ppo").values() if "/reward/" in unit.item_id]
    assert {len(unit.result["logprobs"]) for unit in kept} == {10}
    with pytest.raises(StageError, match="did not rate a response: too little probability on the options"):
        ppo.ppo(opened("strict", reward_function="judge", sections={"label": {"min_option_mass": 0.9}}))


def test_a_constant_score_is_not_divided_by_the_rounding_of_its_mean(opened, functions):
    actors = assign_roles(opened(reward_function="ones"))
    raw = torch.full((8,), 0.1)
    assert raw.std(correction=0).item() > 0
    actors_module.calibrate(actors, raw)
    assert actors.scale == 1.0


@CRITICS
def test_a_new_critic_values_everything_at_0_wherever_the_scores_lie(opened, functions, critic):
    actors = assign_roles(opened(reward_function="ones", critic=critic))
    actors_module.calibrate(actors, torch.tensor([-7.0, -5.0]))
    assert (actors.offset, actors.scale) == (-6.0, 1.0)
    _, values = judge_tokens(actors, POLICY, made_up_rollout(actors).batch)
    assert values.abs().max().item() == 0.0


def first_token_scores(actors, rollout):
    """What the reward model's heads would say of the first token of each response alone, ``[B, K]``."""
    ids, width = rollout.batch.ids, rollout.batch.ids.shape[1] - rollout.batch.response_ids.shape[1]
    cut = rollout.batch._replace(ids=ids[:, : width + 1], mask=rollout.batch.mask[:, : width + 1])
    cut = cut._replace(positions=rollout.batch.positions[:, : width + 1])
    with actors.base.acting_as(REWARD), torch.no_grad():
        last = sampling.last_hidden(cut, sampling.hidden_states(actors.base, cut))
        return last @ actors.base.head_weight(REWARD).T


def test_values_of_an_adapter_critic_start_at_the_reward_models_scores(opened):
    """The value before a response's second token is the score that the reward model would give to its first alone."""
    actors = assign_roles(opened(critic="adapter", offset=3.0, scale=0.5))
    rollout = made_up_rollout(actors)
    _, values = judge_tokens(actors, POLICY, rollout.batch)
    long = rollout.batch.response_mask[:, 1]
    expected = (first_token_scores(actors, rollout)[:, 0] - 3.0) / 0.5
    assert values[long, 1].tolist() == pytest.approx(expected[long].tolist(), abs=1e-4)


def test_values_of_an_adapter_critic_start_at_the_mean_of_several_heads_each_on_its_own_scale(opened):
    run = opened(critic="adapter")
    folder, base = run.stage_folder("reward"), run.load_base()
    base.add_role(REWARD, adapter=folder / "adapter", outputs=3)
    with torch.no_grad():
        base.head_weight(REWARD).normal_(generator=torch.Generator().manual_seed(7))
    base.save_role(REWARD, folder / "adapter")
    measured = json.loads((folder / "calibration.json").read_text())
    scales = [(1.0, 0.5), (-2.0, 2.0), (0.25, 1.0)]
    measured["members"] = [{"offset": offset, "scale": scale} for offset, scale in scales]
    (folder / "calibration.json").write_text(json.dumps(measured))
    actors = assign_roles(run)
    actors_module.calibrate(actors, torch.tensor([0.5, 1.0]))  # takes the mean of the first rollout off
    rollout = made_up_rollout(actors)
    _, values = judge_tokens(actors, POLICY, rollout.batch)
    raw = first_token_scores(actors, rollout)
    expected = sum((raw[:, k] - offset) / scale for k, (offset, scale) in enumerate(scales)) / 3 - 0.75
    long = rollout.batch.response_mask[:, 1]
    assert values[long, 1].tolist() == pytest.approx(expected[long].tolist(), abs=1e-4)
    assert actors.base.head_weight("critic").shape == (1, 32)


def test_responses_without_an_end_lose_the_penalty_and_scores_are_clipped(opened, functions):
    free = opened("free", reward_function="ones", updates=1)
    ppo.ppo(free)
    charged = opened("charged", reward_function="ones", updates=1, missing_eos_penalty=4.0)
    ppo.ppo(charged)
    clipped = opened("clipped", reward_function="ones", updates=1, missing_eos_penalty=4.0, score_clip=2.0)
    ppo.ppo(clipped)
    ended = metrics(free)[0]["rollout/ended"]
    assert metrics(free)[0]["rollout/score"] == 0.0
    assert metrics(charged)[0]["rollout/score"] == pytest.approx(-4.0 * (1 - ended))
    assert metrics(clipped)[0]["rollout/score"] == pytest.approx(-2.0 * (1 - ended))
    assert ended < 1


def test_a_weak_reward_model_stops_ppo_with_its_tag_its_accuracy_and_what_to_do(opened):
    run = opened(rate=0.45, sections={"reward": {"allow_weak_reward": False, "min_heldout_accuracy": 0.6}})
    with pytest.raises(StageError) as caught:
        ppo.ppo(run)
    message = str(caught.value)
    for part in ("harmful: 9 of 20 pairs right (45%", "reward.min_heldout_accuracy 60%", "Label more pairs"):
        assert part in message
    assert "reward.allow_weak_reward: true" in message
    assert not (run.stage_folder("ppo") / "metrics.jsonl").exists()


def test_allow_weak_reward_goes_on_with_a_warning(opened, monkeypatch):
    run = opened(rate=0.45, updates=1)
    said = []
    monkeypatch.setattr(run.progress, "say", said.append)
    ppo.ppo(run)
    assert [line for line in said if "warning" in line and "harmful: 9 of 20" in line]
    assert len(metrics(run)) == 1


def test_a_prompt_that_does_not_fit_the_context_stops_ppo_with_its_id(opened):
    run = opened(sampling={"max_new_tokens": 16384})
    with pytest.raises(DataError, match=r"ppo: `harmful-0\d\d`: .* the model's context holds 16384"):
        ppo.ppo(run)


def test_ppo_after_an_sft_stage_that_has_not_run_says_to_run_it(opened, functions, tiny_model):
    run = opened(reward_function="ones")
    (run.stage_folder("sft") / "adapter").rename(run.stage_folder("sft") / "elsewhere")
    with pytest.raises(StageError, match="Run the stage `sft` first"):
        ppo.ppo(run)


# --- order and schedule ----------------------------------------------------------------------------------------------


def test_each_epoch_over_the_prompts_shows_each_prompt_once_in_an_order_of_its_own(opened):
    run = opened(rollout_batch=4, prompts_per_tag={"harmful": 4, "ordinary": 4})
    prompts = run.select("train", run.recipe.ppo.prompts_per_tag)
    ids = [prompt.id for update in range(4) for prompt in ppo.prompts_of_update(run, prompts, update)]
    assert sorted(ids[:8]) == sorted(ids[8:]) == sorted(prompt.id for prompt in prompts)
    assert ids[:8] != ids[8:]


def test_the_linear_learning_rate_falls_from_the_full_rate_towards_zero(opened, functions):
    run = opened(reward_function="ones", lr_scheduler_type="linear", learning_rate=0.003, updates=3)
    ppo.ppo(run)
    assert [row["policy/learning_rate"] for row in metrics(run)] == pytest.approx([0.003, 0.002, 0.001])


@pytest.mark.parametrize(
    ("kind", "updates", "rates"), [("constant", 4, [0.5, 1, 1, 1]), ("linear", 5, [0.5, 1, 1, 2 / 3, 1 / 3])]
)
def test_a_learning_rate_that_warms_up_rises_to_its_height_and_then_goes_its_way(kind, updates, rates):
    settings = PpoSection(lr_scheduler_type=kind, warmup_updates=2, updates=updates, learning_rate=0.01)
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    found = []
    for update in range(updates):
        ppo.set_learning_rate(optimizer, settings, update)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.01 * rate for rate in rates])


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "name"), [("trunk", "record"), ("adapter", "save")])
def test_a_run_cut_off_and_resumed_equals_one_that_was_not_to_the_bit(opened, critic, name, monkeypatch):
    settings = {"critic": critic, "updates": 3, "kl_target": 0.5, "lr_scheduler_type": "linear"}
    whole = opened("whole", **settings)
    counts = ppo.ppo(whole)
    resumed = opened("resumed", **settings)
    cut_off(resumed, monkeypatch, name, update=1)
    cut_off(resumed, monkeypatch, name, update=2)
    assert ppo.ppo(resumed) == counts
    assert results(resumed) == results(whole)
    assert "critic/adapter_model.safetensors" in results(whole) or critic == "trunk"
    assert [row["update"] for row in metrics(resumed)] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_update_only_writes_its_files(opened, monkeypatch):
    whole = opened("whole", updates=1)
    ppo.ppo(whole)
    resumed = opened("resumed", updates=1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ppo, "finish", lambda *args: (_ for _ in ()).throw(Stopped))
        ppo.ppo(resumed)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "optimize", lambda *args: pytest.fail("an update was done again"))
        ppo.ppo(resumed)
    assert results(resumed) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["counters gone", "state cut short", "marker gone"])
def test_a_checkpoint_that_was_cut_short_is_passed_over_for_the_one_before(opened, damage, monkeypatch):
    whole = opened("whole")
    ppo.ppo(whole)
    resumed = opened("resumed")
    cut_off(resumed, monkeypatch, "record", update=2)
    newest = resumed.stage_folder("ppo") / "checkpoints" / "checkpoint-2"
    if damage == "counters gone":
        (newest / "counters.json").unlink()
    elif damage == "state cut short":
        (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-8])
    else:
        (newest / "COMPLETE").unlink()
    said = []
    monkeypatch.setattr(resumed.progress, "say", said.append)
    ppo.ppo(resumed)
    assert said == ["  continuing after step 1"]
    assert results(resumed) == results(whole)


def test_two_checkpoints_are_kept_and_hold_nothing_but_weights_moments_and_counters(opened):
    run = opened(critic="trunk", num_ppo_epochs=1)
    ppo.ppo(run)
    parent = run.stage_folder("ppo") / "checkpoints"
    assert sorted(path.name for path in parent.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    names = sorted(path.name for path in (parent / "checkpoint-3").iterdir())
    assert names == ["COMPLETE", "counters.json", "state.safetensors"]
    assert json.loads((parent / "checkpoint-3" / "counters.json").read_text())["update"] == 3


def test_a_parameter_without_moments_is_restored(opened):
    run = opened(critic="trunk")
    actors = assign_roles(run)
    parameters = [p for role in (POLICY, CRITIC) for _, p in actors.base.named_parameters_of(role)]
    optimizer = torch.optim.AdamW(parameters)
    kl = ppo.FixedKl(0.05)
    scale = {"offset": 0.5, "scale": 2.0}
    checkpoints.save(run, actors.base, optimizer, kl, 1, scale)
    assert checkpoints.restore(run, actors.base, optimizer, kl) == (1, scale)
    assert all(not state for state in optimizer.state.values())


# --- it learns -------------------------------------------------------------------------------------------------------


def divergence(run, actors):
    """KL of the policy from the reference in nats per response: the exact sum over the vocabulary at each token."""
    base = actors.base
    prompts = [base.tokenizer.prompt(row.messages) for row in run.select("train", {"harmful": 8, "ordinary": 8})]
    with base.acting_as(POLICY):
        drawn = sampling.sample(base, prompts, max_new_tokens=8, seeds=list(range(len(prompts))))
    batch = sampling.pack(base, prompts, [one.ids for one in drawn])
    found = {}
    for role in (POLICY, REFERENCE):
        with torch.no_grad(), base.acting_as(role):
            logits = sampling.response_logits(base, batch, sampling.hidden_states(base, batch))
        found[role] = logits.double().log_softmax(-1)
    per_token = (found[POLICY].exp() * (found[POLICY] - found[REFERENCE])).sum(-1)
    return (per_token * batch.response_mask).sum(1).mean().item()


@pytest.mark.slow
def test_a_huge_price_keeps_the_policy_at_the_reference(opened, functions, monkeypatch):
    """Whitened advantages have one size whatever the price, so it decides their direction, not the size of steps."""
    found, finish = {}, ppo.finish
    steps = {"updates": 15, "num_ppo_epochs": 1, "rollout_batch": 16, "minibatch": 16, "microbatch": 16}
    steps |= {"learning_rate": 1e-4, "lr_scheduler_type": "linear", "prompts_per_tag": {"harmful": 16, "ordinary": 16}}
    steps |= {"sections": tiny_runs.ALL_PROJECTIONS}
    for price in (0.0, 100.0):
        run = opened(f"price-{price:g}", reward_function="small_letters", kl_coef=price, **steps)

        def measured(run, actors, price=price):
            found[price] = divergence(run, actors)
            return finish(run, actors)

        monkeypatch.setattr(ppo, "finish", measured)
        ppo.ppo(run)
    assert 0 < found[100.0] < 1e-3 < found[0.0]


@pytest.mark.slow
@CRITICS
def test_against_a_known_reward_the_score_rises_by_more_than_its_first_deviation(opened, functions, critic):
    settings = {"updates": 20, "num_ppo_epochs": 2, "rollout_batch": 64, "minibatch": 64, "microbatch": 64}
    settings |= {"learning_rate": 4e-3, "lr_scheduler_type": "linear", "kl_coef": 0.05}
    settings |= {"prompts_per_tag": {"harmful": 16, "ordinary": 16}, "sections": tiny_runs.ALL_PROJECTIONS}
    run = opened(reward_function="small_letters", critic=critic, **settings)
    ppo.ppo(run)
    rows = metrics(run)
    last = sum(row["rollout/score"] for row in rows[-4:]) / 4
    assert rows[0]["rollout/score"] == pytest.approx(0.0, abs=1e-5)  # the unit is the first deviation
    assert last > 1.0
    assert max(row["rollout/kl_to_reference"] for row in rows) < 10
