"""PPO-Lagrangian on the tiny model: what is refused, plain PPO at lambda 0, resuming, and a constrained optimum."""

import json

import pytest
import tiny_ppo
import tiny_runs
import torch
from tiny_ppo import cut_off, few_small_letters, metrics, small_letters, weights

from rlaif.errors import ConfigError, StageError
from rlaif.recipe import load_recipe
from rlaif.report.curves import ppo_figures
from rlaif.stages import ppo
from rlaif.stages.actors import CRITIC, POLICY, assign_roles
from rlaif.stages.checkpoints import COST_CRITIC
from rlaif.stages.reward_model import COST

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
FLOAT32 = 1e-5  # a few float32 sums of numbers near 1
EVERY = pytest.mark.parametrize("how", ["trunk", "adapter", "rloo"])
HOW = {
    "trunk": {"critic": "trunk"},
    "adapter": {"critic": "adapter"},
    "rloo": {"advantage_estimator": "rloo", "samples_per_prompt": 2, "rollout_batch": 2},
}
OWN_COST = {"reward": {"cost": True}}


def plain_characters(prompts, completions, **columns):
    """Count ASCII characters, those below 64 (digits, punctuation) twice."""
    return [float(sum((ord(char) < 128) + (ord(char) < 64) for char in text)) for text in completions]


@pytest.fixture
def functions(monkeypatch):
    known = {"small_letters": small_letters, "few": few_small_letters, "plain_characters": plain_characters}
    monkeypatch.setattr("rlaif.stages.judged_reward.find_function", known.__getitem__)
    monkeypatch.setattr("rlaif.stages.constraint.find_function", lambda name, key: known[name])


opened = tiny_ppo.opened


def with_cost(run):
    """Leave a cost adapter of random weights where the stage `reward` would have."""
    folder = run.stage_folder("reward") / COST
    tiny_runs.save_random_role(run, COST, folder / "adapter", seed=7, head=True, size=0.2)
    (folder / "calibration.json").write_text(json.dumps({"members": [{"offset": 0.0, "scale": 1.0}]}))
    return run


def safetensors(folder):
    return tiny_runs.contents(folder, "*.safetensors")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"constraint": {}}, "ppo.constraint: a constraint has one source, cost (an adapter) or function; none is"),
        ({"constraint": {"cost": "reward", "function": "brief"}}, "cost (an adapter) or function; both are given"),
        ({"constraint": {"function": "brief", "limit": 1}}, "ppo.constraint.limit: unknown key; "),
        ({"constraint": {"function": "brief", "lambda_init": 6}}, "lambda_init 6 is above lambda_max 5"),
        ({"constraint": {"function": "brief"}, "whiten_rewards": True}, "whiten_rewards gives rewards another unit"),
        (
            {"constraint": {"cost": "other"}, "rewards": [{"name": "harm", "cost": "other"}]},
            "the cost is a part of rewards or independent, and constraint limits it; leave one out",
        ),
        ({"constraint": {"cost": "runs/none"}}, "ppo.constraint: no cost adapter in `runs/none`; looked for"),
        ({"constraint": {"cost": "reward"}}, "ppo.constraint: the cost needs the stage `reward` before it, with rewa"),
    ],
)
def test_a_constraint_that_does_not_fit_is_refused_with_the_reason(tmp_path, settings, complaint):
    ppo_settings = settings if "rewards" in settings else settings | {"reward_function": "brief"}
    path = tiny_runs.write_recipe(tmp_path / "tiny.yaml", "none", stages=["ppo"], ppo=ppo_settings)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert complaint in str(caught.value)


@pytest.mark.slow
def test_a_missing_cost_adapter_or_function_is_named(opened, functions, monkeypatch):
    run = opened("cost", constraint={"cost": "reward"}, sections=OWN_COST)
    with pytest.raises(StageError, match=r"4-reward/cost: holds no trained reward model .* run the stage `reward`"):
        ppo.ppo(run)
    monkeypatch.undo()
    run = opened("function", stages=["ppo"], reward_function="brief", constraint={"function": "nobody"})
    with pytest.raises(ConfigError, match=r"ppo\.constraint\.function: `nobody` is not registered; known: .*brief"):
        ppo.ppo(run)


def test_without_a_constraint_the_stage_depends_on_what_it_depended_on_before(tmp_path):
    def inputs(name, **settings):
        with tiny_runs.opened(
            tmp_path / name, "none", stages=["ppo"], ppo={"reward_function": "brief", **settings}
        ) as run:
            return ppo.inputs(run)

    for name in ("plain", "limited", "other"):
        (tmp_path / name).mkdir()
    plain = inputs("plain")
    limited = inputs("limited", constraint={"function": "brief"})
    other = inputs("other", constraint={"function": "brief", "threshold": 1.0})
    assert "constraint" not in plain
    assert {key: value for key, value in limited.items() if key != "constraint"} == plain
    assert limited["constraint"] != other["constraint"]


# --- plain PPO, and what moves ---------------------------------------------------------------------------------------


