"""Pairs of answers as other projects write them: each form is read as what it says, or is unusable for a reason."""

from pathlib import Path
from typing import Any

import pytest
from human_files import HH, TRL, assistant, load, reasons, user

from rlaif.records import Comparison, jsonl


def test_a_transcript_of_several_turns_becomes_a_comparison_of_the_last(tmp_path: Path) -> None:
    before = "\n\nHuman: Say: hello\n\nAssistant: hello\n\nHuman: And: now?"
    row = {"chosen": f"{before}\n\nAssistant: one: two", "rejected": f"{before}\n\nAssistant: three"}
    imported = load(tmp_path, row, tag="ordinary", annotator="ann")
    assert (imported.format, imported.unused) == ("hh-rlhf", [])
    (comparison,) = imported.comparisons
    assert comparison.prompt == [user("Say: hello"), assistant("hello"), user("And: now?")]
    assert comparison.chosen == [assistant("one: two")]
    assert comparison.rejected == [assistant("three")]
    assert (comparison.preference, comparison.margin, comparison.source) == (1.0, None, "human")
    assert (comparison.tag, comparison.annotator, comparison.flags) == ("ordinary", "ann", [])
    assert comparison.provenance["file"] == "labels.jsonl"
    assert comparison.provenance["line"] == 1
    assert comparison.provenance["format"] == "hh-rlhf"
    assert len(comparison.provenance["sha256"]) == 64


@pytest.mark.parametrize(
    "row",
    [
        TRL,
        {"prompt": [user("hello")], "chosen": [assistant("good day")], "rejected": [assistant("go away")]},
        {"prompt": [user("hello")], "chosen": "good day", "rejected": "go away"},
        {
            "prompt": "hello",
            "chosen": [user("hello"), assistant("good day")],
            "rejected": [assistant("go away")],
        },
        {"chosen": [user("hello"), assistant("good day")], "rejected": [user("hello"), assistant("go away")]},
        {"prompt": "\n\nHuman: hello\n\nAssistant:", "chosen": " good day", "rejected": " go away"},
        {"prompt": "hello", "chosen": assistant("good day"), "rejected": assistant("go away")},
        {"prompt": "hello", "chosen": [{**assistant("good day"), "name": None}], "rejected": "go away"},
    ],
)
def test_every_trl_form_of_a_row_gives_the_same_comparison(tmp_path: Path, row: dict[str, Any]) -> None:
    imported = load(tmp_path, row)
    assert (imported.format, imported.unused) == ("trl", [])
    (comparison,) = imported.comparisons
    assert comparison.prompt == [user("hello")]
    assert comparison.chosen == [assistant("good day")]
    assert comparison.rejected == [assistant("go away")]


