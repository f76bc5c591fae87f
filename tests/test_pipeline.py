"""The pipeline: which stages run, what is kept of them, and what a run folder holds."""

import shutil

import pytest
import tiny_runs

from rlaif import files, journal, pipeline
from rlaif.errors import ConfigError, DataError, JournalError, StageError
from rlaif.pipeline import open_run, run_recipe
from rlaif.progress import Progress
from rlaif.recipe import STAGES, load_recipe
from rlaif.report.reading import read_run
from rlaif.stages import evaluate, label, ppo, revise, reward, sft
from rlaif.stages.run import Run

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
MODULES = {"revise": revise, "sft": sft, "label": label, "reward": reward, "ppo": ppo, "evaluate": evaluate}
FOLDERS = ["1-revise", "2-sft", "3-label", "4-reward", "5-ppo", "6-evaluate"]


class Told(Progress):
    """Progress that remembers what was said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def copied(finished_run, tiny_model, tmp_path):
    """A copy of the finished run, and its recipe loaded with changes: ``copied(sft={...})``."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)

    def load(**changes):
        return load_recipe(tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, output=str(folder), **changes))

    return load


def stale(loaded):
    """For each stage of a run, why it would run again as things stand."""
    folder = loaded.recipe.folder()
    with journal.Journal(folder / "journal.db") as book:
        run = Run(loaded, folder, book, Progress(quiet=True))
        return {
            stage: journal.broken(run.stage_folder(stage), MODULES[stage].inputs(run)) for stage in loaded.recipe.stages
        }


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_stages_its_recipe_its_journal_and_its_report_and_nothing_else(finished_run):
    assert sorted(path.name for path in finished_run.iterdir()) == [
        ".lock",
        *FOLDERS,
        "journal.db",
        "recipe.yaml",
        "report.html",
    ]
    left = [path.name for path in finished_run.rglob("*") if ".rlaif-" in path.name or "checkpoint" in path.name]
    assert left == []
    assert list(finished_run.rglob(pipeline.STARTED)) == []


def test_every_manifest_names_every_file_of_its_stage(finished_run):
    for number, stage in enumerate(STAGES, start=1):
        folder = finished_run / f"{number}-{stage}"
        manifest = journal.read_manifest(folder)
        assert manifest.stage == stage
        assert set(manifest.outputs) == set(tiny_runs.contents(folder)) - {"manifest.json"}
        assert manifest.peak_memory_gib > 0.05
        assert manifest.versions["torch"]


