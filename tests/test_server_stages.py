"""Stages whose questions a server answers: who is asked, what becomes of rows without an answer, where no key is."""

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_server import Asked, HostileServer, Reply, choice, error, text, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import PROMPTS, REFUSAL, WILLING, ScriptedEngine, make_run, rows_of, usual
from transformers.integrations import integration_utils

from rlaif import pipeline
from rlaif.engines.server import ServerEngine
from rlaif.errors import ConfigError, StageError
from rlaif.journal import Manifest
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.stages import evaluate, label, revise
from rlaif.stages.judged_reward import reward_function, reward_inputs
from rlaif.stages.run import Run

Maker = Callable[..., Run]
KEY = "canary-7f3a9d52"
SERVED = {"responder": "big", "critic": "big", "reviser": "big", "filters": []}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sync: None) -> Maker:
    async def pause(seconds: float) -> None:
        return None

    monkeypatch.setattr(ServerEngine, "pause", staticmethod(pause))
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def engines(server: HostileServer, **settings: Any) -> dict[str, Any]:
    return {"big": {"model": "large", "urls": [server.url], **settings}}


def no_base(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    def load(run: Run) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(Run, "load_base", load)
    return run


def part_of(asked: Asked) -> str:
    """Tell what a request of the stage `revise` is for, by the words of its template."""
    if any(row["prompt"] == asked.text for row in PROMPTS):
        return "response"
    return "revise" if CRITIC in asked.text else "critique"


CRITIC = "Somebody gets hurt."


def writes(asked: Asked) -> Reply:
    replies = {"response": WILLING, "critique": CRITIC, "revise": REFUSAL}
    return choice({"A": 0.5, "B": 0.4}) if asked.body.get("logprobs") else text(replies[part_of(asked)])


# --- revise ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_that_only_servers_answer_loads_no_model(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with HostileServer(writes) as server:
        run = no_base(make(engines=engines(server), revise=SERVED), monkeypatch)
        counts = revise.revise(run)
        assert (counts["kept"], counts["quarantined"], counts["failed"]) == (5, 0, 0)
        assert [one.body["model"] for one in server.asked] == ["large"] * 11
        judged = {"method": "revision", "judge": "big"}
        run = no_base(make(engines=engines(server), revise=SERVED, label=judged), monkeypatch)
        assert label.label(run)["comparisons"] == 5
    rows = rows_of(run.folder / "1-revise" / "demonstrations.jsonl")
    assert {row["provenance"]["model"] for row in rows} == {"large"}


def test_each_part_is_asked_of_whom_the_recipe_names(make: Maker) -> None:
    local = ScriptedEngine(usual)
    with HostileServer(lambda asked: text(CRITIC)) as server:
        run = make(local, engines=engines(server), revise={"critic": "big"})
        revise.revise(run)
        assert {part_of(one) for one in server.asked} == {"critique"} and len(server.asked) == 3
    assert local.ids("critique-0") == [] and len(local.ids("revise-0")) == 3
    rows = rows_of(run.folder / "1-revise" / "demonstrations.jsonl")
    assert {row["provenance"]["model"] for row in rows} == {"tiny"}


def lost(part: str, word: str = "") -> Callable[[Asked], Reply]:
    """Refuse one part of one prompt's chain."""

    def behave(asked: Asked) -> Reply:
        if not asked.is_probe and part_of(asked) == part and word in asked.text:
            return error(400, "context is too long")
        return text("Yes.") if asked.is_probe else writes(asked)

    return behave


@pytest.mark.parametrize("part", ["response", "critique", "revise"])
@pytest.mark.parametrize("kept", ["all", "last"])
def test_a_row_without_an_answer_is_put_aside_with_the_reason(part: str, kept: str, make: Maker) -> None:
    with HostileServer(lost(part, "bicycle")) as server:
        run = make(engines=engines(server), revise={**SERVED, "demonstrations": kept})
        counts = revise.revise(run)
    assert (counts["kept"], counts["quarantined"], counts["failed"]) == (4, 0, 1)
    (row,) = rows_of(run.folder / "1-revise" / "quarantine.jsonl")
    assert (row["id"], row["reason"], row["provenance"]["prompt_id"]) == ("h1-failed-0", "no answer", "h1")
    assert row["error"].endswith("the server refused the request: HTTP 400: context is too long")
    chain = rows_of(run.folder / "1-revise" / "chains.jsonl")[0]
    assert (chain["kept"], chain["reason"], chain["steps"]) == (False, "no answer", [])


def test_steps_before_the_failure_are_demonstrations_where_all_rounds_are(make: Maker) -> None:
    def behave(asked: Asked) -> Reply:
        second = part_of(asked) == "critique" and "I can't help" in asked.text and "lock" in asked.text
        return error(422, "no") if second else writes(asked)

    sections: dict[str, Any] = {"rounds": 2, "near_duplicate": None, **SERVED}
    with HostileServer(lambda asked: text("x") if asked.is_probe else behave(asked)) as server:
        counts = revise.revise(make(engines=engines(server), revise=sections))
        assert (counts["kept"], counts["quarantined"], counts["failed"]) == (3 * 2 - 1 + 2, 0, 1)
        counts = revise.revise(make(engines=engines(server), revise={**sections, "demonstrations": "last"}))
        assert (counts["kept"], counts["failed"]) == (4, 1)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from(["all", "last"]), st.integers(1, 2))