def test_the_same_preference_has_the_same_id_in_either_format(tmp_path: Path) -> None:
    assert load(tmp_path, HH).comparisons[0].id == load(tmp_path, TRL).comparisons[0].id


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", "blue.", "green.")),
        ("The sky is blue.", "The sky is bluish.", ("The sky is", "blue.", "bluish.")),
        ("The sky is", "The sky is blue.", ("The sky", "is", "is blue.")),
        ("The sky\nis blue ", "The sky\nis green", ("The sky\nis", "blue", "green")),
    ],
)
def test_a_prompt_is_what_two_texts_begin_with_up_to_a_whole_word(
    tmp_path: Path, chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    (comparison,) = load(tmp_path, {"chosen": chosen, "rejected": rejected}).comparisons
    texts = (comparison.prompt[0], comparison.chosen[0], comparison.rejected[0])
    assert tuple(turn["content"] for turn in texts) == expected
    assert comparison.flags == ["prompt from the shared beginning"]


def test_a_system_turn_may_stand_before_the_first_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, user("hello")], "chosen": "good day", "rejected": "go away"}
    assert load(tmp_path, row).comparisons[0].prompt == [system, user("hello")]


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (HH["chosen"], transcript("Human: goodbye", "Assistant: go away"), "contexts differ"),
        (transcript("Human: hello", "Assistant: "), HH["rejected"], "empty chosen"),
        (HH["chosen"], transcript("Human: hello", "Assistant:\n "), "empty rejected"),
        (None, HH["rejected"], "empty chosen"),
        (HH["chosen"], "", "empty rejected"),
        (HH["chosen"], HH["chosen"] + "  ", "identical answers"),
        (transcript("Human: hello"), transcript("Human: hello"), "no assistant turn"),
        (HH["chosen"], "go away", "no assistant turn"),
        (HH["chosen"] + transcript("Human: why?"), HH["rejected"], "last turn is not the assistant's"),
        (transcript("Assistant: a"), transcript("Assistant: b"), "odd roles"),
        (
            transcript("Human: a", "Human: b", "Assistant: c"),
            transcript("Human: a", "Human: b", "Assistant: d"),
            "odd roles",
        ),
        ("Chat:" + HH["chosen"], HH["rejected"], "text before the first turn"),
        (transcript("Human:", "Assistant: a"), transcript("Human:", "Assistant: b"), "empty turn"),
        (7, HH["rejected"], "not a text or a conversation"),
    ],
)
def test_a_transcript_that_cannot_be_used_is_kept_aside_with_its_reason(
    tmp_path: Path, chosen: Any, rejected: Any, reason: str
) -> None:
    imported = load(tmp_path, HH, {"chosen": chosen, "rejected": rejected}, format="hh-rlhf")
    assert len(imported.comparisons) == 1
    assert reasons(imported) == [reason]
    assert imported.unused[0]["line"] == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "contexts differ"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
            "identical answers",
        ),
        ({"chosen": "same words", "rejected": "same words "}, "identical answers"),
        ({"chosen": "nothing shared", "rejected": "at all"}, "contexts differ"),
        ({"chosen": "word", "rejected": "words"}, "contexts differ"),
        ({"chosen": [], "rejected": [user("a"), assistant("b")]}, "empty chosen"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "no assistant turn"),
        ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "no assistant turn"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty turn"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [{"role": "tool", "content": "a"}], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "not a text or a conversation"),
        (
            {"prompt": [user("a")], "chosen": [{**assistant("b"), "x": 1}], "rejected": "c"},
            "not a text or a conversation",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "not a text or a conversation"),
        ({"chosen": "b c", "rejected": [user("a"), assistant("b")]}, "not a text or a conversation"),
        ({**TRL, "preference": 1.5}, "preference outside [0, 1]"),
        ({**TRL, "preference": -0.1}, "preference outside [0, 1]"),
        ({**TRL, "preference": "yes"}, "preference not a number"),
        ({**TRL, "preference": True}, "preference not a number"),
        ({**TRL, "margin": "2"}, "margin not a number"),
        ({**TRL, "margin": 10**400}, "margin not finite, or beyond 1e+12"),
        ({**TRL, "tag": ["a"]}, "a name that is not text"),
        ({**TRL, "id": 1.5}, "a name that is not text"),
    ],
)
def test_a_trl_row_that_cannot_be_used_is_kept_aside_with_its_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    imported = load(tmp_path, row, format="trl")
    assert imported.comparisons == []
    assert reasons(imported) == [reason]
    jsonl(imported.unused).encode()


def test_a_preference_below_one_half_swaps_the_sides_and_the_sign_of_the_margin(tmp_path: Path) -> None:
    (comparison,) = load(tmp_path, {**TRL, "preference": 0.25, "margin": 2}).comparisons
    assert comparison.chosen == [assistant("go away")]
    assert comparison.rejected == [assistant("good day")]
    assert (comparison.preference, comparison.margin) == (0.75, -2.0)
    assert comparison.flags == ["sides swapped"]


def test_a_tie_is_kept_as_it_stands(tmp_path: Path) -> None:
    (comparison,) = load(tmp_path, {**TRL, "preference": 0.5, "margin": 0.5}).comparisons
    assert comparison.chosen == [assistant("good day")]
    assert (comparison.preference, comparison.margin, comparison.flags) == (0.5, 0.5, [])


