"""The stage `reward` on the tiny model: what it learns from, what it measures, and resuming to the bit."""

import json
import math
import subprocess
import sys

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_rows import ROWS, comparison, ranking, rating
from transformers import TrainerState

from rlaif import files
from rlaif.errors import ConfigError, DataError, StageError
from rlaif.model import sampling
from rlaif.report.reading import RewardEvaluation
from rlaif.sections import RewardSection
from rlaif.stages import reward, reward_training
from rlaif.stages.reward_data import examples, split_rows
from rlaif.stages.run import Run
from rlaif.stages.training import Recorder

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


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
    return json.loads((run.stage_folder("reward") / "calibration.json").read_text())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
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
    assert len(started) == 2 * 2 * 2 + 1  # A and B of seven projections in two layers, and the head


@pytest.mark.slow
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
        seen.append(trainer._scorer.base.heads["reward"].weight.detach().clone())
        raise tiny_runs.Stopped

    monkeypatch.setattr(reward_training.RewardTrainer, "train", train)
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
    assert set(RewardEvaluation.model_fields) <= set(found)
    assert read.min_heldout_accuracy == 0.55
    assert set(read.baselines) == {"longer", "shorter", "refusal_words", "bag_of_words"}
    assert read.scale > 0


def test_offset_and_scale_are_mean_and_deviation_of_the_held_out_scores(opened):
    run = opened(max_steps=3)
    reward.reward(run)
    base = run.load_base()
    base.add_role("reward", adapter=run.stage_folder("reward") / "adapter")
    scores = []
    for example in examples(base, split_rows(ROWS, 0.2).heldout, run.recipe.reward, {}):
        for response in example.responses:
            batch = sampling.pack(base, [example.prompt], [response])
            with base.acting_as("reward"), torch.no_grad():
                scores.append(sampling.scores(base, "reward", batch).item())
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    assert evaluation(run)["offset"] == pytest.approx(mean, abs=1e-5)
    assert evaluation(run)["scale"] == pytest.approx(spread, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "found"), [(4, r"loss is nan at step \d"), (2, "scores of held-out rows are not")])
def test_a_training_that_diverges_stops_the_stage_also_in_its_last_step(opened, steps, found):
    run = opened(learning_rate=1e25, max_steps=steps, num_heads=2, num_adapters=2)
    with pytest.raises(StageError, match=rf"^reward: .*{found}.*diverged\. Lower reward\.learning_rate"):
        reward.reward(run)


@pytest.mark.parametrize(
    ("logs", "prefix", "found"),
    [
        ({"loss": math.nan}, "reward-2", "reward-2: the loss is nan at step 5"),
        ({"loss": 0.5, "eval_loss": math.inf}, "cost", "cost: the loss is inf at step 5"),
        ({"train_loss": math.nan}, "reward", "reward: the loss is nan at step 5"),
    ],
)
def test_a_loss_that_is_not_finite_is_an_error_that_names_keys_of_the_recipe(tmp_path, logs, prefix, found):
    recorder = Recorder(tmp_path, prefix, None, section="reward")
    with pytest.raises(StageError, match=rf"^{found}.*Lower reward\.learning_rate or reward\.max_grad_norm"):
        recorder.on_log(None, TrainerState(global_step=5), None, logs=logs)


# --- resuming and reloading ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_training_cut_off_after_its_last_step_takes_no_further_one(opened, monkeypatch):
    settings = {"max_steps": 2, "per_device_train_batch_size": 1, "lr_scheduler_type": "constant"}
    whole = opened("whole", **settings)
    reward.reward(whole)
    resumed = opened("resumed", **settings)
    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(reward, "measure", lambda *args: (_ for _ in ()).throw(tiny_runs.Stopped))
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


@pytest.mark.slow
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


def test_a_stage_without_rows_to_train_on_or_to_measure_with_says_so_before_training(opened):
    ties = [comparison(n, preference=0.5) for n in range(6)]
    cases = (
        (ROWS, {"heldout_fraction": 0.0}, "12 usable .none set aside.*0 pairs to measure with.*Raise reward.heldout_f"),
        (ROWS, {"max_length": 3}, "0 usable .longer than max_length: 12.*0 to train on"),
        (ties, {}, "0 pairs to measure with that prefer one answer"),
    )
    for rows, settings, message in cases:
        run = opened(rows=rows, **settings)
        with pytest.raises(DataError, match=message):
            reward.reward(run)
        assert not (run.stage_folder("reward") / "metrics.jsonl").exists()


