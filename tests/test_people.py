"""People's labels in the stage `label`: pairs, ratings and rankings from all files, everything counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import HARM, ScriptedEngine, make_run, prefers, rows_of, usual

from rlaif.errors import DataError
from rlaif.pipeline import _write_recipe
from rlaif.records import Comparison, Ranking, Rating, read_rows
from rlaif.report.reading import Quality
from rlaif.report.wording import label_findings
from rlaif.stages import label
from rlaif.stages.candidates import Engines
from rlaif.stages.people import People, people_labels
from rlaif.stages.run import Run
from rlaif.trace import trace

Maker = Callable[..., Run]
PAIRS = [{"prompt": f"How is number {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
RATINGS = [{"prompt": "Why?", "response": f"Answer {n}.", "rating": n, "annotator": "ann"} for n in range(4)]
RANKINGS = [{"prompt": "Why?", "responses": ["a", "b", "c"], "tag": "t"}]


def labels_of(run: Run) -> People:
    return people_labels(run, Engines(run))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    def make(*files: list[dict[str, Any]], engine: ScriptedEngine | None = None, **changes: Any) -> Run:
        names = [f"labels-{number}.jsonl" for number, _ in enumerate(files)]
        for name, rows in zip(names, files, strict=True):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"feedback": "human", "human": {"files": names, "tag": HARM}} | changes
        return make_run(tmp_path, monkeypatch, engine, **settings)

    return make


def quality_of(run: Run) -> Quality:
    return Quality.model_validate_json((run.folder / "3-label" / "quality.json").read_text())


def test_each_kind_of_row_gets_a_file_and_a_count(make: Maker) -> None:
    empty = {"prompt": "Why?", "response": " ", "rating": 1}
    run = make(PAIRS, [*RATINGS, empty], RANKINGS, system_prompt="Be brief.")
    counts = label.label(run)
    folder = run.folder / "3-label"
    assert {key: counts[key] for key in ("in", "comparisons", "ratings", "rankings", "unused", "failed")} == {
        "in": 9, "comparisons": 3, "ratings": 4, "rankings": 1, "unused": 1, "failed": 0,
    }  # fmt: skip
    ratings = read_rows(folder / "ratings.jsonl", Rating)
    (ranking,) = read_rows(folder / "rankings.jsonl", Ranking)
    assert [row.rating for row in ratings] == [0.0, 1.0, 2.0, 3.0]
    assert {row.tag for row in ratings} == {HARM} and ranking.tag == "t"
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert ranking.prompt == ratings[0].prompt == asked
    (unused,) = rows_of(folder / "unused.jsonl")
    assert (unused["file"], unused["line"], unused["reason"]) == ("labels-1.jsonl", 5, "empty response")
    quality = quality_of(run)
    assert (quality.labels.ratings, quality.labels.rankings, quality.labels.contradictory) == (4, 1, 0)
    assert label_findings(quality) == ["People\u2019s files also hold 4 ratings and 1 rankings."]


def test_files_without_a_pair_are_enough(make: Maker) -> None:
    run = make(RATINGS)
    counts = label.label(run)
    assert (counts["comparisons"], counts["ratings"], counts["in"]) == (0, 4, 4)
    assert (run.folder / "3-label" / "comparisons.jsonl").read_text() == ""
    assert not (run.folder / "3-label" / "rankings.jsonl").exists()
    labels = quality_of(run).labels
    assert (labels.chosen_longer, labels.mean_preference, labels.comparisons) == (None, None, 0)


def test_only_unusable_rows_stop_the_stage(make: Maker) -> None:
    run = make([{"prompt": "Why?", "response": "a", "rating": None}])
    with pytest.raises(DataError, match=r"no comparison is usable; 1 were set aside: \{'no rating': 1\}"):
        label.label(run)


def test_contradictions_are_found_across_files_and_kept(make: Maker) -> None:
    turned = {"prompt": "How is number 1?", "chosen": "bad 1", "rejected": "good 1"}
    other = {**turned, "prompt": "How is number 2?", "chosen": "bad 2", "rejected": "good 2", "annotator": "bo"}
    run = make(PAIRS, [turned, other], [{**RATINGS[0], "rating": 4}], [RATINGS[0]])
    label.label(run)
    rows = read_rows(run.folder / "3-label" / "comparisons.jsonl", Comparison)
    assert [row.flags for row in rows] == [[], ["contradictory"], [], ["contradictory"], []]
    quality = quality_of(run)
    assert quality.labels.contradictory == 4  # two comparisons and two ratings
    assert label_findings(quality)[-1].startswith("4 rows by people contradict another row of the same annotator")


def test_a_row_that_stands_in_two_files_counts_once_whatever_its_kind(make: Maker) -> None:
    people = labels_of(make(RATINGS, RATINGS[:1], RANKINGS, RANKINGS))
    assert (len(people.ratings), len(people.rankings), people.more) == (4, 1, {"ratings": 4, "rankings": 1})
    assert [row["reason"] for row in people.unused] == ["stands in two files"] * 2


def test_with_ai_feedback_no_file_is_read(make: Maker) -> None:
    run = make(PAIRS, engine=ScriptedEngine(usual, prefers("good", 2.0)), feedback="ai")
    assert labels_of(run) == ([], [], [], [], 0, frozenset())


def test_weights_signs_and_the_safety_order_arrive(make: Maker) -> None:
    row = {
        "prompt": "Is it safe?",
        "response_0": "zero",
        "response_1": "one",
        "better_response_id": 1,
        "safer_response_id": 0,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "weight": 0.5,
    }
    run = make([row])
    label.label(run)
    (comparison,) = read_rows(run.folder / "3-label" / "comparisons.jsonl", Comparison)
    assert (comparison.weight, comparison.safer) == (0.5, 0.0)
    assert (comparison.chosen_safe, comparison.rejected_safe) == (False, True)


def test_a_rating_and_a_ranking_lead_to_the_lines_of_their_files(make: Maker) -> None:
    run = make(RATINGS, RANKINGS)
    _write_recipe(run)
    label.label(run)
    folder = run.folder / "3-label"
    for name, file, text in (
        ("ratings", "labels-0.jsonl:1", "Answer 0."),
        ("rankings", "labels-1.jsonl:1", "a | b | c"),
    ):
        row = rows_of(folder / f"{name}.jsonl")[0]
        (node,) = trace(run.folder, row["id"])
        assert (node.what, node.where, node.text) == (name[:-1], f"3-label/{name}.jsonl:1", text)
        assert [(source.what, source.where) for source in node.sources] == [("label by a person", file)]


def test_annotators_of_one_pair_in_two_files_stay_rows_of_their_own(make: Maker) -> None:
    """As within one file: another annotator's row gets the name added, the same row twice or a reused id is unused."""
    mine = [{**row, "id": f"p{n}", "annotator": "a"} for n, row in enumerate(PAIRS)]
    turned = {"prompt": PAIRS[0]["prompt"], "chosen": "bad 0", "rejected": "good 0", "id": "p0"}
    theirs = [mine[1], {**turned, "annotator": "b"}, {**turned, "id": "p2", "annotator": "a"}, mine[0]]
    people = labels_of(make(mine, theirs))
    assert [row.id for row in people.comparisons] == ["p0", "p1", "p2", "p0@b"]
    assert people.comparisons[3].chosen[0]["content"] == "bad 0"
    again = "stands in two files"
    assert [row["reason"] for row in people.unused] == [again, "id used in labels-0.jsonl by another row", again]
    assert people.contradictory == 0
    other_order = labels_of(make(theirs, mine))
    assert len(other_order.comparisons) == 4 and len(other_order.unused) == 3


