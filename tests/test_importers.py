import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.errors import ConfigError, DataError
from rlaif.human.importers import REASONS, Imported, import_file
from rlaif.records import Comparison, jsonl, read_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
HH = {
    "chosen": "\n\nHuman: hello\n\nAssistant: good day",
    "rejected": "\n\nHuman: hello\n\nAssistant: go away",
}
TRL = {"prompt": "hello", "chosen": "good day", "rejected": "go away"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> Imported:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return import_file(path, **options)


def reasons(imported: Imported) -> list[str]:
    return [row["reason"] for row in imported.unused]


def test_a_transcript_of_several_turns_becomes_a_comparison_of_the_last(tmp_path: Path) -> None:
    before = "\n\nHuman: Say: hello\n\nAssistant: hello\n\nHuman: And: now?"
    row = {"chosen": f"{before}\n\nAssistant: one: two", "rejected": f"{before}\n\nAssistant: three"}
    imported = load(tmp_path, row, tag="ordinary", annotator="ann")
    assert (imported.format, imported.unused) == ("hh-rlhf", [])
    (comparison,) = imported.comparisons
    assert comparison.prompt == [user("Say: hello"), assistant("hello"), user("And: now?")]
    assert comparison.chosen == [assistant("one: two")]
    assert comparison.rejected == [assistant("three")]
    assert (comparison.preference, comparison.margin, comparison.source) == (1.0, None, "human")
    assert (comparison.tag, comparison.annotator, comparison.flags) == ("ordinary", "ann", [])
    assert comparison.provenance["file"] == "labels.jsonl"
    assert comparison.provenance["line"] == 1
    assert comparison.provenance["format"] == "hh-rlhf"
    assert len(comparison.provenance["sha256"]) == 64


@pytest.mark.parametrize(
    "row",
    [
        TRL,
        {"prompt": [user("hello")], "chosen": [assistant("good day")], "rejected": [assistant("go away")]},
        {"prompt": [user("hello")], "chosen": "good day", "rejected": "go away"},
        {
            "prompt": "hello",
            "chosen": [user("hello"), assistant("good day")],
            "rejected": [assistant("go away")],
        },
        {"chosen": [user("hello"), assistant("good day")], "rejected": [user("hello"), assistant("go away")]},
        {"prompt": "\n\nHuman: hello\n\nAssistant:", "chosen": " good day", "rejected": " go away"},
        {"prompt": "hello", "chosen": assistant("good day"), "rejected": assistant("go away")},
        {"prompt": "hello", "chosen": [{**assistant("good day"), "name": None}], "rejected": "go away"},
    ],
)
def test_every_trl_form_of_a_row_gives_the_same_comparison(tmp_path: Path, row: dict[str, Any]) -> None:
    imported = load(tmp_path, row)
    assert (imported.format, imported.unused) == ("trl", [])
    (comparison,) = imported.comparisons
    assert comparison.prompt == [user("hello")]
    assert comparison.chosen == [assistant("good day")]
    assert comparison.rejected == [assistant("go away")]


def test_the_same_preference_has_the_same_id_in_either_format(tmp_path: Path) -> None:
    assert load(tmp_path, HH).comparisons[0].id == load(tmp_path, TRL).comparisons[0].id


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", "blue.", "green.")),
        ("The sky is blue.", "The sky is bluish.", ("The sky is", "blue.", "bluish.")),
        ("The sky is", "The sky is blue.", ("The sky", "is", "is blue.")),
        ("The sky\nis blue ", "The sky\nis green", ("The sky\nis", "blue", "green")),
    ],
)
def test_a_prompt_is_what_two_texts_begin_with_up_to_a_whole_word(
    tmp_path: Path, chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    (comparison,) = load(tmp_path, {"chosen": chosen, "rejected": rejected}).comparisons
    texts = (comparison.prompt[0], comparison.chosen[0], comparison.rejected[0])
    assert tuple(turn["content"] for turn in texts) == expected
    assert comparison.flags == ["prompt from the shared beginning"]


def test_a_system_turn_may_stand_before_the_first_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, user("hello")], "chosen": "good day", "rejected": "go away"}
    assert load(tmp_path, row).comparisons[0].prompt == [system, user("hello")]


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{turn}" for turn in turns)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (HH["chosen"], transcript("Human: goodbye", "Assistant: go away"), "contexts differ"),
        (transcript("Human: hello", "Assistant: "), HH["rejected"], "empty chosen"),
        (HH["chosen"], transcript("Human: hello", "Assistant:\n "), "empty rejected"),
        (None, HH["rejected"], "empty chosen"),
        (HH["chosen"], "", "empty rejected"),
        (HH["chosen"], HH["chosen"] + "  ", "identical answers"),
        (transcript("Human: hello"), transcript("Human: hello"), "no assistant turn"),
        (HH["chosen"], "go away", "no assistant turn"),
        (HH["chosen"] + transcript("Human: why?"), HH["rejected"], "last turn is not the assistant's"),
        (transcript("Assistant: a"), transcript("Assistant: b"), "odd roles"),
        (
            transcript("Human: a", "Human: b", "Assistant: c"),
            transcript("Human: a", "Human: b", "Assistant: d"),
            "odd roles",
        ),
        ("Chat:" + HH["chosen"], HH["rejected"], "text before the first turn"),
        (transcript("Human:", "Assistant: a"), transcript("Human:", "Assistant: b"), "empty turn"),
        (7, HH["rejected"], "not a text or a conversation"),
    ],
)
def test_a_transcript_that_cannot_be_used_is_kept_aside_with_its_reason(
    tmp_path: Path, chosen: Any, rejected: Any, reason: str
) -> None:
    imported = load(tmp_path, HH, {"chosen": chosen, "rejected": rejected}, format="hh-rlhf")
    assert len(imported.comparisons) == 1
    assert reasons(imported) == [reason]
    assert reason in REASONS
    assert imported.unused[0]["line"] == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "contexts differ"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
            "identical answers",
        ),
        ({"chosen": "same words", "rejected": "same words "}, "identical answers"),
        ({"chosen": "nothing shared", "rejected": "at all"}, "contexts differ"),
        ({"chosen": "word", "rejected": "words"}, "contexts differ"),
        ({"chosen": [], "rejected": [user("a"), assistant("b")]}, "empty chosen"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "no assistant turn"),
        ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "no assistant turn"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty turn"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [{"role": "tool", "content": "a"}], "chosen": "b", "rejected": "c"}, "odd roles"),
        ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "not a text or a conversation"),
        (
            {"prompt": [user("a")], "chosen": [{**assistant("b"), "x": 1}], "rejected": "c"},
            "not a text or a conversation",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "not a text or a conversation"),
        ({"chosen": "b c", "rejected": [user("a"), assistant("b")]}, "not a text or a conversation"),
        ({**TRL, "preference": 1.5}, "preference outside [0, 1]"),
        ({**TRL, "preference": -0.1}, "preference outside [0, 1]"),
        ({**TRL, "preference": "yes"}, "preference outside [0, 1]"),
        ({**TRL, "preference": True}, "preference outside [0, 1]"),
        ({**TRL, "margin": "2"}, "margin not finite"),
        ({**TRL, "margin": 10**400}, "margin not finite"),
        ({**TRL, "tag": ["a"]}, "a name that is not text"),
        ({**TRL, "id": 1.5}, "a name that is not text"),
    ],
)
def test_a_trl_row_that_cannot_be_used_is_kept_aside_with_its_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    imported = load(tmp_path, row, format="trl")
    assert imported.comparisons == []
    assert reasons(imported) == [reason]
    assert reason in REASONS
    jsonl(imported.unused).encode()