def test_rows_of_weight_0_alone_are_refused(opened):
    with pytest.raises(DataError, match=r"0 usable \(weight 0: 12\).*or raise reward\.weights"):
        reward.reward(opened(weights={"construction": 0.0}))


def test_a_misspelt_name_of_an_annotator_is_refused_before_a_model_is_loaded(opened):
    with pytest.raises(ConfigError, match=r"reward\.weights: .*`constuction`; did you mean `construction`"):
        run = opened(weights={"constuction": 0.0}, model="no model")
        reward.reward(run)


# --- rankings, ratings, several heads and adapters -------------------------------------------------------------------


@pytest.mark.slow
def test_rankings_and_ratings_are_learned_from_beside_comparisons(opened):
    run = opened(max_steps=2, per_device_train_batch_size=4)
    label = run.stage_folder("label")
    before = reward.inputs(run)
    files.write_jsonl(label / "ratings.jsonl", [rating(n, "good " * n, float(n), prompt=f"r{n}") for n in range(1, 6)])
    files.write_jsonl(label / "rankings.jsonl", [ranking(n, ["good", "so", "bad"], prompt=f"k{n}") for n in range(5)])
    assert set(reward.inputs(run)) - set(before) == {"ratings", "rankings"}
    counts = reward.reward(run)
    assert counts["rows"] == counts["train"] + counts["heldout"] == 22
    assert evaluation(run)["train_rows"] == counts["train"]


