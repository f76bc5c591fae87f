"""Recipes with the stages `dpo` and `rejection`: what they need, their folders, and who else knows of them."""

import json
import re

import pytest
import tiny_runs
from typer.testing import CliRunner

from rlaif import trace, tree
from rlaif.chat import Conversation
from rlaif.cli import app
from rlaif.errors import ConfigError
from rlaif.pipeline import run_recipe
from rlaif.plan import plan
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.report.run import write_report

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")

ALL = ["revise", "sft", "label", "reward", "ppo", "dpo", "rejection", "evaluate"]
SECTIONS = {
    "dpo": {"max_steps": 2, "per_device_train_batch_size": 2},
    "rejection": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "prompts_per_tag": {"harmful": 2, "ordinary": 2},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 8},
    },
    "ppo": {"updates": 1},
    "evaluate": {"judge_prompts_per_tag": 0},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("optional") / "run"
    return tiny_runs.whole_run(folder, tiny_model, stages=ALL, **SECTIONS)


def loaded(folder, tiny_model, **changes):
    return load_recipe(tiny_runs.write_recipe(folder / "tiny.yaml", tiny_model, **changes))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["revise", "sft", "dpo"], "dpo needs the stage `label` before it"),
        (["revise", "sft", "label", "dpo", "rejection"], "rejection needs the stage `reward` before it"),
        (["revise", "sft", "label", "dpo", "reward"], "stages run in this order, each once: revise, sft, label, rew"),
    ],
)
def test_a_stage_without_what_it_needs_is_refused(tmp_path, tiny_model, stages, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded(tmp_path, tiny_model, stages=stages)


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("dpo", {"label_smoothing": 0.1}, "read by the losses `robust` and `exo_pair`, and loss_type is `sigmoid`"),
        ("dpo", {"loss_type": "exo_pair"}, "needs a label_smoothing above 0"),
        ("dpo", {"loss_type": "sft"}, "dpo.loss_type"),
        ("dpo", {"min_preference": 0.4}, "dpo.min_preference"),
        ("rejection", {"sampling": {"temperature": 0}}, "all samples of a prompt are the same"),
        ("rejection", {"samples_per_prompt": 1}, "rejection.samples_per_prompt"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, tiny_model, section, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded(tmp_path, tiny_model, **{section: keys})


def test_a_recipe_that_names_no_stages_has_neither(tmp_path, tiny_model):
    assert not {"dpo", "rejection"} & set(loaded(tmp_path, tiny_model).recipe.stages)


@pytest.mark.slow
def test_their_folders_come_last_and_others_keep_their_numbers(run_folder):
    found = sorted(path.name for path in run_folder.iterdir() if path.is_dir())
    assert found == [
        *("1-revise", "2-sft", "3-label", "4-reward", "5-ppo", "6-evaluate"),
        *("7-dpo", "8-rejection"),
    ]
    for name in ("7-dpo", "8-rejection"):
        manifest = json.loads((run_folder / name / "manifest.json").read_text())
        assert {"policy/adapter_model.safetensors", "metrics.jsonl"} <= manifest["outputs"].keys()
        assert not (run_folder / name / "checkpoints").exists()


@pytest.mark.slow
def test_everything_is_up_to_date_afterwards(run_folder):
    said = []
    progress = Progress(quiet=True)
    progress.say = said.append
    run_recipe(load_recipe(run_folder / "recipe.yaml"), progress)
    assert [line.partition(": ")[2] for line in said] == ["up to date"] * len(ALL)


@pytest.mark.slow
def test_evaluate_measures_all_policies(run_folder):
    results = json.loads((run_folder / "6-evaluate" / "results.json").read_text())
    assert results["policies"] == list(results["metrics"]) == ["base", "sft", "ppo", "dpo", "rejection"]
    assert results["metrics"]["dpo"]["kl_to_reference"]["mean"] != 0
    inputs = json.loads((run_folder / "6-evaluate" / "manifest.json").read_text())["inputs"]
    assert inputs["dpo"] != "absent" and inputs["rejection"] != "absent"


def test_what_evaluate_depends_on_has_the_same_names_without_them(tmp_path, tiny_model):
    from rlaif.stages import evaluate

    with tiny_runs.opened(tmp_path, tiny_model) as run:
        assert not {"dpo", "rejection"} & evaluate.inputs(run).keys()


@pytest.mark.slow
def test_the_report_names_them_where_they_ran(run_folder, tmp_path, tiny_model):
    page = write_report(run_folder).read_text(encoding="utf-8")
    for text in ("<th>dpo</th>", "<th>rejection</th>", "<th>DPO</th>", "<th>rejection sampling</th>"):
        assert text in page
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_text((run_folder / "recipe.yaml").read_text())
    assert "<th>dpo</th>" not in write_report(bare).read_text(encoding="utf-8")


@pytest.mark.slow
def test_chat_takes_the_policy_that_was_trained_last(run_folder):
    assert Conversation(run_folder, max_new_tokens=2, temperature=0.0).title == "after rejection sampling"


@pytest.mark.slow
def test_a_trace_leads_from_an_answer_to_the_samples_and_comparisons_behind_it(run_folder):
    rows = tiny_runs.rows(run_folder / "8-rejection" / "responses.jsonl")
    shown = "\n".join(tree.as_lines(trace.trace(run_folder, rows[0]["id"])))
    assert "sample to choose from" in shown and "journal.db rejection" in shown and "not in the journal" not in shown
    answers = {row["policy"]: row["id"] for row in tiny_runs.rows(run_folder / "6-evaluate" / "responses.jsonl")}
    for policy, place, others in (("dpo", "7-dpo/policy", "8-rejection"), ("rejection", "8-rejection/policy", "7-dpo")):
        shown = "\n".join(tree.as_lines(trace.trace(run_folder, answers[policy])))
        assert place in shown and "2-sft/adapter" in shown and f"{others}/policy" not in shown


@pytest.mark.slow
def test_a_plan_counts_the_samples_and_the_steps(run_folder, tmp_path, tiny_model):
    fresh = loaded(tmp_path, tiny_model, output=str(tmp_path / "run"), stages=ALL, **SECTIONS)
    found = {one.stage: one for one in plan(fresh)}
    assert len(found["rejection"].missing) == 2 * 4 and found["rejection"].steps == 2
    assert found["dpo"].steps == 2 and found["dpo"].missing == []
    assert not any("would stop" in one.note for one in found.values())
    again = {one.stage: one for one in plan(load_recipe(run_folder / "recipe.yaml"), first="rejection")}
    assert again["dpo"].reasons == [] and len(again["rejection"].missing) == 0


@pytest.mark.slow
def test_each_has_a_command(run_folder):
    for stage in ("dpo", "rejection"):
        done = CliRunner().invoke(app, [stage, str(run_folder / "recipe.yaml")])
        assert done.exit_code == 0 and "up to date" in done.output
