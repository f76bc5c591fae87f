"""`rlaif reward score`: which model a path names, on which scale its scores are, and what comes back for a row."""

import json
import shutil

import pytest
import tiny_rewards
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForSequenceClassification

from rlaif.conversations import read_answers
from rlaif.errors import ConfigError, DataError, ModelError, StageError
from rlaif.maths.composition import uncertainty_weighted
from rlaif.progress import Progress
from rlaif.scoring import Scorer, score_rows, summary

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

ROWS = [
    {"id": "a", "prompt": "Hello?", "completion": "Good day."},
    {"prompt": "Hello?", "chosen": "Good day.", "rejected": "Go away, you."},
    {"messages": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]},
    {"prompt": "So?", "responses": ["Yes.", "No.", "Well."]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return tiny_rewards.finished(tmp_path_factory.mktemp("scored") / "run", tiny_model, heads=1, cost=True)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, tiny_model):
    return tiny_rewards.finished(tmp_path_factory.mktemp("ensemble") / "run", tiny_model, heads=2, adapters=2)


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "rows.jsonl"
    target.write_text("\n".join(json.dumps(row) for row in ROWS))
    return target


def scored(path, model, **options):
    return score_rows(Scorer.load(model, **options), path, read_answers(path), Progress(quiet=True))


def plain_score(model, tokenizer, prompt, answer):
    """What transformers and peft alone say of an answer."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0].tolist()


def test_rows_come_back_as_they_were_with_their_scores(path, run):
    found = scored(path, run)
    assert [{key: row[key] for key in given} for row, given in zip(found, ROWS, strict=True)] == ROWS
    added = [sorted(row.keys() - given.keys()) for row, given in zip(found, ROWS, strict=True)]
    assert added == [["score"], ["score_chosen", "score_gap", "score_rejected"], ["score"], ["score_responses"]]
    assert found[0]["score"] == pytest.approx(found[1]["score_chosen"], abs=1e-5)
    assert found[1]["score_gap"] == found[1]["score_chosen"] - found[1]["score_rejected"]
    assert found[3]["score_responses"][0] == pytest.approx(found[2]["score"], abs=1e-5)
    assert len({round(score, 4) for score in found[3]["score_responses"]}) == 3
    assert "4 rows; mean score" in summary(found)
    assert "of 1 comparisons" in summary(found)


def test_a_run_its_stage_and_its_adapter_are_the_same_model_shifted_and_scaled_unless_raw(path, run):
    stage = run / "4-reward"
    shifted, raw = ([row.get("score") for row in scored(path, run, raw=raw)] for raw in (False, True))
    assert shifted[0] == pytest.approx((raw[0] - 1.0) / 2.0, abs=1e-6)
    for place in (stage, stage / "adapter"):
        assert [row.get("score") for row in scored(path, place)] == shifted
    assert [row.get("score") for row in scored(path, run, batch_size=1)] == pytest.approx(shifted, abs=1e-5)


def test_the_cost_adapter_is_a_model_of_its_own(path, run):
    for place in (run / "4-reward" / "cost", run / "4-reward" / "cost" / "adapter"):
        cost = [row.get("score") for row in scored(path, place)]
        raw = [row.get("score") for row in scored(path, place, raw=True)]
        assert cost[0] == pytest.approx(raw[0] / 4.0)
        assert abs(cost[0] - scored(path, run)[0]["score"]) > 1e-3


def test_members_of_an_ensemble_are_put_together_on_their_own_scales(path, ensemble):
    first = scored(path, ensemble)[0]
    members = torch.tensor([first["members"]])
    standard = (members - torch.tensor([1.0, 2.0, 3.0, 4.0])) / 2.0
    assert first["score"] == pytest.approx(standard.mean().item(), abs=1e-6)
    worst, uncertain = (scored(path, ensemble, ensemble=name)[0]["score"] for name in ("worst", "uncertainty"))
    assert worst == pytest.approx(standard.min().item(), abs=1e-6)
    assert uncertain == pytest.approx(uncertainty_weighted(standard, 0.5).item(), abs=1e-6)
    assert scored(path, ensemble, raw=True)[0]["score"] == pytest.approx(members.mean().item(), abs=1e-6)
    second = scored(path, ensemble / "4-reward" / "reward-2" / "adapter")[0]
    assert second["members"] == pytest.approx(first["members"][2:], abs=1e-5)
    assert second["score"] == pytest.approx(standard[0, 2:].mean().item(), abs=1e-5)


def test_an_adapter_of_plain_peft_gives_the_scores_that_plain_peft_gives(path, tiny_model, tmp_path):
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    plain = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    ).eval()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no calibration\.json beside it.*Add --raw"):
        Scorer.load(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    with torch.no_grad():
        theirs = plain(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
    assert scored(path, tmp_path / "plain", raw=True)[0]["score"] == pytest.approx(theirs, abs=1e-5)


def test_an_adapter_on_a_reward_model_of_somebody_else_finds_its_base(path, tmp_path):
    model = tiny_rewards.build_reward_model(tmp_path / "foreign")
    plain = LlamaForSequenceClassification.from_pretrained(model).eval()
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(plain, config).eval()
    adapted.save_pretrained(tmp_path / "plain")
    theirs = plain_score(adapted, AutoTokenizer.from_pretrained(model), "Hello?", "Good day.")
    assert [scored(path, tmp_path / "plain", raw=True)[0]["score"]] == pytest.approx(theirs, abs=1e-5)


def test_what_is_no_reward_model_is_refused_with_what_to_do(run, ensemble, tmp_path):
    (tmp_path / "old" / "4-reward").mkdir(parents=True)
    (tmp_path / "old" / "recipe.yaml").write_text("name: old")
    (tmp_path / "old" / "4-reward" / "evaluation.json").write_text("{}")
    shutil.copytree(run / "4-reward" / "adapter", tmp_path / "lost")
    config = json.loads((tmp_path / "lost" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps(config))
    cases = (
        (tmp_path / "nowhere", {}, ModelError, "neither a run folder"),
        (tmp_path / "old", {}, StageError, "written by an earlier version .evaluation.json instead of calibration"),
        (tmp_path / "lost", {"raw": True}, ModelError, "gone`: cannot be loaded"),
        (run, {"ensemble": "worst"}, ConfigError, "has a single member"),
    )
    for place, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            Scorer.load(place, **options)


def test_a_moved_adapter_is_put_on_the_base_that_is_named(run, path, tiny_model, tmp_path):
    shutil.copytree(run / "4-reward" / "adapter", tmp_path / "moved")
    ours = scored(path, run, raw=True)[0]["score"]
    assert scored(path, tmp_path / "moved", raw=True, base=str(tiny_model))[0]["score"] == pytest.approx(ours)


def test_rows_too_long_or_with_such_a_column_are_told_with_their_lines(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    long = {"prompt": "Hello?", "completion": "a" * 20000}
    path.write_text("\n".join(json.dumps(row) for row in (ROWS[0], long, {**ROWS[0], "score": 1})))
    with pytest.raises(DataError) as refused:
        scored(path, run)
    told = str(refused.value).splitlines()
    assert told[0].startswith(f"{path}:2: 20")
    assert "the model's context holds 16384" in told[0]
    assert told[1] == f"{path}:3: has a column `score` already. Rename it, or remove it."
