"""Exploration in PPO: schedules, responses of the reference and what they count, uncertainty as penalty or bonus."""

import itertools
import math

import numpy as np
import pytest
import tiny_ppo
import tiny_runs
import torch
from test_recipe import GOOD, complaint
from test_recipe import recipe as read
from tiny_ppo import ONE_SIZE, assert_close, cut_off, made_up_rollout, metrics, results, step_of

from rlaif.documents import fingerprint
from rlaif.maths.advantages import rloo
from rlaif.maths.composition import uncertainty_weighted
from rlaif.maths.losses import Aggregation, clipped_policy_loss, clipped_value_loss, mixture_weights
from rlaif.maths.masking import masked_whiten
from rlaif.model import sampling
from rlaif.recipe import PpoSection
from rlaif.stages import exploration, ppo
from rlaif.stages import run as run_module
from rlaif.stages.actors import POLICY, REFERENCE, assign_roles

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
functions, opened = tiny_ppo.functions, tiny_ppo.opened
EXPLORES = {"sampling": {"max_new_tokens": 8, "temperature": 1.5}, "final_temperature": 0.5, "reference_share": 0.5}
EXPLORES |= {"entropy_coef": 0.1, "final_entropy_coef": 0.0, "learning_rate": 1e-2}


# --- what a response counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reference", "share", "expected"),
    [
        (0.3, 0.1, 0.5, 0.3 / (0.5 * 0.3 + 0.5 * 0.1)),  # 1.5
        (0.01, 0.4, 0.9, 0.01 / (0.9 * 0.01 + 0.1 * 0.4)),
        (0.2, 0.2, 0.75, 1.0),
        (1.0, 1e-30, 0.8, 1 / 0.8),
        (0.3, 0.9, 1.0, 1.0),
    ],
)
def test_a_response_counts_its_probability_under_the_policy_over_that_under_the_mixture(
    policy, reference, share, expected
):
    found = mixture_weights(torch.tensor([math.log(policy / reference)]), torch.tensor([share]))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert share < 1 or found.item() == 1.0


def test_a_response_that_one_of_both_never_writes_has_a_finite_weight():
    found = mixture_weights(torch.tensor([-1e4, 1e4, -1e4, 1e4]), torch.tensor([0.9, 0.9, 1.0, 1.0]))
    assert found.tolist() == pytest.approx([0.0, 1 / 0.9, 1.0, 1.0])


# A policy that can be enumerated: responses of two tokens out of two, with a logit for each of three prefixes.
RESPONSES = list(itertools.product((0, 1), repeat=2))
POLICY_LOGITS, REFERENCE_LOGITS = [0.7, -1.2, 0.4], [-0.9, 0.8, 1.5]
SCORES = {(0, 0): 1.0, (0, 1): -0.5, (1, 0): 2.5, (1, 1): 0.3}
MASK = torch.ones(1, 2, dtype=torch.bool)


def tokens(logits, response):
    """Log-probabilities of both tokens, [1, 2]; the logit of a prefix is that of its token 1."""
    first, second = response
    chosen = torch.stack([logits[0], logits[1 + first]]) * torch.tensor([2.0 * first - 1, 2.0 * second - 1])
    return torch.nn.functional.logsigmoid(chosen).unsqueeze(0)


def probability(logits, response):
    """By hand: a product of two logistic functions."""
    first, second = response
    one, two = (1 / (1 + math.exp(-logits[place])) for place in (0, 1 + first))
    return (one if first else 1 - one) * (two if second else 1 - two)


def exact_gradient():
    """Of the expected score: central differences of the sum over all responses."""

    def expected(logits):
        return sum(probability(logits, response) * SCORES[response] for response in RESPONSES)

    step = 1e-5
    return [
        (expected([v + step * (n == k) for n, v in enumerate(POLICY_LOGITS)])
         - expected([v - step * (n == k) for n, v in enumerate(POLICY_LOGITS)])) / (2 * step)
        for k in range(3)
    ]  # fmt: skip


def gradient_of(response, advantage):
    """What PPO's loss does to the logits for one response, as an ascent."""
    logits = torch.tensor(POLICY_LOGITS, dtype=torch.float64, requires_grad=True)
    logprobs = tokens(logits, response)
    whole = Aggregation("constant", 1)
    advantages = torch.full((1, 2), advantage, dtype=torch.float64)
    loss = clipped_policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2, whole).loss
    return -torch.autograd.grad(loss, logits)[0]