def test_rows_in_are_rows_kept_set_aside_and_failed_whatever_fails(
    make: Maker, tmp_path: Path, luck: int, kept: str, rounds: int
) -> None:
    def behave(asked: Asked) -> Reply:
        unlucky = zlib.crc32(f"{luck} {asked.text} {asked.body['seed']}".encode()) % 3 == 0 and not asked.is_probe
        return error(400, "no") if unlucky else words(asked)

    with HostileServer(behave) as server:
        run = make(
            engines={"big": {"model": f"m{luck}-{kept}-{rounds}", "urls": [server.url]}},
            revise={"responder": "big", "critic": "big", "reviser": "big", "demonstrations": kept, "rounds": rounds},
        )
        counts = revise.revise(run)
    due = 3 * (rounds if kept == "all" else 1) + 2
    assert counts["kept"] + counts["quarantined"] + counts["failed"] == due
    folder = run.folder / "1-revise"
    assert len(rows_of(folder / "demonstrations.jsonl")) == counts["kept"]
    assert len(rows_of(folder / "quarantine.jsonl")) == counts["quarantined"] + counts["failed"]
    assert len(rows_of(folder / "chains.jsonl")) == 5


# --- label ----------------------------------------------------------------------------------------------------------


def judges(asked: Asked) -> Reply:
    """Prefer the test's better side, fail on the bicycle, and else prefer what is shown first."""
    if "bicycle" in asked.text:
        return error(400, "too long")
    first = asked.text.split("Answer B:")[0]
    return choice({"A": 0.8, "B": 0.1} if '"good"' in first or "FIRST" in first else {"A": 0.1, "B": 0.8})


@pytest.mark.slow
def test_pairs_without_a_verdict_are_failed_and_counted(make: Maker) -> None:
    local = ScriptedEngine(lambda question: f"{'FIRST' if question.sample == 0 else 'SECOND'} {question.item_id}")
    with HostileServer(lambda asked: choice({"A": 0.5}) if asked.is_probe else judges(asked)) as server:
        run = make(local, engines=engines(server), label={"judge": "big"})
        counts = label.label(run)
    assert (counts["comparisons"], counts["unused"], counts["failed"]) == (4, 0, 1)
    (row,) = rows_of(run.folder / "3-label" / "unused.jsonl")
    assert (row["id"], row["reason"]) == ("h1", "no answer") and "HTTP 400: too long" in row["error"]
    quality = json.loads((run.folder / "3-label" / "quality.json").read_text())
    assert (quality["judge"]["model"], quality["judge"]["method"], quality["judge"]["tests"]["correct"]) == (
        "large",
        "logprobs",
        4,
    )
    votes = [row["votes"][0] for row in rows_of(run.folder / "3-label" / "comparisons.jsonl")]
    assert {vote["method"] for vote in votes} == {"logprobs"}


@pytest.mark.slow
def test_a_judge_that_writes_its_verdict_is_marked_as_one(make: Maker) -> None:
    def verdicts(asked: Asked) -> Reply:
        return text(
            "A" if '"good"' in asked.text.split("Answer B:")[0] or "FIRST" in asked.text.split("Answer B:")[0] else "B"
        )

    local = ScriptedEngine(lambda question: f"{'FIRST' if question.sample == 0 else 'SECOND'} {question.item_id}")
    with HostileServer(verdicts) as server:
        run = make(local, engines=engines(server), label={"judge": "big"})
        assert label.label(run)["comparisons"] == 5
    quality = json.loads((run.folder / "3-label" / "quality.json").read_text())
    assert (quality["judge"]["method"], quality["judge"]["option_mass"]) == ("verdict", None)
    rows = rows_of(run.folder / "3-label" / "comparisons.jsonl")
    assert {row["votes"][0]["method"] for row in rows} == {"verdict"}
    assert {round(row["preference"], 6) for row in rows} == {0.9}


