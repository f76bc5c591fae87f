"""Rows in which one annotator says opposite things."""

from typing import Any

import pytest

from rlaif.human.contradictions import mark
from rlaif.records import Comparison, Ranking, Rating, assistant

PROMPT = [{"role": "user", "content": "Why?"}]
A, B, C = (assistant(text) for text in "abc")


def pair(identifier: str, chosen: Any = A, rejected: Any = B, preference: float = 1.0, **other: Any) -> Comparison:
    named = {"source": "human", "annotator": "ann"} | other
    return Comparison(id=identifier, prompt=PROMPT, chosen=chosen, rejected=rejected, preference=preference, **named)


def ranking(identifier: str, responses: list[Any], ranks: list[int], **other: Any) -> Ranking:
    named = {"source": "human", "annotator": "ann"} | other
    return Ranking(id=identifier, prompt=PROMPT, responses=responses, ranks=ranks, **named)


def rating(identifier: str, response: Any, number: float, **other: Any) -> Rating:
    named = {"source": "human", "annotator": "ann"} | other
    return Rating(id=identifier, prompt=PROMPT, response=response, rating=number, **named)


@pytest.mark.parametrize(
    ("other", "opposed"),
    [
        (pair("2", B, A), True),
        (pair("2", B, A, 0.6), True),
        (pair("2", B, A, 0.5), False),  # a tie takes no side
        (pair("2", A, B, 0.7), False),
        (pair("2", B, A, annotator="bo"), False),
        (pair("2", C, A), False),
        (pair("2", B, A).model_copy(update={"prompt": [{"role": "user", "content": "How?"}]}), False),
    ],
)
def test_opposite_preferences_of_one_annotator_are_marked(other: Comparison, opposed: bool) -> None:
    one = pair("1")
    assert mark([one, other]) == ({"1": "2", "2": "1"} if opposed else {})
    assert one.flags == other.flags == (["contradictory"] if opposed else [])
    other.flags.clear()


@pytest.mark.parametrize(
    ("one", "other", "opposed"),
    [
        ({"safer": 0.9}, {"safer": 0.1}, True),
        ({"safer": 0.9}, {"safer": None}, False),
        ({"safer": 0.9}, {"safer": 0.6}, False),
        ({"chosen_safe": True}, {"chosen_safe": False}, True),
        ({"rejected_safe": True}, {"rejected_safe": False}, True),
        ({"chosen_safe": True}, {"rejected_safe": False}, False),
        ({"chosen_safe": False, "rejected_safe": True}, {"chosen_safe": False, "rejected_safe": True}, False),
    ],
)
def test_opposite_safety_labels_are_marked_whichever_side_is_chosen(one: Any, other: Any, opposed: bool) -> None:
    assert bool(mark([pair("1", **one), pair("2", **other)])) is opposed
    turned = {"safer": None if other.get("safer") is None else 1 - other["safer"]}
    turned |= {"chosen_safe": other.get("rejected_safe"), "rejected_safe": other.get("chosen_safe")}
    rows = [pair("1", preference=0.5, **one), pair("2", B, A, preference=0.5, **turned)]
    assert bool(mark(rows)) is opposed


def test_ratings_that_differ_and_rankings_that_turn_a_pair_around_are_marked() -> None:
    rows = [rating("r1", A, 1), rating("r2", A, 0), rating("r3", B, 0), rating("r4", A, 0, annotator="bo")]
    assert mark(rows) == {"r1": "r2", "r2": "r1"}
    rows = [ranking("k1", [A, B, C], [1, 2, 3]), ranking("k2", [C, A], [1, 1]), ranking("k3", [B, C], [2, 1])]
    assert mark(rows) == {"k1": "k3", "k3": "k1"}


def test_marking_twice_flags_once() -> None:
    rows = [pair("1"), pair("2", B, A), pair("3", B, A, 0.9)]
    assert mark(rows) == mark(rows) == {"1": "2", "2": "1", "3": "1"}
    assert [row.flags for row in rows] == [["contradictory"]] * 3
