"""The stage `rejection` on the tiny model: the best is chosen, learned and measured, and a killed run loses nothing."""

import math

import pytest
import tiny_runs
import torch
from peft import AutoPeftModelForCausalLM

from rlaif.engines.local import LocalEngine
from rlaif.errors import DataError, StageError
from rlaif.maths.kl import best_of_n
from rlaif.model import sampling
from rlaif.stages import gate, rejection, sft
from rlaif.stages.reward_model import RewardModel
from rlaif.stages.run import path_sha256

pytestmark = [pytest.mark.usefixtures("one_thread", "no_sync"), pytest.mark.slow]  # each trains


@pytest.fixture
def opened(tmp_path, tiny_model):
    stack = []

    def open_run(folder="run", *, stages=("revise", "sft", "label", "reward", "rejection"), rate=0.9, **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        own = {
            "prompts_per_tag": {"harmful": 3, "ordinary": 3},
            "samples_per_prompt": 3,
            "sampling": {"max_new_tokens": 8},
            "batch_size": 4,
            "microbatch": 3,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "heldout_fraction": 0.6,  # by their hashes one of the six prompts
        }
        reward = {"allow_weak_reward": False}
        context = tiny_runs.opened(
            tmp_path / folder, tiny_model, stages=list(stages), reward=reward, rejection=own | settings
        )
        run = context.__enter__()
        stack.append(context)
        if "sft" in stages:
            tiny_runs.with_sft(run)
        tiny_runs.with_reward(run, offset=0.5, scale=2.0, rate=rate)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def responses(run):
    return tiny_runs.rows(run.stage_folder("rejection") / "responses.jsonl")


@pytest.mark.parametrize(
    ("texts", "scores", "place"),
    [
        (["a", "b", "c"], [0.1, 0.7, 0.2], 1),
        (["a", "b", "c"], [0.7, 0.2, 0.7], 0),  # the first of equal ones
        (["a", " \n", ""], [-3.0, 5.0, 9.0], 0),  # saying nothing is never the best
        ([" ", ""], [1.0, 2.0], None),
    ],
)
def test_the_highest_score_is_chosen_among_responses_with_text(texts, scores, place):
    assert rejection.choose(texts, scores) == place


@pytest.mark.parametrize(("samples", "nats"), [(1, 0.0), (2, 0.19315), (4, 0.63629), (16, 1.83509)])
def test_the_price_of_the_best_of_n(samples, nats):
    assert best_of_n(samples) == pytest.approx(nats, abs=1e-5)


def test_the_price_of_the_best_of_n_is_the_divergence_of_its_distribution():
    """Of N uniform ranks the best has the density N u^(N-1); its divergence, integrated here, is the formula."""
    steps = 200_000
    for n in (2, 5):
        places = [(step + 0.5) / steps for step in range(steps)]
        density = [n * u ** (n - 1) for u in places]
        assert best_of_n(n) == pytest.approx(sum(d * math.log(d) for d in density) / steps, abs=1e-4)
    with pytest.raises(ValueError, match="samples is 0"):
        best_of_n(0)


def test_the_best_sample_of_each_prompt_by_the_reward_model_is_learned(opened, monkeypatch):
    run = opened(heldout_fraction=0.0)
    learned = []
    fit = rejection.fit
    monkeypatch.setattr(rejection, "fit", lambda *args: learned.append(args[4]) or fit(*args))
    counts = rejection.rejection(run)
    rows = responses(run)
    assert (counts["prompts"], counts["responses"], len(rows)) == (6, 18, 18)
    base = run.load_base()
    model = RewardModel.load(base, run.stage_folder("reward"), run.recipe.ppo.reward_model)
    for row in rows:
        ids = base.tokenizer.response(row["response"], ended=row["ended"]) or [base.tokenizer.end_of_turn]
        batch = sampling.pack(base, [base.tokenizer.prompt(row["messages"])], [ids])
        assert row["score"] == pytest.approx((model.score(batch).item() - 0.5) / 2.0, abs=1e-5)
    best = [row for row in rows if row["best"]]
    prompts = list(dict.fromkeys(row["prompt_id"] for row in rows))
    with_text = [row for row in rows if row["response"].strip()]
    assert {row["prompt_id"] for row in best} == {row["prompt_id"] for row in with_text} and len(best) > 3
    for row in best:
        assert row["score"] == max(one["score"] for one in with_text if one["prompt_id"] == row["prompt_id"])
    assert len({row["response"] for row in rows}) > 6  # samples of a prompt differ
    expected = [sft.encode(base, sft.Answered(row["messages"], row["response"], row["ended"])) for row in best]
    assert learned[0].train == expected and learned[0].heldout == []
    assert counts["best_score"] == pytest.approx(sum(row["score"] for row in best) / len(best))
    ours = [row["score"] for row in rows if row["prompt_id"] in {one["prompt_id"] for one in best}]
    assert counts["mean_score"] == pytest.approx(sum(ours) / len(ours))
    assert counts["best_score"] > counts["mean_score"]
    assert sum(row["random"] for row in rows) == len(best) and len(prompts) == 6
    assert counts["best_of_n_kl"] == pytest.approx(math.log(3) - 2 / 3)


def test_a_cut_response_is_learned_without_an_end(opened):
    base = opened().load_base()
    turns = [{"role": "user", "content": "Hi"}]
    cut, ended = (sft.encode(base, sft.Answered(turns, "ok", whole)) for whole in (False, True))
    assert ended["labels"] == [*cut["labels"], base.tokenizer.end_of_turn]


def test_the_policy_starts_from_sft_learns_and_loads_with_peft_alone(opened, tiny_model):
    run = opened(max_steps=12, save_steps=12, num_train_epochs=9)
    before = tiny_runs.contents(run.stage_folder("sft")), tiny_runs.contents(run.stage_folder("reward"))
    counts = rejection.rejection(run)
    assert (tiny_runs.contents(run.stage_folder("sft")), tiny_runs.contents(run.stage_folder("reward"))) == before
    rows = tiny_runs.rows(run.stage_folder("rejection") / "metrics.jsonl")
    losses = [row["rejection/loss"] for row in rows if "rejection/loss" in row]
    assert len(losses) == counts["steps"] == 12 and losses[-1] < losses[0] - 0.1
    held_out = [row["rejection/heldout_loss"] for row in rows if "rejection/heldout_loss" in row]
    assert len(held_out) == 2 and held_out[1] == counts["heldout_loss"]
    base = run.load_base()
    base.add_role("sft", adapter=run.stage_folder("sft") / "adapter")
    kept = [row for row in responses(run) if row["best"]]
    plain = AutoPeftModelForCausalLM.from_pretrained(run.stage_folder("rejection") / "policy").eval()

    def loss(logits_of):
        total, count = 0.0, 0
        for row in kept:
            encoded = sft.encode(base, sft.Answered(row["messages"], row["response"], row["ended"]))
            with torch.no_grad():
                logprobs = logits_of(torch.tensor([encoded["input_ids"]]))[0, :-1].log_softmax(-1)
            for position, label in enumerate(encoded["labels"][1:]):
                if label != -100:
                    total, count = total - logprobs[position, label].item(), count + 1
        return total / count

    with base.acting_as("sft"):
        start = loss(lambda ids: base.lm(input_ids=ids).logits)
    assert loss(lambda ids: plain(input_ids=ids).logits) < start - 0.1


@pytest.mark.parametrize(
    ("stages", "policy", "place"),
    [
        (("revise", "sft", "label", "reward", "ppo", "rejection"), "ppo", "5-ppo/policy"),
        (("revise", "sft", "label", "reward", "ppo", "dpo", "rejection"), "dpo", "7-dpo/policy"),
        (("revise", "sft", "label", "reward", "rejection"), "sft", "2-sft/adapter"),
    ],
)
def test_the_newest_policy_is_sampled_from(opened, stages, policy, place, monkeypatch):
    run = opened(stages=stages)
    for seed, stage in enumerate(("ppo", "dpo"), start=7):
        tiny_runs.save_random_role(run, "policy", run.stage_folder(stage) / "policy", seed=seed)
    asked = []
    init = LocalEngine.__init__

    def watched(self, base, role, **options):
        asked.append((role, options["adapter"]))
        init(self, base, role, **options)

    monkeypatch.setattr(LocalEngine, "__init__", watched)
    assert gate.newest_policy(run, "rejection") == (policy, 1, run.folder / place)
    rejection.rehearse(run)
    assert asked == [("sampler", path_sha256(run.folder / place))]
    changed = rejection.inputs(run)
    tiny_runs.save_random_role(run, "policy", run.folder / place, seed=99)
    assert rejection.inputs(run) != changed


def test_without_any_policy_the_base_is_sampled_from(opened):
    run = opened(stages=("label", "reward", "rejection"), max_steps=1)
    assert gate.newest_policy(run, "rejection") == ("base", 1, None)
    assert rejection.rejection(run)["steps"] == 1


def test_a_weak_reward_model_stops_the_stage_before_it_samples(opened):
    run = opened(rate=0.5)
    with pytest.raises(StageError, match=r"^rejection: the reward model is below reward\.min_heldout_accuracy"):
        rejection.rejection(run)
    assert run.journal.count("rejection") == 0


def test_responses_that_are_too_long_leave_nothing_and_the_error_says_so(opened):
    with pytest.raises(DataError, match=r"no response is left.*of 6 prompts.*longer than 5 tokens.*rejection\.max_len"):
        rejection.rejection(opened(max_length=5))


# --- killed and resumed ----------------------------------------------------------------------------------------------


def test_a_run_cut_off_while_sampling_scoring_and_training_equals_one_that_was_not(opened, monkeypatch):
    whole = opened("whole", num_train_epochs=3.0)
    counts = rejection.rejection(whole)
    resumed = opened("resumed", num_train_epochs=3.0)
    answered, answer = [], LocalEngine._answer

    def cut(self, batch):
        if len(answered) == 1:
            raise tiny_runs.Stopped
        answered.append(len(batch))
        return answer(self, batch)

    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(LocalEngine, "_answer", cut)
        rejection.rejection(resumed)
    assert resumed.journal.count("rejection") == answered[0] < 18
    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(rejection, "_scores", lambda *args: (_ for _ in ()).throw(tiny_runs.Stopped))
        rejection.rejection(resumed)
    assert resumed.journal.count("rejection") == 18
    answered.clear()
    monkeypatch.setattr(LocalEngine, "_answer", lambda *args: answered.append(1))  # nothing is asked again
    with tiny_runs.cut_off_at_checkpoint(2, complete=True):
        rejection.rejection(resumed)
    monkeypatch.setattr(rejection, "_scores", lambda *args: answered.append(2))  # nor scored
    assert rejection.rejection(resumed) == counts
    assert answered == []
    found, expected = (tiny_runs.results(run.stage_folder("rejection")) for run in (resumed, whole))
    assert found == expected
    assert {"policy/adapter_model.safetensors", "responses.jsonl", "metrics.jsonl"} <= expected.keys()
