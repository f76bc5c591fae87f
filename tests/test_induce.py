"""Inverse constitutional AI: what was planted is found, what was not is dropped, and the halves never mix."""

import json
from pathlib import Path
from typing import Any

import planted
import pytest
from scripted import Said, ScriptedEngine

from rlaif.constitution import load
from rlaif.constitution_write import as_yaml
from rlaif.errors import DataError
from rlaif.human.labels import read_labels
from rlaif.induce import Candidate, Induced, Options, cluster, describe, induce, rule_of, split, summary, telling_words
from rlaif.journal import Journal


@pytest.fixture(scope="module")
def usual_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Induced, ScriptedEngine]:
    """Return what comes of planted rows with the usual options, and the engine that answered."""
    folder, engine = tmp_path_factory.mktemp("usual"), planted.engine()
    path = planted.write_rows(folder / "labels.jsonl")
    with Journal(folder / "journal.db") as journal:
        return induce(path, "tiny", engine, journal, Said(), Options()), engine


@pytest.fixture
def usual(usual_run: tuple[Induced, ScriptedEngine]) -> Induced:
    return usual_run[0]


@pytest.fixture
def found(tmp_path: Path, no_sync: None):
    """Induce from planted rows: ``found(engine=..., count=..., **options)``."""

    def run(engine: ScriptedEngine | None = None, count: int = 160, **options: Any) -> Induced:
        path = planted.write_rows(tmp_path / "labels.jsonl", count)
        with Journal(tmp_path / "journal.db") as journal:
            return induce(path, "tiny", engine or planted.engine(), journal, Said(), Options(**options))

    return run


def test_planted_principles_are_found_and_noise_is_dropped(usual):
    induced = usual
    assert induced.constitution is not None
    planted_rules = {rule_of(line) for line in (*planted.POLITE, *planted.SOURCED)}
    assert {p.text for p in induced.constitution.principles} <= planted_rules
    assert sorted(word for p in induced.constitution.principles for word in ("polite", "source") if word in p.text) == [
        "polite",
        "source",
    ]
    (noise,) = [one for one in induced.evidence["candidates"] if not one["kept"]]
    assert noise["text"] == "The answer mentions a colour of the rainbow."
    assert noise["dropped"] == "no better than chance"


def test_accuracy_counts_votes_with_a_side_and_coverage_how_many_there_are(usual):
    induced = usual
    by_text = {one["text"]: one for one in induced.evidence["candidates"]}
    polite = next(one for text, one in by_text.items() if "polite" in text)
    source = next(one for text, one in by_text.items() if "source" in text)
    colour = by_text["The answer mentions a colour of the rainbow."]
    assert polite["accuracy"]["rate"] == source["accuracy"]["rate"] == 1.0
    assert polite["accuracy"]["n"] + source["accuracy"]["n"] == polite["heldout"] == 60
    assert polite["coverage"] == polite["accuracy"]["n"] / 60
    assert colour["coverage"] == 1.0
    assert polite["same_position"] == 60 - polite["accuracy"]["n"], "no side: only the position pulls"
    assert induced.evidence["judge_without_a_principle"]["accuracy"] is None


@pytest.mark.slow
def test_a_judge_that_agrees_without_any_principle_is_seen_to_do_so(found):
    def sycophant(question):
        text = question.messages[-1]["content"]
        first = text.split("Answer A:")[1].split("Answer B:")[0]
        return (-0.5, -1.5) if "please" in first or "[1]" in first else (-1.5, -0.5)

    induced = found(ScriptedEngine(planted.propose, sycophant))
    assert induced.evidence["judge_without_a_principle"]["accuracy"]["rate"] == 1.0


@pytest.mark.slow
def test_what_speaks_against_the_labels_is_dropped_too(found):
    def contrary(question):
        return planted.vote(question)[::-1]

    induced = found(ScriptedEngine(planted.propose, contrary))
    assert induced.constitution is None
    reasons = {one["text"].split()[-1]: one["dropped"] for one in induced.evidence["candidates"]}
    assert sorted(reasons.values()) == [
        "no better than chance",
        "speaks against the labels",
        "speaks against the labels",
    ]


@pytest.mark.slow
def test_keep_all_keeps_everything_with_its_evidence(found):
    induced = found(keep_all=True)
    assert induced.constitution is not None
    assert len(induced.constitution.principles) == len(induced.evidence["candidates"]) == 3
    assert [one["kept"] for one in induced.evidence["candidates"]] == [True] * 3
    assert "mentions a colour" in induced.constitution.principles[-1].text, "ranked by the lower end of the interval"


def test_intervals_widen_with_the_number_of_candidates():
    votes = [1.0] * 13 + [-1.0] * 3
    alone, one_of_five = Candidate("T", votes=votes), Candidate("T", votes=votes, confidence=0.99)
    assert (alone.dropped, one_of_five.dropped) == (None, "no better than chance")
    assert alone.evidence["accuracy"]["low"] == pytest.approx(0.5699, abs=1e-4)
    assert one_of_five.evidence["accuracy"]["low"] == pytest.approx(0.4909, abs=1e-3)


@pytest.mark.slow
def test_a_weak_vote_takes_no_side(found):
    induced = found(min_strength=2.0)
    assert {one["dropped"] for one in induced.evidence["candidates"]} == {"no vote has a side"}


def test_the_written_file_reads_back_and_names_the_evidence(usual, tmp_path):
    induced = usual
    assert induced.constitution is not None
    (tmp_path / "induced.yaml").write_text(as_yaml(induced.constitution, notes=induced.notes))
    assert load(tmp_path / "induced.yaml") == induced.constitution
    text = (tmp_path / "induced.yaml").read_text()
    assert text.count("  # Agrees with ") == 2
    assert "description: " in text and "Induced from labels.jsonl (SHA-256 " in text
    json.dumps(induced.evidence, allow_nan=False)


