"""What changed between two constitutions, and what a run would do again: counted, then compared with doing it."""

import re
from pathlib import Path
from typing import Any

import pytest
from scripted import CONSTITUTION, PROMPTS, ScriptedEngine, make_run, prefers, usual

from rlaif.constitution import load
from rlaif.constitution_diff import RETRAINED, as_text, changed_words, compare, made_with, redone, redone_as_text
from rlaif.errors import DataError
from rlaif.pipeline import _write_recipe
from rlaif.stages.label import label
from rlaif.stages.revise import revise


@pytest.fixture
def both(tmp_path: Path):
    """Compare CONSTITUTION with a changed one: ``both(old, new, old, new, ...)`` are replacements."""

    def differences(*words: str) -> dict[str, Any]:
        text = CONSTITUTION
        for old, new in zip(words[::2], words[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "old.yaml").write_text(CONSTITUTION)
        (tmp_path / "new.yaml").write_text(text)
        return compare(load(tmp_path / "old.yaml"), load(tmp_path / "new.yaml"))

    return differences


# --- differences ------------------------------------------------------------------------------------------------------


def test_equal_constitutions_have_no_difference(both):
    found = both("For tests.", "For others.", "title: Helps", "title: Does help")
    assert found["equal"]
    assert as_text(found) == "No difference that a model could see."


def test_principles_are_told_by_id(both):
    found = both("id: lawful, ", "id: legal, ", "principle: lawful, prompt", "principle: legal, prompt",
                 "principle: lawful}", "principle: legal}", "Who is hurt?", "Who is harmed?",
                 "applies_to: [ordinary]", "applies_to: [ordinary, lookalike], weight: 2")  # fmt: skip
    assert not found["equal"]
    assert found["principles"] == {
        "added": ["legal"],
        "removed": ["lawful"],
        "reworded": [{"id": "safe", "critique": ["Who is hurt?", "Who is harmed?"]}],
        "reweighted": [{"id": "useful", "weight": [1.0, 2.0], "applies_to": [["ordinary"], ["ordinary", "lookalike"]]}],
        "reordered": False,
    }
    assert as_text(found).splitlines() == [
        "+ principle legal",
        "- principle lawful",
        "~ principle safe: reworded",
        "    critique: Who is [-hurt?-]{+harmed?+}",
        "~ principle useful: weight 1 -> 2; applies_to [ordinary] -> [ordinary, lookalike]",
        "~ example two",
        "+ test T1 (legal)",
        "- test T1 (lawful)",
    ]


def test_examples_comparisons_and_tests_are_told_where_they_changed(both):
    found = both("critique: C1", "critique: CC", "better: second", "better: first", "better: good", "better: fine")
    assert found["examples"]["changed"] == ["one"]
    assert found["comparisons"]["changed"] == ["Q1 (useful)"]
    assert found["tests"] == {"added": [], "removed": [], "changed": ["T0 (first principle)"], "reordered": False}
    assert found["principles"]["reworded"] == []


def test_another_order_is_a_difference(both):
    first, second = CONSTITUTION.splitlines()[14:16]
    assert first.startswith("  - {id: one")
    found = both(f"{first}\n{second}\n", f"{second}\n{first}\n")
    assert (found["equal"], found["examples"]["reordered"]) == (False, True)
    assert as_text(found) == "~ examples: in another order"


def test_a_wording_that_was_built_is_called_so(both):
    found = both("    critique: Who is hurt?\n", "")
    (line,) = [line for line in as_text(found).splitlines() if "critique" in line]
    assert line == "    critique: [-Who is hurt?-]{+(built from text)+}"


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("a b c", "a x c", "a [-b-]{+x+} c"),
        ("a b", "a b c", "a b {+c+}"),
        ("a b c", "b c", "[-a-] b c"),
        ("1 2 3 4 5 6 7 8 9 a", "1 2 3 4 5 6 7 8 9 b", "… 6 7 8 9 [-a-]{+b+}"),
        ("a 1 2 3 4 5 6 7 8 9 z", "b 1 2 3 4 5 6 7 8 9 y", "[-a-]{+b+} 1 2 3 4 … 6 7 8 9 [-z-]{+y+}"),
    ],
)
def test_changed_words_are_marked_and_long_equal_stretches_left_out(old: str, new: str, shown: str):
    assert changed_words(old, new) == shown