def weight_of(response, share):
    ratio = math.log(probability(POLICY_LOGITS, response) / probability(REFERENCE_LOGITS, response))
    return mixture_weights(*torch.tensor([[ratio], [share]], dtype=torch.float64)).item()


def drawn(response, share):
    """The probability that a row is this response."""
    return share * probability(POLICY_LOGITS, response) + (1 - share) * probability(REFERENCE_LOGITS, response)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("baseline", [0.0, 5.0])
def test_the_weighted_gradient_is_on_average_that_of_the_expected_score_whoever_draws(share, baseline):
    """Over all responses, each at the probability with which it is drawn, and whatever constant is the baseline."""
    terms = [
        drawn(one, share) * gradient_of(one, weight_of(one, share) * (SCORES[one] - baseline)) for one in RESPONSES
    ]
    assert sum(terms).tolist() == pytest.approx(exact_gradient(), abs=1e-8)
    plain = [drawn(one, share) * gradient_of(one, SCORES[one] - baseline) for one in RESPONSES]
    assert share == 1 or (sum(plain) - torch.tensor(exact_gradient())).abs().max() > 0.01


def test_with_leave_one_out_baselines_a_group_of_both_kinds_is_unbiased_too():
    """Over all pairs: the first row is always the policy's own, as it is in an update."""
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(RESPONSES, repeat=2):
        chance = drawn(pair[0], 1.0) * drawn(pair[1], 0.4)
        advantages = rloo(torch.tensor([SCORES[one] for one in pair], dtype=torch.float64), 2)
        for one, share, advantage in zip(pair, (1.0, 0.4), advantages.tolist(), strict=True):
            total += chance * gradient_of(one, weight_of(one, share) * advantage) / 2
    assert total.tolist() == pytest.approx(exact_gradient(), abs=1e-8)


def test_the_value_that_the_weighted_loss_wants_is_the_policys_mean():
    share = 0.3
    value = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    mean = sum(probability(POLICY_LOGITS, one) * SCORES[one] for one in RESPONSES)
    value.data.fill_(mean)
    loss = sum(
        drawn(one, share)
        * clipped_value_loss(
            value, value.detach(), torch.full((1, 1), SCORES[one]).double(), MASK[:, :1], 0.2,
            torch.full((1, 1), weight_of(one, share)).double(),
        ).loss
        for one in RESPONSES
    )  # fmt: skip
    assert torch.autograd.grad(loss, value)[0].item() == pytest.approx(0.0, abs=1e-8)


def test_whitening_with_weights_takes_mean_and_variance_of_weighted_rows():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(4, 3, generator=generator), torch.tensor([[1.0], [0.5], [0.0], [1.25]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]).bool()
    found = masked_whiten(x, mask, weights=weights)
    kept, counts = x[mask].double().numpy(), weights.expand(4, 3)[mask].double().numpy()
    mean = np.average(kept, weights=counts)
    expected = (kept - mean) / np.sqrt(np.average((kept - mean) ** 2, weights=counts) + 1e-8)
    assert found[mask].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert torch.equal(masked_whiten(x, mask), masked_whiten(x, mask, weights=torch.ones(4, 1)))


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_schedules_go_in_a_line_from_the_first_update_to_the_last():
    settings = PpoSection.model_validate(
        {"updates": 5, "sampling": {"temperature": 1.2}, "final_temperature": 0.4, "entropy_coef": 0.0,
         "final_entropy_coef": 0.02}
    )  # fmt: skip
    assert [settings.temperature_at(n) for n in range(5)] == pytest.approx([1.2, 1.0, 0.8, 0.6, 0.4])
    assert [settings.entropy_coef_at(n) for n in range(5)] == pytest.approx([0.0, 0.005, 0.01, 0.015, 0.02])
    still = PpoSection(entropy_coef=0.01)
    assert {(still.temperature_at(n), still.entropy_coef_at(n)) for n in range(50)} == {(1.0, 0.01)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ppo.updates=1", "ppo.final_temperature=0.5"], "final_temperature is what the last of several updates has"),
        (["ppo.final_temperature=0"], "ppo.final_temperature: Input should be greater than 0"),
        (["ppo.reference_share=1"], "ppo.reference_share: Input should be less than 1"),
        (["ppo.reward_model.uncertainty_coef=.inf"], "uncertainty_coef: Input should be a finite number"),
        (["ppo.reward_model.ensemble=uncertainty"], "raise reward.num_heads or reward.num_adapters"),
    ],
)
def test_what_cannot_be_explored_is_refused(overrides, expected, tmp_path):
    assert expected in complaint(tmp_path, GOOD, *overrides)


