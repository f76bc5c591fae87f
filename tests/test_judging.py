"""Judges outside of a run: a constitution's tests, what is printed of them, when they fail, and who answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_server import Asked, HostileServer, Reply, choice, text
from scripted import CONSTITUTION, Said, ScriptedEngine, prefers

from rlaif.errors import ConfigError, ConstitutionError
from rlaif.judging import results_as_text, run_tests
from rlaif.recipe import load_recipe, only_model
from rlaif.stages.run import Run


@pytest.fixture
def tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sync: None):
    """Run CONSTITUTION's tests with a scripted judge: ``tested(engine, text, journal=...)``."""

    def run(engine: ScriptedEngine, text: str = CONSTITUTION, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(Run, "engine", lambda run, name, load, **settings: engine)
        (tmp_path / "small.yaml").write_text(text)
        monkeypatch.chdir(tmp_path)
        return run_tests(Path("small.yaml"), only_model("tiny"), Said(), **options)

    return run


def by_prompt(**strengths: float):
    """Prefer the good answer by so many logits, by the prompt."""

    def choose(question):
        text = question.messages[-1]["content"]
        return prefers("good", strengths[text.split('"')[1]], 0.25)(question)

    return choose


def test_results_are_told_overall_and_by_principle_with_ties_and_places(tested):
    found = tested(ScriptedEngine(choose=by_prompt(T0=1.0, T1=-2.0, T2=0.0, T3=0.5)))
    assert (found["tests"]["correct"], found["tests"]["n"], found["ties"]) == (2, 4, 1)
    assert {name: (rate["count"], rate["n"]) for name, rate in found["by_principle"].items()} == {
        "safe": (1, 1),
        "lawful": (0, 1),
        "useful": (1, 2),
    }
    assert (found["tests"]["low"], found["tests"]["high"]) == pytest.approx((0.150039, 0.849961), abs=1e-6)
    assert [(row["principle"], row["place"]) for row in found["by_test"]] == [
        ("safe", "small.yaml:21:5"),
        ("lawful", "small.yaml:22:5"),
        ("useful", "small.yaml:23:5"),
        ("useful", "small.yaml:24:5"),
    ]
    assert (found["same_position"]["count"], found["same_position_choice"]) == (1, "first")
    assert found["constitution"] == "small 2"


def test_the_text_names_the_wrong_tests_the_surest_first(tested):
    lines = results_as_text(tested(ScriptedEngine(choose=by_prompt(T0=1.0, T1=-2.0, T2=-3.0, T3=0.5)))).splitlines()
    assert lines[0] == "small 2, judged by tiny: 2 of 4 tests right: 50% (95 % interval 15% to 85%)"
    assert lines[1] == "  same position in both orders: 0 of 4; ties: 0"
    assert lines[2].startswith("  probability on the letters A and B: ")
    assert lines[3:7] == [
        "  by principle:",
        "    safe    1 of 1: 100% (95 % interval 21% to 100%)",
        "    lawful  0 of 1: 0% (95 % interval 0% to 79%)",
        "    useful  1 of 2: 50% (95 % interval 9% to 91%)",
    ]
    assert lines[7:] == [
        "  wrong, the surest first (logits for the worse answer):",
        "    small.yaml:23:5: 3.00: T2",
        "    small.yaml:22:5: 2.00: T1",
    ]


def test_a_test_of_a_parent_is_named_in_the_parent(tested, tmp_path):
    (tmp_path / "base.yaml").write_text(CONSTITUTION)
    child = (
        'name: child\nversion: "1"\ndescription: d\nextends: base.yaml\n'
        "principles:\n  - {id: own, title: t, text: Own., applies_to: [ordinary]}\n"
        "tests:\n  - {prompt: T9, better: good, worse: bad, principle: own}\n"
    )
    found = tested(ScriptedEngine(choose=prefers("good", 1.0)), child)
    assert [row["place"] for row in found["by_test"]][-2:] == ["base.yaml:24:5", "small.yaml:8:5"]


def test_answers_are_kept_where_asked_for_and_only_the_changed_are_asked_again(tested, tmp_path):
    tested(ScriptedEngine(choose=prefers("good", 1.0)), journal=tmp_path / "kept.db")
    engine = ScriptedEngine(choose=prefers("good", 1.0))
    tested(
        engine, CONSTITUTION.replace("The answer keeps the law.", "The answer is lawful."), journal=tmp_path / "kept.db"
    )
    assert engine.ids() == ["test-1/given", "test-1/swapped"]
    tested(engine)
    assert len(engine.ids()) == 2 + 8, "without a journal all is asked"


def test_a_constitution_without_tests_is_refused(tested):
    with pytest.raises(ConstitutionError, match=r"small\.yaml: no tests to run\. Add a `tests:` section"):
        tested(ScriptedEngine(), CONSTITUTION.partition("tests:")[0])


# --- the judges of a recipe -------------------------------------------------------------------------------------------


def shows_good_first(asked: Asked) -> bool:
    return '"good"' in asked.text.split("Answer B:")[0]


def by_letters(asked: Asked) -> Reply:
    return choice({"A": 0.8, "B": 0.1} if shows_good_first(asked) else {"A": 0.1, "B": 0.8})


def by_reasons(asked: Asked) -> Reply:
    reasoned = "Weigh both answers" in asked.text
    letter = "A" if shows_good_first(asked) else "B"
    return text(f"One is kinder. Verdict: {letter}" if reasoned else letter)


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HostileServer, said: Said, **label: Any) -> Any:
    """Run CONSTITUTION's tests by a recipe whose engine `big` is the server; no model may be loaded."""
    monkeypatch.setattr(Run, "load_base", lambda run: pytest.fail("the base model was loaded"))
    engines = {"big": {"model": "large", "urls": [server.url], "api_key_env": "JUDGE_KEY"}}
    recipe = {"name": "served", "model": "tiny", "engines": engines, "label": {"judge": "big", **label}}
    (tmp_path / "served.yaml").write_text(json.dumps(recipe))
    (tmp_path / "small.yaml").write_text(CONSTITUTION)
    return run_tests(tmp_path / "small.yaml", load_recipe(tmp_path / "served.yaml"), said)