def test_a_preference_below_one_half_swaps_the_sides_and_the_sign_of_the_margin(tmp_path: Path) -> None:
    (comparison,) = load(tmp_path, {**TRL, "preference": 0.25, "margin": 2}).comparisons
    assert comparison.chosen == [assistant("go away")]
    assert comparison.rejected == [assistant("good day")]
    assert (comparison.preference, comparison.margin) == (0.75, -2.0)
    assert comparison.flags == ["sides swapped"]


def test_a_tie_is_kept_as_it_stands(tmp_path: Path) -> None:
    (comparison,) = load(tmp_path, {**TRL, "preference": 0.5, "margin": 0.5}).comparisons
    assert comparison.chosen == [assistant("good day")]
    assert (comparison.preference, comparison.margin, comparison.flags) == (0.5, 0.5, [])


def test_a_row_may_name_its_tag_annotator_and_id(tmp_path: Path) -> None:
    named = {**TRL, "tag": "harmful", "annotator": 7, "id": "row-1", "preference": None, "margin": None}
    imported = load(tmp_path, named, {**TRL, "tag": None, "annotator": " ", "id": None}, tag="ordinary")
    first, second = imported.comparisons
    assert (first.tag, first.annotator, first.id) == ("harmful", "7", "row-1")
    assert (second.tag, second.annotator) == ("ordinary", "human")
    assert len(second.id) == 16


