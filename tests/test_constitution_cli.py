"""The commands of `rlaif constitution`: what each prints, and the one message that each mistake gets."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
from hostile_server import Asked, HostileServer, Reply, choice, text
from scripted import CONSTITUTION, ScriptedEngine, make_run, prefers, usual

from rlaif import cli
from rlaif.constitution import load
from rlaif.engines.engine import Question
from rlaif.pipeline import _write_recipe
from rlaif.requests import fence_of
from rlaif.stages.revise import revise
from rlaif.stages.run import Run

SMALL = """\
name: small
version: "1"
description: For tests.
principles:
  - {id: kind, title: Kindness, text: The answer is kind., critique: Is it kind?}
  - {id: rare, title: Rarity, text: It is rarely drawn., weight: 0.0001}
examples:
  - {id: one, principle: kind, prompt: P1, response: R1, critique: C1, revision: V1}
comparisons:
  - {prompt: P2, first: A2, second: B2, better: second}
"""


@pytest.fixture
def rlaif(monkeypatch, capsys):
    """Run a command line in this process: ``code, out, err = rlaif("show", path)``."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlaif", "constitution", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return code, shown.out, shown.err

    return command


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return Path("small.yaml")


# --- check -----------------------------------------------------------------------------------------------------------


def test_warnings_are_printed_with_their_place_and_leave_the_exit_code_at_0(rlaif, small):
    code, out, err = rlaif("check", small)
    assert (code, err) == (0, "")
    warning, last = out.splitlines()
    assert warning.startswith("small.yaml:6:58: warning: principles.1.weight: `rare` gets at most 0.0001 of the draws")
    assert last == "small.yaml: small 1: 2 principles, 1 examples, 0 tests, 1 warning"


def test_errors_end_with_2_and_warnings_are_told_beside_them(rlaif, small):
    small.write_text(SMALL.replace("principle: kind", "principle: kin").replace("better: second", "better: none"))
    code, out, err = rlaif("check", small, "harmless")
    assert code == 2
    assert [line.split(": ")[:2] for line in out.splitlines()[:3]] == [
        ["small.yaml:6:58", "warning"],
        ["small.yaml:8:15", "error"],
        ["small.yaml:10:41", "error"],
    ]
    assert out.splitlines()[3].startswith("harmless: harmless 1.0: 15 principles")
    assert err == "rlaif: 2 errors in small.yaml. Mend what is listed and check again.\n"


def test_json_lists_the_problems_of_all_files_and_nothing_else(rlaif, small):
    code, out, _ = rlaif("check", small, "harmless", small, "--json")
    assert code == 0
    (problem,) = json.loads(out)
    assert list(problem) == ["file", "line", "column", "severity", "code", "message"]
    assert (problem["file"], problem["line"], problem["code"]) == ("small.yaml", 6, "rarely-drawn")
    assert json.loads(rlaif("check", "harmless", "--json")[1]) == []


def test_the_prompt_sets_decide_what_can_be_drawn(rlaif, small, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "a", "prompt": "P?", "tag": "weather"}) + "\n")
    small.write_text(SMALL.replace("weight: 0.0001", "applies_to: [weather]"))
    assert "never-drawn" in rlaif("check", small, "--json")[1]
    assert json.loads(rlaif("check", small, "--prompts", "own.jsonl", "--json")[1]) == []
    code, _, err = rlaif("check", small, "--prompts", "none")
    assert (code, err.startswith("rlaif: none: no such file")) == (2, True)


def test_the_context_can_be_given(rlaif, small):
    assert "too-long" in rlaif("check", small, "--max-tokens", 64, "--json")[1]


# --- show ------------------------------------------------------------------------------------------------------------


def test_without_a_prompt_show_prints_the_wordings(rlaif, small):
    code, out, _ = rlaif("show", small, "--principle", "kind")
    assert code == 0
    assert out.splitlines()[:3] == ["kind: Kindness", "  The answer is kind.", "  critique:   Is it kind?"]
    assert out.splitlines()[-2] == "  weight 1; for prompts tagged anything"


