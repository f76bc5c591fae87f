"""JSON lines in and out: every fault is named with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlaif import records
from rlaif.errors import DataError

USER, ANSWER = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]
COMPARISON: dict[str, Any] = {
    "id": "c1",
    "prompt": USER,
    "chosen": ANSWER,
    "rejected": [{"role": "assistant", "content": "No."}],
    "preference": 0.75,
    "source": "ai",
    "annotator": "judge",
}
RATING = {
    "id": "r1", "prompt": USER, "response": ANSWER, "rating": -3.5, "source": "human", "annotator": "ann",
}  # fmt: skip
RANKING = {
    "id": "k1", "prompt": USER, "responses": [ANSWER, COMPARISON["rejected"]], "ranks": [2, 1], "source": "human",
    "annotator": "ann",
}  # fmt: skip
DEMONSTRATION = {"id": "d1", "prompt": USER, "completion": ANSWER, "messages": USER + ANSWER}


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def complaints(path: Path, kind: type[records.Row] = records.Prompt) -> list[str]:
    with pytest.raises(DataError) as caught:
        records.read_rows(path, kind)
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


def prompt(identifier: str, **other: Any) -> str:
    return json.dumps({"id": identifier, "prompt": "Why?", **other}) + "\n"


def test_prompts_are_read_with_their_defaults(write):
    first, second = records.read_rows(write(prompt("a") + "\n  \n" + prompt("b", tag="harmful")), records.Prompt)
    assert (first.tag, first.category, first.split, second.tag) == ("ordinary", "", "train", "harmful")
    assert first.messages == USER


def test_read_jsonl_counts_blank_lines(write):
    path = write('\n{"a": 1}\n\n{"a": 2}\n')
    assert list(records.read_jsonl(path)) == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    "content",
    [
        b'{"id":"a","prompt":"x"}\r\n{"id":"b","prompt":"x"}\r\n',
        b'\xef\xbb\xbf{"id":"a","prompt":"x"}\n{"id":"b","prompt":"x"}',
        '{"id":"a","prompt":"x\u2028y\x85z"}\n{"id":"b","prompt":"\\ud83d\\ude00"}\n'.encode(),
    ],
)
def test_line_ends_marks_and_odd_separators_do_not_split_rows(write, content: bytes):
    assert [row.id for row in records.read_rows(write(content), records.Prompt)] == ["a", "b"]
    packed = write(gzip.compress(content), "rows.jsonl.gz")
    assert [row.id for row in records.read_rows(packed, records.Prompt)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"id": ',
            "not a JSON object: Expecting value at column 8. Each line must hold one complete object.",
        ),
        ('{"id": "b"} {}', "not a JSON object: Extra data at column 13."),
        ("{'id': 'b'}", "not a JSON object: Expecting property name enclosed in double quotes at column 2."),
        ('["b"]', "a list; one JSON object per line is expected."),
        ("null", "a NoneType; one JSON object per line is expected."),
        ('{"id": NaN}', "NaN is not JSON; a finite number or null is expected."),
        ('{"id": -Infinity}', "-Infinity is not JSON; a finite number or null is expected."),
        ('{"id": [1e999]}', "Out of range float values are not JSON compliant"),
        ('{"id": "b", "id": "c", "prompt": "x"}', "the key `id` stands twice. Remove one."),
        ('{"id": "b", "prompt": "\\ud800"}', "half of a `\\u` pair, which is no character. Mend the text."),
        ("[" * 100_000, "values stand inside values too deep to read. Flatten the row."),
        ('{"id": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ('{"id": "b", "prompt": " "}', "prompt: an empty prompt; text is expected (found ' ')"),
        ('{"id": "", "prompt": "x"}', "id: String should have at least 1 character (found '')"),
        ('{"id": "b"}', "(file): neither `prompt` nor `messages`; one of them is expected"),
        ('{"id": "b", "prompt": "x", "catgory": ""}', "catgory: unknown key; did you mean `category`?"),
        (
            '{"id": "b", "prompt": "x", "split": "test"}',
            "split: Input should be 'train' or 'eval' (found 'test')",
        ),
        ('{"id": 2, "prompt": "x"}', "id: Input should be a valid string (found 2; put it in quotes)"),
        ('{"id": "a", "prompt": "x"}', "the id `a` stands already in line 1"),
    ],
)
def test_a_faulty_line_is_refused_with_its_number(write, line: str, complaint: str):
    (found,) = complaints(write(prompt("a") + "\n" + line + "\n"))
    assert found.startswith(f"rows.jsonl:3: {complaint}")


def test_every_faulty_line_is_reported_at_once(write):
    lines = complaints(write('{"id": "a"}\n{"id":\n' + prompt("a") + prompt("a") + prompt("b", x=1)))
    assert [line.split(":")[1] for line in lines] == ["1", "2", "4", "5"]


def test_a_flood_of_faults_is_cut_after_twenty(write):
    lines = complaints(write('{"id": "a"}\n' * 25))
    assert len(lines) == 21
    assert lines[-1] == "... and 5 more"


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, content: str):
    assert complaints(write(content)) == ["rows.jsonl: no rows; at least one JSON object is expected."]


def test_a_wrong_encoding_is_refused_with_its_line(write):
    content = prompt("a").encode() + b'{"id": "caf\xe9"}\n'
    expected = ["rows.jsonl:2: byte 0xe9 is not UTF-8 text. Save the file as UTF-8."]
    assert complaints(write(content)) == expected
    assert complaints(write(gzip.compress(content), "rows.jsonl.gz"))[0].startswith("rows.jsonl.gz:2: byte 0xe9")


def test_damaged_and_missing_gzip_files_are_refused_in_words(write, tmp_path: Path):
    packed = gzip.compress("".join(prompt(f"p{n}") for n in range(200)).encode())
    damaged = bytearray(packed)
    damaged[20:40] = b"\xff" * 20
    for content in (b"plain text", packed[:-12], bytes(damaged), packed[:-6] + b"\0\0\0\0\0\0"):
        assert complaints(write(content, "rows.gz"))[0].startswith("rows.gz: not a readable gzip file: ")
    assert complaints(tmp_path / "none.gz") == ["none.gz: no such file."]
    assert complaints(tmp_path / "none.jsonl")[0].startswith("none.jsonl: no such file.")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"preference": 0.4}, "preference: Input should be greater than or equal to 0.5 (found 0.4)"),
        ({"preference": 1.01}, "preference: Input should be less than or equal to 1 (found 1.01)"),
        ({"preference": None}, "preference: Input should be a valid number (found nothing)"),
        ({"source": "me"}, "source: Input should be 'ai', 'human' or 'construction' (found 'me')"),
        ({"prompt": "Why?"}, "prompt: Input should be a valid list (found 'Why?')"),
        ({"chosen": []}, "chosen: List should have at least 1 item after validation, not 0 (found [])"),
        ({"chosen": [{"role": "user"}]}, "chosen.0.content: this key is missing. Add it."),
        ({"rejected": [{**ANSWER[0], "name": "x"}]}, "rejected.0.name: unknown key; remove it."),
        ({"id": ""}, "id: String should have at least 1 character (found '')"),
        ({"weight": -1}, "weight: Input should be greater than or equal to 0 (found -1)"),
        ({"weight": 1e31}, "weight: Input should be less than or equal to 1000000000000 (found 1e+31)"),
        ({"margin": -1e39}, "margin: Input should be greater than or equal to -1000000000000 (found -1e+39)"),
        ({"safer": 1.5}, "safer: Input should be less than or equal to 1 (found 1.5)"),
        ({"safer": -0.5}, "safer: Input should be greater than or equal to 0 (found -0.5)"),
        ({"chosen_safe": 1}, "chosen_safe: Input should be a valid boolean (found 1)"),
        ({"rejected_safe": "no"}, "rejected_safe: Input should be a valid boolean (found 'no')"),
    ],
)
def test_a_faulty_comparison_is_described_by_its_column(write, change: dict[str, Any], complaint: str):
    path = write(json.dumps({**COMPARISON, **change}))
    assert complaints(path, records.Comparison) == [f"rows.jsonl:1: {complaint}"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_comparison_built_in_code_refuses_numbers_that_json_lacks(number: float):
    with pytest.raises(ValueError, match="preference"):
        records.Comparison.model_validate({**COMPARISON, "preference": number})
    for column in ("margin", "weight", "safer"):
        with pytest.raises(ValueError, match=column):
            records.Comparison.model_validate({**COMPARISON, column: number})
    with pytest.raises(ValueError, match="rating"):
        records.Rating.model_validate({**RATING, "rating": number})


def test_safety_is_an_order_of_its_own_and_unknown_where_nothing_is_said():
    plain = records.Comparison.model_validate(COMPARISON)
    assert (plain.weight, plain.safer, plain.chosen_safe, plain.rejected_safe) == (1.0, None, None, None)
    told = {"weight": 0, "safer": 0.1, "chosen_safe": False, "rejected_safe": True}  # the better one is the worse here
    assert records.Comparison.model_validate(COMPARISON | told).model_dump(include=set(told)) == told


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rating": "good"}, "rating: Input should be a valid number, unable to parse string as a number"),
        ({"rating": None}, "rating: Input should be a valid number (found nothing)"),
        ({"rating": 1e200}, "rating: Input should be less than or equal to 1000000000000 (found 1e+200)"),
        ({"response": []}, "response: List should have at least 1 item after validation, not 0 (found [])"),
        ({"weight": -0.5}, "weight: Input should be greater than or equal to 0 (found -0.5)"),
        ({"score": 1}, "score: unknown key"),
    ],
)
def test_a_faulty_rating_is_described_by_its_column(write, change: dict[str, Any], complaint: str):
    (found,) = complaints(write(json.dumps({**RATING, **change})), records.Rating)
    assert found.startswith(f"rows.jsonl:1: {complaint}")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ranks": [1]}, "1 `ranks` for 2 `responses`; one for each is expected"),
        ({"ranks": [1, 2, 3]}, "3 `ranks` for 2 `responses`; one for each is expected"),
        ({"ranks": [2, 3]}, "the best of `ranks` is 2; 1 is expected for the best response"),
        ({"ranks": [0, 1]}, "ranks.0: Input should be greater than or equal to 1 (found 0)"),
        ({"ranks": [1, 1.5]}, "ranks.1: Input should be a valid integer (found 1.5)"),
        ({"ranks": [1, True]}, "ranks.1: Input should be a valid integer (found True)"),
        ({"responses": [ANSWER], "ranks": [1]}, "responses: List should have at least 2 items after validation, not 1"),
        ({"responses": [ANSWER, []]}, "responses.1: List should have at least 1 item after validation, not 0"),
    ],
)
def test_a_faulty_ranking_is_described_by_its_column(write, change: dict[str, Any], complaint: str):
    (found,) = complaints(write(json.dumps({**RANKING, **change})), records.Ranking)
    assert found.startswith("rows.jsonl:1: ") and complaint in found


def test_ratings_and_rankings_survive_being_written_and_read(write):
    rating = records.Rating.model_validate({**RATING, "weight": 2.5, "split": "eval"})
    ranking = records.Ranking.model_validate({**RANKING, "ranks": [1, 1], "provenance": {"line": 3}})
    assert records.read_rows(write(records.jsonl([rating])), records.Rating) == [rating]
    assert records.read_rows(write(records.jsonl([ranking])), records.Ranking) == [ranking]


def test_rows_survive_being_written_and_read(write):
    comparison = records.Comparison.model_validate({**COMPARISON, "margin": 0.5, "votes": [{"p": 0.7}]})
    demonstration = records.Demonstration.model_validate({**DEMONSTRATION, "tag": "é\u2028\n"})
    text = records.jsonl([comparison])
    assert text.count("\n") == 1
    assert records.read_rows(write(text), records.Comparison) == [comparison]
    assert records.read_rows(write(records.jsonl([demonstration])), records.Demonstration) == [demonstration]
    assert records.jsonl([{"a": "é"}, {"b": None}]) == '{"a": "é"}\n{"b": null}\n'


def test_rows_with_numbers_that_json_lacks_are_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        records.jsonl([{"a": float("nan")}])


def test_columns_keep_their_names_and_order():
    assert list(records.Comparison.model_validate(COMPARISON).model_dump())[:7] == [
        "id",
        "prompt",
        "chosen",
        "rejected",
        "preference",
        "margin",
        "source",
    ]


def test_rows_do_not_share_their_default_lists():
    first = records.Demonstration.model_validate(DEMONSTRATION)
    first.flags.append("x")
    assert records.Demonstration.model_validate(DEMONSTRATION).flags == []


def test_assistant_turns_and_their_text_are_inverse():
    assert records.assistant("So.") == ANSWER
    assert records.text_of(USER + ANSWER) == "So."
