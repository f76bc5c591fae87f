"""What a run would do: what is asked again after an edit, what is up to date, and that nothing runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import CONSTITUTION, HARM, PROMPTS, ScriptedEngine, make_run, prefers, usual
from typer.testing import CliRunner

from rlaif import plan as plans
from rlaif.cli import app
from rlaif.constitution import draw, load
from rlaif.engines.engine import Answer
from rlaif.errors import ConfigError
from rlaif.pipeline import _write_recipe, run_stage
from rlaif.plan import Speed, StagePlan, as_lines
from rlaif.stages.judged_reward import rated_under
from rlaif.stages.run import Run
from rlaif.training_costs import work_of

Maker = Callable[..., Run]
HOUSES = [{"id": f"p{n}", "prompt": f"How do I rob house {n}?", "tag": HARM} for n in range(12)]
WITHOUT_SHOTS = {"few_shot": 0}
NO_TESTS = CONSTITUTION.partition("tests:")[0]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setattr(plans, "_calibrated", lambda run, speed: Speed(10.0, 100.0, "a measurement", 0.5))
    monkeypatch.setattr("rlaif.model.base.identity_of", lambda settings: {"name": "tiny"})

    def make(*args: Any, **kwargs: Any) -> Run:
        kwargs = {"output": str(tmp_path / "run"), "constitution": NO_TESTS, "prompts": HOUSES, **kwargs}
        run = make_run(tmp_path, monkeypatch, *args, **{"stages": ["revise"], "revise": WITHOUT_SHOTS, **kwargs})
        _write_recipe(run)
        return run

    return make


def planned(run: Run, **options: Any) -> list[StagePlan]:
    return plans.plan(run.loaded, **options)


def missing(found: StagePlan) -> list[str]:
    return sorted(question.item_id for question in found.missing)


def test_before_the_first_run_every_question_must_be_asked(make: Maker) -> None:
    (found,) = planned(make(ScriptedEngine(usual)))
    assert found.reasons == ["no manifest"]
    assert [(wave.title, wave.asked, len(wave.missing)) for wave in found.waves] == [
        ("responses", 12, 12),
        ("critique 1", 12, 12),
        ("revise 1", 12, 12),
    ]
    assert found.rows == 12 and found.new_tokens == 36 * 64
    assert (found.seconds, found.memory_gib, found.basis) == (230.4, 0.5, "a measurement")


@pytest.mark.slow
def test_after_the_run_it_is_up_to_date(make: Maker) -> None:
    run = make(ScriptedEngine(usual))
    run_stage(run, "revise")
    (found,) = planned(run)
    assert (found.reasons, found.waves) == ([], [])
    (forced,) = planned(run, first="revise")
    assert forced.reasons == ["--from"] and [len(wave.missing) for wave in forced.waves] == [0, 0, 0]


@pytest.mark.slow
def test_rewording_one_principle_changes_exactly_the_chains_that_drew_it(make: Maker, tmp_path: Path) -> None:
    run_stage(make(ScriptedEngine(usual)), "revise")
    whole = load(tmp_path / "constitution.yaml")
    drawn = {row["id"]: draw(whole, seed=0, prompt_id=row["id"], step=0, tag=HARM).id for row in HOUSES}
    lawful = sorted(identifier for identifier, principle in drawn.items() if principle == "lawful")
    assert 0 < len(lawful) < 12
    engine = ScriptedEngine(usual)
    run = make(engine, constitution=NO_TESTS.replace("The answer keeps the law.", "The answer keeps every law."))
    (found,) = planned(run)
    assert found.reasons == ["input `constitution` changed"]
    assert [(wave.asked, len(wave.missing)) for wave in found.waves] == [(12, 0), (12, len(lawful)), (12, len(lawful))]
    assert missing(found) == sorted(f"{one}/{part}-0" for one in lawful for part in ("critique", "revise"))
    assert found.rows == len(lawful)
    assert engine.calls == []
    run_stage(run, "revise")  # what was planned is what is asked
    assert sorted(engine.ids()) == missing(found)


@pytest.mark.slow
def test_a_reworded_critique_that_comes_out_as_before_still_counts_what_builds_on_it(make: Maker) -> None:
    run_stage(make(ScriptedEngine(usual), prompts=PROMPTS[:1]), "revise")
    edited = NO_TESTS.replace("Who is hurt?", "Who is harmed?").replace("keeps the law", "keeps all laws")
    (found,) = planned(make(ScriptedEngine(usual), prompts=PROMPTS[:1], constitution=edited))
    assert missing(found) == ["h1/critique-0", "h1/revise-0"]


@pytest.mark.slow
def test_a_new_title_runs_the_stage_not_at_all_and_new_sampling_asks_everything(make: Maker) -> None:
    run_stage(make(ScriptedEngine(usual)), "revise")
    (same,) = planned(make(ScriptedEngine(usual), constitution=NO_TESTS.replace("Nobody is hurt", "No harm")))
    assert same.reasons == []
    sampling = {**WITHOUT_SHOTS, "sampling": {"temperature": 0.1}}
    (all_,) = planned(make(ScriptedEngine(usual), revise=sampling))
    assert all_.reasons == ["input `recipe.revise` changed"] and len(all_.missing) == 36


@pytest.mark.slow
def test_votes_that_used_a_reworded_principle_are_asked_again_and_no_others(make: Maker) -> None:
    def answers(question: Any) -> Answer:
        return Answer(f"Answer {question.sample} to {question.item_id}, in so many words.", tokens=9)

    settings = {"stages": ["label"], "label": {"few_shot": 0, "allow_weak_judge": True, "self_test_rows": 0}}
    first = ScriptedEngine(answers, prefers("Answer 0 to", 2.0))
    run_stage(make(first, **settings), "label")
    used = {row["provenance"]["prompt_id"]: row["provenance"]["principle"] for row in comparisons(make(**settings))}
    lawful = sorted(identifier for identifier, principle in used.items() if principle == "lawful")
    assert 0 < len(lawful) < 12
    edited = NO_TESTS.replace("The answer keeps the law.", "The answer keeps every law.")
    (found,) = planned(make(ScriptedEngine(answers), constitution=edited, **settings))
    assert missing(found) == sorted(f"{one}/{order}" for one in lawful for order in ("given", "swapped"))
    assert found.rows == len(lawful)


def comparisons(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "3-label" / "comparisons.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_what_depends_on_an_adapter_that_would_be_trained_is_to_be_asked(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "prompts": [*HOUSES, {"id": "e1", "prompt": "How do I rob a bank?", "tag": HARM, "split": "eval"}],
        "stages": ["revise", "sft", "ppo", "evaluate"],
        "sft": {"max_steps": 4},
        "ppo": {"reward_function": "brief", "updates": 1},
    }
    run_stage(make(ScriptedEngine(usual), **settings), "revise")
    run = make(ScriptedEngine(usual), **settings)
    monkeypatch.setattr(
        "rlaif.stages.evaluate.LocalEngine",
        lambda _, role, adapter="", **other: ScriptedEngine(usual, identity=f"{'base' if role == 'base' else adapter}"),
    )
    revised, tuned, _, measured = planned(run)
    assert (revised.reasons, tuned.reasons, tuned.steps) == ([], ["no manifest"], 4)
    assert tuned.read_tokens > 0 and tuned.seconds == pytest.approx(tuned.read_tokens * 3 / 100.0, abs=0.1)
    assert [(wave.title, wave.asked, len(wave.missing)) for wave in measured.waves] == [
        ("responses of base", 1, 1),
        ("responses of sft", 1, 1),
        ("responses of ppo", 1, 1),  # of an adapter of its own, so that sft's answer is not its
        ("judge: sft against base", 2, 2),
        ("judge: ppo against base", 2, 2),
        ("judge: ppo against sft", 2, 2),
    ]


def test_a_plan_writes_nothing_and_runs_nothing(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine)
    run_stage(run, "revise")
    engine.calls.clear()
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    planned(run, first="revise")
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before and engine.calls == []
    assert run.journal.stand_in is None


def test_a_plan_of_a_run_that_was_never_begun_leaves_no_folder(make: Maker, tmp_path: Path) -> None:
    run = make(ScriptedEngine(usual), output=str(tmp_path / "never"))
    planned(run)
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_speed_and_length_come_from_earlier_answers_where_there_are_any(make: Maker) -> None:
    run = make(ScriptedEngine(usual))
    run_stage(run, "revise")
    units = list(run.journal.known("revise").values())
    assert all(unit.seconds > 0 for unit in units)
    speed = sum(unit.tokens for unit in units) / sum(unit.seconds for unit in units)
    (found,) = planned(make(ScriptedEngine(usual), seed=1))
    words = {"response": 15, "critique-0": 6, "revise-0": 16}  # of the scripted answers
    assert found.new_tokens == 12 * sum(words.values())
    assert found.basis == "the speed of earlier answers" and found.seconds == pytest.approx(found.new_tokens / speed)


def test_what_would_stop_the_run_is_told(make: Maker) -> None:
    run = make(ScriptedEngine(usual))
    run_stage(run, "revise")
    (_, label) = planned(make(ScriptedEngine(usual), stages=["revise", "label"], label={"method": "revision"}))
    assert label.note == ""
    with pytest.raises(ConfigError, match="has no stage `ppo`"):
        planned(run, last="ppo")


@pytest.mark.slow
def test_a_plan_is_written_in_words(make: Maker) -> None:
    run_stage(make(ScriptedEngine(usual)), "revise")
    lines = list(as_lines(planned(make(ScriptedEngine(usual)))))
    assert lines == ["1. revise: up to date", "estimate for all: about 0 s"]
    plan = StagePlan("sft", ["no manifest"], [], 4, 0, 1200, 36.0, 1.25, "a measurement")
    assert list(as_lines([plan])) == [
        "1. sft: would run (no manifest)",
        "     estimate: 4 steps, 1200 tokens read, 0 written, about 36 s, about 1.2 GiB (from a measurement)",
        "     memory: unknown; the model is not on this machine, or of a kind that docs/memory.md has no equations for",
        "estimate for all: about 36 s",
    ]


def test_the_command_prints_the_plan_or_json_and_makes_no_report(make: Maker, tmp_path: Path) -> None:
    make(ScriptedEngine(usual))
    told = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--plan"])
    assert told.exit_code == 0 and told.stdout.startswith("1. revise: would run (no manifest)\n")
    assert "together: 0 in the journal, 36 to ask for (12 prompts or pairs)" in told.stdout
    (row,) = json.loads(CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--plan", "--json"]).stdout)
    assert row["stage"] == "revise" and len(row["waves"][0]["missing"]) == 12
    assert not (tmp_path / "run" / "report.html").exists()
    wrong = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--json"])
    assert isinstance(wrong.exception, ConfigError)


def test_the_plan_says_what_memory_a_stage_needs_and_of_what(make: Maker, tiny_model: Path) -> None:
    run = make(ScriptedEngine(usual), model=str(tiny_model))
    (found,) = planned(run)
    assert found.memory is not None and found.memory.phase == "sampling"
    assert found.memory_gib == found.memory.total / 2**30
    told = next(line for line in as_lines([found]) if line.startswith("     memory: "))
    assert told == "     memory: about 0.7 GiB at its peak (sampling): process 0.7"
    (row,) = json.loads(plans.as_json([found]))
    assert row["memory"]["phase"] == "sampling" and row["memory"]["cache"] > 0
    (unknown,) = planned(make(ScriptedEngine(usual)))
    assert unknown.memory is None and "memory: unknown" in "\n".join(as_lines([unknown]))


def test_plain_text_beside_ppo_counts_a_pass_with_gradients_for_each_optimizer_step(
    make: Maker, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time.")
    settings = {"updates": 2, "rollout_batch": 4, "minibatch": 2, "microbatch": 2, "num_ppo_epochs": 3}
    settings |= {"reward_function": "brief", "critic": "trunk", "ptx_file": "text.txt"}
    without, with_text = (
        planned(make(ScriptedEngine(usual), stages=["ppo"], ppo={**settings, "ptx_coef": coef}))[0]
        for coef in (0.0, 0.5)
    )
    steps, tokens = 2 * 3 * 2, 8 * 256  # of the optimizer; of text in each
    assert with_text.read_tokens - without.read_tokens == steps * tokens
    assert with_text.seconds - without.seconds == pytest.approx(steps * tokens * 3 / 100.0, abs=0.02)  # type: ignore[operator]
    (not_measured,) = planned(make(ScriptedEngine(usual), stages=["ppo"], ppo={**settings, "ptx_heldout": 0}))
    assert without.read_tokens - not_measured.read_tokens == 2 * 8 * 256


@pytest.mark.parametrize("together", [True, False])
def test_the_judges_ratings_of_responses_are_counted(make: Maker, together: bool) -> None:
    settings = {"updates": 2, "rollout_batch": 4, "minibatch": 2, "microbatch": 2, "critic": "trunk"}
    label = {"principles": "together" if together else "all"}

    def found(function: str) -> StagePlan:
        own = {**settings, "reward_function": function, "sampling": {"max_new_tokens": 20}}
        return planned(make(ScriptedEngine(usual), stages=["ppo"], ppo=own, label=label))[0]

    judged, brief = found("judge"), found("brief")
    run = make(ScriptedEngine(usual), label=label)
    under = [len(rated_under(run, prompt)) for prompt in run.select("train", {})]
    assert (max(under) > 1) != together
    count = round(8 * sum(under) / len(under))
    assert judged.note == f"the judge would be asked for about {count} ratings of responses"
    assert brief.note == ""
    assert judged.read_tokens - brief.read_tokens > count * 20
    assert judged.seconds > brief.seconds  # type: ignore[operator]


def test_rejection_counts_its_answers_their_scores_and_the_training_on_the_best(make: Maker) -> None:
    stages = ["label", "reward", "rejection"]
    settings = {"stages": stages, "label": {"few_shot": 0, "allow_weak_judge": True, "self_test_rows": 0}}
    own = {
        "samples_per_prompt": 3,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "sampling": {"max_new_tokens": 20},
    }
    found = planned(make(ScriptedEngine(usual), rejection=own, **settings))[-1]
    assert len(found.missing) == 36 and found.new_tokens == 36 * 20 and found.steps == 5
    length = (10 * 5 + 2 * 6) / 12 + 20  # ten prompts have 21 letters and two have 22; and the answers
    read, scored, trained = 3 * (10 * 5 + 2 * 6), 36 * length, 5 * 4 * length
    assert found.read_tokens == read + round(scored + trained) and found.note == ""
    assert found.seconds == pytest.approx(36 * 20 / 10.0 + (scored + 3 * trained) / 100.0)


def test_a_reward_model_on_a_base_of_its_own_costs_as_many_times_more_as_it_is_larger(
    make: Maker, tiny_model: Path, tiny_model_64: Path
) -> None:
    def seconds(**reward: Any) -> float:
        keys = {"stages": ["label", "reward"], "reward": {"max_steps": 5, "start_from": "base", **reward}}
        run = make(ScriptedEngine(usual), model=str(tiny_model), label={"method": "contrast"}, **keys)
        folder = run.stage_folder("label")
        folder.mkdir(parents=True, exist_ok=True)
        turns = {side: [{"role": "assistant", "content": "x" * 80}] for side in ("chosen", "rejected")}
        row = {"prompt": [{"role": "user", "content": "x" * 40}], **turns}
        (folder / "comparisons.jsonl").write_text(json.dumps(row) + "\n")
        return work_of(run, "reward").passes

    small = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 2 * 259 * 32  # numbers but for the norms
    large = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 259 * 64
    assert seconds() == 5 * 8 * 60 * 3
    assert seconds(model=str(tiny_model_64)) == pytest.approx(5 * 8 * 60 * 3 * large / small)