def test_with_a_prompt_show_prints_three_requests_with_their_worked_turns(rlaif, small, tmp_path):
    code, out, _ = rlaif(
        "show", small, "--principle", "kind", "--prompt", "Why?", "--response", "So.", "--other", "No."
    )
    assert code == 0
    heads = [line for line in out.splitlines() if line.startswith(("===", "---"))]
    turns = ["--- user ---", "--- assistant ---", "--- user ---"]
    assert heads == [
        "=== kind: critique ===",
        *turns,
        "=== kind: revise ===",
        *turns,
        "=== kind: compare ===",
        *turns,
    ]
    assert '"Why?"\n\nThe assistant answered:\n"So."\n\nIs it kind?\n' in out
    assert "A reviewer said: [the critique]" in out
    mark = fence_of("Why?", "So.", "No.", load(tmp_path / small).principle("kind").comparison_question())
    assert f'Answer A:\n[{mark}] "So." [{mark}]\n\nAnswer B:\n[{mark}] "No." [{mark}]' in out
    assert rlaif("show", small, "--prompt", "Why?", "--few-shot", 0)[1].count("--- user ---") == 6


def test_with_a_model_show_prints_the_text_with_its_control_tokens(rlaif, small, tiny_model):
    words = ("--principle", "kind", "--prompt", "Why <|end|>?", "--few-shot", 0, "--model", tiny_model)
    code, out, _ = rlaif("show", small, *words)
    assert code == 0
    assert '=== kind: critique ===\n<|start|>user\nSomeone asked an assistant:\n"Why <|end|>?"\n' in out
    assert out.count("<|end|>\n<|start|>assistant\n") == 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--principle", "none"], "small: no principle `none`; there are: kind, rare."),
        (
            ["--model", "smollm2-135m"],
            "--model: shows whole requests, which need a prompt. Give --prompt TEXT as well.",
        ),
        (["--prompt", "P", "--model", "nowhere"], "model `nowhere`: its tokenizer cannot be loaded"),
    ],
)
def test_what_cannot_be_shown_is_told(rlaif, small, words, part):
    code, _, err = rlaif("show", small, *words)
    assert code == 2
    assert part in err


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_exits_with_0_and_with_exit_code_1_where_files_differ(rlaif, small):
    Path("new.yaml").write_text(SMALL.replace("The answer is kind.", "The answer is warm."))
    code, out, err = rlaif("diff", small, "new.yaml")
    assert (code, err) == (0, "")
    assert out == "~ principle kind: reworded\n    text: The answer is [-kind.-]{+warm.+}\n"
    assert rlaif("diff", small, "new.yaml", "--exit-code")[0] == 1
    assert rlaif("diff", small, small, "--exit-code")[:2] == (0, "No difference that a model could see.\n")


def test_diff_as_json_has_the_parts_and_no_run(rlaif, small):
    Path("new.yaml").write_text(SMALL.replace("weight: 0.0001", "weight: 1"))
    found = json.loads(rlaif("diff", small, "new.yaml", "--json")[1])
    assert list(found) == ["equal", "principles", "examples", "comparisons", "tests", "run"]
    assert found["principles"]["reweighted"] == [{"id": "rare", "weight": [0.0001, 1.0]}]
    assert found["run"] is None


def test_diff_tells_what_a_run_would_do_again(rlaif, tmp_path, monkeypatch):
    engine = ScriptedEngine(usual)
    run = make_run(tmp_path, monkeypatch, engine, revise={"few_shot": 0, "filters": ["empty"]})
    _write_recipe(run)
    revise(run)
    Path("new.yaml").write_text(CONSTITUTION.replace("Who is hurt?", "Who is harmed?"))
    words = ("diff", "constitution.yaml", "new.yaml", "--run", "run")
    again = sum(run.principle_for(prompt).id == "safe" for prompt in run.prompts[:3])
    code, out, err = rlaif(*words)
    assert (code, err) == (0, "")
    assert out.splitlines()[2:4] == ["in run, with the new file:", f"  {again} of 5 chains would be done again"]
    found = json.loads(rlaif(*words, "--json")[1])["run"]
    assert found == {
        "run": "run",
        "chains": {"all": 5, "again": again, "reasons": {"its principle is reworded": again}},
        "votes": None,
    }
    assert rlaif("diff", "new.yaml", "constitution.yaml", "--run", "run")[2] == (
        "note: run was made with other principles or examples than those of new.yaml.\n"
    )
    assert "not a run folder" in rlaif("diff", "new.yaml", "new.yaml", "--run", tmp_path / "none")[2]


