"""Near-duplicates and critiques that find nothing to change."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.sameness import grams, likeness, near_duplicates, says_no_change

LINE = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.parametrize(
    ("critique", "expected"),
    [
        ("Nothing has to change. The answer is kind.", True),
        ("nothing needs to be changed", True),
        ("Nothing in the answer has to be corrected.", True),
        ("No change is needed.", True),
        ("No further revisions are necessary here.", True),
        ("The answer needs no change.", True),
        ("This answer doesn\u2019t need to be changed.", True),
        ("There is none.", True),
        ("There is no such risk.", True),
        ("Nothing has to change, but the tone is harsh.", False),
        ("Nothing has to change except the last line.", False),
        ("The answer helps with theft. Nothing has to change.", False),
        ("Everything has to change.", False),
        ("There is none of the warmth that was asked for.", False),
        ("No.", False),
        ("", False),
    ],
)
def test_a_critique_says_that_nothing_has_to_change_in_its_first_sentence_without_reserve(
    critique: str, expected: bool
) -> None:
    assert says_no_change(critique) is expected


def test_likeness_is_the_share_of_common_word_triples() -> None:
    # a b c d and a b c e have the triples {abc, bcd} and {abc, bce}: one common of three
    assert likeness(grams("a b c d"), grams("A  b C e")) == pytest.approx(1 / 3)
    assert likeness(grams("a b"), grams("a B")) == 1.0
    assert likeness(grams("a b"), grams("a c")) == 0.0


def test_the_smallest_id_of_a_group_stays_and_the_order_of_rows_changes_nothing() -> None:
    # 12 words have 10 triples; another last word changes one of them: 9 common of 11
    rows = [("c", LINE), ("a", LINE), ("b", LINE.replace("twelve", "dozen")), ("d", "something else altogether")]
    for order in itertools.permutations(rows):
        assert near_duplicates(order, 0.8) == {"b": "a", "c": "a"}
    assert near_duplicates(rows, 0.9) == {"c": "a"}
    assert near_duplicates(rows, 9 / 11) == {"b": "a", "c": "a"}
    assert near_duplicates(rows, 0.82) == {"c": "a"}


@pytest.mark.slow
def test_hashing_misses_hardly_any_pair_that_the_exact_share_finds() -> None:
    draw = random.Random(7)
    found = expected = 0
    for _ in range(150):
        words = [str(draw.randrange(10_000)) for _ in range(60)]
        other = list(words)
        for _ in range(draw.randrange(3)):
            other[draw.randrange(60)] = "changed"
        pair = " ".join(words), " ".join(other)
        if likeness(grams(pair[0]), grams(pair[1])) >= 0.85:
            expected += 1
            found += len(near_duplicates([("a", pair[0]), ("b", pair[1])], 0.85))
    assert expected > 80 and found >= 0.99 * expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab {}<|\ud800", max_size=12), max_size=6))
def test_any_texts_are_compared_and_no_group_loses_its_last(texts: list[str]) -> None:
    rows = [(f"{index:02}", text) for index, text in enumerate(texts)]
    gone = near_duplicates(rows, 1.0)
    assert not gone.keys() & set(gone.values())
    exact = {grams(text) for text in texts}
    assert len(texts) - len(gone) == len(exact)