@pytest.mark.parametrize("key", ["num_heads", "num_adapters"])
def test_a_reward_model_of_several_members_may_have_a_bonus_or_a_penalty(key, tmp_path):
    found = read(tmp_path, GOOD, f"reward.{key}=2", "ppo.reward_model={ensemble: uncertainty, uncertainty_coef: -0.5}")
    assert found.ppo.reward_model.uncertainty_coef == -0.5


def test_below_0_the_coefficient_is_a_bonus_for_disagreement():
    members = torch.tensor([[1.0, 3.0], [2.0, 2.0]])  # of one mean; variances 1 and 0
    assert uncertainty_weighted(members, -0.5).tolist() == [2.5, 2.0]
    assert uncertainty_weighted(members, 0.5).tolist() == [1.5, 2.0]


def test_keys_at_their_defaults_leave_the_fingerprint_of_a_section_as_it_was(opened, functions):
    run = opened(stages=["ppo"], reward_function="ones")
    later = {"critic", "final_entropy_coef", "final_temperature", "importance_cap", "reference_share"}
    later |= {"ptx_heldout", "warmup_updates"}
    later |= {"sampling_engine", "judge"}  # what they are asked with counts
    old = run.recipe.ppo.model_dump(exclude=later | run_module._NOT_DETERMINING)
    old |= {"microbatch": PpoSection().microbatch}  # rows at a time count as their default
    assert run.inputs(run.recipe.ppo)["recipe.ppo"] == fingerprint(old)
    for key, value in {
        "final_entropy_coef": 0.0,
        "final_temperature": 1.0,
        "reference_share": 0.1,
        "ptx_heldout": 9,
        "warmup_updates": 1,
        "critic": "adapter",
    }.items():
        changed = run.recipe.ppo.model_copy(update={key: value})
        assert run.inputs(changed)["recipe.ppo"] != fingerprint(old)


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_how_many_responses_are_sampled_at_a_time_changes_none(opened, functions, monkeypatch):
    sample, batches = ppo.sampling.sample, []
    monkeypatch.setattr(ppo.sampling, "sample", lambda *args, **kw: batches.append(kw["rows"]) or sample(*args, **kw))
    shown = []
    for folder, rows in (("whole", None), ("few", 2)):
        run = opened(folder, reward_function="small_letters", reference_share=0.4, updates=1, sampling_batch=rows)
        ppo.ppo(run)
        shown.append([row["response"] for row in tiny_runs.rows(run.stage_folder("ppo") / "samples.jsonl")])
    assert shown[0] == shown[1] and {None, 2} == {*batches}


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_the_temperature_of_an_update_is_one_from_sampling_to_the_loss(opened, critic, monkeypatch):
    """The log-probability when sampled, that of step 4 and that of the first minibatch are the same number."""
    run = opened(critic=critic, **EXPLORES)
    figures, backward = [], ppo.backward
    monkeypatch.setattr(ppo, "backward", lambda *args: figures.append(backward(*args)) or figures[-1])
    ppo.ppo(run)
    assert len(figures) == 12  # 3 updates of 2 epochs of 2 microbatches
    for update in range(3):
        for first in figures[4 * update : 4 * update + 2]:
            assert (first["policy/ratio"], first["policy/kl_to_old"], first["policy/clip_fraction"]) == (1.0, 0.0, 0.0)
    found = metrics(run)
    assert [row["rollout/temperature"] for row in found] == pytest.approx([1.5, 1.0, 0.5])
    assert [row["policy/entropy_coef"] for row in found] == pytest.approx([0.1, 0.05, 0.0])
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in found)
    assert found[0]["policy/entropy"] > found[1]["policy/entropy"] > found[2]["policy/entropy"]