# --- numbered responses -------------------------------------------------------------------------------------------

PKU = {
    "prompt": "Is it safe?",
    "response_0": "zero",
    "response_1": "one",
    "better_response_id": 1,
    "safer_response_id": 0,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
PANDA = {
    "idx": 7,
    "cmp_key": "a_b",
    "instruction": "Add.",
    "input": " 1 and 2 ",
    "response1": "three",
    "response2": "four",
    "annotator1": 1,
    "annotator2": 1,
    "annotator3": 1,
}
BAR = {"input": "Add 1 and 2.", "output_1": "four", "output_2": "three", "label": 2}


def said(comparison: Comparison) -> tuple[Any, ...]:
    texts = (comparison.chosen[0]["content"], comparison.rejected[0]["content"])
    signs = (comparison.chosen_safe, comparison.rejected_safe)
    return (*texts, comparison.preference, comparison.safer, *signs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("one", "zero", 1.0, 0.0, False, True)),  # the better one is the less safe one
        ({"better_response_id": 0}, ("zero", "one", 1.0, 1.0, True, False)),
        (
            {"safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": False},
            ("one", "zero", 1.0, 1.0, False, False),
        ),
        ({"safer_response_id": None, "is_response_1_safe": None}, ("one", "zero", 1.0, None, None, True)),
        ({"is_response_0_safe": 1, "is_response_1_safe": 0.0}, ("one", "zero", 1.0, 0.0, False, True)),
    ],
)
def test_a_pku_row_brings_two_orders_and_two_signs(tmp_path: Path, change: dict[str, Any], expected: Any) -> None:
    imported = load(tmp_path, PKU | change)
    (comparison,) = imported.comparisons
    assert (imported.format, said(comparison), comparison.flags) == ("pku-saferlhf", expected, [])
    assert comparison.prompt == [user("Is it safe?")]
    assert comparison.provenance["chosen"] == {"zero": "response_0", "one": "response_1"}[expected[0]]


def test_a_pku_row_of_one_order_has_no_safety_labels(tmp_path: Path) -> None:
    columns = ("prompt", "response_0", "response_1", "better_response_id")
    (comparison,) = load(tmp_path, {key: PKU[key] for key in columns}).comparisons
    assert said(comparison) == ("one", "zero", 1.0, None, None, None)


def test_further_columns_of_pku_are_kept_for_the_trace(tmp_path: Path) -> None:
    more = {"response_0_severity_level": 2, "prompt_source": float("nan"), "response_1_harm_category": {"a": True}}
    (comparison,) = load(tmp_path, PKU | more).comparisons
    assert comparison.provenance["columns"] == more | {"prompt_source": "nan"}
    jsonl([comparison])


