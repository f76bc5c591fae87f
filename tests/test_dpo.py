"""The stage `dpo` on the tiny model: what is learned, against which reference, what moves, and resuming to the bit."""

import math

import pytest
import tiny_runs
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlaif import files
from rlaif.errors import ConfigError, DataError, StageError
from rlaif.records import Comparison, assistant
from rlaif.stages import dpo, processes
from rlaif.stages.run import Run

pytestmark = [pytest.mark.usefixtures("one_thread", "no_sync"), pytest.mark.slow]  # each trains

NEAR = 2e-5  # fp32 sums over some twenty tokens, taken in different orders


def comparison(number, *, preference=1.0, prompt=None, chosen="yes, of course.", rejected="no, never.", **columns):
    turns = [{"role": "user", "content": prompt or f"Question {number}?"}]
    return Comparison(
        id=f"c-{number}",
        prompt=turns,
        chosen=assistant(chosen),
        rejected=assistant(rejected),
        preference=preference,
        source="ai",
        annotator="judge",
        **columns,
    )


ROWS = [comparison(number, chosen="yes, of course." * (1 + number % 3)) for number in range(10)]


@pytest.fixture
def opened(tmp_path, tiny_model):
    stack = []

    def open_run(folder="run", *, rows=ROWS, model=None, with_sft=True, four_bit=False, recompute=False, **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "learning_rate": 1e-2}
        context = tiny_runs.opened(
            tmp_path / folder,
            model or tiny_model,
            stages=["revise", *["sft"] * with_sft, "label", "dpo"],
            model={"load_in_4bit": four_bit, "gradient_checkpointing": recompute},
            dpo=defaults | settings,
        )
        run = context.__enter__()
        stack.append(context)
        files.write_jsonl(run.stage_folder("label") / "comparisons.jsonl", rows)
        if with_sft and not (run.stage_folder("sft") / "adapter").is_dir():
            tiny_runs.save_random_role(run, "policy", run.stage_folder("sft") / "adapter", seed=1, size=0.2)
        return run

    yield open_run
    for context in reversed(stack):
        context.__exit__(None, None, None)


def metrics(run):
    return tiny_runs.rows(run.stage_folder("dpo") / "metrics.jsonl")


def logprob(model, base, row, answer):
    """The log-probability of a whole answer under a plain `transformers` model, summed here."""
    prompt, response = base.tokenizer.prompt(row.prompt), base.tokenizer.response(answer[-1]["content"])
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) + place - 1, token].item() for place, token in enumerate(response))


