"""The stage `sft` on the tiny model: what is learned, what moves, and resuming to the bit."""

import pytest
import tiny_runs
import torch

from rlaif import files
from rlaif.errors import DataError, StageError
from rlaif.recipe import SftSection
from rlaif.records import Demonstration, assistant
from rlaif.stages import sft, training
from rlaif.stages.run import Run

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def demonstration(number, *, prompt=None, answer="yes, of course."):
    turns = [{"role": "user", "content": prompt or f"Question {number}?"}]
    completion = assistant(answer)
    return Demonstration(id=f"d-{number}", prompt=turns, completion=completion, messages=turns + completion)


def answered(row):
    return sft.Answered(row.prompt, row.completion[-1]["content"])


ROWS = [demonstration(number, answer="yes, of course." * (1 + number % 3)) for number in range(8)]


@pytest.fixture
def opened(tmp_path, tiny_model):
    stack = []

    def open_run(folder="run", *, rows=ROWS, model=None, four_bit=False, **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        sections = {"sft": {"learning_rate": 1e-2, **settings}, "model": {"load_in_4bit": four_bit}}
        context = tiny_runs.opened(tmp_path / folder, model or tiny_model, **sections)
        run = context.__enter__()
        stack.append(context)
        files.write_jsonl(run.stage_folder("revise") / "demonstrations.jsonl", rows)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def metrics(run):
    return tiny_runs.rows(run.stage_folder("sft") / "metrics.jsonl")


def watch_base(monkeypatch):
    """Keep the base that a stage loads, with a copy of its parameters as they were."""
    kept, load_base = {}, Run.load_base

    def loaded(run):
        kept["base"] = load_base(run)
        kept["before"] = [p.detach().clone() for p in kept["base"].lm.parameters()]
        kept["own"] = list(kept["base"].lm.parameters())
        return kept["base"]

    monkeypatch.setattr(Run, "load_base", loaded)
    return kept


def test_only_the_tokens_of_the_answer_and_the_end_of_the_turn_are_learned(opened):
    base = opened().load_base()
    row = demonstration(0, prompt="Hi", answer="ok")
    encoded = sft.encode(base, answered(row))
    start = base.tokenizer.prompt(row.prompt)
    assert encoded["input_ids"][: len(start)] == start
    assert encoded["labels"][: len(start)] == [-100] * len(start)
    assert encoded["labels"][len(start) :] == encoded["input_ids"][len(start) :]
    assert base.tokenizer.decode(encoded["input_ids"][len(start) :]) == "ok"
    assert encoded["input_ids"][-1] == base.tokenizer.end_of_turn


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_every_parameter_of_the_policy_moves_and_nothing_else(opened, tiny_model_64, four_bit, monkeypatch):
    run = opened(model=tiny_model_64, four_bit=four_bit, max_steps=2)
    kept = watch_base(monkeypatch)
    sft.sft(run)
    base = kept["base"]
    assert all(torch.equal(old, now) for old, now in zip(kept["before"], kept["own"], strict=True))
    assert len(kept["own"]) == len(kept["before"]) > 0
    fresh = run.load_base()
    fresh.add_role("policy", trainable=True)
    started = dict(fresh.named_parameters_of("policy"))
    trained = dict(base.named_parameters_of("policy"))
    assert trained.keys() == started.keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert [name for name in trained if torch.equal(trained[name], started[name])] == []
    assert len(started) == 2 * 2 * 2  # A and B of two projections in two layers


@pytest.mark.slow
def test_the_loss_falls_on_trained_and_held_out_answers_and_each_step_has_its_row(opened):
    run = opened(max_steps=12, heldout_fraction=0.3, save_steps=12)
    counts = sft.sft(run)
    assert (counts["train"] + counts["heldout"], counts["steps"]) == (8, 12)
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, *range(1, 13), 12]
    for row in rows[1:-1]:
        assert set(row) == {"step", "sft/loss", "sft/learning_rate", "sft/gradient_norm"}
    assert set(rows[0]) == set(rows[-1]) == {"step", "sft/heldout_loss"}
    assert rows[-1]["sft/heldout_loss"] == counts["heldout_loss"] < rows[0]["sft/heldout_loss"] - 0.1
    assert rows[12]["sft/loss"] < rows[1]["sft/loss"] - 0.1


