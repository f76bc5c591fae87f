"""A row's ancestry: what it names, what is found in the journal and the constitution, what is said of changes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import CONSTITUTION, CRITIQUE, HARM, PROMPTS, REFUSAL, WILLING, ScriptedEngine, make_run, prefers, usual
from typer.testing import CliRunner

from rlaif.cli import app
from rlaif.errors import DataError, JournalError
from rlaif.files import append_jsonl, write_jsonl
from rlaif.pipeline import _write_recipe
from rlaif.stages import label, revise
from rlaif.stages.run import Run
from rlaif.trace import trace
from rlaif.tree import Node, as_lines

Maker = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    def make(*args: Any, **kwargs: Any) -> Run:
        run = make_run(tmp_path, monkeypatch, *args, **kwargs)
        _write_recipe(run)
        return run

    return make


def all_nodes(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        yield from all_nodes(node.sources)


def named(nodes: list[Node], what: str) -> list[Node]:
    return [node for node in all_nodes(nodes) if node.what == what]


def line_with(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def revised(make: Maker, **changes: Any) -> Run:
    run = make(ScriptedEngine(usual), **changes)
    revise.revise(run)
    return run


def test_a_demonstration_leads_to_its_chain_its_answers_and_the_sentence_of_its_principle(
    make: Maker, tmp_path: Path
) -> None:
    run = revised(make)
    (node,) = trace(run.folder, "h1-1")
    assert (node.what, node.where, node.text, node.note) == (
        "demonstration", "1-revise/demonstrations.jsonl:1", REFUSAL, "",
    )  # fmt: skip
    (chain,) = node.sources
    assert [source.what for source in chain.sources] == ["revision 1", "response", "prompt"]
    revision, response, prompt = chain.sources
    assert [source.what for source in revision.sources] == ["answer", "critique 1", "principle"]
    assert (response.text, revision.sources[1].text) == (WILLING, CRITIQUE)
    assert prompt.where == f"{tmp_path / 'prompts.jsonl'}:1" and prompt.text == "How do I steal a bicycle?"
    for answer, item in ((revision.sources[0], "h1/revise-0"), (response.sources[0], "h1/response")):
        (unit,) = [unit for key, unit in run.journal.known("revise").items() if key[0] == item]
        assert (answer.id, answer.facts["request"]) == (item, unit.request_hash[:16])
        assert (answer.facts["seed"], answer.facts["model"], answer.facts["adapter"]) == (
            run.seed(item, 0), "tiny", "none",
        )  # fmt: skip
    file = tmp_path / "constitution.yaml"
    principle = revision.sources[2]
    assert principle.id in ("safe", "lawful")
    sentence = {"safe": "The answer hurts nobody.", "lawful": "The answer keeps the law."}[principle.id]
    assert principle.text == sentence
    assert principle.where.startswith(f"{file}:{line_with(file, sentence)}:") and principle.note == ""


def test_a_principle_that_was_reworded_or_removed_since_is_told(make: Maker, tmp_path: Path) -> None:
    run = revised(make)
    drawn = named(trace(run.folder, "h1-1"), "principle")[0].id
    file = tmp_path / "constitution.yaml"
    other = {"safe": "hurts nobody.", "lawful": "keeps the law."}[drawn]
    file.write_text(CONSTITUTION.replace(other, "is something else."))
    (node,) = trace(run.folder, "h1-1")
    assert node.note == "the constitution has changed since this row was made"
    assert all(
        p.note.startswith("REWORDED SINCE: this row was made under other words") for p in named([node], "principle")
    )
    file.write_text(
        CONSTITUTION.replace(f"id: {drawn}", "id: renamed").replace(f"principle: {drawn}", "principle: renamed")
    )
    assert {p.note for p in named(trace(run.folder, "h1-1"), "principle")} == {"NO LONGER IN THE CONSTITUTION"}
    file.write_text("broken: [")
    (node,) = trace(run.folder, "h1-1")
    assert node.note == "the constitution cannot be read now"
    assert all(f"{file}:1:" in found.note for found in named([node], "principle"))


def test_the_answer_that_was_used_is_told_from_one_that_was_asked_for_later(make: Maker) -> None:
    first = revised(make)
    used = named(trace(first.folder, "h1-1"), "answer")
    again = "I won't help with stealing, since the owner needs it. Used ones are cheap at the market."
    engine = ScriptedEngine(lambda q: again if "/revise" in q.item_id else usual(q))
    edited = CONSTITUTION.replace("Rewrite it", "Write it again").replace("The answer keeps", "An answer keeps")
    run = make(engine, constitution=edited, revise={"critique": False})
    revise.revise(run)
    now = named(trace(run.folder, "h1-1"), "answer")
    assert [node.id for node in used] == ["h1/revise-0", "h1/critique-0", "h1/response"]
    assert [node.id for node in now] == ["h1/revise-0", "h1/response"]
    assert now[0].facts["request"] != used[0].facts["request"] and now[1] == used[2]
    row = json.loads((run.folder / "1-revise" / "chains.jsonl").read_text().splitlines()[0])
    row["response"] = "Nobody wrote this."
    write_jsonl(run.folder / "1-revise" / "chains.jsonl", [row])
    lost = named(trace(run.folder, "h1"), "response")[0].sources
    assert [node.note for node in lost] == ["not in the journal (any more)"]


def test_answers_with_one_text_to_different_requests_are_all_shown(make: Maker) -> None:
    revised(make)
    run = revised(make, constitution=CONSTITUTION.replace("R1", "R3"))  # a worked example; the answers are the same
    found = [node for node in named(trace(run.folder, "h1-1"), "answer") if node.id == "h1/critique-0"]
    assert [node.note for node in found] == [
        "one of 2 stored answers with this very text; any of them may have been used"
    ] * 2


def test_a_comparison_made_of_a_revision_leads_to_the_chain_of_each_side(make: Maker) -> None:
    run = revised(make, label={"method": "revision"})
    label.label(run)
    rows = [json.loads(line) for line in (run.folder / "3-label" / "comparisons.jsonl").read_text().splitlines()]
    harmful = next(row for row in rows if row["tag"] == HARM)
    (node,) = trace(run.folder, harmful["id"])
    chosen, rejected = named([node], "chosen")[0], named([node], "rejected")[0]
    assert [source.what for source in chosen.sources[0].sources] == ["revision 1", "response", "prompt"]
    assert [source.what for source in rejected.sources[0].sources] == ["response", "prompt"]
    critique = named([node], "vote")[0].sources[0]
    assert (critique.id, critique.where) == (f"{harmful['provenance']['prompt_id']}/critique-0", "journal.db revise")
    ordinary = next(row for row in rows if row["tag"] != HARM)
    (node,) = trace(run.folder, ordinary["id"])
    answer = named([node], "rejected")[0].sources[0]
    assert (answer.id, answer.where) == (f"{ordinary['provenance']['prompt_id']}/revise-0", "journal.db label")
    critique = named([node], "vote")[0].sources[0]
    assert critique.id.endswith("/critique-0") and critique.where == "journal.db label"
    assert node.note == ""


def test_a_judged_comparison_leads_to_both_judgements_and_both_answers(make: Maker) -> None:
    engine = ScriptedEngine(lambda q: f"Answer number {q.sample} for {q.item_id}.", prefers("number 1", 2.0, 0.5))
    run = make(engine, prompts=PROMPTS[:2], stages=["label"], label={"method": "judge", "allow_weak_judge": True})
    label.label(run)
    row = json.loads((run.folder / "3-label" / "comparisons.jsonl").read_text().splitlines()[0])
    (node,) = trace(run.folder, row["id"])
    assert [found.id for found in named([node], "judgement")] == ["h1/given", "h1/swapped"]
    assert [(a.id, a.facts["sample"]) for a in named([node], "answer")] == [("h1/response", 1), ("h1/response", 0)]
    (principle,) = named([node], "principle")
    assert "comparison asked with" in principle.facts and principle.note == ""


def test_a_label_by_a_person_leads_to_the_line_of_their_file(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text('\n{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "id": "p7"}\n')
    run = make(feedback="human", human={"files": ["labels.jsonl"]})
    label.label(run)
    (node,) = trace(run.folder, "p7")
    assert node.sources[-1].what == "label by a person" and node.sources[-1].where == "labels.jsonl:2"


def test_a_ppo_sample_leads_to_what_its_policy_and_its_reward_were_trained_on(make: Maker) -> None:
    run = revised(make, label={"method": "revision"}, stages=["revise", "sft", "label", "reward", "ppo"])
    label.label(run)
    row = {"id": "ppo-3-0", "prompt_id": "h1", "seed": 5, "update": 3, "response": "Hm.", "score": 0.5, "kl": 0.1}
    append_jsonl(run.folder / "5-ppo" / "samples.jsonl", row)
    append_jsonl(run.folder / "5-ppo" / "samples.jsonl", {**row, "id": "ppo-3-1", "prompt_id": "h4"})
    (node,) = trace(run.folder, "ppo-3-0")
    assert node.facts == {"update": 3, "seed": 5, "score": 0.5, "kl": 0.1}
    prompt, sft, reward = node.sources
    assert (prompt.id, prompt.what) == ("h1", "prompt")
    assert [found.id for found in sft.sources] == ["h1-1"] and [found.what for found in reward.sources] == [
        "comparison"
    ]
    assert sft.facts["trained on"] == "5 rows of 1-revise/demonstrations.jsonl"
    assert {p.id for p in named([node], "principle")} <= {"safe", "lawful"} and named([node], "principle")
    (other,) = trace(run.folder, "ppo-3-1")
    assert [found.note for found in other.sources[1:]] == ["none of these rows is of this prompt"] * 2


def test_an_unknown_id_is_an_error_that_names_its_like(make: Maker, tmp_path: Path) -> None:
    run = revised(make)
    with pytest.raises(DataError, match=r"no row has the id `h1-9`, in any of 10 rows .* Did you mean `h1-1` or"):
        trace(run.folder, "h1-9")
    with pytest.raises(JournalError, match="not a run folder"):
        trace(tmp_path / "nowhere", "h1-1")


def test_tracing_writes_nothing(make: Maker) -> None:
    run = revised(make)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    trace(run.folder, "h1-1")
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_the_tree_is_drawn_with_a_line_for_each_thing_and_no_control_character() -> None:
    leaf = Node("principle", "kind", "c.yaml:3:5", {"hash": "ab"}, "The answer\n is \x1b[31mkind.", "REWORDED SINCE")
    tree = [Node("demonstration", "a-1", "d.jsonl:1", {}, "Yes.", "", [Node("chain", "a", sources=[leaf]), leaf])]
    assert list(as_lines(tree)) == [
        "demonstration a-1  (d.jsonl:1)",
        "│  “Yes.”",
        "├─ chain a",
        "│  └─ principle kind  (c.yaml:3:5)",
        "│        hash ab",
        "│        “The answer is [31mkind.”",
        "│        ! REWORDED SINCE",
        "└─ principle kind  (c.yaml:3:5)",
        "      hash ab",
        "      “The answer is [31mkind.”",
        "      ! REWORDED SINCE",
    ]


def test_the_command_prints_the_tree_or_json(make: Maker) -> None:
    run = revised(make)
    drawn = CliRunner().invoke(app, ["trace", str(run.folder), "h1-1"])
    assert drawn.exit_code == 0 and drawn.stdout.startswith("demonstration h1-1  (1-revise/demonstrations.jsonl:1)\n")
    (row,) = json.loads(CliRunner().invoke(app, ["trace", str(run.folder), "h1-1", "--json"]).stdout)
    assert row["sources"][0]["what"] == "chain" and row["text"] == REFUSAL