@pytest.mark.slow
def test_several_heads_and_adapters_are_members_that_differ_and_reload(opened):
    run = opened(max_steps=3, num_heads=2, num_adapters=2, suspects=0)
    reward.reward(run)
    folder = run.stage_folder("reward")
    first, second = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "reward-2/adapter"))
    assert set(first) == set(second)
    assert first["base_model.model.score.weight"].shape == (2, 32)
    assert all(not torch.equal(first[name], second[name]) for name in first)
    found = evaluation(run)
    assert len(found["members"]) == 4
    assert (found["offset"], found["scale"]) == (0.0, 1.0)
    assert not (folder / "suspects.jsonl").exists()
    assert [row["step"] for row in tiny_runs.rows(folder / "reward-2" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_an_ensemble_stopped_within_its_second_adapter_goes_on_there(opened):
    settings = {"max_steps": 4, "num_adapters": 2}
    whole = opened("whole", **settings)
    reward.reward(whole)
    resumed = opened("resumed", **settings)
    steps, save = [], reward_training.RewardTrainer._save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(tiny_runs.Stopped):

        def stop(trainer, *args, **kwargs):
            save(trainer, *args, **kwargs)
            steps.append(trainer.state.global_step)
            if len(steps) == 6:  # the second checkpoint of the second adapter
                raise tiny_runs.Stopped

        patch.setattr(reward_training.RewardTrainer, "_save", stop)
        reward.reward(resumed)
    reward.reward(resumed)
    assert tiny_runs.results(resumed.stage_folder("reward")) == tiny_runs.results(whole.stage_folder("reward"))


# --- measuring on the way --------------------------------------------------------------------------------------------


def test_the_loss_on_rows_that_are_not_trained_on_is_measured_on_the_way(opened):
    run = opened(max_steps=4, eval_steps=2)
    reward.reward(run)
    measured = [row for row in metrics(run) if "reward/heldout_loss" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert all(0 <= row["reward/heldout_accuracy"] <= 1 for row in measured)


@pytest.mark.slow
def test_training_stops_where_the_loss_grows_and_keeps_the_best_weights_also_when_resumed(opened):
    """With a learning rate this high the loss jumps about; what is kept is the best of what was seen."""
    settings = {
        "max_steps": 12,
        "num_train_epochs": 99.0,
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
    }
    whole = opened("whole", **settings)
    counts = reward.reward(whole)
    assert counts["steps"] < 12
    losses = [row["reward/heldout_loss"] for row in metrics(whole) if "reward/heldout_loss" in row]
    assert len(losses) == counts["steps"]
    assert min(losses) == losses[-3]  # patience 2
    assert counts["dev"] > 0
    for step in (2, counts["steps"]):  # on the way, and after the step that was the last
        resumed = opened(f"resumed {step}", **settings)
        with tiny_runs.cut_off_at_checkpoint(step, complete=True):
            reward.reward(resumed)
        assert reward.reward(resumed) == counts
        assert tiny_runs.results(resumed.stage_folder("reward")) == tiny_runs.results(whole.stage_folder("reward"))


@pytest.mark.slow
def test_a_base_of_8_bits_is_trained_on_and_does_not_tell_of_each_product(tmp_path, tiny_model_64, caplog):
    losses = {}
    for eight in (False, True):
        settings = {"start_from": "base", "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
        model = {"load_in_8bit": eight}
        with tiny_runs.opened(tmp_path / str(eight), tiny_model_64, model=model, reward=settings) as run:
            files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", SAFETY)
            reward.reward(run)
            losses[eight] = [row["reward/loss"] for row in metrics(run) if "reward/loss" in row]
            kinds = {type(module).__name__ for module in run.load_base().lm.modules()}
            assert ("Linear8bitLt" in kinds) == eight
    assert losses[True] == pytest.approx(losses[False], abs=0.1)  # 8 bits of 64 numbers
    assert losses[True] != losses[False]
    assert losses[True][-1] < losses[True][0] - 0.1
    assert "MatMul8bitLt" not in caplog.text


@pytest.mark.slow
def test_rows_of_weight_0_stand_in_no_figure(opened):
    crowd = [comparison(100 + n, "bad bad", "good good", annotator="crowd") for n in range(30)]
    run = opened(rows=[*ROWS, *crowd], weights={"crowd": 0.0}, max_steps=2, eval_steps=1)
    counts = reward.reward(run)
    assert (counts["rows"], counts["unused_weight_0"]) == (42, 30)
    unused = tiny_runs.rows(run.stage_folder("reward") / "unused.jsonl")
    assert {row["id"] for row in unused} == {row.id for row in crowd}
    plain = opened("plain", max_steps=2, eval_steps=1)
    reward.reward(plain)
    assert evaluation(run) == evaluation(plain)


# --- annotators ------------------------------------------------------------------------------------------------------


def by_annotators(**right):
    """Return twelve pairs as annotators see them, each right in the given share of the pairs."""
    return [
        row.model_copy(
            update={
                "id": f"{row.id}-{name}",
                "annotator": name,
                "source": "human",
                "split": "eval" if place > 8 else "train",
                **({} if place % 12 < 12 * share else {"chosen": row.rejected, "rejected": row.chosen}),
            }
        )
        for place, row in enumerate(ROWS)
        for name, share in right.items()
    ]


def test_rows_to_train_on_count_what_their_annotators_are_worth(opened, monkeypatch):
    trained = {}

    def train(run, base, job, *rest):
        trained.update({example.id: example.weight for example in job.train})
        return reward_training.train(run, base, job, *rest)

    monkeypatch.setattr(reward, "train", train)
    rows = by_annotators(ann=1, ben=1, cy=1, liar=0)
    run = opened(rows=rows, max_steps=2, suspects=0, skill_weights=True, weights={"ben": 0.5})
    counts = reward.reward(run)
    written = json.loads((run.stage_folder("reward") / "annotators.json").read_text())
    weights = {one["annotator"]: one["weight"] for one in written["annotators"]}
    assert weights["liar"] == 0 < 0.5 < weights["ann"]
    unused = tiny_runs.rows(run.stage_folder("reward") / "unused.jsonl")
    assert {row["id"].partition("-c")[0] for row in unused} == {f"{row.id}-liar" for row in ROWS[:9]}
    assert (counts["train"], counts["heldout"], counts["unused_weight_0"]) == (27, 12, 9)
    assert evaluation(run)["heldout"]["all"]["n"] == 12  # the liar's too, as they were labelled
    assert trained["c-0-ann"] / trained["c-0-cy"] == pytest.approx(weights["ann"] / weights["cy"])
    assert trained["c-0-ann"] / trained["c-0-ben"] == pytest.approx(2 * weights["ann"] / weights["ben"])  # and by hand
    assert sum(trained.values()) == pytest.approx(len(trained))


def test_skill_weights_need_shared_pairs_and_somebody_better_than_a_coin(opened):
    with pytest.raises(DataError, match=r"reward\.skill_weights needs pairs .* two annotators .* none of 12 rows"):
        reward.reward(opened(skill_weights=True))
    with pytest.raises(DataError, match=r"on 12 pairs .* nobody who gave a row .* more often than a coin"):
        reward.reward(opened(rows=by_annotators(ann=1, liar=0), skill_weights=True))
    watched = {"eval_steps": 1, "early_stopping_patience": 1}
    rows = [*by_annotators(ann=1, ben=1, liar=0)]
    names = {row.id: row.annotator for row in rows}
    dev = split_rows(rows, 0.2, dev_fraction=0.2).dev
    kept = [row for row in rows if row not in dev or names[row.id] == "liar"]
    with pytest.raises(DataError, match="nobody who gave a row to stop training by"):
        reward.reward(opened(rows=kept, skill_weights=True, **watched))


def test_known_answers_decide_who_is_right_and_count_only_where_they_are_used(opened, tmp_path):
    (tmp_path / "known.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in ROWS))
    rows = by_annotators(ann=1, liar=0, other=0)
    run = opened(rows=rows, skill_weights=True, max_steps=1, suspects=0)
    run.loaded.known = tmp_path / "known.jsonl"
    assert "known" in reward.inputs(run)
    reward.reward(run)
    written = json.loads((run.stage_folder("reward") / "annotators.json").read_text())
    assert [one["annotator"] for one in written["annotators"] if one["weight"] > 0] == ["ann"]
    plain = opened("plain", rows=rows)
    plain.loaded.known = tmp_path / "known.jsonl"
    assert "known" not in reward.inputs(plain)


# --- the cost adapter ------------------------------------------------------------------------------------------------

SAFETY = [
    comparison(
        n,
        "good " * (1 + n % 3),
        "bad " * (1 + n % 2),
        tag=("harmful", "ordinary")[n % 2],
        safer=1.0,
        chosen_safe=True,
        rejected_safe=False,
    )
    for n in range(12)
]


@pytest.mark.slow
def test_the_cost_adapter_learns_the_sign_and_the_order_of_harm_and_keeps_its_zero(opened):
    run = opened(rows=SAFETY, cost=True, max_steps=24, num_train_epochs=20.0, per_device_train_batch_size=4)
    counts = reward.reward(run)
    folder = run.stage_folder("reward") / "cost"
    found = json.loads((folder / "calibration.json").read_text())
    assert counts["cost_sign_accuracy"] == found["sign"]["rate"] == 1.0
    assert found["order"]["rate"] == 1.0
    assert (found["unsafe"]["count"], found["unsafe"]["n"]) == (4, 8)
    assert (found["offset"], found["scale"] > 0) == (0.0, True)
    base = run.load_base()
    base.add_role("cost", adapter=folder / "adapter")
    assert base.head_weight("cost").shape == (1, 32)


def test_costs_without_both_signs_are_refused_with_what_was_found(opened):
    safe = [row.model_copy(update={"rejected_safe": True}) for row in SAFETY]
    with pytest.raises(DataError, match=r"answers of both signs.*16 safe and 0 unsafe.*label\.safety"):
        reward.reward(run := opened(rows=safe, cost=True, max_steps=1))
    assert not (run.stage_folder("reward") / "adapter").exists()  # before anything is trained


def test_with_early_stopping_a_checkpoint_is_written_where_all_that_was_summed_is_logged():
    settings = RewardSection(eval_steps=3, logging_steps=2, early_stopping_patience=2, save_steps=4)
    options = reward_training._watching(settings)
    assert (options["eval_steps"], options["save_steps"]) == (4, 4)
    assert reward_training._watching(RewardSection(eval_steps=3, logging_steps=2))["eval_steps"] == 3


@pytest.mark.slow
def test_ratings_alone_are_enough_to_learn_from_and_to_measure_with(opened):
    run = opened(rows=[], max_steps=12, num_train_epochs=20.0, per_device_train_batch_size=4)
    rows = [rating(n, ("good " if n % 2 else "bad ") * (1 + n % 3), float(n % 2), prompt=f"r{n}") for n in range(24)]
    files.write_jsonl(run.stage_folder("label") / "ratings.jsonl", rows)
    counts = reward.reward(run)
    assert counts["rows"] == 24
    assert counts["heldout_accuracy"] > 0.5
    assert evaluation(run)["train_pairs"] > 0