@pytest.mark.slow
@EVERY
def test_at_lambda_0_policy_critic_and_shared_metrics_are_those_of_plain_ppo_to_the_bit(opened, functions, how):
    settings = {"reward_function": "small_letters", "learning_rate": 1e-2, "kl_target": 0.5, **HOW[how]}
    plain, limited = (
        opened("plain", **settings),
        opened("limited", constraint={"function": "few", "threshold": -9.0, "lambda_init": 0.0}, **settings),
    )
    for run in (plain, limited):
        ppo.ppo(run)
    one, other = (run.stage_folder("ppo") for run in (plain, limited))
    for name in ("policy", *(["critic"] if how != "rloo" else [])):
        assert safetensors(one / name) == safetensors(other / name) != {}
    assert [
        {key: row[key] for key in ours} for row, ours in zip(metrics(limited), metrics(plain), strict=True)
    ] == metrics(plain)
    assert [row["constraint/lambda"] for row in metrics(limited)] == [0.0] * 3
    samples = [
        {key: value for key, value in row.items() if key != "cost"} for row in tiny_runs.rows(other / "samples.jsonl")
    ]
    assert samples == tiny_runs.rows(one / "samples.jsonl")
    assert (other / "cost_critic").exists() == (how != "rloo")


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_the_cost_has_a_critic_of_its_own_that_learns_and_an_adapter_that_does_not(opened, critic, monkeypatch):
    run = with_cost(opened(constraint={"cost": "reward"}, sections=OWN_COST, critic=critic, learning_rate=1e-2))
    kept, before = {}, {}

    def watched(run):
        actors = kept["actors"] = assign_roles(run)
        before.update({role: weights(actors.base, role) for role in (POLICY, CRITIC, COST_CRITIC, COST)})
        return actors

    monkeypatch.setattr(ppo, "assign_roles", watched)
    ppo.ppo(run)
    base = kept["actors"].base
    for role, old in before.items():
        moved = [name for name, value in weights(base, role).items() if not torch.equal(value, old[name])]
        assert moved == ([] if role == COST else list(old)), role
    cost = {name.replace(COST_CRITIC, COST): value for name, value in before[COST_CRITIC].items()}
    if critic == "adapter":  # it starts as a copy
        assert all(torch.equal(value, before[COST][name]) for name, value in cost.items()) and len(cost) > 1
    else:
        assert [value.abs().max().item() for value in cost.values()] == [0.0]
    saved = safetensors(run.stage_folder("ppo") / "cost_critic")
    assert list(saved) == ["adapter_model.safetensors" if critic == "adapter" else "value_head.safetensors"]
    assert all(row["cost_value/loss"] > 0 and row["cost_value/gradient_norm"] > 0 for row in metrics(run))


@pytest.mark.slow
def test_a_critic_that_starts_from_the_cost_adapter_says_its_cost_in_deviations(opened):
    run = with_cost(opened(constraint={"cost": "reward"}, sections=OWN_COST, critic="adapter"))
    actors = assign_roles(run)
    constraint, rollout = actors.constraint, tiny_ppo.made_up_rollout(actors)
    batch, mask = rollout.batch, rollout.batch.response_mask
    own = torch.ones(len(batch.ids), dtype=torch.bool)
    costs, values = constraint.assess(0, [], [], own, batch, rollout.logprobs, rollout.ref_logprobs, 0.0)
    raw = constraint.model.score(batch)
    assert constraint.latest.tolist() == pytest.approx(raw.tolist(), abs=FLOAT32)  # in microbatches, and in one
    deviations = (raw - raw.mean()) / raw.std(correction=0)
    assert costs.sum(1).tolist() == pytest.approx(deviations.tolist(), abs=FLOAT32)
    with torch.no_grad(), actors.base.acting_as(COST):
        hidden = ppo.sampling.hidden_states(actors.base, batch)[:, -mask.shape[1] - 1 : -1]
        said = actors.base.head(COST, hidden)
    expected = (said - raw.mean()) / raw.std(correction=0) * mask
    assert (values - expected).abs().max().item() < FLOAT32 * expected.abs().max().item()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lambda_and_advantages_are_those_of_the_paper(opened, functions, monkeypatch):
    """RLOO's advantages by hand: each response's reward less that of the other to its prompt, and so for costs."""
    limit = {"function": "few", "threshold": -2.0, "lambda_lr": 0.5, "lambda_update_delay_steps": 1}
    limit |= {"episode_cost_window_size": 6}
    settings = {"reward_function": "small_letters", "learning_rate": 1e-2, "kl_coef": 0.5, **HOW["rloo"]}
    run = opened(constraint=limit, **settings)
    seen, optimize = [], ppo.optimize
    monkeypatch.setattr(ppo, "optimize", lambda *args: seen.append(args[4]) or optimize(*args))
    kept, record = [], ppo.record
    monkeypatch.setattr(ppo, "record", lambda *args: kept.append(args[4]) or record(*args))
    ppo.ppo(run)
    logarithm, window = 0.0, []
    for update, (rollout, rows, row) in enumerate(zip(seen, kept, metrics(run), strict=True)):
        costs = torch.tensor(few_small_letters([], [one[1] for one in rows]))
        window = (window + costs.tolist())[-6:]
        if update == 0:
            mean, spread = costs.mean(), costs.std(correction=0)
        else:
            logarithm += 0.5 * torch.tensor(logarithm).exp().item() * (sum(window) / len(window) + 2.0)
        price = torch.tensor(logarithm).exp().item()
        assert row["constraint/lambda"] == pytest.approx(price, rel=FLOAT32)
        assert row["constraint/mean_cost"] == pytest.approx(sum(window) / len(window), rel=FLOAT32)
        assert row["rollout/cost"] == pytest.approx(costs.mean().item(), rel=FLOAT32)
        assert row["rollout/cost_std"] == pytest.approx(costs.std(correction=0).item(), rel=FLOAT32)
        assert (row["rollout/unsafe"], row["constraint/threshold"]) == (0.0, -2.0)
        scores, divergence = (torch.stack([one[index] for one in rows]) for index in (2, 3))
        gain, loss = scores - 0.5 * divergence, (costs - mean) / spread + 0.5 * divergence
        combined = (gain - price * loss) / (1 + price)
        expected = combined - combined.view(2, 2).flip(1).flatten()
        of_tokens = expected.unsqueeze(1) * rollout.batch.response_mask
        assert (rollout.advantages - of_tokens).abs().max().item() < FLOAT32 * 10
    assert price != 1.0


