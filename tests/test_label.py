"""Labels: from a judge, by construction, or from people, all as the same rows; nothing lost, everything counted."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import (
    CONSTITUTION,
    CRITIQUE,
    HARM,
    HELPFUL,
    PLAIN,
    PROMPTS,
    REFUSAL,
    WILLING,
    Choose,
    ScriptedEngine,
    by_part,
    make_run,
    prefers,
    rows_of,
    usual,
)

from rlaif.engines.engine import Answer, Question
from rlaif.errors import DataError, StageError
from rlaif.records import Comparison, read_rows, text_of
from rlaif.report.reading import Judge, Quality
from rlaif.stages import label, revise
from rlaif.stages.run import Run

Maker = Callable[..., Run]
FIRST, SECOND = "It is wrong to do that, so I will not say how.", "Go ahead, it is easy and nobody will notice."
THEIRS = [{"prompt": f"How is number {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def labelled(run: Run) -> tuple[list[Comparison], list[dict[str, Any]], Quality, dict[str, Any]]:
    """Run the stage and return its rows, those not used, the quality as the report reads it, and the counts."""
    counts = label.label(run)
    folder = run.folder / "3-label"
    quality = Quality.model_validate_json((folder / "quality.json").read_text())
    return read_rows(folder / "comparisons.jsonl", Comparison), rows_of(folder / "unused.jsonl"), quality, counts


def reconcile(rows: list[Comparison], unused: list[dict[str, Any]], quality: Quality, counts: dict[str, Any]) -> None:
    assert counts["comparisons"] == quality.labels.comparisons == len(rows)
    assert counts["unused"] == sum(quality.labels.unused.values()) == len(unused)
    assert quality.labels.unused == dict(Counter(row["reason"] for row in unused))
    assert counts["by_tag"] == quality.labels.by_tag == dict(Counter(row.tag or "untagged" for row in rows))
    assert len({row.id for row in rows}) == len(rows)


def two_answers(question: Question) -> str:
    return FIRST if question.sample == 0 else SECOND


def said(run: Run) -> str:
    return "\n".join(run.progress.lines)


# --- judge ----------------------------------------------------------------------------------------------------------


def finds(wanted: str = "good", **strengths: float) -> Choose:
    """Return a judge that finds a side of the constitution's tests; between two answers it prefers the first one.

    Args:
        wanted: which side of the tests it prefers, with strength 2.
        strengths: how much it prefers the first answer, by a word of the prompt; otherwise 1.
    """

    def choose(question: Question) -> Sequence[float]:
        content = question.messages[-1]["content"]
        if f'"{wanted}"' in content:
            return prefers(f'"{wanted}"', 2.0, 0.5)(question)
        strength = next((strength for word, strength in strengths.items() if word in content), 1.0)
        return prefers(FIRST, strength, 0.5)(question)

    return choose


good = finds(bicycle=2.0, lock=-1.0, ticket=0.25, egg=0.0, shirt=0.5)


def test_the_judge_compares_two_answers_of_the_policy(make: Maker) -> None:
    run = make(ScriptedEngine(two_answers, good))
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    by_prompt = {row.provenance["prompt_id"]: row for row in rows}
    assert list(by_prompt) == ["h1", "h2", "h3", "o2"]
    assert [text_of(row.chosen) for row in rows] == [FIRST, SECOND, FIRST, FIRST]
    assert [text_of(row.rejected) for row in rows] == [SECOND, FIRST, SECOND, SECOND]
    assert [row.preference for row in rows] == pytest.approx([0.880797, 0.731059, 0.562177, 0.622459], abs=1e-6)
    assert {(row.source, row.annotator, row.split, row.margin) for row in rows} == {("ai", "judge", "train", None)}
    assert [row.tag for row in rows] == [HARM, HARM, HARM, PLAIN]
    vote = by_prompt["h2"].votes[0]
    assert (vote["annotator"], vote["strength"], vote["bias"]) == ("judge", pytest.approx(-1.0), pytest.approx(0.5))
    assert [(row["id"], row["reason"], row["texts"]) for row in unused] == [("o1", "tie", [FIRST, SECOND])]
    assert quality.labels.ties == 1 and quality.labels.method == "judge" and quality.judge_labels
    assert quality.labels.same_position is not None and quality.labels.same_position.count == 2  # |0.25| and 0 < 0.5
    assert quality.labels.same_position_choice == "first"
    assert quality.labels.mean_preference == pytest.approx(0.699123, abs=1e-6)


def test_a_judged_row_says_where_it_came_from(make: Maker) -> None:
    run = make(ScriptedEngine(two_answers, good))
    row = labelled(run)[0][3]
    principle = run.constitution.principle("useful")
    assert row.provenance == {
        "prompt_id": "o2",
        "samples": [0, 1],
        "constitution": "small 2",
        "constitution_hash": run.constitution.hash_of("principles", "examples", "comparisons"),
        "principle": "useful",
        "principle_hash": principle.hash,
        "model": "tiny",
        "seed": 0,
    }
    assert row.votes[0]["principle"] == "useful" and row.id.startswith("o2-")
    assert row.prompt == [{"role": "user", "content": "How do I fold a shirt?"}]


def test_judgements_up_to_the_least_strength_are_ties(make: Maker) -> None:
    rows, unused, quality, counts = labelled(make(ScriptedEngine(two_answers, good), label={"min_strength": 0.9}))
    reconcile(rows, unused, quality, counts)
    assert [row.provenance["prompt_id"] for row in rows] == ["h1", "h2"]
    assert [row["reason"] for row in unused] == ["tie"] * 3 and quality.labels.ties == 3


def test_answers_that_cannot_be_compared_are_not_shown_to_the_judge(make: Maker) -> None:
    def write(question: Question) -> str:
        texts = {"h1": ("", SECOND), "h2": (FIRST, FIRST.replace(" ", "  ")), "h3": (FIRST, " \n")}
        return texts.get(question.item_id[:2], (FIRST, SECOND))[question.sample]

    engine = ScriptedEngine(write, good)
    rows, unused, quality, counts = labelled(make(engine))
    reconcile(rows, unused, quality, counts)
    assert [(row["id"], row["reason"]) for row in unused] == [
        ("h1", "empty"),
        ("h2", "identical answers"),
        ("h3", "empty"),
        ("o1", "tie"),
    ]
    compared = {name.split("/")[0] for name in engine.ids("given")}
    assert {name for name in compared if name[0] in "ho"} == {"o1", "o2"}


def test_the_policy_writes_and_the_base_judges(make: Maker, tmp_path: Path) -> None:
    policy, judge = ScriptedEngine(two_answers, identity="policy"), ScriptedEngine(choose=good, identity="judge")
    adapter = tmp_path / "run" / "2-sft" / "adapter"
    adapter.mkdir(parents=True)
    stages = ["revise", "sft", "label"]
    run = make({"policy": policy, "base": judge}, stages=stages)
    labelled(run)
    assert {question.item_id.rpartition("/")[2] for question in policy.asked} == {"response"}
    assert {question.item_id.rpartition("/")[2] for question in judge.asked} == {"given", "swapped"}
    assert run.load_base().roles == {"policy": {"adapter": adapter}}


def test_without_the_sft_adapter_the_advice_is_to_run_that_stage(make: Maker) -> None:
    with pytest.raises(StageError, match=r"2-sft/adapter: not there yet\. Run the stage `sft` first"):
        label.label(make(ScriptedEngine(two_answers, good), stages=["revise", "sft", "label"]))


def test_a_weak_judge_stops_with_numbers_and_remedies(make: Maker) -> None:
    engine = ScriptedEngine(two_answers, finds("bad"))
    run = make(engine)
    with pytest.raises(StageError) as caught:
        label.label(run)
    text = str(caught.value)
    for part in (
        "the judge `tiny` got 0 of 4 tests of the constitution right (0%, 95 % interval 0% to 49%)",
        "label.min_judge_accuracy is 60%",
        "`revision` or `contrast`",
        "feedback: human",
        "label.allow_weak_judge: true",
    ):
        assert part in text
    assert engine.ids("response") == []
    left = run.folder / "3-label" / "judge.json"
    assert str(left) in text and list(left.parent.iterdir()) == [left]
    assert Judge.model_validate_json(left.read_text()).tests.rate == 0.0


def test_a_judge_without_tests_is_taken_for_weak(make: Maker) -> None:
    untested = CONSTITUTION.partition("tests:")[0]
    with pytest.raises(StageError, match="has no tests to measure the judge with; add a `tests:` section"):
        label.label(make(ScriptedEngine(two_answers, good), constitution=untested))
    run = make(ScriptedEngine(two_answers, good), constitution=untested, label={"allow_weak_judge": True})
    assert labelled(run)[2].judge is None
    assert "warning: the constitution has no tests" in said(run)


@pytest.mark.parametrize(("least", "stops"), [(0.5, False), (0.51, True)])
def test_a_judge_at_its_floor_is_good_enough(least: float, stops: bool, make: Maker) -> None:
    def half(question: Question) -> Sequence[float]:
        wrong = any(name in question.messages[-1]["content"] for name in ("T0", "T1"))
        return finds("bad" if wrong else "good")(question)

    run = make(ScriptedEngine(two_answers, half), label={"min_judge_accuracy": least})
    if stops:
        with pytest.raises(StageError, match="got 2 of 4 tests"):
            label.label(run)
    else:
        assert labelled(run)[2].judge_labels and "warning" not in said(run)


def test_a_weak_judge_that_is_allowed_goes_on_with_a_warning(make: Maker) -> None:
    run = make(ScriptedEngine(two_answers, finds("bad")), label={"allow_weak_judge": True})
    rows, _, quality, _ = labelled(run)
    assert len(rows) == 5 and quality.judge is not None and quality.judge.tests.rate == 0.0
    assert "warning: the judge `tiny` got 0 of 4 tests" in said(run)
    assert "Going on, because label.allow_weak_judge is set." in said(run)


def test_a_judge_that_sees_no_difference_leaves_no_comparison(make: Maker) -> None:
    undecided = ScriptedEngine(two_answers, lambda question: (-1.0, -1.0))
    with pytest.raises(DataError, match=r"no comparison is usable; 5 were set aside: \{'tie': 5\}"):
        label.label(make(undecided, label={"allow_weak_judge": True}))


# --- revision -------------------------------------------------------------------------------------------------------


def revised(make: Maker, write: Any = usual, **sections: Any) -> Run:
    """Run the revise stage and return a run ready to label by revision."""
    sections = {"label": {"method": "revision"}, **sections}
    run = make(ScriptedEngine(write), **sections)
    revise.revise(run)
    return run


def test_by_revision_the_revision_wins_and_so_does_the_plain_answer(make: Maker) -> None:
    run = revised(make)
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    assert unused == []
    assert [row.provenance["prompt_id"] for row in rows] == ["h1", "h2", "h3", "o1", "o2"]
    for row in rows[:3]:
        assert (text_of(row.chosen), text_of(row.rejected), row.tag) == (REFUSAL, WILLING, HARM)
        assert row.provenance["principle"] == row.votes[0]["principle"] in ("safe", "lawful")
    for row in rows[3:]:
        assert (text_of(row.chosen), text_of(row.rejected), row.tag) == (HELPFUL, REFUSAL, PLAIN)
        assert row.provenance["principle"] is None
        assert row.votes[0] | {"principle": ""} == {"annotator": "revision", "principle": "", "critique": CRITIQUE}
        assert row.votes[0]["principle"] in ("safe", "lawful")  # a refusal is written as for a harmful prompt
    assert {(row.source, row.annotator, row.preference) for row in rows} == {("construction", "revision", 1.0)}
    assert quality.labels.method == "revision" and not quality.judge_labels
    assert quality.judge is not None and quality.judge.tests.n == 4  # measured all the same
    assert quality.labels.same_position is None and quality.labels.mean_preference == 1.0
    assert quality.labels.chosen_longer.rate == 0.6  # the refusals are the longer ones
    assert {tag: rate.rate for tag, rate in quality.labels.chosen_refuses.items()} == {HARM: 1.0, PLAIN: 0.0}


def test_a_judge_measured_as_weak_does_not_stop_labels_by_construction(make: Maker) -> None:
    assert len(labelled(revised(make))[0]) == 5
    run = make(ScriptedEngine(usual, lambda question: (-2.0, -1.0)), label={"method": "revision"}, seed=0)
    assert labelled(run)[2].judge is not None


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ({"revise": WILLING}, "unchanged"),
        ({"revise": ""}, "empty"),
        ({"response": REFUSAL, "revise": "I won't do it; someone would be hurt. Talk with a friend about it."},
         "the initial response declines already"),
        ({"revise": "Locks keep people safe, and it would be kinder to leave them alone for good."},
         "does not decline"),
    ],
)  # fmt: skip
def test_a_chain_that_shows_no_improvement_is_not_used(replies: dict[str, str], reason: str, make: Maker) -> None:
    def write(question: Question) -> str | Answer:
        if question.item_id.startswith("o"):
            return usual(question)
        return by_part(**{"response": WILLING, "critique": CRITIQUE, "revise": REFUSAL, **replies})(question)

    run = revised(make, write, revise={"must_refuse_tags": [HARM]})
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    assert [(row["id"], row["reason"]) for row in unused] == [(f"h{n}", reason) for n in (1, 2, 3)]
    assert {row.tag for row in rows} == {PLAIN}


@pytest.mark.parametrize(
    ("plain", "needless", "reason"),
    [
        (HELPFUL, "Boil it for eight minutes instead, and do not forget the salt.", "no needless refusal was written"),
        (HELPFUL, HELPFUL, "identical answers"),
        (HELPFUL, "", "empty"),
        (REFUSAL, "I won't help with that, because somebody could be hurt by it.", "the plain response declines"),
        ("Hm.", REFUSAL, "too short"),
        (HELPFUL, Answer("I can't help with that because the", ended=False), "truncated"),
    ],
)
def test_a_needless_refusal_has_to_be_one(plain: str, needless: str | Answer, reason: str, make: Maker) -> None:
    def write(question: Question) -> str | Answer:
        if question.item_id.startswith("h"):
            return usual(question)
        return by_part(response=plain, critique=CRITIQUE, revise=needless)(question)

    rows, unused, quality, counts = labelled(revised(make, write))
    reconcile(rows, unused, quality, counts)
    assert [(row["id"], row["reason"]) for row in unused] == [("o1", reason), ("o2", reason)]
    assert {row.tag for row in rows} == {HARM}


def test_by_revision_the_last_round_is_compared_with_the_response(make: Maker) -> None:
    def write(question: Question) -> str | Answer:
        return "No, I won't help. It harms the owner, and a shop is near." if "revise-1" in question.item_id else (
            usual(question))  # fmt: skip

    rows = labelled(revised(make, write, revise={"rounds": 2}))[0]
    assert (text_of(rows[0].chosen), text_of(rows[0].rejected)) == (
        "No, I won't help. It harms the owner, and a shop is near.",
        WILLING,
    )


def test_by_revision_a_number_of_prompts_of_each_tag_is_taken(make: Maker) -> None:
    run = revised(make, label={"method": "revision", "prompts_per_tag": {HARM: 2, PLAIN: 1}})
    rows = labelled(run)[0]
    assert [row.provenance["prompt_id"] for row in rows] == ["h1", "h2", "o1"]


def test_chains_of_prompts_that_are_gone_ask_for_the_stage_before(make: Maker) -> None:
    revised(make)
    run = make(ScriptedEngine(usual), prompts=PROMPTS[1:], label={"method": "revision"})
    with pytest.raises(StageError, match=r"chains\.jsonl:1: the prompt `h1` is not in the recipe's prompt sets"):
        label.label(run)


def test_by_revision_nothing_is_asked_twice(make: Maker) -> None:
    first = labelled(revised(make))[0]
    engine = ScriptedEngine()
    run = make(engine, label={"method": "revision"})
    assert labelled(run)[0] == first and engine.calls == []


# --- contrast -------------------------------------------------------------------------------------------------------


def test_by_contrast_the_answer_under_the_constitution_wins(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine, label={"method": "contrast"})
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    assert [(text_of(row.chosen), text_of(row.rejected)) for row in rows] == [
        *[(REFUSAL, WILLING)] * 3,
        *[(REFUSAL, HELPFUL)] * 2,
    ]
    assert {(row.source, row.annotator) for row in rows} == {("construction", "contrast")}
    assert all(row.prompt[0]["role"] == "user" and len(row.prompt) == 1 for row in rows)
    assert quality.labels.method == "contrast" and not quality.judge_labels
    (asked,) = [question for question in engine.asked if question.item_id == "h1/contrast"]
    assert [turn["role"] for turn in asked.messages] == ["system", "user"]
    assert asked.messages[0]["content"] == (
        "You are an assistant that lives by these principles:\n"
        "- The answer hurts nobody.\n- The answer keeps the law.\nLet every answer follow them."
    )


def test_by_contrast_empty_equal_and_cut_answers_are_not_used(make: Maker) -> None:
    contrast = {"h1": "", "h2": WILLING, "h3": Answer("Without any end", ended=False)}

    def write(question: Question) -> str | Answer:
        known = question.item_id.endswith("/contrast") and question.item_id[:2] in contrast
        return contrast[question.item_id[:2]] if known else usual(question)

    rows, unused, quality, counts = labelled(make(ScriptedEngine(write), label={"method": "contrast"}))
    reconcile(rows, unused, quality, counts)
    assert [(row["id"], row["reason"]) for row in unused] == [
        ("h1", "empty"),
        ("h2", "identical answers"),
        ("h3", "truncated"),
    ]


# --- people ---------------------------------------------------------------------------------------------------------


def human(tmp_path: Path, *rows: Any, name: str = "labels.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_peoples_labels_come_through_the_same_door_without_a_model(make: Maker, tmp_path: Path) -> None:
    name = human(tmp_path, *THEIRS, {"prompt": "P", "chosen": "a", "rejected": "a"})
    run = make(None, feedback="human", human={"files": [name], "annotator": "Ann", "tag": HARM})
    run.load_base = lambda: pytest.fail("a model was loaded")
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    assert len(rows) == 6 and {(row.source, row.annotator, row.tag) for row in rows} == {("human", "Ann", HARM)}
    assert [(row["file"], row["line"], row["reason"]) for row in unused] == [("labels.jsonl", 7, "identical answers")]
    assert (quality.judge, quality.judge_labels, quality.labels.method) == (None, False, "human")
    assert quality.labels.same_position is None


def test_rows_of_all_sources_have_the_same_columns(make: Maker, tmp_path: Path) -> None:
    name = human(tmp_path, *THEIRS)
    mixed = labelled(make(ScriptedEngine(two_answers, good), feedback="mixed", human={"files": [name]}))[0]
    built = labelled(make(ScriptedEngine(usual), label={"method": "contrast"}))[0]
    assert {row.source for row in [*mixed, *built]} == {"human", "ai", "construction"}
    for row in [*mixed, *built]:
        assert (row.prompt[-1]["role"], row.chosen[0]["role"], row.rejected[0]["role"]) == (
            "user",
            "assistant",
            "assistant",
        )
        assert row.provenance and 0.5 <= row.preference <= 1


def test_mixed_labels_are_peoples_and_the_judges_together(make: Maker, tmp_path: Path) -> None:
    tie = {"prompt": "P", "chosen": "a", "rejected": "b", "preference": 0.5}
    run = make(ScriptedEngine(two_answers, good), feedback="mixed", human={"files": [human(tmp_path, *THEIRS, tie)]})
    rows, unused, quality, counts = labelled(run)
    reconcile(rows, unused, quality, counts)
    assert [row.source for row in rows] == ["human"] * 7 + ["ai"] * 4
    assert quality.labels.by_tag == {"untagged": 7, HARM: 3, PLAIN: 1}
    assert quality.labels.ties == 2  # one of a person and one of the judge
    assert set(quality.labels.chosen_refuses) == {HARM, PLAIN}


def test_a_row_that_stands_in_two_files_counts_once(make: Maker, tmp_path: Path) -> None:
    files = [human(tmp_path, *THEIRS), human(tmp_path, THEIRS[0], name="again.jsonl")]
    rows, unused, quality, counts = labelled(make(None, feedback="human", human={"files": files}))
    reconcile(rows, unused, quality, counts)
    assert len(rows) == 6 and [(row["file"], row["reason"]) for row in unused] == [
        ("again.jsonl", "stands in two files")
    ]


def test_rows_made_before_and_given_as_labels_count_once(make: Maker, tmp_path: Path) -> None:
    run = make(ScriptedEngine(two_answers, good))
    made = labelled(run)[0]
    (tmp_path / "made.jsonl").write_bytes((run.folder / "3-label" / "comparisons.jsonl").read_bytes())
    again = make(ScriptedEngine(two_answers, good), feedback="mixed", human={"files": ["made.jsonl"]})
    rows, unused, quality, counts = labelled(again)
    reconcile(rows, unused, quality, counts)
    assert rows == made
    assert Counter(row["reason"] for row in unused) == {"in a file of labels already": 4, "tie": 1}


def test_a_file_without_a_usable_row_stops(make: Maker, tmp_path: Path) -> None:
    name = human(tmp_path, {"prompt": "P", "chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match=r"no comparison is usable; 1 were set aside: \{'identical answers': 1\}"):
        label.label(make(None, feedback="human", human={"files": [name]}))


def test_a_file_of_labels_that_does_not_exist_is_named(make: Maker) -> None:
    with pytest.raises(DataError, match=r"nosuch\.jsonl: no such file"):
        label.label(make(None, feedback="human", human={"files": ["nosuch.jsonl"]}))


# --- what the result depends on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"seed": 1}, ["seed"]),
        ({"label": {"few_shot": 1}}, ["recipe.label"]),
        ({"label": {"min_judge_accuracy": 0.9, "allow_weak_judge": True}}, []),
        ({"revise": {"must_refuse_tags": [HARM]}}, ["recipe.revise"]),
        ({"constitution": CONSTITUTION.replace("prompt: T3", "prompt: T4")}, ["constitution"]),
        ({"constitution": CONSTITUTION.replace("better: first}", "better: first, principle: safe}")}, ["constitution"]),
        ({"prompts": PROMPTS[::-1]}, ["prompts"]),
        ({"ppo": {"updates": 3}}, []),
    ],
)
def test_the_inputs_change_with_what_the_result_depends_on(
    changed: dict[str, Any], expected: list[str], make: Maker
) -> None:
    before = label.inputs(make())
    after = label.inputs(make(**changed))
    assert sorted(name for name in before if before[name] != after[name]) == expected


def test_a_changed_file_of_labels_changes_the_inputs(make: Maker, tmp_path: Path) -> None:
    human(tmp_path, *THEIRS)
    settings = {"feedback": "human", "human": {"files": ["labels.jsonl"]}}
    before = label.inputs(make(**settings))
    human(tmp_path, *THEIRS[1:])
    after = label.inputs(make(**settings))
    assert [name for name in before if before[name] != after[name]] == ["human.0"]
