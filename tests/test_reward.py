"""The stage `reward` on the tiny model: what it learns from, what it measures, and resuming to the bit."""

import json
import math
import subprocess
import sys

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from rlaif import files
from rlaif.errors import DataError
from rlaif.model import sampling
from rlaif.records import Comparison, assistant
from rlaif.report.reading import RewardEvaluation
from rlaif.stages import reward
from rlaif.stages.run import Run

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def comparison(
    number, chosen="good good good", rejected="bad bad bad", *, tag="harmful", prompt=None, preference=1.0, **columns
):
    return Comparison(
        id=f"c-{number}",
        prompt=[{"role": "user", "content": prompt or f"Question {number}?"}],
        chosen=assistant(chosen),
        rejected=assistant(rejected),
        preference=preference,
        source="construction",
        annotator="test",
        tag=tag,
        **columns,
    )


ROWS = [
    comparison(number, "good " * (1 + number % 3), "bad " * (1 + number % 2), tag=("harmful", "ordinary")[number % 2])
    for number in range(12)
]


@pytest.fixture
def opened(tmp_path, tiny_model):
    stack = []

    def open_run(folder="run", *, rows=ROWS, model=None, four_bit=False, **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        sections = {
            "reward": {"start_from": "base", "learning_rate": 1e-2, **settings},
            "model": {"load_in_4bit": four_bit},
        }
        context = tiny_runs.opened(tmp_path / folder, model or tiny_model, **sections)
        run = context.__enter__()
        stack.append(context)
        files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", rows)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def metrics(run):
    return tiny_runs.rows(run.stage_folder("reward") / "metrics.jsonl")


def evaluation(run):
    return json.loads((run.stage_folder("reward") / "evaluation.json").read_text())


# --- what is trained on and what is measured with --------------------------------------------------------------------


def keys(rows):
    return {row.prompt[0]["content"] for row in rows}


def test_a_share_of_each_tags_prompts_is_held_out_and_no_prompt_stands_on_both_sides():
    rows = [comparison(n, tag="a", prompt=f"a{n // 2}") for n in range(20)]
    rows += [comparison(100 + n, tag="b", prompt=f"b{n}") for n in range(4)]
    train, heldout = reward.split_pairs(rows, 0.3)
    assert len(train) + len(heldout) == 24
    assert keys(train) & keys(heldout) == set()
    assert len([row for row in heldout if row.tag == "a"]) == 6  # 3 of 10 prompts, 2 pairs each
    assert len([row for row in heldout if row.tag == "b"]) == 2  # 1.2 of 4 prompts, rounded up


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    rows = [comparison(n) for n in range(20)]
    assert keys(reward.split_pairs(rows, 0.2).heldout) == keys(reward.split_pairs(rows[::-1], 0.2).heldout)


def test_rows_marked_eval_are_the_held_out_ones_of_their_tag():
    rows = [comparison(n, tag="a", split="eval" if n < 2 else "train") for n in range(10)]
    rows += [comparison(100 + n, tag="b") for n in range(10)]
    train, heldout = reward.split_pairs(rows, 0.5)
    assert [row.id for row in heldout if row.tag == "a"] == ["c-0", "c-1"]
    assert len([row for row in heldout if row.tag == "b"]) == 5
    assert len(train) == 13


def test_a_prompt_of_two_tags_or_two_marks_is_held_out_as_a_whole():
    rows = [comparison(n, tag="a", prompt=f"p{n}") for n in range(6)]
    rows += [comparison(10 + n, tag="b", prompt=f"p{n}") for n in range(6)]
    rows += [comparison(20, tag="a", prompt="p3", split="eval")]
    train, heldout = reward.split_pairs(rows, 0.2)
    assert keys(train) & keys(heldout) == set()
    assert "p3" in keys(heldout)
    assert len([row for row in heldout if row.prompt[0]["content"] == "p3"]) == 3


def test_nothing_is_held_out_where_the_share_is_0_and_nothing_is_marked():
    assert reward.split_pairs([comparison(n) for n in range(4)], 0.0).heldout == []


def test_a_stage_without_pairs_to_train_on_or_to_measure_with_says_so_before_training(opened):
    ties = [comparison(n, preference=0.5) for n in range(6)]
    for rows, settings in ((ROWS, {"heldout_fraction": 0.0}), (ROWS, {"max_length": 3}), (ties, {})):
        run = opened(rows=rows, **settings)
        with pytest.raises(DataError, match=r"0 to measure with that prefer one answer.*reward\.heldout_fraction"):
            reward.reward(run)
        assert not (run.stage_folder("reward") / "metrics.jsonl").exists()


# --- the loss --------------------------------------------------------------------------------------------------------


class Scores(torch.nn.Module):
    """A model whose scores are given."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(scores))

    def forward(self, groups):
        return self.scores


def loss_of(chosen, rejected, preference, margin, centering=0.0):
    trainer = reward.RewardTrainer.__new__(reward.RewardTrainer)
    trainer._centering, trainer._seen = centering, []
    labels = {"preference": torch.tensor(preference), "margin": torch.tensor(margin)}
    scores = [score for pair in zip(chosen, rejected, strict=True) for score in pair]
    loss = trainer.compute_loss(Scores(*scores), {"groups": [], **labels})
    return loss.item(), trainer._seen


@pytest.mark.parametrize(
    ("chosen", "rejected", "preference", "margin", "expected"),
    [
        ([1.0], [0.2], [1.0], [0.0], 0.37110),
        ([1.0], [0.2], [0.6], [0.0], 0.69110),  # 0.6 x 0.37110 + 0.4 x 1.17110
        ([1.0], [0.2], [1.0], [1.0], 0.79814),
        ([0.40547], [0.0], [0.6], [0.0], 0.67301),  # the minimum of a preference of 0.6
        ([1.0, 0.2], [0.2, 1.0], [1.0, 1.0], [0.0, 0.0], 0.77110),  # the mean of 0.37110 and 1.17110
    ],
)
def test_the_loss_is_the_mean_bradley_terry_loss_with_soft_labels_and_margins(
    chosen, rejected, preference, margin, expected
):
    assert loss_of(chosen, rejected, preference, margin)[0] == pytest.approx(expected, abs=2e-5)


def test_centering_adds_the_squared_sum_of_a_pairs_scores():
    plain, seen = loss_of([1.0, 0.0], [0.5, 1.0], [1.0, 1.0], [0.0, 0.0])
    centred, _ = loss_of([1.0, 0.0], [0.5, 1.0], [1.0, 1.0], [0.0, 0.0], centering=0.1)
    assert centred - plain == pytest.approx(0.1 * (1.5**2 + 1.0**2) / 2)
    assert seen == [(0.5, -0.25)]  # accuracy and mean margin of this batch


def test_soft_labels_and_margins_of_the_rows_reach_the_loss(opened):
    run = opened()
    base = run.load_base()
    rows = [comparison(0, preference=0.75, margin=0.5), comparison(1, "a", "b")]
    batch = reward.collate(base, [reward.encode(base, row) for row in rows])
    assert batch["preference"].tolist() == [0.75, 1.0]
    assert batch["margin"].tolist() == [0.5, 0.0]
    texts = [[base.tokenizer.decode(answer) for answer in group.responses] for group in batch["groups"]]
    assert texts == [["good good good", "bad bad bad"], ["a", "b"]]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_every_parameter_of_the_reward_role_moves_and_nothing_else(opened, tiny_model_64, four_bit, monkeypatch):
    run = opened(model=tiny_model_64, four_bit=four_bit, max_steps=3)  # the first step moves no A, since B is zero
    kept, load_base = {}, Run.load_base

    def loaded(run):
        kept["base"] = load_base(run)
        kept["own"] = list(kept["base"].lm.parameters())
        kept["before"] = [p.detach().clone() for p in kept["own"]]
        return kept["base"]

    monkeypatch.setattr(Run, "load_base", loaded)
    reward.reward(run)
    trained = dict(kept["base"].named_parameters_of("reward"))
    assert all(torch.equal(old, now) for old, now in zip(kept["before"], kept["own"], strict=True))
    fresh = run.load_base()
    fresh.add_role("reward", trainable=True, head=True)
    started = dict(fresh.named_parameters_of("reward"))
    assert [name for name in started if torch.equal(trained[name], started[name])] == []
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert len(started) == 2 * 2 * 7 + 1  # A and B of seven projections in two layers, and the head


def test_the_loss_falls_and_better_answers_win_on_prompts_never_trained_on(opened):
    run = opened(max_steps=24, num_train_epochs=20.0, per_device_train_batch_size=4, save_steps=24)
    counts = reward.reward(run)
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 25))
    names = {"loss", "accuracy", "margin", "learning_rate", "gradient_norm"}
    assert all(set(row) == {"step"} | {f"reward/{name}" for name in names} for row in rows)
    assert rows[0]["reward/loss"] > 0.5
    assert rows[-1]["reward/loss"] < 0.3
    assert rows[-1]["reward/accuracy"] == 1.0
    found = evaluation(run)
    assert counts["heldout_accuracy"] == found["heldout"]["all"]["rate"] == 1.0
    assert found["nll"] < 0.4
    assert {tag: rate["n"] for tag, rate in found["heldout"].items()} == {"all": 4, "harmful": 2, "ordinary": 2}
    assert (found["train_pairs"], found["heldout_pairs"]) == (8, 4)


def test_a_new_head_is_drawn_with_the_deviation_that_keeps_scores_near_one(opened, monkeypatch):
    """Huang et al. 2024 (arXiv 2403.17031), detail 11: 1 / sqrt(hidden size + 1); 32 draws here."""
    seen = []

    def train(trainer, resume_from_checkpoint):
        seen.append(trainer.model.base.heads["reward"].weight.detach().clone())
        raise tiny_runs.Stopped

    monkeypatch.setattr(reward.RewardTrainer, "train", train)
    for _ in range(2):
        with pytest.raises(tiny_runs.Stopped):
            reward.reward(opened())
    assert 0.6 < seen[0].std().item() * 33**0.5 < 1.4
    assert torch.equal(seen[0], seen[1])


def test_the_evaluation_is_what_the_report_reads(opened):
    run = opened(max_steps=1, min_heldout_accuracy=0.55)
    reward.reward(run)
    found = evaluation(run)
    read = RewardEvaluation.model_validate(found)
    assert set(RewardEvaluation.model_fields) == set(found)
    assert read.min_heldout_accuracy == 0.55
    assert set(read.baselines) == {"longer", "shorter", "refusal_words"}
    assert read.scale > 0


def test_offset_and_scale_are_mean_and_deviation_of_the_held_out_scores(opened):
    run = opened(max_steps=3)
    reward.reward(run)
    base = run.load_base()
    base.add_role("reward", adapter=run.stage_folder("reward") / "adapter")
    scores = []
    for row in reward.split_pairs(ROWS, 0.2).heldout:
        encoded = reward.encode(base, row)
        for side in ("chosen", "rejected"):
            batch = sampling.pack(base, [encoded["prompt"]], [encoded[side]])
            with base.acting_as("reward"), torch.no_grad():
                scores.append(sampling.scores(base, "reward", batch).item())
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    assert evaluation(run)["offset"] == pytest.approx(mean, abs=1e-5)
    assert evaluation(run)["scale"] == pytest.approx(spread, rel=1e-4)


def test_pairs_without_a_preference_count_for_the_likelihood_and_not_for_accuracy(opened):
    """With a head of zeros nothing is right, and every pair costs log 2."""
    base = opened().load_base()
    base.add_role("reward", head=True)
    ties = [comparison(100 + n, preference=0.5, tag="tie") for n in range(3)]
    found = reward.evaluate(base, reward.Split([], [*ROWS[:4], *ties]), 2)
    assert found["heldout_pairs"] == 7
    right = found["heldout"]["all"]
    assert (right["n"], right["count"], right["rate"]) == (4, 0, 0.0)
    assert set(found["heldout"]) == {"all", "harmful", "ordinary"}
    assert found["nll"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["offset"] == 0.0
    assert found["scale"] == 1e-6  # scores that are all equal have no spread to divide by


def test_the_baselines_are_the_accuracies_of_longer_shorter_and_refusal_words():
    pairs = [
        ("I can't help with that.", "Sure, here is how."),
        ("I'm sorry, but I can't help with that.", "Sure."),
        ("Sure.", "I can't help with that."),
        ("ab", "cd"),
    ]
    found = reward.baselines([comparison(n, *pair) for n, pair in enumerate(pairs)])
    assert [found[name]["count"] for name in ("longer", "shorter", "refusal_words")] == [2.5, 1.5, 2.5]
    assert [found[name]["rate"] for name in ("longer", "shorter", "refusal_words")] == [0.625, 0.375, 0.625]
    assert found["longer"]["n"] == 4


# --- resuming and reloading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_cut_off_and_resumed_equals_training_that_was_not_to_the_bit(
    opened, tiny_model_64, four_bit, monkeypatch
):
    settings = {"model": tiny_model_64, "four_bit": four_bit, "max_steps": 6, "num_train_epochs": 9.0}
    whole = opened("whole", **settings)
    counts = reward.reward(whole)
    resumed = opened("resumed", **settings)
    said = []
    monkeypatch.setattr(resumed.progress, "say", said.append)
    for step, complete in ((2, True), (5, False)):
        with tiny_runs.cut_off_at_checkpoint(step, complete=complete):
            reward.reward(resumed)
    assert reward.reward(resumed) == counts
    assert said == ["  continuing after step 2", "  continuing after step 4"]
    assert tiny_runs.results(resumed.stage_folder("reward")) == tiny_runs.results(whole.stage_folder("reward"))
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3, 4, 5, 6]


def test_a_mean_over_several_steps_is_whole_after_resuming(opened):
    settings = {"max_steps": 4, "logging_steps": 2, "save_steps": 1}
    whole = opened("whole", **settings)
    reward.reward(whole)
    resumed = opened("resumed", **settings)
    with tiny_runs.cut_off_at_checkpoint(4, complete=False):
        reward.reward(resumed)
    reward.reward(resumed)
    assert tiny_runs.results(resumed.stage_folder("reward")) == tiny_runs.results(whole.stage_folder("reward"))
    assert [row["step"] for row in metrics(resumed)] == [2, 4]


def test_training_cut_off_after_its_last_step_takes_no_further_one(opened, monkeypatch):
    settings = {"max_steps": 2, "per_device_train_batch_size": 1, "lr_scheduler_type": "constant"}
    whole = opened("whole", **settings)
    reward.reward(whole)
    resumed = opened("resumed", **settings)
    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(reward, "evaluate", lambda *args: (_ for _ in ()).throw(tiny_runs.Stopped))
        reward.reward(resumed)
    reward.reward(resumed)
    assert tiny_runs.results(resumed.stage_folder("reward")) == tiny_runs.results(whole.stage_folder("reward"))


RELOAD = """
import sys, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
model.config.pad_token_id = tokenizer.pad_token_id
for answer in ("good good", "bad"):
    turns = [{"role": "user", "content": "Question 1?"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\\n")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        print(model(**ids).logits.item())
print("rlaif" in sys.modules)
"""


@pytest.mark.slow
def test_the_saved_adapter_gives_the_same_scores_with_plain_peft_and_transformers_in_a_fresh_process(opened, tmp_path):
    run = opened(max_steps=8)
    reward.reward(run)
    folder = run.stage_folder("reward") / "adapter"
    base = run.load_base()
    base.add_role("reward", adapter=folder)
    prompt = base.tokenizer.prompt([{"role": "user", "content": "Question 1?"}])
    ours = []
    for answer in ("good good", "bad"):
        batch = sampling.pack(base, [prompt], [base.tokenizer.response(answer)])
        with base.acting_as("reward"), torch.no_grad():
            ours.append(sampling.scores(base, "reward", batch).item())
    child = subprocess.run([sys.executable, "-c", RELOAD, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    *theirs, imported = child.stdout.split()
    assert imported == "False"
    assert [float(score) for score in theirs] == pytest.approx(ours, abs=1e-5)
    assert abs(ours[0] - ours[1]) > 0.01


def test_training_starts_from_the_sft_adapter_where_the_recipe_has_one(opened):
    run = opened(start_from="sft", max_steps=1, learning_rate=1e-30)
    base = run.load_base()
    base.add_role("policy", trainable=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters_of("policy"):
            parameter.fill_(0.25 if "lora_A" in name else 0.5)
    before = reward.inputs(run)
    base.save_role("policy", run.stage_folder("sft") / "adapter")
    assert reward.inputs(run)["sft"] != before["sft"]
    reward.reward(run)
    weights = load_file(run.stage_folder("reward") / "adapter" / "adapter_model.safetensors")
    assert {float(tensor.mean()) for name, tensor in weights.items() if "lora_A" in name} == {0.25}
    assert {float(tensor.mean()) for name, tensor in weights.items() if "lora_B" in name} == {0.5}


def test_without_an_sft_stage_or_from_the_base_nothing_of_it_is_read(opened):
    assert "sft" not in reward.inputs(opened())
