"""Pairs that comparisons, rankings and ratings give for measuring a reward model."""

from tiny_rows import comparison, ranking, rating

from rlaif.records import text_of
from rlaif.stages.reward_pairs import decided, pairs_among


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