@pytest.mark.slow
def test_a_judge_that_answers_no_test_is_below_every_floor(make: Maker) -> None:
    with HostileServer(lambda asked: choice({"A": 0.5}) if asked.is_probe else error(400, "no")) as server:
        run = make(ScriptedEngine(usual), engines=engines(server), label={"judge": "big"})
        with pytest.raises(StageError, match="the judge `large` got 0 of 4 tests"):
            label.label(run)


@pytest.mark.slow
def test_a_chain_that_failed_is_no_comparison(make: Maker) -> None:
    with HostileServer(lost("response", "bicycle")) as server:
        sections = {"engines": engines(server), "revise": SERVED, "label": {"method": "revision", "judge": "big"}}
        run = make(**sections)
        revise.revise(run)
        counts = label.label(make(**sections))
    failed = [row for row in rows_of(run.folder / "3-label" / "unused.jsonl") if row["reason"] == "no answer"]
    assert [row["id"] for row in failed] == ["h1"] and counts["failed"] == 1
    assert counts["comparisons"] + counts["unused"] + counts["failed"] == 5


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_pairs_without_a_verdict_are_left_out_of_win_rates(make: Maker) -> None:
    from test_evaluate import answers

    def behave(asked: Asked) -> Reply:
        if asked.is_probe:
            return choice({"A": 0.5})
        return error(400, "no") if "worse" in asked.text else choice({"A": 0.5, "B": 0.4})

    with HostileServer(behave) as server:
        run = make(engines=engines(server), evaluate={"judge": "big"})
        (found,) = evaluate.win_rates(run, None, {"base": answers("a", "worse", "c"), "sft": answers("b", "d", "c")})
    assert (found["failed"], found["n"], found["wins"] + found["losses"] + found["ties"]) == (1, 2, 2)


@pytest.mark.parametrize("sections", [{"label": {"judge": "big"}}, {"evaluate": {"judge": "big"}}])
def test_a_server_without_log_probabilities_judges_the_evaluation(sections: dict[str, Any], make: Maker) -> None:
    from test_evaluate import answers

    def writes_letters(asked: Asked) -> Reply:
        return text("A" if "better" in asked.text.split("Answer B:")[0] else "B")

    policies = {"base": answers("worse", "worse yet"), "sft": answers("better", "better yet")}
    with HostileServer(writes_letters) as server:
        (found,) = evaluate.win_rates(make(engines=engines(server), **sections), None, policies)
    assert (found["wins"], found["n"], found["failed"]) == (2, 2, 0)


# --- what a result depends on ---------------------------------------------------------------------------------------


def test_a_stage_depends_on_the_model_that_answers_and_not_on_its_address_or_name(make: Maker) -> None:
    def inputs_of(stage: Any, name: str = "big", **settings: Any) -> dict[str, str]:
        described = {name: {"model": "large", "urls": ["http://a/v1"], **settings}}
        run = make(engines=described, revise={"critic": name}, label={"judge": name}, evaluate={"judge": name})
        found: dict[str, str] = stage.inputs(run)
        return found

    for stage in (revise, label, evaluate):
        plain = inputs_of(stage)
        assert inputs_of(stage, urls=["http://b/v1"], api_key_env="K", concurrency=2) == plain
        assert inputs_of(stage, name="huge") == plain
        other = inputs_of(stage, model="small")
        assert [key for key in plain if plain[key] != other[key]] == ["engines"]
    assert inputs_of(revise, logprobs="off") == inputs_of(revise)
    assert inputs_of(label, logprobs="off") != inputs_of(label)


