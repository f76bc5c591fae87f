"""YAML and text files: what is accepted, what is refused, and where a message says the fault is."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from rlaif import documents, validation
from rlaif.errors import ConfigError, ConstitutionError

EXPONENTIAL_ALIASES = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(Strict):
    id: str
    text: str
    weight: float = Field(default=1.0, gt=0)
    kind: int | list[str] = 0


class Whole(Strict):
    name: str
    parts: list[Part] = Field(default=[], min_length=1)
    learning_rate: float = 1.0
    extra: Part | None = None
    named: dict[str, Part] = {}
    free: dict[str, int] = {}


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str | bytes, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def refusal(path: Path) -> str:
    """Return the message with which a file is refused, its folder taken off."""
    with pytest.raises(ConstitutionError) as caught:
        documents.load_yaml(path, ConstitutionError)
    return str(caught.value).replace(f"{path.parent}/", "")


def complaints(path: Path, model: type[BaseModel] = Whole) -> list[str]:
    with pytest.raises(ConstitutionError) as caught:
        validation.validate(documents.load_yaml(path, ConstitutionError), model, ConstitutionError)
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


# ---- what a value means


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("1e3", 1000.0),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        (">-\n  two\n  lines\n", "two lines"),
        ("\U0001f600 é", "\U0001f600 é"),
        ("[1, {b: c}]", [1, {"b": "c"}]),
    ],
)
def test_values_are_read_by_the_rules_of_yaml_1_2(write, written: str, value: Any):
    data = documents.load_yaml(write(f"a: {written}\n"), ConstitutionError).data
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def test_keys_are_the_text_that_was_written(write):
    data = documents.load_yaml(write("1: a\ntrue: b\non: c\n1.0: d\nnull: e\n"), ConstitutionError).data
    assert data == {"1": "a", "true": "b", "on": "c", "1.0": "d", "null": "e"}


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa: 1\n", b"a: 1\r\n", b"---\na: 1\n", b"%YAML 1.2\n---\na: 1\n"])
def test_a_byte_order_mark_windows_line_ends_and_a_header_change_nothing(write, content: bytes):
    assert documents.load_yaml(write(content), ConstitutionError).data == {"a": 1}


# ---- what is refused, and where


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "file.yaml:3:1: the key `a` stands twice (first in line 1). Remove one."),
        ("x:\n  a: 1\n  a: 1\n", "file.yaml:3:3: the key `a` stands twice (first in line 2). Remove one."),
        ("x: [{a: 1, a: 2}]\n", "file.yaml:1:12: the key `a` stands twice (first in line 1). Remove one."),
        ("1: a\n'1': b\n", "file.yaml:2:1: the key `1` stands twice (first in line 1). Remove one."),
        ("a: &x [1]\nb: *x\n", "file.yaml:1:4: an anchor or alias"),
        ("a: 1\nb:\n  - &x word\n", "file.yaml:3:5: an anchor or alias"),
        ("&x a: 1\n", "file.yaml:1:1: an anchor or alias"),
        ("a: *x\n", "file.yaml:1:4: not readable as YAML: found undefined alias 'x'"),
        (EXPONENTIAL_ALIASES, "file.yaml:1:4: an anchor or alias"),
        ("a: &a [*a]\n", "file.yaml:1:4: an anchor or alias"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "file.yaml:1:4: the tag `tag:yaml.org,2002:python/",
        ),
        ("a: !!python/name:os.system\n", "file.yaml:1:4: the tag `tag:yaml.org,2002:python/"),
        ("a:\n  b: !env HOME\n", "file.yaml:2:6: the tag `!env` is not allowed"),
        ("a: !!binary aGk=\n", "file.yaml:1:4: the tag `tag:yaml.org,2002:binary` is not allowed"),
        ("a: !!set {x, y}\n", "file.yaml:1:4: the tag `tag:yaml.org,2002:set` is not allowed"),
        ("a: !!int word\n", "file.yaml:1:4: `word` is not a number"),
        ("a: !!float word\n", "file.yaml:1:4: `word` is not a number"),
        ("a: " + "9" * 5000, "file.yaml:1:4: `" + "9" * 40 + "` is not a number"),
        ("", "file.yaml:1:1: the file holds nothing; keys with values are expected"),
        ("# only a comment\n", "file.yaml:1:1: the file holds nothing"),
        ("- a\n- b\n", "file.yaml:1:1: the file holds a list; keys with values are expected"),
        ("word\n", "file.yaml:1:1: the file holds a plain value"),
        ("a: 1\n---\nb: 2\n", "file.yaml:2:1: not readable as YAML: but found another document"),
        ("%YAML 1.1\n---\na: yes\n", "file.yaml:1:1: a `%YAML` line asks for another version than 1.2"),
        ("%YAML 2.0\n---\na: yes\n", "file.yaml:1:1: not readable as YAML: found incompatible YAML document"),
        ("[1, 2]: a\n", "file.yaml:1:1: a key must be a plain word"),
        ("? {a: 1}\n: b\n", "file.yaml:1:3: a key must be a plain word"),
        (": a\n", "file.yaml:1:1: a key must be a plain word"),
        ("a:\n\tb: 1\n", "file.yaml:2:1: not readable as YAML: found character '\\t'"),
        ("a: b: c\n", "file.yaml:1:5: not readable as YAML: mapping values are not allowed here"),
        ("a: 1\nb: 'open\n", "file.yaml:3:1: not readable as YAML: found unexpected end of stream"),
        ("a: 1\nbé: \x01\n", "file.yaml:2:5: the control character #x0001; text is expected. Remove it."),
        ("a: \x00\n", "file.yaml:1:4: the control character #x0000"),
        ('a: 1\nb: "\\ud800"\n', "file.yaml:2:4: half of a `\\u` pair"),
        ('"\\udc00": 1\n', "file.yaml:1:1: half of a `\\u` pair"),
        ('a: "\\U00110000"\n', "file.yaml: not readable as YAML: chr() arg not in range"),
        ('a: "\\UFFFFFFFF"\n', "file.yaml: not readable as YAML: "),
        ("a: " + "[" * 500 + "]" * 500, "file.yaml: values stand inside values too deep to read"),
        ("a: " + "{b: " * 500 + "}" * 500, "file.yaml: values stand inside values too deep to read"),
        (b"a: 1\nb: caf\xe9\n", "file.yaml:2: byte 0xe9 is not UTF-8 text. Save the file as UTF-8."),
        (b"\xef\xbb\xbfa: 1\nb: caf\xe9\n", "file.yaml:2: byte 0xe9 is not UTF-8 text"),
        (b"\xef\xbb\xbf\xe9", "file.yaml:1: byte 0xe9 is not UTF-8 text"),
        ("a: é\n".encode("utf-16"), "file.yaml:1: byte 0xff is not UTF-8 text"),
    ],
)
def test_a_faulty_file_is_refused_with_its_position(write, content: str | bytes, message: str):
    assert refusal(write(content)).startswith(message)


def test_the_size_limit_counts_bytes_and_lets_the_limit_itself_pass(write):
    limit = 1 << 20
    whole = "a: " + "x" * (limit - 3)
    assert len(documents.load_yaml(write(whole), ConstitutionError).data["a"]) == limit - 3
    expected = "file.yaml: 1048577 bytes; a file of at most 1048576 is expected. Split it."
    assert refusal(write(whole + "x")) == expected
    assert refusal(write("a: " + "é" * 524_287)) == expected


def test_a_python_tag_runs_nothing(write, tmp_path: Path):
    mark = tmp_path / "mark"
    refusal(write(f"a: !!python/object/apply:pathlib.Path.touch [{mark}]\n"))
    assert not mark.exists()


def test_paths_that_are_no_readable_file_are_refused_in_words(write, tmp_path: Path):
    assert refusal(tmp_path / "none.yaml").startswith("none.yaml: no such file.")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refusal(folder) == "folder: is a folder; a file is expected."
    assert "cannot be read" in refusal(write("a: 1") / "below.yaml")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "cannot be read" in refusal(tmp_path / "null\0")


def test_a_file_without_read_permission_is_refused_in_words(write, monkeypatch):
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write("a: 1")
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read every file, so chmod would not do
    assert refusal(path) == "file.yaml: may not be read. Check its permissions."


def test_the_error_has_the_class_that_the_caller_names(write):
    with pytest.raises(ConfigError):
        documents.load_yaml(write("- a"), ConfigError)


# ---- positions


def test_positions_are_those_of_keys_and_of_list_items(write):
    document = documents.load_yaml(
        write("# note\nname: x\nparts:\n  - id: a\n    text: b\n  -   id: c\n"), ConstitutionError
    )
    assert document.position(["name"]) == (2, 1)
    assert document.position(["parts", 0]) == (4, 5)
    assert document.position(["parts", 0, "text"]) == (5, 5)
    assert document.position(["parts", 1, "id"]) == (6, 7)
    assert document.position(["parts", 1, "text"]) == (6, 7), "a missing key stands where its parent stands"
    assert document.position([]) == document.position(["other"]) == (2, 1)
    assert document.problem(("parts", 0, "text"), "c", "m").place.endswith("file.yaml:5:5")


# ---- validation


def test_every_problem_is_reported_at_once_each_with_its_position(write):
    path = write(
        "name: 5\nparts:\n  - id: a\n    text: b\n    wieght: 2\n  - text: c\n    weight: -1\nlearning_rat: 1\n"
    )
    assert complaints(path) == [
        "file.yaml:1:1: name: Input should be a valid string (found 5; put it in quotes)",
        "file.yaml:5:5: parts.0.wieght: unknown key; did you mean `weight`?",
        "file.yaml:6:5: parts.1.id: this key is missing. Add it.",
        "file.yaml:7:5: parts.1.weight: Input should be greater than 0 (found -1)",
        "file.yaml:8:1: learning_rat: unknown key; did you mean `learning_rate`?",
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("parts: []\n", "file.yaml:1:1: name: this key is missing. Add it."),
        ("name:\n", "file.yaml:1:1: name: Input should be a valid string (found nothing)"),
        ("name: n\nxyzzy: 1\n", "known keys: name, parts, learning_rate, extra, named, free."),
        ("name: n\nextra: {id: a, text: b, txt: c}\n", ":2:25: extra.txt: unknown key; did you mean `text`?"),
        ("name: n\nnamed:\n  one: {id: a, text: b, wait: 1}\n", "named.one.wait: unknown key; did you mean"),
        ("name: n\nparts: word\n", "2:1: parts: Input should be a valid list (found 'word')"),
        ("name: n\nparts: [word]\n", "2:9: parts.0: Input should be a valid dictionary or instance of Part"),
        (
            "name: n\nparts: []\n",
            "2:1: parts: List should have at least 1 item after validation, not 0 (found [])",
        ),
        (
            "name: n\nparts:\n- {id: a, text: b, kind: [0, c]}\n",
            "3:27: parts.0.kind.0: Input should be a valid string (found 0; put it in quotes)",
        ),
        ("name: n\nfree:\n  a: b\n", "3:3: free.a: Input should be a valid integer"),
    ],
)
def test_a_wrong_value_is_described_by_its_key(write, content: str, complaint: str):
    assert any(complaint in line for line in complaints(write(content)))


def test_the_name_of_a_union_member_is_no_key(write):
    lines = complaints(write("name: n\nparts:\n  - {id: a, text: b, kind: {x: 1}}\n"))
    assert {line.split(": ")[1] for line in lines} == {"parts.0.kind"}


def test_a_long_value_is_cut_in_the_message(write):
    (line,) = complaints(write(f"name: n\nfree: {'x' * 5000}\n"))
    assert len(line) < 200


def test_a_valid_document_becomes_the_model(write):
    document = documents.load_yaml(write("name: n\nparts: [{id: a, text: b, weight: 2}]\n"), ConstitutionError)
    whole = validation.validate(document, Whole, ConstitutionError)
    assert whole.parts[0].weight == 2.0


def test_the_nearest_key_may_be_an_alias(write):
    class Aliased(Strict):
        inner: Part = Field(alias="in")

    lines = complaints(write("in: {id: a, text: b, txet: c}\nim: 1\n"), Aliased)
    assert lines == [
        "file.yaml:1:22: in.txet: unknown key; did you mean `text`?",
        "file.yaml:2:1: im: unknown key; did you mean `in`?",
    ]


# ---- fingerprints


def test_canonical_json_depends_on_the_value_alone():
    assert documents.canonical_json({"b": [1, None, "é"], "a": 0.5}) == '{"a":0.5,"b":[1,null,"é"]}'
    assert documents.fingerprint({"b": 1, "a": 2}) == documents.fingerprint({"a": 2, "b": 1})
    assert documents.fingerprint([1, 2]) != documents.fingerprint([2, 1])
    assert documents.fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_canonical_json_refuses_numbers_that_json_lacks(number: float):
    with pytest.raises(ValueError, match="JSON compliant"):
        documents.canonical_json({"a": number})


def test_file_sha256_is_that_of_the_bytes(write):
    assert documents.file_sha256(write(b"a\r\n")) == hashlib.sha256(b"a\r\n").hexdigest()


# ---- finding files


def test_find_prefers_the_folder_of_the_recipe_then_the_working_folder(write, tmp_path: Path, monkeypatch):
    beside, working = tmp_path / "beside", tmp_path / "working"
    beside.mkdir(), working.mkdir()
    monkeypatch.chdir(working)
    here, there = write("a: 1", "working/mine.yaml"), write("a: 1", "beside/mine.yaml")
    assert documents.find("constitutions", "mine", beside) == there.resolve()
    assert documents.find("constitutions", "mine.yaml", beside) == there.resolve()
    assert documents.find("constitutions", "mine") == here.resolve()
    assert documents.find("constitutions", str(there)) == there.resolve()
    assert documents.find("constitutions", "absent.yaml") == Path("absent.yaml")
    assert documents.find("constitutions", "x" * 300) == Path("x" * 300)


def test_find_reaches_the_shipped_files_from_anywhere(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert documents.find("constitutions", "harmless").name == "harmless.yaml"
    assert documents.find("constitutions", "constitutions/harmless.yaml").name == "harmless.yaml"
    assert documents.find("prompts", "critique.jinja").parent == documents.shipped("prompts")