def plain(folder_of_model, adapter):
    """A base and an adapter as `peft` alone loads them."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder_of_model), adapter).eval()


@pytest.mark.parametrize("four_bit", [False, True])
def test_every_parameter_of_the_policy_moves_and_nothing_else(opened, tiny_model_64, four_bit, monkeypatch):
    run = opened(model=tiny_model_64, four_bit=four_bit)
    kept, load_base = {}, Run.load_base

    def loaded(run):
        kept["base"] = load_base(run)
        kept["own"] = list(kept["base"].lm.parameters())
        kept["before"] = [p.detach().clone() for p in kept["own"]]
        return kept["base"]

    monkeypatch.setattr(Run, "load_base", loaded)
    sft = tiny_runs.contents(run.stage_folder("sft"))
    dpo.dpo(run)
    assert all(torch.equal(old, now) for old, now in zip(kept["before"], kept["own"], strict=True))
    assert tiny_runs.contents(run.stage_folder("sft")) == sft
    trained = dict(kept["base"].named_parameters_of("policy"))
    fresh = run.load_base()
    fresh.add_role("policy", adapter=run.stage_folder("sft") / "adapter")
    started = dict(fresh.named_parameters_of("policy"))
    assert trained.keys() == started.keys() and len(trained) == 2 * 2 * 2  # A and B of two projections, two layers
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert [name for name in trained if torch.equal(trained[name], started[name])] == []


def test_the_policy_starts_at_the_reference_and_learns_to_prefer_the_chosen_answers(opened):
    run = opened(max_steps=12, save_steps=12, heldout_fraction=0.3)
    counts = dpo.dpo(run)
    assert (counts["comparisons"], counts["train"], counts["heldout"], counts["steps"]) == (10, 7, 3, 12)
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, *range(1, 13), 12]
    held_out = {"step", "dpo/heldout_loss", "dpo/heldout_accuracy", "dpo/heldout_reward_margin"}
    assert set(rows[0]) == set(rows[-1]) == held_out
    names = {"loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward", "learning_rate", "gradient_norm"}
    assert all(set(row) == {"step", *(f"dpo/{name}" for name in names)} for row in rows[1:-1])
    for row, key in ((rows[0], "heldout_loss"), (rows[1], "loss")):
        assert row[f"dpo/{key}"] == pytest.approx(math.log(2), abs=NEAR)
    assert rows[1]["dpo/reward_margin"] == pytest.approx(0, abs=NEAR)
    assert rows[-1]["dpo/heldout_loss"] == counts["heldout_loss"] < 0.5
    assert rows[-1]["dpo/heldout_accuracy"] == counts["heldout_accuracy"] == 1.0
    assert rows[12]["dpo/accuracy"] == 1.0 and rows[12]["dpo/reward_margin"] > 0.5


@pytest.mark.parametrize("with_sft", [True, False])
def test_loss_and_margin_are_those_of_plain_peft_models_against_the_sft_adapter_or_the_base(
    opened, tiny_model, with_sft
):
    """Equation 7 on the held-out pairs, in two batches of unequal size, with nothing of this package in between."""
    run = opened(with_sft=with_sft, heldout_fraction=0.3, max_steps=3, beta=0.3)
    counts = dpo.dpo(run)
    base = run.load_base()
    policy = plain(tiny_model, run.stage_folder("dpo") / "policy")
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    if with_sft:
        reference = plain(tiny_model, run.stage_folder("sft") / "adapter")
    known = {row["id"]: row for row in tiny_runs.rows(run.stage_folder("dpo") / "reference.jsonl")}
    margins = []
    for row in dpo.split_rows(ROWS, 0.3).heldout:
        ratios = []
        for side in ("chosen", "rejected"):
            said = logprob(reference, base, row, getattr(row, side))
            assert known[row.id][f"ref_{side}_logps"] == pytest.approx(said, abs=1e-4)
            ratios.append(logprob(policy, base, row, getattr(row, side)) - said)
        margins.append(0.3 * (ratios[0] - ratios[1]))
    assert len(margins) == 3 and len(known) == len(ROWS)
    assert max(margins) > 0.05
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert counts["heldout_loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert counts["heldout_reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo", "beta": 0.2}, 6.25),  # (0 - 1 / (2 beta)) squared
        ({"loss_type": "robust", "label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "exo_pair", "label_smoothing": 0.1}, -0.5 * math.log(0.9) - 0.5 * math.log(0.1) - math.log(2)),
        ({"loss_type": "nca_pair"}, 2 * math.log(2)),
        ({"loss_type": "apo_zero"}, 1.0),
        ({"loss_type": "apo_down"}, 1.0),
        ({"loss_type": "sigmoid_norm"}, math.log(2)),
    ],
    ids=lambda value: value["loss_type"] if isinstance(value, dict) else "",
)
def test_the_loss_that_the_recipe_names_is_trained(opened, settings, loss):
    """At the start all log-ratios are 0, where each loss has a known value."""
    run = opened(heldout_fraction=0.0, max_steps=1, **settings)
    dpo.dpo(run)
    assert metrics(run)[0]["dpo/loss"] == pytest.approx(loss, abs=1e-4)


def test_label_smoothing_is_what_the_loss_says(opened):
    """At equal scores the gradient of `robust` is that without smoothing over 1 - 2 x 0.4 (arXiv 2403.00409)."""
    norms = []
    for number, smoothing in enumerate((0.0, 0.4)):
        run = opened(str(number), heldout_fraction=0.0, max_steps=1, loss_type="robust", label_smoothing=smoothing)
        dpo.dpo(run)
        norms.append(metrics(run)[0]["dpo/gradient_norm"])
    assert norms[1] == pytest.approx(5 * norms[0], rel=1e-3)


def test_ties_and_unsure_labels_are_left_out_with_the_reason(opened):
    rows = [
        *ROWS[:6],
        comparison(20, preference=0.5),
        comparison(21, preference=0.6),
        comparison(22, chosen="same", rejected="same"),
        comparison(23, chosen="long " * 100),
    ]
    run = opened(rows=rows, min_preference=0.7, max_length=200, heldout_fraction=0.0)
    counts = dpo.dpo(run)
    left_out = {key: value for key, value in counts.items() if key.startswith("unused")}
    assert left_out == {
        "unused_tie": 1,
        "unused_below_min_preference": 1,
        "unused_identical_answers": 1,
        "unused_longer_than_max_length": 1,
    }
    assert counts["train"] == 6 and counts["heldout_loss"] is None
    assert {row["id"] for row in tiny_runs.rows(run.stage_folder("dpo") / "unused.jsonl")} == {
        f"c-{number}" for number in (20, 21, 22, 23)
    }


def test_rows_marked_eval_are_held_out(opened):
    run = opened(rows=[*ROWS[:4], *(comparison(number, split="eval") for number in (30, 31))])
    counts = dpo.dpo(run)
    assert (counts["train"], counts["heldout"]) == (4, 2)


def test_no_row_to_train_on_is_an_error_that_says_why(opened):
    rows = [comparison(number, preference=0.5) for number in range(3)]
    with pytest.raises(DataError, match=r"of 3 rows 3 are left out \(tie: 3\) and 0 are held out.*dpo\.min_preference"):
        dpo.dpo(opened(rows=rows))


def test_control_tokens_in_a_row_stay_text(opened):
    row = comparison(0, chosen="ok<|end|>\n<|start|>user\nmore")
    run = opened(rows=[row])
    base = run.load_base()
    base.add_role("policy")
    (example,) = dpo._examples(run, base, [row]).values()
    assert [token for token in example["chosen_ids"] if token in (1, 2)] == [base.tokenizer.end_of_turn]
    assert example["chosen_ids"][-1] == base.tokenizer.end_of_turn


def test_several_processes_are_refused_before_anything_runs(monkeypatch):
    processes.refuse_unsupported(["label", "dpo"])
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    processes.refuse_unsupported(["label", "reward"])
    with pytest.raises(ConfigError, match=r"dpo: trains in one process.*launched in 2.*--until"):
        processes.refuse_unsupported(["label", "dpo"])


def test_recomputed_activations_change_nothing_beyond_rounding(opened):
    found = []
    for name, recompute in (("kept", False), ("recomputed", True)):
        run = opened(name, recompute=recompute, heldout_fraction=0.0, max_steps=3)
        dpo.dpo(run)
        found.append([row["dpo/loss"] for row in metrics(run)])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_cut_off_and_resumed_equals_training_that_was_not_to_the_bit(
    opened, tiny_model_64, four_bit, monkeypatch
):
    settings = {"model": tiny_model_64, "four_bit": four_bit, "max_steps": 4, "num_train_epochs": 3.0}
    whole = opened("whole", **settings)
    counts = dpo.dpo(whole)
    resumed = opened("resumed", **settings)
    asked = []
    ask = dpo._reference_logprobs
    monkeypatch.setattr(dpo, "_reference_logprobs", lambda *args: asked.append(1) or ask(*args))
    for step, complete in ((1, True), (3, False)):
        with tiny_runs.cut_off_at_checkpoint(step, complete=complete):
            dpo.dpo(resumed)
    assert dpo.dpo(resumed) == counts
    assert asked == [1]  # the reference is asked once
    found, expected = (tiny_runs.results(run.stage_folder("dpo")) for run in (resumed, whole))
    assert found == expected
    assert {"policy/adapter_model.safetensors", "metrics.jsonl", "reference.jsonl"} <= expected.keys()


def test_a_checkpoint_holds_the_role_and_nothing_of_the_base(opened):
    run = opened()
    with tiny_runs.cut_off_at_checkpoint(1, complete=True):
        dpo.dpo(run)
    folder = run.stage_folder("dpo") / "checkpoints" / "checkpoint-1"
    assert (folder / "role.safetensors").is_file()
    assert [path.name for path in folder.glob("*.safetensors")] == ["role.safetensors"]


def test_a_training_that_diverges_stops_the_stage(opened):
    with pytest.raises(StageError, match=r"dpo: the loss is nan at step [123]:.*diverged\. Lower dpo\.learning_rate"):
        dpo.dpo(opened(learning_rate=1e25, max_steps=4))
