import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from human_files import HH, TRL, assistant, load, reasons, user
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.errors import ConfigError, DataError
from rlaif.human.importers import FORMATS, import_file
from rlaif.records import Comparison, jsonl, read_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"


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


def test_annotators_of_one_pair_stay_rows_of_their_own(tmp_path: Path) -> None:
    turned = {**TRL, "chosen": TRL["rejected"], "rejected": TRL["chosen"]}
    rows = [{**TRL, "annotator": "a"}, {**turned, "annotator": "b"}, {**TRL, "annotator": "c"}]
    for same in (rows, [{**row, "id": "pair-1"} for row in rows]):
        imported = load(tmp_path, *same)
        assert [row.annotator for row in imported.comparisons] == ["a", "b", "c"]
        assert len({row.id for row in imported.comparisons}) == 3 and imported.contradictory == {}
    assert [row.id for row in imported.comparisons] == ["pair-1", "pair-1@b", "pair-1@c"]


def test_a_row_that_says_the_opposite_is_kept_and_reported(tmp_path: Path) -> None:
    opposite = {"prompt": "hello", "chosen": "go away", "rejected": "good day"}
    imported = load(tmp_path, TRL, opposite, {**opposite, "annotator": "bo"})
    first, second, third = imported.comparisons
    assert imported.contradictory == {first.id: second.id, second.id: first.id}
    assert [row.flags for row in (first, second, third)] == [["contradictory"], ["contradictory"], []]


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.json"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("margin", "margin not finite, or beyond 1e+12"),
        ("preference", "preference outside [0, 1]"),
        ("safer", "safer outside [0, 1]"),
        ("weight", "weight not a number from 0 to 1e+12"),
        ("chosen", "not a text or a conversation"),
        ("tag", "a name that is not text"),
    ],
)
def test_a_number_that_is_none_costs_its_row_only(
    tmp_path: Path, name: str, number: str, column: str, reason: str
) -> None:
    broken = json.dumps({**TRL, column: 77}).replace("77", number)
    lines = [json.dumps(TRL), broken]
    path = tmp_path / name
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]", encoding="utf-8")
    imported = import_file(path)
    assert len(imported.comparisons) == 1 and reasons(imported) == [reason]
    kept = json.loads(jsonl(imported.unused))
    assert kept["row"][column] in ("nan", "inf", "-inf")


def test_each_format_is_told_by_its_columns(tmp_path: Path) -> None:
    for name, form in FORMATS.items():
        if name != "hh-rlhf":  # told from `trl` by what stands in the columns
            columns = form.columns | form.optional | {"weight", "tag"}
            imported = load(tmp_path, dict.fromkeys(columns))
            assert (imported.format, imported.kind, len(imported.unused)) == (name, form.kind, 1)


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
        ('[\n{"chosen": "\\ud800"}]', r"labels\.jsonl:2: half of a"),
        ('{"chosen": "\\ud800"}', r"labels\.jsonl:1: half of a"),
        ("[" * 100_000, "not a JSON list"),
        ('[{"chosen": "a",\n "rejected": b}]', r"labels\.jsonl:2: not a JSON list"),
        (json.dumps(TRL) + "\nchosen,rejected\n", r"labels\.jsonl:2: not a JSON object"),
        ('{"input": "a", "output_1": "b"}', r"`llmbar`, the nearest .* lacks label, output_2\. Seen: input, output_1"),
        ('{"text": "a"}', r"lacks chosen, rejected and has the unknown text\. Seen: text\."),
        ('{"prompt": "a", "completion": "b"}', r"`unpaired`, the nearest format, the file lacks label\."),
        ('{"prompt": "a", "response": "b", "rating": 1, "margin": 2}', "`ratings`.* has the unknown margin"),
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
    with pytest.raises(ConfigError, match="`csv` is not known. Expected one of: hh-rlhf, trl, pku-saferlhf"):
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
NUMBER = st.floats()  # NaN and infinity among them
ANY_ROW = st.fixed_dictionaries(
    {"chosen": SIDE, "rejected": SIDE},
    optional={
        "prompt": SIDE,
        "preference": st.none() | NUMBER | st.text(max_size=3),
        "margin": st.none() | NUMBER | st.integers(),
        "weight": st.none() | NUMBER,
        "safer": st.none() | NUMBER,
        "chosen_safe": st.none() | st.booleans() | NUMBER,
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
    assert all(row["reason"] and row["row"] for row in imported.unused)
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
@pytest.mark.parametrize(
    "name",
    ["prompt_only", "prompt_completion", "stepwise_supervision", "language_modeling"],
)
def test_a_trl_file_without_labels_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="the file lacks "):
        import_file(_shared(f"trl-zen/standard_{name}.jsonl"))


@pytest.mark.slow
def test_the_unpaired_trl_file_is_imported_as_ratings() -> None:
    imported = import_file(_shared("trl-zen/standard_unpaired_preference.jsonl"))
    assert (imported.format, imported.kind, imported.unused) == ("unpaired", "ratings", [])
    assert Counter(row.rating for row in imported.ratings) == {1.0: 10, 0.0: 9}


@pytest.mark.slow
def test_pandalm_and_llmbar_are_imported_whole() -> None:
    imported = import_file(_shared("pandalm-3annot/testset.shared.json"))
    causes = Counter(reason.split(" of line")[0] for reason in reasons(imported))
    assert causes == {
        "duplicate": 49,
        "empty response1": 9,
        "empty response2": 6,
        "not a text or a conversation": 6,
    }
    assert len(imported.comparisons) + 70 == 535
    assert Counter(round(row.preference, 2) for row in imported.comparisons) == {1.0: 394, 0.67: 45, 0.5: 17, 0.83: 9}
    for name, count in (("Natural", 100), ("Adversarial_Neighbor", 134)):
        imported = import_file(_shared(f"llmbar/{name}.json"))
        assert (len(imported.comparisons), imported.unused) == (count, [])