def test_a_row_named_after_its_annotator_in_one_file_is_known_by_its_id_in_another(make: Maker) -> None:
    both = [{**PAIRS[0], "id": "p0", "annotator": name} for name in ("b", "a")]  # in a file of both: p0 and p0@a
    people = labels_of(make(both[1:], both))
    assert [row.id for row in people.comparisons] == ["p0", "p0@b"]
    assert [row["reason"] for row in people.unused] == ["stands in two files"]


def test_annotators_who_share_pairs_are_measured_and_told_in_the_report(make: Maker) -> None:
    said = [
        {"prompt": f"Question {n}?", "chosen": better, "rejected": worse, "annotator": name}
        for n in range(40)
        for name, right in (("ann", True), ("ben", True), ("cy", n % 20 > 0), ("coin", n % 2 == 0))
        for better, worse in [(f"good {n}", f"bad {n}")[:: 1 if right else -1]]
    ]
    run = make(said, RATINGS)
    label.label(run)
    found = quality_of(run).annotators
    assert found is not None
    assert (found.pairs, found.shared) == (46, 40)  # four ratings of one prompt are six pairs
    assert [one.annotator for one in found.annotators][0] == "coin"
    assert found.annotators[0].weight < 0.2 < 0.8 < found.annotators[-1].weight
    [sentence] = [one for one in label_findings(quality_of(run)) if "annotators" in one]
    assert "Of 4 annotators" in sentence and "coin agrees less" in sentence and "reward.skill_weights" in sentence


def test_known_answers_tell_who_is_good_and_are_no_labels(make: Maker, tmp_path: Path) -> None:
    known = [{"prompt": row["prompt"], "response_0": row["chosen"], "response_1": row["rejected"]} for row in PAIRS]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps({**row, "better_response_id": 1}) + "\n" for row in known))
    settings = {"system_prompt": "Be brief.", "human": {"files": ["labels-0.jsonl"], "known": "known.jsonl"}}
    run = make(PAIRS, **settings)
    before = label.inputs(run)
    label.label(run)
    found = quality_of(run).annotators
    assert found is not None and (found.shared, found.known) == (3, 3)
    assert found.annotators[0].agreement.count == 0  # type: ignore[union-attr]
    assert quality_of(run).labels.comparisons == 3
    _write_recipe(run)
    assert f"known: {tmp_path / 'known.jsonl'}" in (run.folder / "recipe.yaml").read_text()
    (tmp_path / "known.jsonl").write_text(json.dumps({**known[0], "better_response_id": 0}) + "\n")
    assert {key for key, value in label.inputs(run).items() if value != before[key]} == {"known"}


def test_known_answers_to_none_of_the_pairs_are_told(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": "Else?", "chosen": "a", "rejected": "b"}) + "\n")
    run = make(PAIRS, human={"files": ["labels-0.jsonl"], "known": "known.jsonl"})
    label.label(run)
    assert "known.jsonl holds none of the labelled pairs" in "".join(run.progress.lines)  # type: ignore[attr-defined]


def test_annotators_who_share_no_pair_are_not_measured(make: Maker) -> None:
    run = make(PAIRS)
    label.label(run)
    assert quality_of(run).annotators is None


def test_duplicates_are_counted_together_whichever_line_they_repeat(make: Maker) -> None:
    run = make([*PAIRS, *PAIRS])
    label.label(run)
    assert quality_of(run).labels.unused == {"duplicate of an earlier line": 3}
