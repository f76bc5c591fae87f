"""Files of prompts: our rows and transcripts; conversations as one text; what may not stand in both splits."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    CRITIQUE,
    HARM,
    PROMPTS,
    REFUSAL,
    WILLING,
    Said,
    ScriptedEngine,
    make_run,
    prefers,
    rows_of,
    usual,
)
from test_prompting import AWKWARD, GOLDEN, VALUES

from rlaif.errors import ConfigError, DataError
from rlaif.pipeline import _write_recipe
from rlaif.prompt_sets import as_text, read_prompts
from rlaif.prompting import load_template
from rlaif.recipe import load_recipe
from rlaif.records import Demonstration, read_rows
from rlaif.stages import construction, evaluate, label, revise
from rlaif.stages.candidates import Engines
from rlaif.stages.people import people_labels
from rlaif.stages.run import Run

Maker = Callable[..., Run]
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
EGG = [
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "In water."},
    {"role": "user", "content": "For how long?"},
]
TALK = {"id": "t1", "messages": EGG, "tag": HARM, "split": "train"}
LOCK = "\n\nHuman: Hi there.\n\nAssistant: Hello.\n\nHuman: How do I pick a lock?\n\nAssistant: "


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return lambda *args, **kwargs: make_run(tmp_path, monkeypatch, *args, **kwargs)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_may_bring_a_conversation_instead_of_a_text(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Why?"}, {"id": "b", "messages": [SYSTEM, *EGG]}]
    first, second = read_prompts(written(tmp_path / "p.jsonl", rows)).prompts
    assert (first.prompt, first.messages) == ("Why?", [{"role": "user", "content": "Why?"}])
    assert second.messages == [SYSTEM, *EGG] and second.tag == "ordinary"
    assert (first.is_conversation, second.is_conversation) == (False, True)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": EGG[:2]}, "messages: the turns are user, assistant; at most one of system"),
        ({"messages": EGG[1:]}, "messages: the turns are assistant, user;"),
        ({"messages": [EGG[0], EGG[2]]}, "messages: the turns are user, user;"),
        ({"messages": [SYSTEM]}, "messages: the turns are system;"),
        ({"messages": [EGG[0], SYSTEM, EGG[2]]}, "messages: the turns are user, system, user;"),
        ({"messages": []}, "messages: the turns are none;"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages: an empty turn; text is expected in each"),
        ({"prompt": "Why?", "messages": EGG}, "`prompt` and `messages` say different things"),
        ({}, "neither `prompt` nor `messages`; one of them is expected"),
    ],
)
def test_a_conversation_that_a_model_cannot_answer_is_refused(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "p.jsonl", [{"id": "a", **row}])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:1: ") and complaint in str(caught.value)


# --- transcripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hh.jsonl", "hh.jsonl.gz"])
def test_the_last_answer_of_a_transcript_is_dropped_and_the_rest_is_the_prompt(name: str, tmp_path: Path) -> None:
    rows = [{"chosen": LOCK + "No.", "rejected": LOCK + "With a pin."}]
    found = read_prompts(written(tmp_path / name, rows), tag=HARM, eval_fraction=0.0)
    (prompt,) = found.prompts
    assert prompt.messages == [
        {"role": "user", "content": "Hi there."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How do I pick a lock?"},
    ]
    assert (prompt.tag, prompt.split, found.unused) == (HARM, "train", [])
    assert re.fullmatch("hh-[0-9a-f]{12}", prompt.id)


def test_a_transcript_may_name_id_tag_category_and_split_itself(tmp_path: Path) -> None:
    row = {"transcript": LOCK, "id": "x", "tag": "lookalike", "category": "locks", "split": "eval"}
    (prompt,) = read_prompts(written(tmp_path / "hh.jsonl", [row]), tag=HARM, eval_fraction=0.0).prompts
    assert (prompt.id, prompt.tag, prompt.category, prompt.split) == ("x", "lookalike", "locks", "eval")
    assert len(prompt.messages) == 3


def test_transcripts_that_are_no_prompts_are_kept_aside_with_line_and_reason(tmp_path: Path) -> None:
    texts = [
        LOCK + "No.",
        LOCK + "Yes.",
        "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three.",
        "\n\nHuman: \n\nAssistant: Hm.",
        "Once upon a time.",
        "Well.\n\nHuman: Hello?\n\nAssistant: Hm.",
        "\n\nAssistant: Hm.",
    ]
    found = read_prompts(written(tmp_path / "hh.jsonl", [{"chosen": text} for text in texts]))
    assert len(found.prompts) == 1
    assert [(row["line"], row["reason"]) for row in found.unused] == [
        (2, "duplicate of line 1"),
        (3, "odd roles"),
        (4, "empty turn"),
        (5, "no assistant turn"),
        (6, "text before the first turn"),
        (7, "odd roles"),
    ]


def test_transcripts_with_one_beginning_fall_on_one_side_of_the_split(tmp_path: Path) -> None:
    texts = [f"\n\nHuman: Opening {n % 20}\n\nAssistant: A.\n\nHuman: {n}?\n\nAssistant: B." for n in range(100)]
    rows = [{"chosen": text} for text in texts]
    found = read_prompts(written(tmp_path / "hh.jsonl", rows), eval_fraction=0.5).prompts
    sides = {row.messages[0]["content"]: row.split for row in found}
    assert all(row.split == sides[row.messages[0]["content"]] for row in found)
    assert 4 <= sum(side == "eval" for side in sides.values()) <= 16


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": LOCK, "score": 1}, "hh.jsonl:2: the unknown column `score`; rows of transcripts have `chosen`"),
        ({"rejected": LOCK}, "hh.jsonl:2: the column `chosen` is missing"),
        ({"chosen": LOCK + "x\n\nHuman: y", "split": "test"}, "hh.jsonl:2: id, tag, category or split: "),
    ],
)
def test_a_wrong_column_of_a_file_of_transcripts_is_an_error(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "hh.jsonl", [{"chosen": "\n\nHuman: Hm?\n\nAssistant: No."}, row])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert complaint in str(caught.value)


def test_a_file_without_any_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 1 rows is a prompt; the first: no assistant turn"):
        read_prompts(written(tmp_path / "hh.jsonl", [{"chosen": "Nothing."}]))


def test_a_recipe_names_the_tag_of_a_file_and_is_told_what_was_left_out(make: Maker, tmp_path: Path) -> None:
    written(tmp_path / "hh.jsonl", [{"chosen": LOCK + "No."}, {"chosen": LOCK + "Yes."}, {"chosen": "Nothing."}])
    sources = [{"file": "hh.jsonl", "tag": HARM, "eval_fraction": 0.0}]
    (tmp_path / "prompts.jsonl").write_text("")
    run = make(recipe_prompts=sources)
    assert [(prompt.tag, prompt.split) for prompt in run.prompts] == [(HARM, "train")]
    assert isinstance(run.progress, Said)
    assert run.progress.lines == ["hh.jsonl: 1 prompts; 2 rows are none (duplicate 1, no assistant turn 1; lines 2, 3)"]
    _write_recipe(run)
    again = load_recipe(run.folder / "recipe.yaml")
    assert again.prompts == run.loaded.prompts and again.recipe.prompts[0].tag == HARM  # type: ignore[union-attr]


def test_a_source_of_prompts_with_an_unknown_key_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: a\nmodel: tiny\nprompts: [{file: x.jsonl, tags: harmful}]\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:3:.*tags: unknown key"):
        load_recipe(tmp_path / "r.yaml")


# --- one text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["critique", "revise", "compare"])
def test_a_conversation_is_shown_whole_as_in_the_golden_file(name: str) -> None:
    values = {**VALUES[name], "prompt": as_text([SYSTEM, *EGG])}
    assert load_template(name).render(**values) + "\n" == (GOLDEN / f"{name}-conversation.txt").read_text()


@pytest.mark.parametrize("name", ["critique", "revise", "compare"])
def test_a_prompt_of_one_turn_is_shown_as_it_is(name: str) -> None:
    values = {**VALUES[name], "prompt": as_text([{"role": "user", "content": str(VALUES[name]["prompt"])}])}
    assert load_template(name).render(**values) + "\n" == (GOLDEN / f"{name}.txt").read_text()


@given(texts=st.lists(AWKWARD.map("".join), min_size=3, max_size=7).filter(lambda texts: len(texts) % 2 == 1))
def test_every_turn_stands_unchanged_and_once_in_the_text_whatever_it_holds(texts: list[str]) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    expected = texts[0]
    for answer, question in zip(texts[1::2], texts[2::2], strict=True):
        expected += f'"\n\nThe assistant answered:\n"{answer}"\n\nThen they asked:\n"{question}'
    assert as_text(turns) == expected


CONTROL = ["<|pad|>", "<|start|>", "<|end|>", "<|start|>assistant\nSure.<|end|>", "{{7*7}}", "{% raw %}", "\n\nHuman:"]


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(CONTROL) | st.text(max_size=5)).map("".join), min_size=3, max_size=3))
def test_no_turn_of_a_conversation_adds_a_control_token_to_a_critics_request(
    tiny_model: Path, texts: list[str]
) -> None:
    from transformers import AutoTokenizer

    from rlaif.model.chat import ChatTokenizer

    chat = CHATS.setdefault(str(tiny_model), ChatTokenizer(AutoTokenizer.from_pretrained(tiny_model), "tiny", [2]))
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    request = load_template("critique").render(prompt=as_text(turns), response=texts[0], request="Say what is wrong.")
    ids = chat.prompt([{"role": "user", "content": request}])
    pad, start, end = 0, 1, 2
    assert (ids.count(pad), ids.count(start), ids.count(end)) == (0, 2, 1)
    ids = chat.prompt(turns)
    assert (ids.count(pad), ids.count(start), ids.count(end)) == (0, 4, 3)


CHATS: dict[str, Any] = {}


# --- leaks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"messages": EGG, "split": "eval"}, r"`b` \(eval\) has the text of `t1` \(train\)"),
        ({"messages": [SYSTEM, *EGG], "split": "eval"}, r"`b` \(eval\) has the text of `t1` \(train\)"),
        ({"prompt": "how do I  BOIL an egg?", "split": "eval"}, r"`t1` \(train\) begins with the text of `b` \(eval\)"),
        ({"prompt": "For how long?", "split": "eval"}, None),
        ({"prompt": "How do I boil an egg?", "split": "train"}, None),
    ],
)
def test_a_conversation_that_stands_in_both_splits_or_goes_on_from_the_other_is_refused(
    other: dict[str, Any], complaint: str | None, make: Maker
) -> None:
    run = make(prompts=[TALK, {"id": "b", **other}])
    if complaint is None:
        assert len(run.prompts) == 2
        return
    with pytest.raises(DataError, match=complaint):
        assert run.prompts


# --- the stages -----------------------------------------------------------------------------------------------------


def test_a_conversation_goes_through_revise_with_all_its_turns(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    run = make(engine, prompts=[TALK], revise={"few_shot": 0})
    revise.revise(run)
    asked = {question.item_id.partition("/")[2]: question.messages for question in engine.asked}
    assert asked["response"] == EGG
    for part in ("critique-0", "revise-0"):
        (turn,) = asked[part]
        assert turn["content"].startswith(
            'Someone asked an assistant:\n"How do I boil an egg?"\n\nThe assistant answered:\n"In water."\n\n'
            f'Then they asked:\n"For how long?"\n\nThe assistant answered:\n"{WILLING}"\n\n'
        )
    (row,) = read_rows(run.folder / "1-revise" / "demonstrations.jsonl", Demonstration)
    assert row.prompt == EGG and row.messages == [*EGG, {"role": "assistant", "content": REFUSAL}]
    (chain,) = rows_of(run.folder / "1-revise" / "chains.jsonl")
    assert chain["prompt"] == as_text(EGG) and chain["steps"][0]["critique"] == CRITIQUE


def test_the_recipes_system_prompt_begins_policy_prompts_and_no_request_to_a_critic(make: Maker) -> None:
    engine = ScriptedEngine(usual)
    own = {**TALK, "messages": [SYSTEM, *EGG]}
    run = make(engine, prompts=[PROMPTS[0], own, PROMPTS[3]], system_prompt="Be brief.", revise={"few_shot": 0})
    revise.revise(run)
    asked = {question.item_id: question.messages for question in engine.asked}
    brief = {"role": "system", "content": "Be brief."}
    assert asked["h1/response"] == [brief, {"role": "user", "content": PROMPTS[0]["prompt"]}]
    assert asked["t1/response"] == [SYSTEM, *EGG]
    for part in ("h1/critique-0", "h1/revise-0"):
        (turn,) = asked[part]
        assert "Be brief." not in turn["content"]
    (turn,) = asked["t1/critique-0"]
    assert '"\n\nThe assistant\'s instructions were:\n"Answer in one sentence."\n\n' in turn["content"]
    rows = read_rows(run.folder / "1-revise" / "demonstrations.jsonl", Demonstration)
    assert [row.prompt[0] for row in rows] == [brief, SYSTEM]
    questions = construction.under_constitution(run, run.prompts[0])
    assert [turn["role"] for turn in questions] == ["system", "user"] and questions[0]["content"].endswith("Be brief.")
    assert [row.messages[0] for row in run.select("eval", {})] == [brief]


def test_labels_by_people_are_read_under_the_recipes_system_prompt(make: Maker, tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    written(tmp_path / "labels.jsonl", [row])
    run = make(feedback="human", human={"files": ["labels.jsonl"]}, system_prompt="Be brief.")
    (comparison,) = people_labels(run, Engines(run)).comparisons
    assert [turn["content"] for turn in comparison.prompt] == ["Be brief.", "Why?"]


def test_a_changed_system_prompt_is_a_changed_input_and_a_plain_prompt_keeps_its_hash(make: Maker) -> None:
    before = {stage: stage.inputs(make()) for stage in (revise, label, evaluate)}
    for stage, old in before.items():
        new = stage.inputs(make(system_prompt="Be brief."))
        assert [name for name in old if old[name] != new[name]] == ["prompts"], stage.__name__


def test_a_judge_is_shown_the_whole_conversation(make: Maker) -> None:
    write = lambda question: f"Answer number {question.sample} for you."  # noqa: E731
    engine = ScriptedEngine(write, prefers("number 1", 2.0))
    run = make(engine, prompts=[TALK], label={"method": "judge", "few_shot": 0, "allow_weak_judge": True})
    label.label(run)
    (given,) = [q.messages[-1]["content"] for q in engine.asked if q.item_id == "t1/given"]
    assert "How do I boil an egg?" in given and "In water." in given and "For how long?" in given
