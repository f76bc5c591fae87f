"""Candidates: which answers are compared, in which order, and what a judge is not shown."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import CONSTITUTION, HARM, PLAIN, REFUSAL, WILLING, ScriptedEngine, make_run, prefers, rows_of, usual

from rlaif.constitution import applying
from rlaif.engines.engine import Question
from rlaif.errors import ConfigError
from rlaif.stages import label, revise
from rlaif.stages.candidates import Engines, collect, principles_of
from rlaif.stages.run import Run

Maker = Callable[..., Run]
ROWS = [
    {"prompt": f"How is number {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "tag": HARM} for n in range(12)
]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def candidates(run: Run) -> tuple[list[Any], list[dict[str, Any]]]:
    return collect(run, Engines(run))


def sample(question: Question) -> str:
    return f"answer {question.sample} to {question.item_id}"


# --- samples --------------------------------------------------------------------------------------------------------


def test_two_samples_are_one_pair(make: Maker) -> None:
    found, unused = candidates(make(ScriptedEngine(sample)))
    assert [one.id for one in found] == ["h1", "h2", "h3", "o1", "o2"] and unused == []
    assert (found[0].first, found[0].second) == ("answer 0 to h1/response", "answer 1 to h1/response")
    assert found[0].origin == {"samples": [0, 1]} and found[0].reference is None


def test_k_samples_are_all_their_pairs(make: Maker) -> None:
    found, _ = candidates(make(ScriptedEngine(sample), label={"samples_per_prompt": 4}))
    of_first = [one for one in found if one.prompt_id == "h1"]
    assert [one.origin["samples"] for one in of_first] == [list(p) for p in itertools.combinations(range(4), 2)]
    assert len(found) == 30 and len({one.id for one in found}) == 30 and of_first[0].id == "h1/0-1"


def test_of_k_samples_so_many_pairs_are_chosen_by_the_seed(make: Maker) -> None:
    settings = {"samples_per_prompt": 4, "max_pairs_per_prompt": 2}
    chosen = [
        [one.id for one in candidates(make(ScriptedEngine(sample), label=settings, seed=seed))[0]] for seed in (0, 0, 1)
    ]
    assert len(chosen[0]) == 10 and chosen[0] == chosen[1] != chosen[2]
    pairs = [name.partition("/")[2] for name in chosen[0]]
    assert len(set(pairs)) > 2  # not the same two for every prompt


def test_samples_that_are_alike_are_one_pair_at_most(make: Maker) -> None:
    def write(question: Question) -> str:
        return ("one", "two", "two")[question.sample]

    found, unused = candidates(make(ScriptedEngine(write), label={"samples_per_prompt": 3}))
    assert [one.id for one in found][:2] == ["h1/0-1", "h2/0-1"]
    assert [row["reason"] for row in unused if row["id"] == "h1"] == ["the same two answers again", "identical answers"]


# --- revisions and policies -----------------------------------------------------------------------------------------


def test_a_revision_stands_against_what_it_revised_on_a_side_that_a_hash_decides(make: Maker) -> None:
    run = make(ScriptedEngine(usual), label={"candidates": "revision"})
    revise.revise(run)
    found, _ = candidates(run)
    assert [one.prompt_id for one in found] == ["h1", "h2", "h3"]
    for one in found:
        texts = {"revision": REFUSAL, "response": WILLING}
        assert (one.first, one.second) == (texts[one.origin["first"]], texts[one.origin["second"]])
    firsts = {run.seed(f"h{n}", "side", "revision") < run.seed(f"h{n}", "side", "response") for n in range(40)}
    assert firsts == {True, False}


def test_two_policies_answer_the_same_prompts(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {name: ScriptedEngine(lambda q, name=name: f"by {name}", identity=name) for name in ("base", "policy")}
    settings = {"candidates": "policies", "policies": ["sft", "base"]}
    run = make(engines, label=settings, stages=["revise", "sft", "label"])
    monkeypatch.setattr(Run, "output", lambda run, stage, name: run.folder)
    found, _ = candidates(run)
    assert len(found) == 5
    by_name = {"sft": "by policy", "base": "by base"}
    assert all(
        (one.first, one.second) == (by_name[one.origin["first"]], by_name[one.origin["second"]]) for one in found
    )
    assert run.load_base().roles == {"policy": {"adapter": run.folder}}


def test_an_adapter_folder_may_answer_too(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    settings = {"candidates": "policies", "policies": ["base", "mine"]}
    run = make(ScriptedEngine(sample), label=settings)
    assert run.loaded.adapters == {"mine": tmp_path / "mine"}
    with pytest.raises(ConfigError, match="label or reward: no adapter in `yours`; looked beside the recipe"):
        make(ScriptedEngine(sample), label={"candidates": "policies", "policies": ["base", "yours"]})


# --- files ----------------------------------------------------------------------------------------------------------


def from_file(make: Maker, tmp_path: Path, engine: ScriptedEngine, **settings: Any) -> Run:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"candidates": "file", "candidate_files": ["pairs.jsonl"], "gold_rate": 0, "attacks": 0, **settings}
    return make(engine, label=settings, stages=["label"])


def test_pairs_from_a_file_keep_peoples_labels_as_the_reference_on_either_side(make: Maker, tmp_path: Path) -> None:
    found, unused = candidates(from_file(make, tmp_path, ScriptedEngine()))
    assert len(found) == 12 and unused == []
    assert {one.reference for one in found} == {0.0, 1.0}
    assert all(one.first.startswith("good" if one.reference == 1.0 else "bad") for one in found)
    assert found[0].tag == HARM and found[0].origin == {"file": "pairs.jsonl", "line": 1}
    limited, _ = candidates(from_file(make, tmp_path, ScriptedEngine(), prompts_per_tag={HARM: 5}))
    assert len(limited) == 5


def test_peoples_labels_are_the_measure_and_no_judge_is_shown_them(make: Maker, tmp_path: Path) -> None:
    engine = ScriptedEngine(choose=prefers('"good', 1.0))
    run = from_file(make, tmp_path, engine)
    label.label(run)
    quality = json.loads((run.folder / "3-label" / "quality.json").read_text())
    assert (quality["reference"]["count"], quality["reference"]["n"]) == (12, 12)
    assert (quality["reference"]["low"], quality["reference"]["high"]) == pytest.approx((0.757506, 1.0), abs=1e-6)
    rules = quality["reference"]["rules"]
    assert (rules["longer"]["rate"], rules["shorter"]["rate"], rules["refusal_words"]["rate"]) == (1.0, 0.0, 0.5)
    shown = [json.dumps(question.messages) for question in engine.asked]
    assert not any(word in text for text in shown for word in ("chosen", "rejected", "human", "preference"))
    first = {question.messages[-1]["content"].split("Answer A:\n")[1].split('"')[1][:4] for question in engine.asked
             if question.item_id.endswith("/given") and "number" in question.messages[-1]["content"]}  # fmt: skip
    assert first == {"good", "bad "}  # the side called first says nothing
    (row, *_) = rows_of(run.folder / "3-label" / "comparisons.jsonl")
    assert row["source"] == "ai" and row["provenance"]["file"] == "pairs.jsonl" and row["preference"] < 1


# --- principles -----------------------------------------------------------------------------------------------------


def test_a_pair_is_judged_by_the_drawn_principle_or_by_all_that_apply(make: Maker) -> None:
    one, every = make(), make(label={"principles": "all"})
    drawn = {principles_of(one, f"p{n}", HARM)[0].id for n in range(20)}
    assert drawn == {"safe", "lawful"} and len(principles_of(one, "p", HARM)) == 1
    assert [p.id for p in principles_of(every, "p", HARM)] == ["safe", "lawful"]
    assert [p.id for p in principles_of(every, "p", PLAIN)] == ["useful"]


def test_principles_that_name_the_category_come_before_those_of_the_tag(make: Maker) -> None:
    text = CONSTITUTION.replace("text: The answer keeps the law., applies_to: [harmful]",
                                "text: The answer keeps the law., applies_to: [harmful, theft]")  # fmt: skip
    constitution = make(constitution=text).constitution
    assert [p.id for p in applying(constitution, HARM, "theft")] == ["lawful"]
    assert [p.id for p in applying(constitution, HARM, "fraud")] == ["safe", "lawful"]