def test_a_row_that_stood_before_is_a_duplicate_but_a_second_opinion_is_not(tmp_path: Path) -> None:
    mirrored = {"prompt": "hello", "chosen": "go away", "rejected": "good day", "preference": 0.0}
    opposite = {"prompt": "hello", "chosen": "go away", "rejected": "good day"}
    imported = load(tmp_path, TRL, {**TRL, "annotator": "bo"}, opposite, TRL, mirrored)
    assert len(imported.comparisons) == 3
    assert [(row["line"], row["reason"]) for row in imported.unused] == [
        (4, "duplicate of line 1"),
        (5, "duplicate of line 1"),
    ]
    assert imported.unused[1]["row"] == mirrored


def test_an_id_stands_for_one_row_only(tmp_path: Path) -> None:
    imported = load(tmp_path, {**TRL, "id": "a"}, {**TRL, "id": "a", "tag": "x"}, {**TRL, "id": "a"})
    assert reasons(imported) == ["id used in line 1", "duplicate of line 1"]


def test_rows_with_one_opening_question_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"chosen": [user(f"{case} {question}"), assistant("a"), user(str(turn)), assistant("b")],
         "rejected": [user(f"{case} {question}"), assistant("a"), user(str(turn)), assistant("c")]}
        for question in range(200)
        for turn, case in enumerate(("Question", "question", " QUESTION "))
    ]  # fmt: skip
    sides: dict[str, set[str]] = {}
    for comparison in load(tmp_path, *rows).comparisons:
        sides.setdefault(comparison.prompt[0]["content"].split()[-1], set()).add(comparison.split)
    assert all(len(side) == 1 for side in sides.values())
    assert 8 <= sum(side == {"eval"} for side in sides.values()) <= 36  # 20 expected, 4 standard deviations


def test_the_share_and_the_seed_choose_the_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {number}", "chosen": "a", "rejected": "b"} for number in range(60)]

    def split(**options: Any) -> list[str]:
        return [row.split for row in load(tmp_path, *rows, **options).comparisons]

    assert set(split(eval_fraction=0.0)) == {"train"}
    assert set(split(eval_fraction=1.0)) == {"eval"}
    assert split(eval_fraction=0.5, seed=1) == split(eval_fraction=0.5, seed=1)
    assert split(eval_fraction=0.5, seed=1) != split(eval_fraction=0.5, seed=2)


def test_a_json_list_is_read_and_each_row_has_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps([TRL, {**TRL, "chosen": ""}, {**TRL, "tag": "{"}], indent=2), encoding="utf-8")
    imported = import_file(path)
    assert [comparison.provenance["line"] for comparison in imported.comparisons] == [2, 12]
    assert [(row["line"], row["reason"]) for row in imported.unused] == [(7, "empty chosen")]


def test_a_gzip_file_is_read_whichever_form_it_holds(tmp_path: Path) -> None:
    for name, text in (("a.jsonl.gz", json.dumps(HH) + "\n"), ("b.json.gz", json.dumps([HH]))):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()))
        assert len(import_file(path).comparisons) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("[1, 2]", "objects are expected"),
        ('[{"chosen": "a",\n"rejected": "b",\n"margin": NaN}]', r"labels\.jsonl:1: .*Finite numbers"),
        ('{"chosen": "a", "rejected": "b", "margin": NaN}', r"labels\.jsonl:1: NaN is not JSON"),
        ('[\n{"chosen": "\\ud800"}]', r"labels\.jsonl:2: .*Unicode"),
        ("[" * 100_000, "not a JSON list"),
        ('[{"chosen": "a",\n "rejected": b}]', r"labels\.jsonl:2: not a JSON list"),
        (json.dumps(TRL) + "\nchosen,rejected\n", r"labels\.jsonl:2: not a JSON object"),
        ('{"input": "a", "output_1": "b"}', "lacks chosen, rejected and has the unknown input, output_1"),
        ('{"prompt": "a", "chosen": "b"}', r"lacks rejected\. Seen: chosen, prompt\."),
        (json.dumps({**TRL, "preferance": 1}), "has the unknown preferance"),
    ],
)
def test_a_file_that_is_no_preference_file_is_refused_with_what_was_seen(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        import_file(path)


@pytest.mark.parametrize(
    "content", [b"no gzip at all", gzip.compress(b"abc" * 99, mtime=0)[:-20], gzip.compress(b"\xff\xfe", mtime=0)]
)
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="gzip|UTF-8"):
        import_file(path)


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`csv` is not known. Expected one of: hh-rlhf, trl"):
        load(tmp_path, TRL, format="csv")
    with pytest.raises(ConfigError, match="eval_fraction: 1.5"):
        load(tmp_path, TRL, eval_fraction=1.5)
    with pytest.raises(DataError, match="has the unknown prompt"):
        load(tmp_path, TRL, format="hh-rlhf")
    with pytest.raises(DataError, match="no such file"):
        import_file(tmp_path / "absent.jsonl")