def test_a_safety_order_against_the_signs_is_kept_and_flagged(tmp_path: Path) -> None:
    (comparison,) = load(tmp_path, PKU | {"safer_response_id": 1}).comparisons
    assert comparison.flags == ["safer against the signs"]
    assert said(comparison) == ("one", "zero", 1.0, 1.0, False, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PKU | {"response_0": " "}, "empty response_0"),
        (PKU | {"response_1": None}, "empty response_1"),
        (PKU | {"response_1": "zero"}, "identical answers"),
        (PKU | {"prompt": None}, "not a text or a conversation"),
        (PKU | {"prompt": " "}, "empty turn"),
        (PKU | {"better_response_id": 2}, "better_response_id not one of 0, 1"),
        (PKU | {"better_response_id": None}, "better_response_id not one of 0, 1"),
        (PKU | {"better_response_id": True}, "better_response_id not one of 0, 1"),
        (PKU | {"better_response_id": float("nan")}, "better_response_id not one of 0, 1"),
        (PKU | {"safer_response_id": "0"}, "safer_response_id not one of 0, 1"),
        (PKU | {"is_response_0_safe": "no"}, "is_response_0_safe not true or false"),
        (PKU | {"is_response_1_safe": 0.5}, "is_response_1_safe not true or false"),
        (PANDA | {"annotator2": 3}, "annotator2 not one of 0, 1, 2"),
        (PANDA | {"annotator3": None}, "annotator3 not one of 0, 1, 2"),
        (PANDA | {"response1": True}, "not a text or a conversation"),
        (PANDA | {"instruction": float("nan")}, "not a text or a conversation"),
        (PANDA | {"instruction": "", "input": ""}, "empty turn"),
        (BAR | {"label": 0}, "label not one of 1, 2"),
        (BAR | {"output_2": "four "}, "identical answers"),
        (BAR | {"weight": -1}, "weight not a number from 0 to 1e+12"),
        (BAR | {"weight": "1"}, "weight not a number from 0 to 1e+12"),
        (BAR | {"weight": 1e308}, "weight not a number from 0 to 1e+12"),
        (BAR | {"weight": float("inf")}, "weight not a number from 0 to 1e+12"),
    ],
)
def test_a_numbered_row_that_cannot_be_used_is_kept_aside(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    imported = load(tmp_path, row)
    assert imported.comparisons == [] and reasons(imported) == [reason]
    jsonl(imported.unused)


@pytest.mark.parametrize(
    ("votes", "chosen", "preference", "for_chosen"),
    [
        ((1, 1, 1), "three", 1.0, [1.0, 1.0, 1.0]),
        ((2, 2, 1), "four", 2 / 3, [1.0, 1.0, 0.0]),
        ((1, 0, 0), "three", 2 / 3, [1.0, 0.5, 0.5]),
        ((0, 2, 2), "four", 5 / 6, [0.5, 1.0, 1.0]),
        ((0, 0, 0), "three", 0.5, [0.5, 0.5, 0.5]),
        ((2, 0, 1), "three", 0.5, [0.0, 0.5, 1.0]),
    ],
)
def test_three_votes_make_a_soft_preference_and_are_kept(
    tmp_path: Path, votes: tuple[int, int, int], chosen: str, preference: float, for_chosen: list[float]
) -> None:
    row = PANDA | {f"annotator{number}": vote for number, vote in enumerate(votes, start=1)}
    (comparison,) = load(tmp_path, row).comparisons
    assert comparison.prompt == [user("Add.\n\n1 and 2")]
    assert load(tmp_path, row | {"input": ""}).comparisons[0].prompt == [user("Add.")]
    assert comparison.chosen == [assistant(chosen)]
    assert comparison.preference == pytest.approx(preference)
    assert [vote["annotator"] for vote in comparison.votes] == ["annotator1", "annotator2", "annotator3"]
    assert [vote["preference"] for vote in comparison.votes] == for_chosen
    assert {vote["first"] for vote in comparison.votes} == {"chosen"}
    assert comparison.provenance["columns"] == {"cmp_key": "a_b", "idx": 7}


def test_the_label_of_llmbar_names_the_better_output(tmp_path: Path) -> None:
    second, first = load(tmp_path, BAR, BAR | {"label": 1, "weight": 0.25}).comparisons
    assert said(second)[:3] == ("three", "four", 1.0) and second.provenance["chosen"] == "output_2"
    assert said(first)[:3] == ("four", "three", 1.0) and first.provenance["chosen"] == "output_1"
    assert (second.weight, first.weight) == (1.0, 0.25)


def test_safety_columns_change_places_with_the_sides(tmp_path: Path) -> None:
    signs = {"safer": 0.75, "chosen_safe": True, "rejected_safe": False}
    (comparison,) = load(tmp_path, {**TRL, "preference": 0.25, **signs}).comparisons
    assert said(comparison) == ("go away", "good day", 0.75, 0.25, False, True)
    assert comparison.flags == ["sides swapped"]


def test_the_id_of_a_row_that_says_nothing_new_is_that_of_earlier_releases(tmp_path: Path) -> None:
    assert load(tmp_path, TRL).comparisons[0].id == "615f7680e3e68c71"