def test_no_prompt_is_in_both_halves_and_the_labels_of_one_are_never_shown(usual_run):
    engine = usual_run[1]
    texts = {"propose": set(), "votes": set()}
    for question in engine.asked:
        kind = "propose" if question.item_id.endswith("/propose") else "votes"
        texts[kind].add(question.messages[-1]["content"].split('"')[1])
    assert len(texts["propose"]) == 40 and len(texts["votes"]) == 60
    assert not texts["propose"] & texts["votes"]


def test_each_rule_is_voted_on_in_both_orders_and_the_better_answer_is_shown_first_about_half_of_the_time(usual_run):
    engine = usual_run[1]
    votes = [question.item_id for question in engine.asked if not question.item_id.endswith("/propose")]
    assert len(votes) == 4 * 60 * 2  # three candidates and the judge without a principle
    assert sum(name.endswith("/swapped") for name in votes) == len(votes) / 2
    shown = [question.messages[-1]["content"] for question in engine.asked if question.item_id.endswith("/propose")]
    better_first = sum("found answer A the better" in text for text in shown)
    assert 10 <= better_first <= 30
    for text in shown:
        letter = text.split("found answer ")[1][0]
        better = text.split(f"Answer {letter}:")[1].split('"')[1]
        assert "please" in better or "[1]" in better


@pytest.mark.slow
def test_a_second_induction_asks_nothing_again(found):
    first = found()
    engine = planted.engine()
    assert found(engine).evidence == first.evidence
    assert engine.calls == []


def test_another_seed_chooses_other_halves(tmp_path):
    path = planted.write_rows(tmp_path / "labels.jsonl")
    rows = read_labels(path).comparisons
    halves = [split(path, rows, Options(seed=seed, max_propose=999, max_heldout=999)) for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]
    assert len(halves[0].propose) + len(halves[0].heldout) == 160
    assert abs(len(halves[0].propose) - 80) < 26  # 4 standard deviations of 6.3


def test_ties_are_of_no_use_and_an_empty_half_is_refused(tmp_path):
    path = planted.write_rows(tmp_path / "labels.jsonl", 4)
    rows = read_labels(path).comparisons
    tied = [row.model_copy(update={"preference": 0.5}) for row in rows[:3]]
    with pytest.raises(DataError, match=r"pairs to propose from and \d to test on \(3 ties\)"):
        split(path, [*tied, rows[3]], Options())


def test_a_model_that_proposes_no_rules_is_told(found):
    with pytest.raises(DataError, match="no rule was proposed from 40 pairs; 40 lines were no rules. Take a stronger"):
        found(ScriptedEngine(lambda question: "Answer A is better.", planted.vote))


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("1. The answer is short", "The answer is short."),
        ('- "The answer is short."', "The answer is short."),
        ("  (2) the **answer** is short!", "The answer is short!"),
        ("Rule 3: The answer is short.", "The answer is short."),
        ("Answer A is shorter than that.", None),
        ("Neither of them is short.", None),
        ("Sure, here are three rules:", None),
        ("Is the answer short?", None),
        ("Too short", None),
        ('The rule is that "the answer" is short.', None),
        ("Sentence B is better than the other.", None),
        ("word " * 41, None),
    ],
)
def test_a_line_is_a_rule_if_it_is_a_sentence_that_could_hold_elsewhere(line: str, rule: str | None):
    assert rule_of(line) == rule


def test_rules_that_share_their_telling_words_are_one_candidate_and_negation_tells():
    assert telling_words("The answer names its sources.") == telling_words("The answer names a source")
    assert telling_words("It doesn't lecture.") != telling_words("It lectures.")
    proposals = [(f"r{n}", text) for n, text in enumerate([*planted.POLITE[:2], planted.SOURCED[0], planted.POLITE[0]])]
    groups = cluster(proposals)
    assert [(one.text, [row for row, _ in one.proposals]) for one in groups] == [
        (planted.POLITE[0], ["r0", "r1", "r3"]),
        (planted.SOURCED[0], ["r2"]),
    ]


def test_groups_do_not_depend_on_the_order_of_the_proposals():
    texts = [
        "The answer stays polite.",
        "The answer is polite when asked.",
        "The answer is polite.",
        "The answer is short.",
    ]
    for order in (texts, texts[::-1]):
        groups = cluster([(str(number), text) for number, text in enumerate(order)])
        assert [(one.text, len(one.proposals)) for one in groups] == [(texts[2], 3), (texts[3], 1)]


def test_evidence_is_told_in_a_line():
    one = Candidate("T", [("a", "T"), ("a", "T"), ("b", "T")], votes=[1.0, 2.0, 0.5, -1.0, 0.0], same_position=1)
    assert describe(one) == (
        "Agrees with 3 of 4 labels (75%, 95.0% interval 30% to 95%), takes a side on 80%; proposed from 2 pairs."
    )
    assert describe(Candidate("T", [], votes=[0.0])) == "No vote has a side on 1 held-out pairs; proposed from 0 pairs."


def test_the_summary_has_a_line_for_the_judge_alone_and_for_each_candidate(usual):
    lines = summary(usual.evidence).splitlines()
    assert lines[0].endswith("3 candidates, each tested on 60 other pairs (98.3% intervals, 95% over all of them)")
    assert lines[1].split() == ["no", "side", "the", "judge", "without", "a", "principle"]
    assert lines[-1].endswith("The answer mentions a colour of the rainbow. (no better than chance)")