def test_the_report_reads_the_run_and_shows_every_stage(finished_run):
    run = read_run(finished_run)
    assert list(run.manifests) == list(STAGES)
    assert len(run.chains) == 12
    assert [row["update"] for row in run.ppo] == [1, 2, 3]
    assert run.results.policies == ["base", "sft", "ppo"]
    page = (finished_run / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")


def test_every_demonstration_says_which_prompt_principle_and_model_it_came_from(finished_run, tiny_model):
    for row in tiny_runs.rows(finished_run / "1-revise" / "demonstrations.jsonl"):
        assert row["provenance"]["prompt_id"] == row["id"].rsplit("-", 1)[0]
        assert row["provenance"]["model"] == str(tiny_model)
        assert (row["provenance"]["principle"] is None) == (row["tag"] == "ordinary")


def test_the_resolved_recipe_loads_again_to_the_same_recipe_and_inputs(finished_run, copied):
    given, resolved = copied(), open_run(finished_run)
    same = {"exclude": {"output", "constitution", "prompts"}}
    assert resolved.recipe.model_dump(**same) == given.recipe.model_dump(**same)
    assert resolved.recipe.folder() == finished_run
    assert resolved.constitution == finished_run.parent / "tiny-constitution.yaml"
    assert resolved.prompts == given.prompts
    assert stale(resolved) == {stage: [] for stage in STAGES}


def test_a_folder_without_a_recipe_is_no_run_folder(tmp_path):
    with pytest.raises(JournalError, match="not a run folder"):
        open_run(tmp_path)


def test_a_second_run_says_that_every_stage_is_up_to_date_and_runs_none(copied, monkeypatch):
    for stage, module in MODULES.items():
        monkeypatch.setattr(module, stage, lambda run, stage=stage: pytest.fail(f"{stage} ran again"))
    loaded = copied()
    before = tiny_runs.contents(loaded.recipe.folder())
    told = Told()
    run_recipe(loaded, told)
    assert told.lines == [f"{folder}: up to date" for folder in FOLDERS]
    after = tiny_runs.contents(loaded.recipe.folder())
    assert after.pop("recipe.yaml") != before.pop("recipe.yaml")  # it says where the copy is
    assert after == before


# --- what depends on what --------------------------------------------------------------------------------------------


def changed_constitution(tmp_path, old, new):
    assert tiny_runs.CONSTITUTION.count(old) == 1
    path = tmp_path / "changed.yaml"
    path.write_text(tiny_runs.CONSTITUTION.replace(old, new))
    return str(path)


def reasons(stale_stages):
    return {stage: found for stage, found in stale_stages.items() if found}


def test_a_changed_principle_makes_the_stages_that_read_principles_stale(copied, tmp_path):
    path = changed_constitution(tmp_path, "Make it safe.", "Make it harmless.")
    assert reasons(stale(copied(constitution=path))) == {
        stage: ["input `constitution` changed"] for stage in ("revise", "label", "evaluate")
    }


def test_a_changed_judge_test_does_not_touch_revise_and_sft(copied, tmp_path):
    path = changed_constitution(tmp_path, "May I borrow your pen?", "Is this seat taken?")
    assert reasons(stale(copied(constitution=path))) == {"label": ["input `constitution` changed"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sft": {"learning_rate": 1e-3}}, {"sft": ["input `recipe.sft` changed"]}),
        ({"sft": {"save_steps": 2}}, {}),
        ({"reward": {"min_heldout_accuracy": 0.1, "allow_weak_reward": False}}, {}),
        ({"label": {"min_judge_accuracy": 0.1}}, {}),
        ({"ppo": {"save_every_updates": 2}}, {}),
        ({"ppo": {"kl_coef": 0.1}}, {"ppo": ["input `recipe.ppo` changed"]}),
        ({"evaluate": {"judge_prompts_per_tag": 0}}, {"evaluate": ["input `recipe.evaluate` changed"]}),
        ({"seed": 4}, {stage: ["input `seed` changed"] for stage in STAGES}),
        ({"model": {"lora_r": 8}}, {stage: ["input `model` changed"] for stage in STAGES}),
    ],
)
def test_a_changed_key_makes_exactly_the_stages_that_it_determines_stale(copied, changes, expected):
    assert reasons(stale(copied(**changes))) == expected


@pytest.mark.slow
def test_a_stage_whose_file_was_changed_runs_again_and_the_others_do_not(copied):
    loaded = copied()
    folder = loaded.recipe.folder()
    (folder / "3-label" / "quality.json").write_text("{}")
    whole = tiny_runs.lasting(folder)
    told = Told()
    run_recipe(loaded, told)
    assert told.lines[2] == "3-label (`quality.json` was changed or is missing)"
    assert [line for line in told.lines if line.endswith(": up to date")] == [
        f"{name}: up to date" for name in FOLDERS if name != "3-label"
    ]
    taken = [line for line in told.lines if line.endswith("taken from the journal")]
    assert len(taken) == 3  # the judge's tests, the plain responses, and those under the constitution
    assert all(line.split(":")[1].split()[0] == line.split(":")[1].split()[2] for line in taken)
    after = tiny_runs.lasting(folder)
    assert after.pop("3-label/quality.json") != whole.pop("3-label/quality.json")
    assert after == whole


@pytest.mark.slow
def test_after_a_changed_principle_only_the_answers_that_it_was_part_of_are_asked_for_again(copied, tmp_path):
    loaded = copied()
    folder = loaded.recipe.folder()
    before, chains = tiny_runs.units(folder), tiny_runs.rows(folder / "1-revise" / "chains.jsonl")
    drawn = {row["prompt_id"]: row["steps"][0]["principle"] for row in chains if row["steps"]}
    assert set(drawn.values()) == {"kind", "safe", "plain"}
    told = Told()
    run_recipe(copied(constitution=changed_constitution(tmp_path, "Make it safe.", "Make it harmless.")), told)
    assert "  responses: 12 of 12 taken from the journal" in told.lines
    assert "  critique 1: 6 of 6 taken from the journal" in told.lines
    after = tiny_runs.units(folder)
    asked = {key[0] for key in after["revise"].keys() - before["revise"].keys()}
    assert asked == {f"{prompt}/revise-0" for prompt, name in drawn.items() if name == "safe"}
    ran = [line.split()[0] for line in told.lines if line[0].isdigit() and "up to date" not in line]
    assert ran == FOLDERS
    assert stale(copied(constitution=str(tmp_path / "changed.yaml"))) == {stage: [] for stage in STAGES}


# --- with stages that only take notes --------------------------------------------------------------------------------


@pytest.fixture
def noted(monkeypatch, tmp_path, tiny_model):
    """Stages that write one file and are noted when they run; `noted.fail_in` names one that breaks off."""

    class Noted:
        ran: list[str] = []
        fail_in = ""
        inputs = {stage: {"x": "1"} for stage in STAGES}
        found: dict[str, list[str]] = {}

        def load(self, **changes):
            changes = {"output": str(tmp_path / "run"), **changes}
            return load_recipe(tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, **changes))

        def run(self, **options):
            self.ran = []
            told = Told()
            run_recipe(self.load(), told, **options)
            return told.lines

    notes = Noted()

    def stage_of(stage):
        def work(run):
            folder = run.stage_folder(stage)
            notes.ran.append(stage)
            notes.found[stage] = sorted(tiny_runs.contents(folder))
            files.write_json(folder / "checkpoints" / "checkpoint-1" / "state.json", {})
            if notes.fail_in == stage:
                raise StageError("broken off")
            files.write_json(folder / "result.json", {"stage": stage})
            return {"rows": 1}

        return work

    monkeypatch.setattr(pipeline.gc, "collect", lambda: 0)  # there is no model to free
    for stage, module in MODULES.items():
        monkeypatch.setattr(module, "inputs", lambda run, stage=stage: notes.inputs[stage])
        monkeypatch.setattr(module, stage, stage_of(stage))
    return notes


