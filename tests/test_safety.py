"""Safety labels: helpfulness and harmlessness judged apart, and each answer asked about alone, in two wordings."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import HARM, ScriptedEngine, make_run, rows_of

from rlaif.constitution import load, tagged
from rlaif.constitution_diff import redone
from rlaif.engines.engine import Answer, Question
from rlaif.errors import ConfigError, ConstitutionError
from rlaif.pipeline import _write_recipe
from rlaif.prompting import load_template
from rlaif.records import Comparison, read_rows, text_of
from rlaif.report.reading import Quality
from rlaif.report.wording import label_findings
from rlaif.stages import label
from rlaif.stages.run import Run
from rlaif.stages.safety import WORDINGS
from rlaif.trace import trace

Maker = Callable[..., Run]
REFUSES, HELPS = "It is wrong to do that, so I will not say how.", "Go ahead, it is easy and nobody will notice."
CONSTITUTION = """\
name: two
version: "1"
description: For tests.
principles:
  - {id: useful, title: Helps, text: The answer helps., comparison: Which one helps more?, tags: [helpful]}
  - {id: safe, title: S, text: Nobody is hurt., comparison: Who is hurt less?, applies_to: [harmful], tags: [harmless]}
  - {id: lawful, title: L, text: It is lawful., comparison: Which is lawful?, applies_to: [theft], tags: [harmless]}
tests:
  - {prompt: T1, better: good, worse: bad, principle: useful}
  - {prompt: T2, better: good, worse: bad, principle: useful}
  - {prompt: T3, better: kind, worse: cruel, principle: safe}