def test_the_first_loss_is_the_mean_over_the_answer_tokens_of_the_batch(opened):
    """TRL's loss of the first batch, which holds all rows, against log-probabilities summed here."""
    rows = ROWS[:4]
    run = opened(rows=rows, heldout_fraction=0.0, max_steps=1, per_device_train_batch_size=4)
    sft.sft(run)
    base = run.load_base()
    total, count = 0.0, 0
    for row in rows:
        encoded = sft.encode(base, answered(row))
        ids = torch.tensor([encoded["input_ids"]])
        with base.acting_as("base"), torch.no_grad():
            logprobs = base.lm(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(encoded["labels"][1:]):
            if label != -100:
                total, count = total - logprobs[position, label].item(), count + 1
    assert metrics(run)[0]["sft/loss"] == pytest.approx(total / count, rel=1e-4)


def test_answers_to_one_prompt_stay_on_one_side_of_the_held_out_split(opened):
    rows = [demonstration(number, prompt=f"Prompt {number // 2}?") for number in range(40)]
    sides = {}
    for row in rows:
        sides.setdefault(row.prompt[0]["content"], set()).add(sft._held_out(row.prompt, 0.3))
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < sum(side == {True} for side in sides.values()) < 20


def test_rows_that_are_too_long_are_counted_and_left_out(opened):
    rows = [*ROWS[:4], demonstration(9, answer="long " * 100)]
    counts = sft.sft(opened(rows=rows, max_length=200, max_steps=1, heldout_fraction=0.0))
    assert counts["too_long"] == 1
    assert counts["train"] == 4
    assert counts["heldout_loss"] is None


def test_no_demonstration_and_none_that_fits_are_errors_that_say_what_to_do(opened):
    with pytest.raises(DataError, match=r"no demonstration; every answer was set aside.*quarantine\.jsonl"):
        sft.sft(opened("none", rows=[]))
    with pytest.raises(DataError, match=r"of 8 rows 8 are longer than 5 tokens.*Raise sft\.max_length"):
        sft.sft(opened("long", max_length=5))


@pytest.mark.slow
def test_a_training_that_diverges_stops_the_stage(opened):
    with pytest.raises(StageError, match=r"sft: the loss is nan at step [123]:.*diverged\. Lower sft\.learning_rate"):
        sft.sft(opened(learning_rate=1e37, weight_decay=0.1))


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "accumulation", "max_steps", "steps"),
    [(1, 8, 2, 1, -1, 4), (1.5, 6, 2, 1, -1, 5), (1, 9, 2, 2, -1, 3), (0.1, 8, 8, 1, -1, 1), (3, 8, 2, 1, 7, 7)],
)
def test_the_number_of_steps_follows_from_epochs_rows_and_batch_sizes(
    epochs, rows, batch, accumulation, max_steps, steps
):
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": batch, "max_steps": max_steps}
    section = SftSection(**settings, gradient_accumulation_steps=accumulation)
    assert training.steps_of(section, rows, 1) == steps
    halved = section.model_copy(update={"per_device_train_batch_size": batch // 2})
    assert training.steps_of(halved, rows, 2) == steps


@pytest.mark.slow
def test_transformers_takes_as_many_steps_as_announced(opened):
    settings = {"num_train_epochs": 1.5, "max_steps": -1, "heldout_fraction": 0.0, "save_steps": 100}
    run = opened(rows=ROWS[:6], **settings)
    assert sft.sft(run)["steps"] == 5
    assert metrics(run)[-1]["step"] == 5


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_cut_off_and_resumed_equals_training_that_was_not_to_the_bit(
    opened, tiny_model_64, four_bit, monkeypatch
):
    settings = {"model": tiny_model_64, "four_bit": four_bit, "max_steps": 4, "num_train_epochs": 3.0}
    settings["heldout_fraction"] = 0.3
    whole = opened("whole", **settings)
    counts = sft.sft(whole)
    resumed = opened("resumed", **settings)
    said = []
    monkeypatch.setattr(resumed.progress, "say", said.append)
    for step, complete in ((1, True), (3, False)):
        with tiny_runs.cut_off_at_checkpoint(step, complete=complete):
            sft.sft(resumed)
    assert sft.sft(resumed) == counts
    assert said == ["  continuing after step 1", "  continuing after step 2"]
    assert tiny_runs.results(resumed.stage_folder("sft")) == tiny_runs.results(whole.stage_folder("sft"))
    assert "adapter/adapter_model.safetensors" in tiny_runs.results(whole.stage_folder("sft"))


@pytest.mark.slow
def test_training_cut_off_after_its_last_step_measures_again_and_writes_each_row_once(opened, monkeypatch):
    # Within the first epoch, where `Trainer` itself would take a third step, and at a rate that would show it.
    settings = {"max_steps": 2, "heldout_fraction": 0.3, "per_device_train_batch_size": 1}
    settings["lr_scheduler_type"] = "constant"
    whole = opened("whole", **settings)
    sft.sft(whole)
    resumed = opened("resumed", **settings)
    with monkeypatch.context() as patch, pytest.raises(tiny_runs.Stopped):
        patch.setattr(sft, "last_metrics", lambda folder: (_ for _ in ()).throw(tiny_runs.Stopped))
        sft.sft(resumed)
    assert len(metrics(resumed)) == 4
    sft.sft(resumed)
    assert tiny_runs.results(resumed.stage_folder("sft")) == tiny_runs.results(whole.stage_folder("sft"))


@pytest.mark.slow
def test_checkpoints_are_written_at_steps_that_are_logged_so_a_resumed_mean_is_whole(opened):
    settings = {"max_steps": 6, "logging_steps": 2, "save_steps": 1, "heldout_fraction": 0.0}
    whole = opened("whole", **settings)
    sft.sft(whole)
    resumed = opened("resumed", **settings)
    with tiny_runs.cut_off_at_checkpoint(4, complete=False):
        sft.sft(resumed)
    kept = sorted(path.name for path in (resumed.stage_folder("sft") / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    sft.sft(resumed)
    assert tiny_runs.results(resumed.stage_folder("sft")) == tiny_runs.results(whole.stage_folder("sft"))
    assert [row["step"] for row in metrics(resumed)] == [2, 4, 6]


@pytest.mark.slow
def test_an_unfinished_checkpoint_is_removed_before_training_goes_on(opened):
    run = opened(heldout_fraction=0.0)
    with tiny_runs.cut_off_at_checkpoint(3, complete=False):
        sft.sft(run)
    parent = run.stage_folder("sft") / "checkpoints"
    assert training.resume_point(run, run.stage_folder("sft")) == str(parent / "checkpoint-2")
    assert [path.name for path in parent.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in metrics(run)] == [1, 2]