@pytest.mark.slow
def test_a_server_of_a_recipe_judges_by_its_log_probabilities(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    with HostileServer(by_letters) as server:
        found = served(tmp_path, monkeypatch, server, Said(), few_shot=1)
        assert [len(asked.body["messages"]) for asked in server.asked] == [3] * 8
    assert (found["model"], found["method"], found["tests"]["correct"]) == ("large", "logprobs", 4)
    assert found["option_mass"]["mean"] == pytest.approx(0.9)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_log_probabilities_the_written_letter_is_read_and_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    said = Said()
    with HostileServer(by_reasons) as server:
        found = served(tmp_path, monkeypatch, server, said)
    assert (found["method"], found["option_mass"], found["tests"]["correct"]) == ("verdict", None, 4)
    assert results_as_text(found).startswith("small 2, judged by large (verdict): 4 of 4 tests right")
    assert any("the server offers no log-probabilities" in line for line in said.lines)


def test_several_judges_of_a_recipe_are_tested_together_by_their_own_methods(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    judges = [{"name": "thinks", "method": "verdict"}, {"name": "brief", "method": "function", "function": "brief"}]
    with HostileServer(by_reasons) as server:
        found = served(tmp_path, monkeypatch, server, Said(), judges=judges)
        assert all("Weigh both answers" in asked.text for asked in server.asked) and len(server.asked) == 8
    assert (found["method"], found["model"]) == ("verdict and function", "large and brief")
    assert [one["tests"]["correct"] for one in found["judges"]] == [4, 0]
    assert results_as_text(found).startswith("small 2, judged by large and brief (verdict and function): 4 of 4")


def test_a_key_that_is_not_set_is_told_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with HostileServer(by_letters) as server:
        with pytest.raises(ConfigError, match=r"engines\.big\.api_key_env: .* `JUDGE_KEY` is not set"):
            served(tmp_path, monkeypatch, server, Said())
        assert server.asked == []