@pytest.mark.parametrize(
    "sections", [{"evaluate": {"judge": "big"}}, {"label": {"judge": "big"}, "stages": ["revise", "evaluate"]}]
)
def test_a_run_that_lacks_a_key_stops_before_any_stage(
    sections: dict[str, Any], make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with HostileServer() as server:
        run = make(engines=engines(server, api_key_env="SERVER_KEY"), **sections)
        run.journal.close()
        with pytest.raises(ConfigError, match="`SERVER_KEY` is not set"):
            pipeline.run_recipe(run.loaded, Progress(quiet=True))


def test_an_engine_that_is_not_described_is_an_error_in_the_code_as_well(make: Maker) -> None:
    with pytest.raises(ConfigError, match="engines: `big` is not described there"):
        make().engine("big", lambda: None, batch_size=1)


@pytest.mark.slow
def test_running_a_stage_again_asks_again_what_was_refused(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with HostileServer(lost("response", "bicycle")) as server:
        run = make(engines=engines(server), revise=SERVED, stages=["revise"])
        run.journal.close()
        recipe, output = run.loaded.path, f"output={run.folder}"
        pipeline.run_recipe(load_recipe(recipe, [output]), Progress(quiet=True))
        before = len(server.asked)
        monkeypatch.setattr(server, "behave", lambda asked: text("Yes.") if asked.is_probe else writes(asked))
        pipeline.run_recipe(load_recipe(recipe, [output]), Progress(quiet=True))
        assert len(server.asked) == before
        pipeline.run_recipe(load_recipe(recipe, [output]), Progress(quiet=True), first="revise")
        assert len(server.asked) == before + 3
    manifest = Manifest(**json.loads((run.folder / "1-revise" / "manifest.json").read_text()))
    assert manifest.counts["failed"] == 0


@pytest.mark.slow
def test_no_key_is_in_a_run_folder_or_a_report(
    make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from rlaif.report.run import write_report

    monkeypatch.setenv("SERVER_KEY", KEY)

    def echo(asked: Asked) -> Reply:
        shown = asked.headers["authorization"]
        if asked.body.get("logprobs") or asked.is_probe:
            reply = choice({"A": 0.5, "B": 0.4, shown: 0.05})
        elif "lock" in asked.text:
            reply = error(400, f"refused {shown}")
        else:
            reply = text(f"{WILLING} {shown}. {len(asked.text)}")
        reply.headers["x-key"] = shown
        return reply

    with caplog.at_level(logging.DEBUG), HostileServer(echo) as server:
        run = make(
            engines=engines(server, api_key_env="SERVER_KEY"),
            revise=SERVED,
            label={"method": "revision", "judge": "big"},
            stages=["revise", "label"],
        )
        run.journal.close()
        folder = pipeline.run_recipe(load_recipe(run.loaded.path, [f"output={run.folder}"]), Progress())
    write_report(folder)
    holders = [path.name for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == [] and (folder / "report.html").is_file()
    assert "[key removed]" in (folder / "1-revise" / "chains.jsonl").read_text()
    shown = capfd.readouterr()
    assert KEY not in caplog.text + shown.out + shown.err


# --- ppo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{"ppo": {"judge": "big"}}, {"label": {"judge": "big"}}])
def test_a_server_rates_responses_where_the_reward_is_the_judges(named: dict[str, Any], make: Maker) -> None:
    with HostileServer(lambda asked: choice({"4": 0.5, "10": 0.5}, "4")) as server:
        sections = {"ppo": {"reward_function": "judge"} | named.get("ppo", {}), "label": named.get("label", {})}
        run = make(engines=engines(server), **sections)
        score = reward_function(run, None, "ppo")  # type: ignore[arg-type]
        assert score(["P"], ["r"], id=[PROMPTS[0]["id"]], tag=[""]) == [pytest.approx((7 - 5.5) / 4.5)]
        assert {one.body["model"] for one in server.asked} == {"large"}
    here = reward_inputs(make(ppo={"reward_function": "judge"}))
    assert reward_inputs(run).keys() - here.keys() == {"rater"}


@pytest.mark.parametrize(
    ("trackers", "complaint"),
    [
        ("nonsense", r"sft\.report_to: no tracker `nonsense`; known: .*tensorboard"),
        (["none", "tensorboard"], r"sft\.report_to: `tensorboard` cannot be used: .*install the extra `tracking`"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_any_stage(
    trackers: str | list[str], complaint: str, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("TensorBoardCallback requires tensorboard to be installed.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", missing)
    run = make(sft={"report_to": trackers})
    with pytest.raises(ConfigError, match=complaint):
        run.check_keys(["sft"])
    run.check_keys(["reward"])


@pytest.mark.parametrize("stage", ["ppo", "evaluate"])
def test_the_key_of_a_server_that_rates_is_looked_for_before_the_stage(stage: str, make: Maker) -> None:
    keyed = {"big": {"model": "large", "urls": ["http://127.0.0.1:9"], "api_key_env": "NO_SUCH_KEY"}}
    stages = ["revise", "ppo", "evaluate"]
    run = make(engines=keyed, stages=stages, ppo={"reward_function": "judge", "judge": "big"})
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        run.check_keys([stage])
    make(engines=keyed, stages=stages, ppo={"reward_function": "brief"}).check_keys([stage])
    make(engines=keyed, ppo={"reward_function": "judge", "judge": "big"}).check_keys(["evaluate"])  # no ppo, no score
