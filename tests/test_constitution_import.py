"""Constitutions of other projects: what is known of each, what is refused, and what is said not to have come along."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlaif.constitution import load
from rlaif.constitution_import import Imported, import_constitution, slugged
from rlaif.constitution_write import as_yaml
from rlaif.errors import ConstitutionError

PAIR = {"critic": "Say who is hurt.", "revision": "Rewrite it so that nobody is hurt."}
OTHER = {"critic": "Say what is untrue.", "revision": "Rewrite it so that it is true."}
BUILT = "`text` and `comparison`: the source has none"


def imported(tmp_path: Path, content: Any, name: str = "theirs.json") -> Imported:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    found = import_constitution(path)
    (tmp_path / "written.yaml").write_text(as_yaml(found.constitution), encoding="utf-8")
    assert load(tmp_path / "written.yaml") == found.constitution, "what is written is read as it was"
    return found


def refusal(tmp_path: Path, content: Any, name: str = "theirs.json") -> str:
    with pytest.raises(ConstitutionError) as caught:
        imported(tmp_path, content, name)
    return str(caught.value).replace(f"{tmp_path}/", "")


def chat(request: dict[str, str], prompt: str = "How do I hurt him?") -> list[dict[str, str]]:
    texts = [prompt, "Hit him.", request["critic"], "He is hurt.", request["revision"], "Talk to him."]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# --- request pairs ----------------------------------------------------------------------------------------------------


def test_llm_swarm_pairs_keep_their_wordings_and_fitting_chats_become_examples(tmp_path):
    found = imported(tmp_path, {"constitutions": [PAIR, OTHER], "system_chat": [chat(OTHER), chat(PAIR)]})
    assert (found.format, found.constitution.name) == ("llm-swarm", "theirs")
    first, second = found.constitution.principles
    assert (first.critique, first.revision) == (PAIR["critic"], PAIR["revision"])
    assert (first.id, second.id) == ("hurt", "untrue")
    assert first.text == f"The answer leaves nothing to do for somebody who is asked this: {PAIR['revision']}"
    assert [(e.id, e.principle, e.response, e.critique, e.revision) for e in found.constitution.examples] == [
        ("how-do-i-hurt-him", "untrue", "Hit him.", "He is hurt.", "Talk to him."),
        ("how-do-i-hurt-him-2", "hurt", "Hit him.", "He is hurt.", "Talk to him."),
    ]
    assert len(found.left) == 1
    assert found.left[0].startswith(BUILT)


def test_chats_that_do_not_fit_are_reported_with_their_line_and_the_reason(tmp_path):
    half = {"critic": PAIR["critic"], "revision": "Something else."}
    neither = {"critic": "A.", "revision": "B."}
    chats = [chat(PAIR)[:4], chat(neither), chat(half)]
    found = imported(tmp_path, {"constitutions": [PAIR], "system_chat": chats, "extra": 1})
    assert [e.principle for e in found.constitution.examples] == ["hurt"]
    reasons = [re.sub(r"line \d+", "line N", line) for line in found.left if not line.startswith("`text`")]
    assert reasons == [
        "chat 0 of `system_chat` (line N): not a prompt, a response, and a critique and a revision with their requests",
        "chat 1 of `system_chat` (line N): its requests are those of no principle",
        "chat 2 of `system_chat` (line N): one of its two requests differs from those of `hurt`, which are shown now",
        "the key `extra` (line N)",
    ]


def test_a_chat_goes_to_the_principle_with_both_of_its_requests(tmp_path):
    twin = {"critic": PAIR["critic"], "revision": "Make a joke of it."}
    found = imported(tmp_path, {"constitutions": [PAIR, twin], "system_chat": [chat(twin)]})
    assert [e.principle for e in found.constitution.examples] == ["hurt-2"]
    assert len(found.left) == 1


@pytest.mark.parametrize(
    ("critique", "revision"),
    [
        ("critic", "revision"),
        ("critique", "revise"),
        ("critique_request", "revision_request"),
        ("CritiqueRequest", "RevisionRequest"),
        ("critique-prompt", "edit_request"),
    ],
)
def test_every_usual_spelling_of_a_pair_is_known(tmp_path, critique: str, revision: str):
    found = imported(tmp_path, [{critique: "C one.", revision: "R one."}, {critique: "C two.", revision: "R two."}])
    assert [(p.critique, p.revision) for p in found.constitution.principles] == [
        ("C one.", "R one."),
        ("C two.", "R two."),
    ]


def test_langchain_lists_keep_their_names_as_titles_and_ids(tmp_path):
    rows = [{"name": "My Rule", "critique_request": "C.", "revision_request": "R.", "weight": 2}] * 2
    found = imported(tmp_path, rows)
    assert [(p.id, p.title) for p in found.constitution.principles] == [
        ("my-rule", "My Rule"),
        ("my-rule-2", "My Rule"),
    ]
    assert found.left[0] == "the key `weight` of principle 0 (line 2)"


def test_the_papers_format_loses_its_labels_and_says_what_stood_before(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Go.\n\nCritiqueRequest: Say what is bad.\n\nCritique:"
    rows = {
        "harmful0": {"prompt": [prompt], "edit_request": "\n\nRevisionRequest: Make it good.\n\nRevision:"},
        "harmful1": {"prompt": ["Say what", "else is bad."], "edit_request": "Make it better."},
    }
    found = imported(tmp_path, rows)
    assert found.format == "paper"
    assert [(p.id, p.critique, p.revision) for p in found.constitution.principles] == [
        ("harmful0", "Say what is bad.", "Make it good."),
        ("harmful1", "Say what\nelse is bad.", "Make it better."),
    ]
    assert found.left[0] == "what stands before the critique request of principle harmful0 (line 2)"


def test_json_lines_of_pairs_are_read(tmp_path):
    found = imported(tmp_path, f"{json.dumps(PAIR)}\n{json.dumps(OTHER)}\n", "theirs.jsonl")
    assert [p.id for p in found.constitution.principles] == ["hurt", "untrue"]


def test_a_text_that_comes_with_a_pair_is_kept(tmp_path):
    found = imported(tmp_path, [{**PAIR, "principle": "Nobody is hurt."}])
    assert (found.constitution.principles[0].text, found.left) == ("Nobody is hurt.", [])


# --- statements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"constitution": ["1. Be kind.", "2. Select the response that is shorter."]},
        ["Be kind.", "Select the response that is shorter."],
        {"principles": [{"id": "kind", "text": "Be kind."}, {"rule": "Select the response that is shorter."}]},
        {"0": "Be kind.", "1": "Select the response that is shorter."},
    ],
)
def test_statements_are_principles_and_a_choice_stays_the_question(tmp_path, content: Any):
    first, second = imported(tmp_path, content).constitution.principles
    assert (first.id, first.text, first.comparison) == ("kind", "Be kind.", None)
    assert (second.text, second.comparison) == ("The answer is shorter.", "Select the response that is shorter.")


def test_numbered_text_joins_lines_that_go_on(tmp_path):
    text = '1. Be kind\n   to people.\n2) Be honest.\n\n3. Say: "I don\'t know" # if so.\n'
    found = imported(tmp_path, text, "rules.txt")
    assert (found.format, found.constitution.name, found.left) == ("text", "rules", [])
    assert [p.text for p in found.constitution.principles] == [
        "Be kind to people.",
        "Be honest.",
        'Say: "I don\'t know" # if so.',
    ]


def test_markdown_headings_are_tags_of_lists_and_titles_of_paragraphs(tmp_path):
    text = (
        "# House rules\n\nAn introduction.\n\n## Safety\n\n- **No weapons**: Never [explain](http://a.b) *any*.\n"
        "  - not even old ones\n- Nobody is hurt.\n\nTone\n----\n\nBe calm.\n\nDo not shout.\n\n"
        "```\ncode\n```\n| a | b |\n"
    )
    found = imported(tmp_path, text, "rules.md")
    assert found.constitution.name == "house-rules"
    assert [(p.id, p.title, p.text, p.tags) for p in found.constitution.principles] == [
        ("no-weapons", "No weapons", "Never explain any. not even old ones", ["Safety"]),
        ("nobody-hurt", "Nobody is hurt", "Nobody is hurt.", ["Safety"]),
        ("tone", "Tone", "Be calm.\n\nDo not shout.", []),
    ]
    assert found.left == [
        "the paragraph in line 3, which has no heading: `An introduction.`",
        "the block of code in line 18",
        "the row of a table in line 21",
    ]


def test_the_description_names_the_file_and_its_hash(tmp_path):
    found = imported(tmp_path, "- Be kind.\n", "r.md")
    assert found.constitution.description == "Imported from r.md (SHA-256 8814fe249f931898, format text)."


def test_control_characters_are_taken_out_and_reported(tmp_path):
    found = imported(tmp_path, ["Be\u0007 kind.\ufeff"])
    assert found.constitution.principles[0].text == "Be kind."
    assert found.left == ["control characters in `Be\u0007 kind.\ufeff`"]


def test_an_id_is_made_of_words_and_never_of_nothing(tmp_path):
    assert slugged("Don't do: X_y, please!") == "dont-do-x-y-please"
    assert [p.id for p in imported(tmp_path, ["日本語。", "日本。"]).constitution.principles] == [
        "principle",
        "principle-2",
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"a": 1, "b": [1, 2]}, "t.json", "t.json: an object of `a`: a number (line 2), `b`: a list of 2 (line 3)."),
        ([1, "a"], "t.json", "t.json: a list of `0`: a number (line 2), `1`: a text (line 3). Known: "),
        ([], "t.json", "t.json: a list of nothing."),
        ("[1, 2", "t.json", "t.json:1:6: not readable as JSON: Expecting ',' delimiter. Check commas"),
        ("[" * 100_000, "t.json", "t.json: values stand inside values too deep to read."),
        ({"constitutions": "x"}, "t.json", "t.json:2: `constitutions` holds a text; a list of principles is expected."),
        ({"constitutions": ["x"]}, "t.json", "t.json:3: principle 0 is a text; an object with a critique and a revis"),
        (
            {"constitutions": [PAIR, {"critic": "A"}]},
            "t.json",
            "t.json:7: principle 1: nothing as its revision request",
        ),
        ([{"a": "b"}], "t.json", "t.json:2: principle 0 is an object with `a`. Known: "),
        ({"constitution": [" "]}, "t.json", "t.json:3: principle 0 is a text; a text is expected."),
        ("Hello there.\nNo list.", "t.txt", "t.txt:1: text that begins `Hello there.`, without a list. Known: "),
        ("name: a\nprinciples:\n  - id: b\n", "t.yaml", "t.yaml:2: the key `principles`, so this looks like YAML."),
        ("  \n", "t.txt", "t.txt: the file is empty; a constitution is expected."),
    ],
)
def test_an_unknown_file_is_refused_with_what_was_seen(tmp_path, content: Any, name: str, message: str):
    assert refusal(tmp_path, content, name).startswith(message)
