"""People's labels: files of this package as they are, others imported, and what became of the rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.documents import shipped
from rlaif.errors import DataError
from rlaif.human.labels import read_comparisons, read_labels, summary
from rlaif.records import Comparison, Ranking, Rating, assistant, read_rows

OURS = Comparison(
    id="c1",
    prompt=[{"role": "user", "content": "P"}],
    chosen=assistant("good"),
    rejected=assistant("bad"),
    preference=0.8,
    margin=1.5,
    source="ai",
    annotator="judge",
    split="eval",
    votes=[{"annotator": "judge", "strength": 1.4}],
    flags=["odd"],
    provenance={"prompt_id": "h1"},
)
THEIRS = [{"prompt": f"How is number {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]


def written(path: Path, *rows: Any) -> Path:
    text = "".join((row.model_dump_json() if isinstance(row, Comparison) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["ours.jsonl", "ours.jsonl.gz"])
def test_comparisons_of_this_package_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    second = OURS.model_copy(update={"id": "c2", "tag": "harmful"})
    found = read_labels(written(tmp_path / name, OURS, second), annotator="someone", seed=5)
    assert found == ([OURS, second], [], "rlaif", [], [], {})
    assert found.kind == "comparisons"


def test_ratings_and_rankings_of_this_package_come_back_as_they_were(tmp_path: Path) -> None:
    about: dict[str, Any] = {"prompt": OURS.prompt, "source": "human", "annotator": "ann", "split": "eval"}
    rating = Rating(id="r", response=OURS.chosen, rating=4.5, **about)
    ranking = Ranking(id="k", responses=[OURS.chosen, OURS.rejected], ranks=[1, 1], weight=2, tag="t", **about)
    for row, kind in ((rating, "ratings"), (ranking, "rankings")):
        path = written(tmp_path / f"{kind}.jsonl", row.model_dump())
        found = read_labels(path, tag="t", annotator="other")
        assert (found.kind, found.format, found.rows) == (kind, "rlaif", [row.model_copy(update={"tag": "t"})])
        with pytest.raises(DataError, match=f"{kind}.jsonl: holds {kind}; pairs of which one answer"):
            read_comparisons(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": [{"role": "system", "content": "S"}]}, "odd roles"),
        ({"prompt": assistant("A")}, "odd roles"),
        ({"prompt": [{"role": "user", "content": "Q"}, *assistant("A")]}, "odd roles"),
        ({"prompt": [{"role": "bot", "content": "Q"}]}, "odd roles"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty turn"),
        ({"rejected": [{"role": "user", "content": "bad"}]}, "last turn is not the assistant's"),
    ],
)
def test_rows_of_this_package_that_are_no_conversation_are_kept_aside(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    odd = OURS.model_copy(update={"id": "c2", **change})
    found = read_labels(written(tmp_path / "ours.jsonl", OURS, odd))
    assert found.rows == [OURS]
    assert found.unused == [{"line": 2, "reason": reason, "row": odd.model_dump()}]


def test_a_file_where_only_pairs_are_of_use_may_be_of_any_form(tmp_path: Path) -> None:
    assert len(read_comparisons(written(tmp_path / "theirs.jsonl", *THEIRS), tag="t").comparisons) == 40
    with pytest.raises(DataError, match="holds ratings"):
        read_comparisons(written(tmp_path / "none.jsonl", {"prompt": "P", "response": "", "rating": 1}))


def test_a_tag_is_given_to_rows_that_bring_none(tmp_path: Path) -> None:
    tagged = OURS.model_copy(update={"id": "c2", "tag": "harmful"})
    found = read_labels(written(tmp_path / "ours.jsonl", OURS, tagged), tag="mine")
    assert [row.tag for row in found.comparisons] == ["mine", "harmful"]
    theirs = read_labels(written(tmp_path / "theirs.jsonl", THEIRS[0] | {"tag": "t"}, THEIRS[1]), tag="mine")
    assert [row.tag for row in theirs.comparisons] == ["t", "mine"]


def test_a_wrong_row_of_this_package_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "ours.jsonl", OURS, OURS.model_copy(update={"preference": 0.2}))
    with pytest.raises(DataError, match=r"ours\.jsonl:2: preference: Input should be greater than or equal to 0\.5"):
        read_labels(path)


@pytest.mark.parametrize("name", ["theirs.jsonl", "theirs.jsonl.gz"])
def test_another_projects_file_is_imported(name: str, tmp_path: Path) -> None:
    empty = {"prompt": "P", "chosen": "", "rejected": "b"}
    found = read_labels(written(tmp_path / name, *THEIRS, empty), annotator="ann", seed=1)
    assert found.format == "trl" and len(found.comparisons) == 40
    assert [(row["line"], row["reason"]) for row in found.unused] == [(41, "empty chosen")]
    row = found.comparisons[0]
    assert (row.annotator, row.source, row.preference) == ("ann", "human", 1.0)
    assert {row.split for row in found.comparisons} == {"train"}


def test_a_share_of_the_opening_questions_is_held_out_where_one_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "theirs.jsonl", *THEIRS)
    first, second = (
        [row.split for row in read_labels(path, seed=seed, eval_fraction=0.3).comparisons] for seed in (1, 2)
    )
    assert 0 < first.count("eval") < 40 and first != second


def test_imported_rows_that_are_written_and_read_again_are_the_same(tmp_path: Path) -> None:
    found = read_labels(written(tmp_path / "theirs.jsonl", *THEIRS), tag="t")
    again = read_labels(written(tmp_path / "again.jsonl", *found.comparisons), tag="other", annotator="other", seed=9)
    assert again.comparisons == found.comparisons == read_rows(tmp_path / "again.jsonl", Comparison)


def test_the_shipped_example_is_usable_throughout() -> None:
    found = read_labels(shipped("recipes") / "human-example.jsonl")
    assert len(found.comparisons) == 40 and found.unused == []


def test_a_file_that_does_not_exist_or_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nosuch\.jsonl: no such file"):
        read_labels(tmp_path / "nosuch.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1: not a JSON object"):
        read_labels(tmp_path / "broken.jsonl")


def test_the_summary_counts_every_row(tmp_path: Path) -> None:
    same = {"prompt": "P", "chosen": "a", "rejected": "a"}
    rows = [*THEIRS, same, same | {"prompt": "Q"}, {"prompt": "P", "chosen": "", "rejected": "b"}, *THEIRS[:3]]
    found = read_labels(written(tmp_path / "theirs.jsonl", *rows), eval_fraction=0.3)
    held = sum(row.split == "eval" for row in found.comparisons)
    assert 0 < held < 40
    assert summary(found, Path("out.jsonl"), Path("unused.jsonl")).splitlines() == [
        "46 rows (trl): 40 comparisons -> out.jsonl",
        f"  for training {40 - held}, held out {held}",
        "  not usable 6 -> unused.jsonl",
        "    duplicate of an earlier line: 3",
        "    identical answers: 2",
        "    empty chosen: 1",
    ]


def test_the_summary_names_flags_and_contradictions(tmp_path: Path) -> None:
    turned = {"prompt": "How is number 0?", "chosen": "bad 0", "rejected": "good 0", "preference": 0.9}
    swapped = {"prompt": "How is number 1?", "chosen": "x", "rejected": "y", "preference": 0.2}
    found = read_labels(written(tmp_path / "theirs.jsonl", THEIRS[0], turned, swapped))
    assert summary(found, Path("out.jsonl"), Path("unused.jsonl")).splitlines() == [
        "3 rows (trl): 3 comparisons -> out.jsonl",
        "  for training 3, held out 0",
        "  sides swapped: 1",
        "  contradictory 2 (kept; one annotator said the opposite of the same answers elsewhere): "
        "line 1 against 2, 2 against 1",
    ]


def test_the_summary_of_a_file_without_unusable_rows_is_short(tmp_path: Path) -> None:
    found = read_labels(written(tmp_path / "ours.jsonl", OURS))
    assert summary(found, Path("out.jsonl"), Path("unused.jsonl")).splitlines() == [
        "1 rows (rlaif): 1 comparisons -> out.jsonl",
        "  for training 0, held out 1",
        "  odd: 1",
    ]
