"""Pairs that comparisons, rankings and ratings give for measuring a reward model."""

from pathlib import Path

import pytest
from tiny_rows import comparison, ranking, rating

from rlaif.errors import DataError
from rlaif.records import text_of
from rlaif.stages.reward_data import Usable, split_rows
from rlaif.stages.reward_pairs import decided, pairs_among, refuse_too_few


def told(rows):
    return [
        (text_of(pair.comparison.chosen), text_of(pair.comparison.rejected), pair.better, pair.worse)
        for pair in pairs_among(rows)
    ]


def test_comparisons_are_pairs_and_ties_are_not_decided():
    rows = [comparison(1, "a", "b"), comparison(2, "c", "d", preference=0.5)]
    assert told(rows) == [("a", "b", (0, 0), (0, 1)), ("c", "d", (1, 0), (1, 1))]
    assert [pair.comparison for pair in decided(pairs_among(rows))] == rows[:1]


def test_a_ranking_gives_a_pair_for_each_two_answers_of_different_ranks():
    found = pairs_among([comparison(1), ranking(2, ["x", "y", "z"], [2, 1, 2], tag="ordinary")])
    assert [(pair.better, pair.worse) for pair in found[1:]] == [((1, 1), (1, 0)), ((1, 1), (1, 2))]
    assert {(pair.comparison.source, pair.comparison.tag) for pair in found[1:]} == {("human", "ordinary")}
    assert len({pair.comparison.id for pair in found}) == 3


def test_ratings_of_one_annotator_on_one_prompt_are_compared_and_others_are_not():
    rows = [
        rating(1, "low", 1, prompt="p"),
        rating(2, "high", 5, prompt="p"),
        rating(3, "as high", 5, prompt="p"),
        rating(4, "another prompt", 9, prompt="q"),
        rating(5, "another annotator", 9, annotator="b", prompt="p"),
    ]
    assert told(rows) == [("high", "low", (1, 0), (0, 0)), ("as high", "low", (2, 0), (0, 0))]


def test_without_any_other_pair_an_annotators_ratings_are_compared_across_prompts():
    rows = [rating(n, f"rated {n}", n, prompt=f"p{n}", annotator="ab"[n % 2]) for n in range(6)]
    found = pairs_among(rows)
    assert len(found) == 4  # neighbours in the order of the prompts' hashes, within each annotator
    for pair in found:
        assert rows[pair.better[0]].rating > rows[pair.worse[0]].rating
        assert rows[pair.better[0]].annotator == rows[pair.worse[0]].annotator
    assert len(pairs_among([*rows, comparison(9)])) == 1


EVAL = [comparison(n, split="eval") for n in range(3)]
LONG, EMPTY = {"id": "a", "reason": "longer than max_length"}, {"id": "a", "reason": "empty answer"}


@pytest.mark.parametrize(
    ("rows", "unused", "fraction", "advice"),
    [
        ([comparison(1)], [], 0.2, "All usable rows are of one prompt, .*: bring rows of others"),
        ([comparison(n, prompt="one") for n in range(4)], [], 0.2, "All usable rows are of one prompt"),
        ([comparison(n) for n in range(4)], [], 1.0, "Lower reward.heldout_fraction"),
        ([comparison(n) for n in range(4)], [LONG], 0.0, "Raise reward.heldout_fraction, or mark"),
        (EVAL, [], 0.2, "Mark fewer rows with `split: eval`"),
        ([comparison(n, preference=0.5) for n in range(4)], [], 0.2, "Bring more labels that prefer one"),
        ([], [LONG], 0.2, r"Bring rows from which .* learned, or raise reward\.max_length"),
        ([], [EMPTY], 0.2, "Bring rows from which something can be learned"),
        ([rating(n, value=3) for n in range(4)], [], 0.2, "all 4 ratings are 3.*Bring ratings that differ"),
    ],
)
def test_too_few_rows_are_refused_with_what_helps(rows, unused, fraction, advice):
    with pytest.raises(DataError, match=advice):
        refuse_too_few(Path("4-reward"), len(rows) + len(unused), Usable(rows, unused, 0), split_rows(rows, fraction))


def test_enough_rows_are_not_refused():
    rows = [comparison(n) for n in range(4)]
    refuse_too_few(Path("4-reward"), 4, Usable(rows, [], 0), split_rows(rows, 0.2))