def test_what_is_imported_can_be_written_and_read_as_comparisons(tmp_path: Path) -> None:
    imported = load(tmp_path, TRL, {**TRL, "preference": 0.1}, {**TRL, "id": "x", "margin": 0.5})
    path = tmp_path / "comparisons.jsonl"
    path.write_text(jsonl(imported.comparisons), encoding="utf-8")
    assert read_rows(path, Comparison) == imported.comparisons


LINE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
PIECES = st.sampled_from(["Human: ", "Assistant: ", ": ", "\nHuman: x", "a\nAssistant: y", "\n", "\r\n"])
TURN = st.lists(LINE | PIECES, min_size=1, max_size=4).map("".join).map(str.strip).filter(
    lambda text: text and "\n\n" not in text
)  # fmt: skip


@given(st.lists(TURN, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1), TURN, TURN)
@settings(deadline=None, max_examples=100)
def test_a_transcript_built_from_turns_gives_the_same_turns_back(
    tmp_path_factory: pytest.TempPathFactory, turns: list[str], chosen: str, rejected: str
) -> None:
    spoken = [(user, assistant)[place % 2](text) for place, text in enumerate(turns)]
    before = "".join(f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in spoken)
    row = {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}
    imported = load(tmp_path_factory.mktemp("turns"), row)
    if chosen == rejected:
        assert reasons(imported) == ["identical answers"]
    else:
        (comparison,) = imported.comparisons
        assert comparison.prompt == spoken
        assert (comparison.chosen, comparison.rejected) == ([assistant(chosen)], [assistant(rejected)])


SIDE = (
    st.none()
    | st.text(max_size=12)
    | st.sampled_from([HH["chosen"], HH["rejected"], "\n\nHuman: a", "\n\nAssistant: b", "good day", "good bye"])
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": st.text(max_size=5)}
        ),
        max_size=3,
    )
    | st.integers()
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANY_ROW = st.fixed_dictionaries(
    {"chosen": SIDE, "rejected": SIDE},
    optional={
        "prompt": SIDE,
        "preference": st.none() | FINITE | st.text(max_size=3),
        "margin": st.none() | FINITE | st.integers(),
        "tag": st.none() | st.text(max_size=3),
        "id": st.none() | st.integers(0, 3) | st.text(max_size=3),
    },
)


@given(st.lists(ANY_ROW, min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_every_row_is_kept_or_kept_aside(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    imported = load(tmp_path_factory.mktemp("rows"), *rows)
    lines = [comparison.provenance["line"] for comparison in imported.comparisons]
    lines += [row["line"] for row in imported.unused]
    assert sorted(lines) == list(range(1, len(rows) + 1))
    assert len({comparison.id for comparison in imported.comparisons}) == len(imported.comparisons)
    known = (*REASONS, "duplicate of line", "id used in line")
    assert all(row["reason"].startswith(known) for row in imported.unused)
    (jsonl(imported.comparisons) + jsonl(imported.unused)).encode()


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the shared data set {name} is not beside this checkout")
    return path


@pytest.mark.slow
def test_the_hh_rlhf_sample_is_imported_whole() -> None:
    imported = import_file(_shared("hh-rlhf-harmless/harmless_base_test.shared.jsonl.gz"), tag="harmful")
    assert imported.format == "hh-rlhf"
    assert Counter(reasons(imported)) == {"odd roles": 4, "empty chosen": 2, "contexts differ": 2}
    assert len(imported.comparisons) + len(imported.unused) == 1172
    assert Counter(comparison.split for comparison in imported.comparisons) == {"train": 1036, "eval": 128}
    sides: dict[str, set[str]] = {}
    for comparison in imported.comparisons:
        sides.setdefault(comparison.prompt[0]["content"], set()).add(comparison.split)
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompt"),
    [("standard_preference", "Complex"), ("standard_implicit_prompt_preference", "Complex is")],
)
def test_the_trl_preference_files_are_imported_whole(name: str, prompt: str) -> None:
    imported = import_file(_shared(f"trl-zen/{name}.jsonl"))
    assert (imported.format, len(imported.comparisons), imported.unused) == ("trl", 19, [])
    assert imported.comparisons[3].prompt == [user(prompt)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard_prompt_only", "standard_unpaired_preference", "standard_language_modeling"])
def test_a_trl_file_without_pairs_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="lacks chosen, rejected"):
        import_file(_shared(f"trl-zen/{name}.jsonl"))