def test_until_stops_after_its_stage_and_a_later_run_goes_on_from_there(noted):
    noted.run(last="label")
    assert noted.ran == ["revise", "sft", "label"]
    noted.run()
    assert noted.ran == ["reward", "ppo", "evaluate"]


def test_from_runs_its_stage_and_all_later_ones_again(noted):
    noted.run()
    noted.run(first="reward")
    assert noted.ran == ["reward", "ppo", "evaluate"]
    noted.run(first="sft", last="label")
    assert noted.ran == ["sft", "label"]
    assert noted.run() == [f"{folder}: up to date" for folder in FOLDERS]


def test_a_run_with_from_that_broke_off_is_continued_without_it(noted):
    noted.run()
    noted.fail_in = "ppo"
    with pytest.raises(StageError):
        noted.run(first="reward")
    noted.fail_in = ""
    noted.run()
    assert noted.ran == ["ppo", "evaluate"]
    assert noted.found["ppo"] == ["checkpoints/checkpoint-1/state.json", "started.json"]


def test_a_single_stage_runs_alone_and_only_when_it_must(noted):
    noted.run(only="sft")
    assert noted.ran == ["sft"]
    noted.run(only="sft")
    assert noted.ran == []


@pytest.mark.parametrize("option", ["first", "last", "only"])
def test_a_stage_that_the_recipe_does_not_have_is_an_error_before_anything_is_written(noted, option, tmp_path):
    with pytest.raises(ConfigError, match=r"tiny\.yaml: has no stage `dpo`; its stages: revise, sft, label"):
        noted.run(**{option: "dpo"})
    assert not (tmp_path / "run").exists()