# --- what a run would do again ----------------------------------------------------------------------------------------

MANY = [{**row, "id": f"{row['id']}{n}", "prompt": f"{row['prompt']} {n}"} for n in range(6) for row in PROMPTS]
SETTINGS: dict[str, Any] = {
    "prompts": MANY,
    "stages": ["revise", "label"],
    "revise": {"few_shot": 1, "filters": ["empty"]},
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a run with one constitution, again with another, and tell what was asked the second time."""

    def twice(method: str, *words: str, **settings: Any):
        text = CONSTITUTION
        for old, new in zip(words[::2], words[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        labels = {"method": method, "allow_weak_judge": True, "few_shot": 1, **settings.pop("label", {})}
        options = {**SETTINGS, **settings, "label": labels}
        first = make_run(tmp_path, monkeypatch, ScriptedEngine(_write, _vote), **options)
        (tmp_path / "old.yaml").write_text(CONSTITUTION)
        (tmp_path / "new.yaml").write_text(text)
        _write_recipe(first)
        revise(first)
        label(first)
        old, new = load(tmp_path / "old.yaml"), load(tmp_path / "new.yaml")
        counted = redone(tmp_path / "run", old, new)
        first.journal.close()
        engine = ScriptedEngine(_write, _vote)
        second = make_run(tmp_path, monkeypatch, engine, constitution=text, **options)
        revise(second)
        chains = {name.split("/")[0] for name in engine.ids() if "/critique-0" in name or "/revise-0" in name}
        engine.calls.clear()
        label(second)
        asked = {re.split("[/@~]", name)[0] for name in engine.ids()} & {row["id"] for row in MANY}
        return counted, chains, asked

    return twice


def _vote(question):
    """Prefer the answer with `good` in it; rate it 9, and others 2."""
    if len(question.options) == 2:
        return prefers("good", 1.0)(question)
    rating = "9" if ' good"' in question.messages[-1]["content"] else "2"
    return [-0.1 if option == rating else -9.0 for option in question.options]


def _write(question):
    """As `usual`, with two answers that differ by sample, and critiques that do not depend on the principle."""
    if question.item_id.endswith("/response"):
        return f"{usual(question)} {'good' if question.sample else 'poor'}"
    return usual(question)


def test_rewording_one_principle_does_its_chains_again_and_no_others(made):
    counted, chains, _ = made("revision", "The answer keeps the law.", "The answer follows the law.")
    assert 0 < len(chains) < 18
    assert counted["chains"] == {
        "all": 36 - 6,
        "again": len(chains),
        "reasons": {"its principle is reworded": len(chains)},
    }


def test_a_new_principle_takes_its_draws(made):
    new = "  - {id: calm, title: t, text: The answer is calm., applies_to: [harmful]}\nexamples:\n"
    counted, chains, _ = made("revision", "examples:\n", new)
    assert 0 < len(chains) < 18
    assert counted["chains"]["reasons"] == {"another principle is drawn": len(chains)}


def test_a_principle_that_names_a_category_takes_the_prompts_of_that_category(made):
    new = "  - {id: calm, title: t, text: The answer is calm., applies_to: [theft]}\nexamples:\n"
    thefts = [{**row, "category": "theft" if row["id"].startswith("h1") else "other"} for row in MANY]
    counted, chains, _ = made("revision", "examples:\n", new, prompts=thefts)
    assert chains == {f"h1{n}" for n in range(6)}
    assert counted["chains"]["reasons"] == {"another principle is drawn": 6}


@pytest.mark.slow
def test_a_changed_worked_example_does_every_revised_chain_again(made):
    counted, chains, asked = made("revision", "critique: C1", "critique: CC")
    assert len(chains) == 18
    assert counted["chains"]["reasons"] == {"the worked examples changed": 18}
    assert counted["votes"]["reasons"]["the worked examples changed"] == len(asked) == 12


@pytest.mark.slow
def test_an_example_that_is_never_shown_changes_nothing(made):
    counted, chains, asked = made("revision", "critique: C2", "critique: CC")
    assert (counted["chains"]["again"], counted["votes"]["again"], chains, asked) == (0, 0, set(), set())


@pytest.mark.slow
def test_votes_of_a_judge_follow_the_comparison_question(made):
    counted, chains, asked = made("judge", "Which one helps more?", "Which one is of more help?")
    assert counted["chains"]["again"] == len(chains) == 0
    # The first worked comparison is put under that principle too, so every vote is shown it.
    assert counted["votes"]["again"] == counted["votes"]["all"] == len(asked) == 30
    assert counted["votes"]["reasons"] == {"its principle is reworded": 12, "the worked comparisons changed": 18}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "old", "new", "reason", "again", "pairs"),
    [
        ({"principles": "all"}, "keeps the law.", "follows the law.", "its principle is reworded", 18, 18),
        ({"principles": "together"}, "keeps the law.", "follows the law.", "its principle is reworded", 18, 18),
        ({"principles": "together"}, "applies_to: [ordinary]", "applies_to: []", "other principles apply", 18, 18),
        (
            {"judge_method": "rating"},
            "The answer helps.",
            "The answer is of help.",
            "its principle is reworded",
            12,
            12,
        ),
        ({"judge_method": "rating"}, "Which one helps more?", "Which one is better?", "", 0, 0),
    ],
)
def test_votes_follow_what_their_way_of_judging_shows(made, label, old, new, reason, again, pairs):
    rated = {"label": {"few_shot": 0, **label}, "revise": {"few_shot": 0, "filters": ["empty"]}}
    counted, chains, asked = made("judge", old, new, **rated)
    assert counted["votes"]["again"] == sum(counted["votes"]["reasons"].values()) == again
    assert counted["votes"]["reasons"] == ({reason: again} if again else {})
    assert len(asked) == pairs


@pytest.mark.slow
def test_votes_on_a_policy_that_is_trained_again_are_new(made, tmp_path):
    counted, chains, _ = made("judge", "The answer keeps the law.", "The answer follows the law.")
    reworded = counted["votes"]["again"]
    assert 0 < reworded < 18, "no SFT stage: the base model's responses stay"
    recipe = tmp_path / "run" / "recipe.yaml"
    text = recipe.read_text()
    assert "[revise, label]" in text
    recipe.write_text(text.replace("[revise, label]", "[revise, sft, label]"))
    again = redone(tmp_path / "run", load(tmp_path / "old.yaml"), load(tmp_path / "new.yaml"))
    assert again["votes"]["reasons"] == {RETRAINED: 30 - reworded, "its principle is reworded": reworded}
    assert redone_as_text(again).splitlines() == [
        f"in {tmp_path}/run, with the new file:",
        f"  {len(chains)} of 30 chains would be done again",
        f"    {len(chains)}: its principle is reworded",
        "  30 of 30 votes would be done again",
        *(f"    {count}: {reason}" for reason, count in again["votes"]["reasons"].items()),
    ]


@pytest.mark.slow
def test_votes_by_contrast_follow_the_principles_of_the_system_prompt(made):
    counted, _, asked = made("contrast", "The answer keeps the law.", "The answer follows the law.")
    assert counted["votes"]["reasons"] == {"the principles of its system prompt changed": 18}
    assert {name for name in asked if name.startswith("h")} == asked


@pytest.mark.slow
def test_a_run_that_was_made_with_another_constitution_is_noticed(made, tmp_path):
    made("revision", "critique: C2", "critique: CC")
    old, new = load(tmp_path / "old.yaml"), load(tmp_path / "new.yaml")
    assert (made_with(tmp_path / "run", old), made_with(tmp_path / "run", new)) == (False, True), (
        "the second run stands"
    )
    (tmp_path / "other.yaml").write_text(CONSTITUTION.replace("safe", "sound"))
    with pytest.raises(DataError, match="was made under the principle `safe`, which small lacks"):
        redone(tmp_path / "run", load(tmp_path / "other.yaml"), new)


def test_a_folder_without_a_run_or_without_rows_is_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"not a run folder: it holds no recipe\.yaml"):
        redone(run.folder, run.constitution, run.constitution)
    _write_recipe(run)
    with pytest.raises(DataError, match=r"holds no chains\.jsonl and no comparisons\.jsonl yet"):
        redone(run.folder, run.constitution, run.constitution)