"""
STRENGTH = {REFUSES: 2.0, HELPS: -1.0, "kind": 1.0, "cruel": -1.0}
BIAS = 5.0  # towards the letter A, and yes: alone it would decide every question


def logprobs(logit: float, mass: float = 1.0) -> tuple[float, float]:
    first = 1 / (1 + math.exp(-logit))
    return math.log(mass * first), math.log(mass * (1 - first))


def judge(question: Question, signs: dict[str, float] = STRENGTH, mass: float = 1.0) -> Sequence[float]:
    """Find the answer that helps under `useful`, the refusal under others; call answers safe as `signs` says."""
    content = question.messages[-1]["content"]
    if "Does the answer " in content:
        strength = next(value for text, value in signs.items() if f'"{text}"' in content)
        strength -= 4.0 * ("It is lawful." in content)
        return logprobs((-strength if "break it?" in content else strength) + BIAS, mass)
    wanted = ("good", HELPS) if "Which one helps more?" in content else ("kind", REFUSES)
    shown_first = content.split("Answer B:")[0]
    return logprobs((1.5 if any(text in shown_first for text in wanted) else -1.5) + BIAS)


def write(question: Question) -> str:
    return (REFUSES, HELPS, "Third.")[question.sample]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    def make(choose: Callable[[Question], Sequence[float]] = judge, **changes: Any) -> Run:
        run_label = {"safety": True, "few_shot": 0, "attacks": 0, "gold_rate": 0.0} | changes.pop("label", {})
        settings = {"constitution": CONSTITUTION, "stages": ["label"], "label": run_label} | changes
        engine = ScriptedEngine(write, choose)
        run = make_run(tmp_path, monkeypatch, engine, **settings)
        run.scripted = engine  # type: ignore[attr-defined]
        return run

    return make


def labelled(run: Run) -> tuple[list[Comparison], Quality]:
    label.label(run)
    folder = run.folder / "3-label"
    quality = Quality.model_validate_json((folder / "quality.json").read_text())
    return read_rows(folder / "comparisons.jsonl", Comparison), quality


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_both_orders_and_the_signs_come_from_their_own_principles(make: Maker) -> None:
    rows, quality = labelled(make())
    harmful = [row for row in rows if row.tag == HARM]
    assert len(harmful) == 3 and len(rows) == 5
    for row in rows:
        assert text_of(row.chosen) == HELPS and row.preference == pytest.approx(sigmoid(1.5))
        assert row.provenance["principle"] == "useful"
    for row in harmful:  # the better answer is the less safe one
        assert row.safer == pytest.approx(1 - sigmoid(1.5))
        assert (row.chosen_safe, row.rejected_safe, row.flags) == (False, True, [])
    found = quality.safety
    assert found is not None
    assert (found.pairs, found.orders, found.safe, found.unsafe, found.against_signs) == (3, 3, 3, 3, 0)
    assert found.same_order is not None and (found.same_order.n, found.same_order.count) == (3, 0)
    assert found.tests is not None and (found.tests.n, found.tests.count) == (2, 2)
    texts = label_findings(quality)
    assert texts[0].startswith("Safety was judged apart on 3 pairs. 3 of 6 answers with a sign are called safe")
    assert texts[-1] == "No harmless principle applies to 2 pairs."


def test_a_pair_that_no_harmless_principle_applies_to_has_no_safety_labels(make: Maker) -> None:
    rows, quality = labelled(make())
    plain = [row for row in rows if row.tag != HARM]
    assert {(row.safer, row.chosen_safe, row.rejected_safe, len(row.votes)) for row in plain} == {(None, None, None, 1)}
    assert quality.safety is not None and quality.safety.without_principle == len(plain) == 2


def test_every_vote_says_what_it_is_about(make: Maker) -> None:
    row = labelled(make())[0][0]
    about = [(vote.get("about"), vote["principle"], vote.get("first")) for vote in row.votes]
    first = row.votes[0]["first"]
    assert about == [
        (None, "useful", first),
        ("safer", "safe", first),
        ("chosen_safe", "safe", None),
        ("rejected_safe", "safe", None),
    ]
    chosen, rejected = row.votes[2:]
    assert (chosen["strength"], chosen["bias"]) == (pytest.approx(-1.0), pytest.approx(BIAS))
    assert (rejected["preference"], rejected["bias"]) == (pytest.approx(sigmoid(2.0)), pytest.approx(BIAS))


def test_the_two_questions_differ_in_one_line() -> None:
    values = {"prompt": "P", "response": "R", "principle": "Nobody is hurt.", "fence": "kzqt"}
    keep, broken = (load_template(name).render(**values) for name in WORDINGS)
    assert keep.replace("Does the answer keep to it?", "Does the answer break it?") == broken != keep
    assert keep.endswith("\nA: Yes.\nB: No.\nReply with the letter A or B.")


def test_one_broken_principle_makes_an_answer_unsafe(make: Maker) -> None:
    both = CONSTITUTION.replace("applies_to: [theft]", "applies_to: [harmful]")
    rows, _ = labelled(make(constitution=both, label={"principles": "all"}))
    row = rows[0]  # the refusal has +2 under `safe` and -2 under `lawful`
    signs = [(vote["principle"], vote["strength"]) for vote in row.votes if vote.get("about") == "rejected_safe"]
    assert signs == [("safe", pytest.approx(2.0)), ("lawful", pytest.approx(-2.0))]
    assert (row.chosen_safe, row.rejected_safe) == (False, False)


def test_all_principles_in_one_request_give_one_vote(make: Maker) -> None:
    both = CONSTITUTION.replace("applies_to: [theft]", "applies_to: [harmful]")
    run = make(constitution=both, label={"principles": "together"})
    rows, _ = labelled(run)
    (vote,) = [vote for vote in rows[0].votes if vote.get("about") == "chosen_safe"]
    assert vote["principles"] == ["safe", "lawful"]
    asked = [q.messages[-1]["content"] for q in run.scripted.asked if "/safe-" in q.item_id]  # type: ignore[attr-defined]
    assert "follows this principle: - Nobody is hurt.\n- It is lawful.\nDoes the answer keep" in asked[0]


def test_the_principles_of_a_prompts_category_come_first(make: Maker) -> None:
    prompt = {"id": "h1", "prompt": "How do I steal?", "tag": HARM, "split": "train", "category": "theft"}
    (row,), _ = labelled(make(prompts=[prompt]))
    assert [vote["principle"] for vote in row.votes] == ["useful", "lawful", "lawful", "lawful"]


def test_too_little_probability_on_the_options_gives_no_sign(make: Maker) -> None:
    rows, quality = labelled(make(lambda question: judge(question, mass=0.004), label={"min_option_mass": 0.005}))
    assert {(row.chosen_safe, row.rejected_safe) for row in rows} == {(None, None)}
    assert rows[0].safer is not None
    assert quality.safety is not None and quality.safety.without_sign == {"too little probability on the options": 6}
    assert quality.safety.tests is not None and quality.safety.tests.count == 0


def test_a_weak_answer_gives_no_sign(make: Maker) -> None:
    rows, quality = labelled(make(label={"min_strength": 1.2}))
    assert {(row.chosen_safe, row.rejected_safe) for row in rows if row.tag == HARM} == {(None, True)}
    assert quality.safety is not None and quality.safety.without_sign == {"too weak for a sign": 3}


def test_an_engine_that_refuses_a_question_costs_its_sign_only(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    one = run.scripted._one  # type: ignore[attr-defined]
    refuses = lambda q: Answer(error="too long") if "/safe-" in q.item_id and HELPS in str(q.messages) else one(q)  # noqa: E731
    monkeypatch.setattr(run.scripted, "_one", refuses)  # type: ignore[attr-defined]
    rows, quality = labelled(run)
    assert {(row.chosen_safe, row.rejected_safe) for row in rows if row.tag == HARM} == {(None, True)}
    assert quality.safety is not None and quality.safety.without_sign == {"no answer": 3}


def test_a_safety_order_against_the_signs_is_flagged(make: Maker) -> None:
    turned = {REFUSES: -1.0, HELPS: 1.0, "kind": 1.0, "cruel": -1.0}
    rows, quality = labelled(make(lambda question: judge(question, turned)))
    assert [row.flags for row in rows if row.tag == HARM] == [["safer against the signs"]] * 3
    assert quality.safety is not None and quality.safety.against_signs == 3


def test_an_answer_in_several_pairs_is_asked_about_once(make: Maker) -> None:
    signs = STRENGTH | {"Third.": 0.5}
    run = make(lambda question: judge(question, signs), label={"samples_per_prompt": 3, "min_strength": 0.0})
    rows, quality = labelled(run)
    ids = [name for name in run.scripted.ids() if name.startswith("h1/safe-")]  # type: ignore[attr-defined]
    assert (
        len(set(ids))
        == len(ids)
        == 2 * len({text for row in rows for text in (text_of(row.chosen), text_of(row.rejected))})
    )
    assert quality.safety is not None and quality.safety.pairs == sum(row.tag == HARM for row in rows) > 3


def test_a_pair_without_a_helpful_principle_is_set_aside(make: Maker) -> None:
    narrow = CONSTITUTION.replace("tags: [helpful]", "applies_to: [ordinary], tags: [helpful]")
    run = make(constitution=narrow)
    rows, quality = labelled(run)
    assert {row.tag for row in rows} == {"ordinary"}
    assert quality.labels.unused == {"no helpful principle applies": 3}
    assert len(rows_of(run.folder / "3-label" / "unused.jsonl")) == 3


def test_settings_that_cannot_give_safety_labels_are_refused(make: Maker) -> None:
    with pytest.raises(ConfigError, match="safety is judged by the method `judge`, and the method is `contrast`"):
        make(label={"method": "contrast"})
    with pytest.raises(ConfigError, match="safety needs a judge of the method `logprobs` or `rating`"):
        make(label={"judge_method": "verdict"})
    with pytest.raises(ConstitutionError, match=r"two: no principle is tagged `kind`; its tags: harmless, helpful\."):
        label.inputs(make(label={"harmless_tags": ["kind"]}))


def test_the_inputs_change_with_the_parts_of_the_constitution(make: Maker) -> None:
    before = label.inputs(make())
    moved = CONSTITUTION.replace("[theft], tags: [harmless]", "[theft], tags: [helpful]")
    after = label.inputs(make(constitution=moved))
    assert [name for name in before if before[name] != after[name]] == ["parts"]
    off, still = (
        label.inputs(make(label={"safety": False})),
        label.inputs(make(constitution=moved, label={"safety": False})),
    )
    assert "parts" not in off and off == still


@pytest.mark.slow
def test_an_edit_of_a_harmless_principle_asks_its_votes_again_and_no_others(make: Maker, tmp_path: Path) -> None:
    run = make()
    rows, _ = labelled(run)
    _write_recipe(run)
    old = load(tmp_path / "constitution.yaml")
    path = tmp_path / "new.yaml"
    for edit, reasons in (
        (("Nobody is hurt.", "No one is hurt."), {"its principle is reworded": 6}),  # two signs of each pair
        (("Who is hurt less?", "Who suffers less?"), {"its principle is reworded": 3}),
        (("[harmful], tags: [harmless]", "[harmful], tags: [other]"), {"no principle applies any more": 9}),
    ):
        path.write_text(CONSTITUTION.replace(*edit))
        assert redone(run.folder, old, load(path))["votes"] == {
            "all": 14,
            "again": sum(reasons.values()),
            "reasons": reasons,
        }
    assert [p.id for p in tagged(old, ["harmless"]).principles] == ["safe", "lawful"] and len(rows) == 5


@pytest.mark.slow
def test_a_sign_leads_back_to_its_answers_in_the_journal(make: Maker) -> None:
    run = make()
    rows, _ = labelled(run)
    _write_recipe(run)
    (node,) = trace(run.folder, rows[0].id)
    signs = [one for one in node.sources if one.what == "vote" and one.facts.get("about") == "chosen_safe"]
    assert len(signs) == 1 and len([one for one in signs[0].sources if one.what != "principle"]) == 2
    assert [one.id for one in signs[0].sources if one.what == "principle"] == ["safe"]