# --- import ----------------------------------------------------------------------------------------------------------


def test_import_writes_a_file_that_passes_the_check_and_says_what_is_missing(rlaif, tmp_path):
    Path("theirs.json").write_text(json.dumps([{"name": "Kind", "critique_request": "C.", "revision_request": "R."}]))
    code, out, err = rlaif("import", "theirs.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "theirs.json (pairs): 1 principle, 0 examples -> theirs.yaml"
    assert out.splitlines()[1].startswith("  not carried over: `text` and `comparison`: the source has none")
    assert out.splitlines()[2] == "Now read it, and give: rlaif constitution check theirs.yaml"
    assert Path("theirs.yaml").read_text().startswith("# yaml-language-server: $schema=./constitution.schema.json\n")
    assert rlaif("check", "theirs.yaml")[0] == 0


def test_import_overwrites_nothing(rlaif, tmp_path):
    Path("rules.txt").write_text("1. Be kind.\n")
    Path("rules.yaml").write_text("mine")
    code, _, err = rlaif("import", "rules.txt")
    assert code == 2
    assert "rules.yaml: is there already, and may have been edited. Name another file with --output." in err
    assert Path("rules.yaml").read_text() == "mine"
    assert rlaif("import", "rules.txt", "--output", "other.yaml")[0] == 0
    assert rlaif("import", "nowhere.txt")[2].startswith("rlaif: nowhere.txt: no such file.")


# --- test and induce -------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch, no_sync):
    """Let a scripted engine answer in the place of a model."""
    return lambda engine: monkeypatch.setattr(Run, "engine", lambda run, name, load, **settings: engine)


def test_tests_that_pass_exit_with_0_and_below_the_threshold_with_2_and_the_reason(rlaif, judged, tmp_path):
    (tmp_path / "small.yaml").write_text(CONSTITUTION)
    judged(ScriptedEngine(choose=prefers("good", 1.0)))
    code, out, err = rlaif("test", "small.yaml", "--model", "tiny")
    assert (code, err) == (0, "")
    assert out.startswith("small 2, judged by tiny: 4 of 4 tests right: 100% ")
    judged(ScriptedEngine(choose=lambda question: (-0.5, -1.0)))
    code, out, err = rlaif("test", "small.yaml", "--threshold", 0.25)
    assert code == 2
    assert "same position in both orders: 4 of 4, mostly the first; ties: 4" in out
    assert err.startswith("rlaif: small.yaml: 0 of 4 tests right (0%); --threshold is 25%. ")
    assert rlaif("test", "small.yaml", "--threshold", 0)[0] == 0


def test_test_as_json_says_whether_it_passed(rlaif, judged, tmp_path):
    (tmp_path / "small.yaml").write_text(CONSTITUTION)
    judged(ScriptedEngine(choose=prefers("bad", 1.0)))
    code, out, _ = rlaif("test", "small.yaml", "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["threshold"], found["tests"]["correct"]) == (2, False, 0.6, 0)
    assert set(found["by_principle"]) == {"safe", "lawful", "useful"}


def test_a_mistake_in_the_file_is_told_before_a_model_is_loaded(rlaif, small):
    small.write_text(SMALL.replace("principle: kind", "principle: none"))
    code, _, err = rlaif("test", small)
    assert (code, err.startswith("rlaif: small.yaml:8:15: examples.0.principle: no principle `none`")) == (2, True)


def served(tmp_path: Path, url: str, **label: Any) -> Path:
    recipe = {"name": "served", "model": "tiny", "engines": {"big": {"model": "large", "urls": [url]}}, "label": label}
    (tmp_path / "served.yaml").write_text(json.dumps(recipe))
    return Path("served.yaml")


def test_a_judge_of_a_recipe_is_named_and_takes_the_place_of_those_of_its_label_section(rlaif, judged, tmp_path):
    (tmp_path / "small.yaml").write_text(CONSTITUTION)
    judges = [{"name": "brief", "method": "function", "function": "brief"}]
    judged(ScriptedEngine(choose=prefers("good", 1.0)))
    with HostileServer(lambda asked: choice({"A": 0.5, "B": 0.4})) as server:
        recipe = served(tmp_path, server.url, judges=judges)
        assert rlaif("test", "small.yaml", "--recipe", recipe, "--threshold", 0)[1].startswith(
            "small 2, judged by brief (function): "
        )
        code, out, _ = rlaif("test", "small.yaml", "--recipe", recipe, "--judge", "base")
        assert (code, out.startswith("small 2, judged by tiny: 4 of 4 tests right")) == (0, True)
    alone = served(tmp_path, "http://127.0.0.1:9/v1", judge_method="function", judge_function="brief")
    assert rlaif("test", "small.yaml", "--recipe", alone, "--judge", "base")[0] == 0


@pytest.mark.parametrize("command", [("test", "small.yaml"), ("induce", "labels.jsonl")])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--judge", "big"), "--judge big: names an engine of a recipe. Give the recipe with --recipe as well."),
        (("--recipe", "served.yaml", "--judge", "bug"), "no engine `bug` in served.yaml; known: base, ray, big."),
        (("--recipe", "served.yaml", "--model", "m"), "--model m: the recipe served.yaml names the model. Give --mod"),
        (("--recipe", "lost.yaml"), "lost.yaml: no such file."),
    ],
)
def test_a_judge_that_cannot_be_is_told_before_a_model_is_loaded(rlaif, small, tmp_path, command, options, said):
    planted.write_rows(tmp_path / "labels.jsonl", 8)
    served(tmp_path, "http://127.0.0.1:9/v1")
    code, _, err = rlaif(*command, *options)
    assert (code, said in err) == (2, True), err


