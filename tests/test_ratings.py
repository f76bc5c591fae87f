"""Ratings and rankings as other projects write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.human.importers import Imported, import_file
from rlaif.records import Ranking, Rating, jsonl, read_rows

USER = [{"role": "user", "content": "Why?"}]
NAN = float("nan")
RATED = {"prompt": "Why?", "response": "So.", "rating": 3}
RANKED = {"prompt": "Why?", "responses": ["best", "good", "bad"]}
UNPAIRED = {"prompt": "Why?", "completion": " So.", "label": True}


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> Imported:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return import_file(path, **options)


def test_a_rating_keeps_its_number_annotator_and_weight(tmp_path: Path) -> None:
    named = {**RATED, "rating": -2.5, "annotator": "ann", "weight": 0.5, "tag": "ordinary", "id": "r1"}
    imported = load(tmp_path, RATED, named, annotator="somebody")
    plain, told = imported.ratings
    assert (imported.format, imported.comparisons, imported.unused) == ("ratings", [], [])
    assert (plain.prompt, plain.response, plain.rating) == (USER, assistant("So."), 3.0)
    assert (plain.annotator, plain.weight, plain.source, plain.tag) == ("somebody", 1.0, "human", "")
    assert (told.id, told.annotator, told.weight, told.tag, told.rating) == ("r1", "ann", 0.5, "ordinary", -2.5)
    assert plain.provenance["line"] == 1 and plain.provenance["format"] == "ratings"


def test_a_rating_may_be_of_a_conversation(tmp_path: Path) -> None:
    turns = [*USER, *assistant("Hm?"), *USER]
    one, two = load(
        tmp_path,
        {**RATED, "prompt": turns},
        {**RATED, "prompt": "\n\nHuman: Why?\n\nAssistant: Hm?\n\nHuman: Why?\n\nAssistant:", "annotator": "b"},
    ).ratings
    assert one.prompt == two.prompt == turns


@pytest.mark.parametrize(("label", "rating"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)])
def test_a_good_or_bad_completion_is_a_rating_of_one_or_nought(tmp_path: Path, label: Any, rating: float) -> None:
    imported = load(tmp_path, {**UNPAIRED, "label": label})
    (row,) = imported.ratings
    assert (imported.format, row.rating, row.response) == ("unpaired", rating, assistant("So."))


@pytest.mark.parametrize(
    ("ranks", "expected"), [(None, [1, 2, 3]), ([3, 1, 2], [3, 1, 2]), ([1, 1, 3], [1, 1, 3]), ([1, 1, 1], [1, 1, 1])]
)
def test_responses_stand_best_first_unless_ranks_say_otherwise(tmp_path: Path, ranks: Any, expected: list[int]) -> None:
    imported = load(tmp_path, {**RANKED, "ranks": ranks})
    (row,) = imported.rankings
    assert (imported.format, row.ranks) == ("rankings", expected)
    assert row.responses == [assistant("best"), assistant("good"), assistant("bad")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**RATED, "rating": None}, "no rating"),
        ({**RATED, "rating": NAN}, "rating not finite, or beyond 1e+12"),
        ({**RATED, "rating": -1e200}, "rating not finite, or beyond 1e+12"),
        ({**RATED, "rating": "5"}, "rating not a number"),
        ({**RATED, "rating": True}, "rating not a number"),
        ({**RATED, "response": " "}, "empty response"),
        ({**RATED, "prompt": ""}, "empty turn"),
        ({**UNPAIRED, "label": None}, "label not true or false"),
        ({**UNPAIRED, "label": 2}, "label not true or false"),
        ({**UNPAIRED, "label": NAN}, "label not true or false"),
        ({**UNPAIRED, "completion": ""}, "empty completion"),
        ({**RANKED, "responses": ["alone"]}, "fewer than two responses"),
        ({**RANKED, "responses": "best good"}, "fewer than two responses"),
        ({**RANKED, "responses": ["a", ""]}, "empty response"),
        ({**RANKED, "responses": ["a", "b", "a "]}, "identical answers"),
        *(
            ({**RANKED, "ranks": ranks}, "ranks not whole numbers from 1, the best, one for each response")
            for ranks in ([1, 2], [0, 1, 2], [2, 3, 4], [1, 2, 2.5], [1, 2, True], "123", [1, 2, NAN], [])
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_kept_aside_with_its_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    imported = load(tmp_path, row)
    assert imported.rows == [] and [one["reason"] for one in imported.unused] == [reason]
    jsonl(imported.unused)


def test_duplicates_are_set_aside_and_other_annotators_are_not(tmp_path: Path) -> None:
    imported = load(tmp_path, RATED, RATED, {**RATED, "annotator": "b"}, {**RATED, "rating": 1})
    assert [one["reason"] for one in imported.unused] == ["duplicate of line 1"]
    first, _, other = imported.ratings
    assert imported.contradictory == {first.id: other.id, other.id: first.id}


def test_what_is_imported_can_be_written_and_read(tmp_path: Path) -> None:
    for row, kind in ((RATED, Rating), (RANKED, Ranking)):
        imported = load(tmp_path, row)
        path = tmp_path / "rows.jsonl"
        path.write_text(jsonl(imported.rows), encoding="utf-8")
        assert read_rows(path, kind) == imported.rows  # type: ignore[type-var]