def test_a_stage_that_broke_off_finds_its_checkpoints_where_nothing_has_changed(noted):
    noted.fail_in = "sft"
    with pytest.raises(StageError):
        noted.run()
    noted.fail_in = ""
    noted.run()
    assert noted.ran == ["sft", "label", "reward", "ppo", "evaluate"]
    assert noted.found["sft"] == ["checkpoints/checkpoint-1/state.json", "started.json"]


def test_a_stage_that_broke_off_starts_in_an_empty_folder_where_its_inputs_have_changed(noted):
    noted.fail_in = "sft"
    with pytest.raises(StageError):
        noted.run()
    noted.fail_in = ""
    noted.inputs = {**noted.inputs, "sft": {"x": "2"}}
    noted.run()
    assert noted.found["sft"] == ["started.json"]


def test_a_finished_stage_whose_inputs_have_changed_starts_in_an_empty_folder(noted):
    noted.run()
    noted.inputs = {**noted.inputs, "label": {"x": "2"}}
    lines = noted.run()
    assert noted.ran == ["label"]
    assert "3-label (input `x` changed)" in lines
    assert noted.found["label"] == ["started.json"]


def test_a_started_file_that_cannot_be_read_is_taken_for_a_change(noted, tmp_path):
    noted.fail_in = "revise"
    with pytest.raises(StageError):
        noted.run()
    (tmp_path / "run" / "1-revise" / "started.json").write_text("[]")
    noted.fail_in = ""
    noted.run(last="revise")
    assert noted.found["revise"] == ["started.json"]


def test_checkpoints_stay_until_the_manifest_stands_and_are_not_part_of_it(noted, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "2-sft"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_tidy", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            noted.run(only="sft")
    assert (folder / "checkpoints" / "checkpoint-1").is_dir()
    assert list(journal.read_manifest(folder).outputs) == ["result.json"]
    assert noted.run(only="sft") == ["2-sft: up to date"]
    assert noted.ran == []
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "result.json"]


def test_a_run_folder_in_use_is_refused(noted, tmp_path):
    with files.run_lock(tmp_path / "run"), pytest.raises(JournalError, match="in use by another process"):
        noted.run()
    assert noted.ran == []


def test_a_run_that_fails_leaves_the_folder_unlocked(noted):
    noted.fail_in = "revise"
    for _ in range(2):
        with pytest.raises(StageError):
            noted.run()


# --- stages on their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "label", "reward", "ppo", "evaluate"])
def test_a_stage_before_its_turn_says_which_one_to_run_first(tmp_path, tiny_model, stage):
    recipe = tiny_runs.write_recipe(tmp_path / "tiny.yaml", tiny_model, output=str(tmp_path / "run"))
    with pytest.raises(StageError, match=r"not there yet\. Run the stage `(revise|sft|label|reward)` first: rlaif "):
        run_recipe(load_recipe(recipe), Progress(quiet=True), only=stage)


def test_an_answer_that_stands_for_nothing_stops_before_the_next_stage(copied):
    loaded = copied()
    folder = loaded.recipe.folder()
    (folder / "1-revise" / "demonstrations.jsonl").write_text("")
    with pytest.raises(DataError, match="no demonstration"):
        run_recipe(loaded, Progress(quiet=True), only="sft")


def test_peak_memory_is_measured_since_the_last_reset():
    pipeline._reset_peak()
    low = pipeline.peak_memory_gib()
    block = bytearray(300 << 20)
    high = pipeline.peak_memory_gib()
    del block
    assert high > low + 0.25