def test_the_report_draws_the_cost_against_its_threshold_and_lambda():
    row = {"rollout/cost": 0.5, "constraint/mean_cost": 0.4, "constraint/threshold": 0.1, "constraint/lambda": 1.2}
    rows = [{"update": update, **row} for update in (1, 2)]
    drawn = {figure.title: figure.chart for figure in ppo_figures(rows)}
    assert "threshold" in drawn["Cost"] and "mean of the window" in drawn["Cost"]
    assert "Lambda" in drawn
    assert not {"Cost", "Lambda"} & {figure.title for figure in ppo_figures([{"update": 1, "rollout/score": 0.0}])}


# --- resuming and learning -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("how", "name"), [("trunk", "record"), ("adapter", "save")])
def test_a_run_cut_off_and_resumed_equals_one_that_was_not_to_the_bit(opened, how, name, monkeypatch):
    limit = {"cost": "reward", "threshold": -0.2, "lambda_lr": 0.1, "episode_cost_window_size": 6}
    settings = {"constraint": limit, "sections": OWN_COST, "updates": 3, **HOW[how]}
    whole = with_cost(opened("whole", **settings))
    counts = ppo.ppo(whole)
    resumed = with_cost(opened("resumed", **settings))
    cut_off(resumed, monkeypatch, name, update=1)
    cut_off(resumed, monkeypatch, name, update=2)
    assert ppo.ppo(resumed) == counts
    assert tiny_runs.contents(resumed.stage_folder("ppo")) == tiny_runs.contents(whole.stage_folder("ppo"))
    assert len({row["constraint/lambda"] for row in metrics(whole)}) == 3
    assert counts["last_lambda"] == metrics(whole)[-1]["constraint/lambda"]


@pytest.mark.slow
def test_against_a_known_cost_the_policy_ends_at_the_limit_that_plain_ppo_violates(opened, functions, tmp_path):
    """Score and cost are one number, so its limit is the best score under it, and lambda is then 1, less the KL."""
    prompts = tmp_path / "letters.jsonl"
    rows = [{"id": letter, "prompt": letter, "tag": "letter", "split": "train"} for letter in "abcdefgh"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"reward_function": "plain_characters", "prompts_per_tag": {}, "sampling": {"max_new_tokens": 2}}
    settings |= {"rollout_batch": 64, "minibatch": 64, "microbatch": 64, "num_ppo_epochs": 4, "critic": "trunk"}
    settings |= {"learning_rate": 8e-3, "lam": 1.0, "stages": ["ppo"]}
    settings |= {"sections": {"prompts": [str(prompts)], **tiny_runs.ALL_PROJECTIONS}}
    limit = {"function": "plain_characters", "threshold": 2.0, "lambda_init": 0.5, "lambda_lr": 0.5}
    run = opened("limited", updates=36, constraint=limit | {"episode_cost_window_size": 64}, **settings)
    ppo.ppo(run)
    first, last = metrics(run)[0], metrics(run)[-12:]
    scale = json.loads((run.stage_folder("ppo") / "scale.json").read_text())
    earned = sum(row["rollout/score"] for row in last) / 12 * scale["scale"] + scale["offset"]
    assert first["rollout/cost"] < 1.4
    assert sum(row["rollout/cost"] for row in last) / 12 == pytest.approx(2.0, abs=0.15)
    assert earned == pytest.approx(2.0, abs=0.15)
    assert sum(row["constraint/lambda"] for row in last) / 12 == pytest.approx(0.9, abs=0.25)
    plain = opened("plain", updates=16, **settings)
    ppo.ppo(plain)
    scale = json.loads((plain.stage_folder("ppo") / "scale.json").read_text())
    earned = sum(row["rollout/score"] for row in metrics(plain)[-4:]) / 4 * scale["scale"] + scale["offset"]
    assert earned > 2.6