@pytest.mark.slow
def test_an_exploring_run_cut_off_and_resumed_equals_one_that_was_not_to_the_bit(opened, monkeypatch):
    whole = opened("whole", **EXPLORES)
    counts = ppo.ppo(whole)
    resumed = opened("resumed", **EXPLORES)
    cut_off(resumed, monkeypatch, "record", update=1)
    cut_off(resumed, monkeypatch, "save", update=2)
    assert ppo.ppo(resumed) == counts
    assert results(resumed) == results(whole)


@pytest.mark.slow
def test_the_reference_draws_its_share_and_figures_are_of_the_policys_own_responses(opened, monkeypatch):
    many = {"rollout_batch": 8, "minibatch": 8, "updates": 3, "kl_coef": 0.0}
    run = opened(**{**EXPLORES, **many, "final_temperature": None})
    seen, draw = [], exploration.draw
    kept, record = [], ppo.record

    def watched(run, actors, ids, own):
        samples = draw(run, actors, ids, own)
        alone = {}
        for role in (POLICY, REFERENCE):
            seeds = [run.seed("ppo", actors.update, row) for row in range(len(ids))]
            with actors.base.acting_as(role):
                alone[role] = sampling.sample(actors.base, ids, max_new_tokens=8, seeds=seeds, temperature=1.5)
        seen.append((own.tolist(), samples, alone))
        return samples

    monkeypatch.setattr(ppo, "draw", watched)
    monkeypatch.setattr(ppo, "record", lambda *args: kept.append(args) or record(*args))
    ppo.ppo(run)
    for own, samples, alone in seen:
        assert own[0] and 0 < sum(own) < 8
        for row, mine in enumerate(own):
            assert samples[row].ids == alone[POLICY if mine else REFERENCE][row].ids
    own, samples, alone = seen[2]
    assert any(alone[POLICY][row].ids != alone[REFERENCE][row].ids for row in range(8))
    figures, rows = kept[2][3], kept[2][4]
    for key, place in (("rollout/score", 2), ("rollout/kl_to_reference", 3)):
        mean = np.mean([row[place].item() for row, mine in zip(rows, own, strict=True) if mine])
        assert figures[key] == pytest.approx(mean, abs=1e-5)
    theirs = [row for row, mine in zip(rows, own, strict=True) if not mine]
    assert figures["rollout/reference_score"] == pytest.approx(np.mean([row[2].item() for row in theirs]), abs=1e-5)
    counts = [1 / (0.5 + 0.5 * math.exp(-row[3].item())) for row in theirs]
    assert figures["rollout/reference_weight"] == pytest.approx(np.mean(counts), rel=1e-4)
    assert figures["rollout/reference_weight"] != pytest.approx(1.0, abs=1e-3)
    shown = tiny_runs.rows(run.stage_folder("ppo") / "samples.jsonl")[-4:]
    assert [row.get("drawn_by") for row in shown] == [None if mine else "reference" for mine in own[:4]]


@pytest.mark.slow
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_weights_count_the_same_however_rows_are_batched_and_a_weight_of_0_is_a_row_without_a_voice(opened, kl_in):
    run = opened(critic="trunk", entropy_coef=0.1, kl_in=kl_in, **ONE_SIZE)
    actors = assign_roles(run)
    rollout = made_up_rollout(actors)
    weights = torch.tensor([1.0, 0.5, 0.0, 1.25, 2.0, 0.0, 0.1, 1.0]).unsqueeze(1)
    rollout = rollout._replace(weights=weights, ref_logprobs=rollout.ref_logprobs - 0.3 * rollout.batch.response_mask)
    whole, figures = step_of(run, actors, rollout, kl_coef=0.5)
    mute = (weights == 0).expand_as(rollout.advantages)
    other = {key: getattr(rollout, key).masked_fill(mute, 0.7) for key in ("advantages", "returns", "ref_logprobs")}
    assert_close(whole, step_of(run, actors, rollout._replace(**other), kl_coef=0.5)[0])
    actors.settings = actors.settings.model_copy(update={"microbatch": 1})
    parts, figures_of_parts = step_of(run, actors, rollout, kl_coef=0.5)
    assert_close(whole, parts)
    assert figures == pytest.approx(figures_of_parts, rel=tiny_ppo.ROUNDING, abs=1e-6)
    plain, _ = step_of(run, actors, rollout._replace(weights=torch.ones(8, 1)), kl_coef=0.5)
    assert any((plain[name] - whole[name]).abs().max() > 0.01 * whole[name].abs().max() for name in whole)