@pytest.mark.slow
def test_a_server_proposes_and_votes(rlaif, no_sync, tmp_path):
    def plays(asked: Asked) -> Reply:
        question = Question("asked", asked.body["messages"])
        if not asked.body.get("logprobs"):
            return text(planted.propose(question))
        return choice(dict(zip("AB", map(math.exp, planted.vote(question)), strict=True)))

    planted.write_rows(tmp_path / "labels.jsonl", 80)
    with HostileServer(plays) as server:
        code, out, err = rlaif("induce", "labels.jsonl", "--recipe", served(tmp_path, server.url), "--judge", "big")
        assert {asked.body["model"] for asked in server.asked} == {"large"}
    assert code == 0, err
    assert out.splitlines()[-1] == "2 principles -> induced.yaml; evidence -> induced.evidence.json"
    assert json.loads(Path("induced.evidence.json").read_text())["model"] == "large"


def test_induce_writes_a_constitution_its_evidence_and_what_was_answered(rlaif, judged, tmp_path):
    planted.write_rows(tmp_path / "labels.jsonl", 80)
    judged(planted.engine())
    code, out, _ = rlaif("induce", "labels.jsonl", "--output", "found.yaml", "--model", "tiny")
    assert code == 0
    assert out.splitlines()[-1] == "2 principles -> found.yaml; evidence -> found.evidence.json"
    assert sorted(path.name for path in tmp_path.glob("found.*")) == [
        "found.evidence.json",
        "found.journal.db",
        "found.yaml",
    ]
    assert rlaif("check", "found.yaml")[0] == 0
    assert json.loads(Path("found.evidence.json").read_text())["model"] == "tiny"
    code, _, err = rlaif("induce", "labels.jsonl", "--output", "found.yaml")
    assert (code, "found.yaml: is there already" in err) == (2, True)


@pytest.mark.slow
def test_induce_that_finds_nothing_writes_the_evidence_and_says_why(rlaif, judged, tmp_path):
    planted.write_rows(tmp_path / "labels.jsonl", 80)
    judged(ScriptedEngine(planted.propose, lambda question: (-0.5, -1.0)))
    code, _, err = rlaif("induce", "labels.jsonl")
    assert code == 2
    assert "no rule reconstructs the labels better than chance, so no constitution was written" in err
    assert not Path("induced.yaml").exists()
    assert Path("induced.evidence.json").exists()
    code, out, _ = rlaif("induce", "labels.jsonl", "--keep-all")
    assert (code, "3 principles -> induced.yaml" in out) == (0, True)
    assert rlaif("induce", "nowhere.jsonl", "--output", "o.yaml")[2].startswith("rlaif: nowhere.jsonl: no such file")
