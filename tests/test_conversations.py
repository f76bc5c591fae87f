"""Files of conversations: every form gives the same prompt and answer, and every mistake its line."""

import json

import pytest

from rlaif.conversations import answers_of, read_answers
from rlaif.errors import DataError
from rlaif.transcripts import Unusable

USER = {"role": "user", "content": "Hello?"}
GOOD = {"role": "assistant", "content": "Good day."}
BAD = {"role": "assistant", "content": "Go away."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"prompt": "Hello?", "completion": "Good day."},
        {"prompt": [USER], "completion": [GOOD], "messages": [USER, GOOD], "id": "a"},
        {"prompt": "Hello?", "response": "Good day.", "score": 3},
        {"prompt": [USER], "response": [USER, GOOD]},
        {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "completion": "Good day."},
    ],
)
def test_every_form_of_one_answer_is_the_same_prompt_and_answer(row):
    prompt, answers = answers_of(row)
    assert prompt == [USER]
    assert list(answers.values()) == [[[GOOD]]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello?", "chosen": "Good day.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "preference": 0.7},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: Hello?\n\nAssistant: Good day.", "rejected": "\n\nHuman: Hello?\n\nAssistant: Go away."},
    ],
)
def test_every_form_of_a_comparison_gives_both_sides(row):
    assert answers_of(row) == ([USER], {"chosen": [[GOOD]], "rejected": [[BAD]]})


def test_a_ranking_gives_all_its_answers():
    row = {"prompt": [USER], "responses": [[GOOD], "Go away."], "ranks": [1, 2]}
    assert answers_of(row) == ([USER], {"responses": [[GOOD], [BAD]]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "Expected: `messages`; or `prompt` with"),
        ({"text": "a", "label": 1}, "has the columns text, label"),
        ({"messages": [USER]}, "`messages` does not end with an answer of the assistant"),
        ({"messages": "hello"}, "`messages`: no assistant turn"),
        ({"messages": [USER, {"role": "assistant"}]}, "`messages`: not a text or a conversation"),
        ({"messages": [USER, USER, GOOD]}, "odd roles before the answer"),
        ({"messages": [GOOD]}, "odd roles before the answer"),
        ({"prompt": "Hello?", "completion": " "}, "Give one that is not empty"),
        ({"prompt": " ", "completion": "a"}, "empty turn before the answer"),
        ({"completion": "a"}, "`completion` without a `prompt`"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "`prompt`: not a text or a conversation"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Other"}, BAD]}, "answer different prompts"),
        ({"prompt": "a", "responses": []}, "no list of answers"),
        ({"responses": ["a"]}, "`responses` without a `prompt`"),
    ],
)
def test_a_row_of_no_form_says_what_is_wrong_and_what_to_do(row, reason):
    with pytest.raises(Unusable) as refused:
        answers_of(row)
    assert reason in str(refused.value)


def test_all_bad_rows_of_a_file_are_told_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [USER, GOOD]}, {"messages": [USER]}, *({"text": str(n)} for n in range(25))]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError) as refused:
        read_answers(path)
    told = str(refused.value).splitlines()
    assert told[0].startswith(f"{path}:2: `messages` does not end")
    assert told[1].startswith(f"{path}:3: has the columns text")
    assert told[-1] == "... and 6 more"
    assert len(told) == 21


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_answers(tmp_path / "empty.jsonl")
