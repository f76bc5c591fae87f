"""`rlaif constitution check`: every error and warning at its place, and nothing where nothing is odd."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlaif import constitution_check as checks
from rlaif.constitution_check import Kinds, check, estimated_tokens, similarity
from rlaif.documents import Problem, shipped

HEAD = 'name: own\nversion: "1"\ndescription: For tests.\n'
KINDS = Kinds(["own.jsonl"], Counter({("harmful", "theft"): 3, ("harmful", "fraud"): 2, ("ordinary", ""): 4}), 20)
KIND = "  - {id: kind, title: t, text: The answer is kind.}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(body: str, name: str = "own.yaml") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + body, encoding="utf-8")
        return path

    return write_file


def found(path: Path, kinds: Kinds = KINDS, *, max_tokens: int = 4096) -> list[tuple[int | None, int | None, str, str]]:
    problems = check(path, kinds, max_tokens=max_tokens)
    assert all(problem.message.endswith((".", "?", ")")) for problem in problems)
    return [(problem.line, problem.column, problem.severity, problem.code) for problem in problems]


def messages(path: Path, kinds: Kinds = KINDS, *, max_tokens: int = 4096) -> list[str]:
    return [problem.message for problem in check(path, kinds, max_tokens=max_tokens)]


@pytest.mark.parametrize("name", ["harmless", "helpful-honest"])
def test_a_shipped_constitution_has_no_problem_with_the_shipped_prompts(name: str):
    sets = checks.read_prompts([shipped("prompts") / f"{tag}.jsonl" for tag in ("harmful", "ordinary", "lookalike")])
    assert check(shipped("constitutions") / f"{name}.yaml", sets, max_tokens=2048) == []


# ---- errors


def test_an_entry_with_a_fault_is_compared_by_the_fields_that_can_be_read(write):
    path = write(
        "principles:\n  - {id: kind, titel: t, text: The answer is kind.}\n"
        "  - {id: kind, title: t, text: Keep the secret., weight: -1, applies_to: [nowhere]}\n"
        "  - {id: Warm, title: t, text: The answer is kind.}\n"
        "examples:\n  - {id: one, principle: kind, prompt: P, response: R, critique: C, revision: V}\n"
        "  - {id: one, principle: kind, prompt: P, response: R}\n"
        "comparisons:\n  - {prompt: Q, first: A, second: B, better: third}\n"
        "tests:\n  - {prompt: P, better: R, worse: V, principle: kind, note: n}\n"
        "  - {prompt: Q, better: S, worse: S}\n  - just words\n"
    )
    assert found(path) == [
        (5, 5, "error", "missing-key"),
        (5, 16, "error", "unknown-key"),
        (6, 6, "error", "repeated-id"),
        (6, 50, "error", "wrong-value"),
        (6, 62, "warning", "never-drawn"),
        (7, 5, "warning", "near-duplicate"),
        (7, 6, "error", "wrong-value"),
        (10, 5, "error", "missing-key"),
        (10, 5, "error", "missing-key"),
        (10, 6, "error", "repeated-id"),
        (12, 38, "error", "wrong-value"),
        (14, 5, "warning", "contradiction"),
        (14, 55, "error", "unknown-key"),
        (15, 28, "error", "wrong-value"),
        (16, 5, "error", "wrong-value"),
    ]
    named = [said for said in messages(path) if "nearly the same" in said]
    assert named == [
        "principles.2: `principles.2` says nearly the same as `kind` in line 5 (100% of their three-word sequences), "
        "so its subject is drawn twice as often. Merge or distinguish them."
    ]


def test_draws_and_lengths_are_told_beside_errors_that_do_not_change_them(write):
    rare = "  - {id: rare, title: t, text: Seldom., weight: 0.0001}\n"
    longest = "x " * 700
    path = write(
        "principles:\n" + KIND + rare + f"tests:\n  - {{prompt: {longest}, better: A, worse: B, note: n}}\n"
        "  - {prompt: P, worse: B}\nextra: 1\n"
    )
    codes = [code for *_, code in found(path, max_tokens=700)]
    assert sorted(codes) == ["missing-key", "rarely-drawn", "too-long", "unknown-key", "unknown-key"]
    unread = write(
        "principles:\n" + KIND + rare + "  - {id: third, title: t, text: Text., weight: high}\n", "unread.yaml"
    )
    assert [code for *_, code in found(unread)] == ["wrong-value"], "the shares of the draws are not known"


def test_errors_inside_an_entry_hide_neither_errors_between_entries_nor_warnings(write):
    path = write(
        "principles:\n" + KIND + "  - {id: mild, titel: t, text: Mild.}\n"
        "  - {id: warm, title: t, text: The answer is kind. , applies_to: [thef]}\n"
        "examples:\n  - {id: one, principle: rude, prompt: P, response: R, critique: C, revision: V}\n"
    )
    assert found(path) == [
        (6, 5, "error", "missing-key"),
        (6, 16, "error", "unknown-key"),
        (7, 5, "warning", "near-duplicate"),
        (7, 54, "warning", "never-drawn"),
        (9, 15, "error", "unknown-principle"),
    ]


def test_an_id_that_cannot_be_read_is_not_reported_again_where_it_is_named(write):
    path = write(
        "principles:\n  - {id: Kind, title: t, text: T.}\n"
        "tests:\n  - {prompt: P, better: A, worse: B, principle: kind}\n"
    )
    assert found(path) == [(5, 6, "error", "wrong-value")]


def test_the_errors_of_a_file_and_of_its_parent_are_told_together(write):
    write("principles:\n  - {id: kind, title: t, text: ''}\n", "base.yaml")
    path = write("extends: base.yaml\nprinciples:\n  - {id: kind, title: t, text: T., weight: 0}\n")
    problems = check(path, KINDS, max_tokens=4096)
    assert [(Path(problem.file).name, problem.line, problem.code) for problem in problems] == [
        ("base.yaml", 5, "wrong-value"),
        ("own.yaml", 6, "wrong-value"),
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("principles: [\n", (5, 1, "error", "not-yaml")),
        ("principles: &a [1]\n", (4, 13, "error", "not-plain")),
        ("extends: nowhere.yaml\nprinciples:\n" + KIND, (4, 1, "error", "no-parent")),
        ("extends: own.yaml\nprinciples:\n" + KIND, (4, 1, "error", "circle")),
        ("name: twice\nprinciples: []\n", (4, 1, "error", "not-plain")),
    ],
)
def test_what_cannot_be_read_at_all_is_one_problem_with_its_place(write, body: str, expected: tuple[object, ...]):
    assert found(write(body)) == [expected]


def test_a_missing_file_is_a_problem_without_a_line(tmp_path: Path):
    path = tmp_path / "none.yaml"
    message = "no such file. Check the path; it is taken from the working folder."
    assert check(path, KINDS, max_tokens=4096) == [Problem(str(path), None, None, "unreadable", message)]


def test_two_entries_of_one_id_on_one_line_are_seen(write):
    one = "{id: kind, title: t, text: T.}"
    assert [code for _, _, _, code in found(write(f"principles: [{one}, {one}]\n"))][0] == "repeated-id"


# ---- entries that stand twice


def test_similarity_is_the_share_of_three_word_sequences():
    assert similarity("a b c d", "a b c d") == 1.0
    assert similarity("A, b; c d", "a b c e") == 1 / 3  # abc, bcd and abc, bce
    assert similarity("a b c d", "e f g h") == 0.0
    assert similarity("Kind", "kind.") == 1.0


def test_principles_that_say_nearly_the_same_are_named_with_their_lines(write):
    words = "The answer helps nobody to steal things from other people"
    path = write(
        f"principles:\n  - {{id: one, title: t, text: {words}.}}\n"
        "  - {id: other, title: t, text: The answer names the law.}\n"
        f"  - {{id: two, title: t, text: {words} at all.}}\n"
    )
    assert found(path) == [(7, 5, "warning", "near-duplicate")]
    assert "`two` says nearly the same as `one` in line 5 (80% of" in messages(path)[0]


def test_principles_with_the_same_built_frame_around_other_words_are_not_alike(write):
    path = write(
        "principles:\n  - {id: one, title: t, text: Nobody is hurt by it.}\n"
        "  - {id: two, title: t, text: It names a source for each claim.}\n"
    )
    assert found(path) == []


def test_a_phrase_that_most_principles_begin_with_makes_no_two_alike(write):
    phrase = "Look at the last answer with great care and then say in plain words whether it is"
    own = ["kind", "honest", "short", "safe", "calm", "clear"]
    path = write("principles:\n" + "".join(f"  - {{id: {word}, title: t, text: {phrase} {word}.}}\n" for word in own))
    assert similarity(f"{phrase} kind.", f"{phrase} honest.") > 0.8
    assert found(path) == []


def test_an_override_of_a_parents_principle_is_no_duplicate(write):
    write("principles:\n" + KIND, "base.yaml")
    assert found(write("extends: base.yaml\nprinciples:\n" + KIND)) == []


def test_examples_and_tests_that_stand_twice_are_named(write):
    example = "principle: kind, prompt: How are you?, response: Go away., critique: It is rude., revision: Well.}"
    test = "  - {prompt: How are you today?, better: Fine and you?, worse: No.}\n"
    path = write(
        "principles:\n" + KIND + f"examples:\n  - {{id: a, {example}\n  - {{id: b, {example}\ntests:\n{test}{test}"
    )
    assert found(path) == [(8, 5, "warning", "near-duplicate"), (11, 5, "warning", "near-duplicate")]


# ---- contradictions

WORKED = (
    "principles:\n" + KIND + "  - {id: other, title: t, text: Something else.}\n"
    "examples:\n  - {id: a, principle: kind, prompt: E?, response: Bad., critique: C., revision: Good.}\n"
    "comparisons:\n  - {prompt: C?, first: Yes., second: No., better: second}\ntests:\n"
)


@pytest.mark.parametrize(
    ("test", "code", "words"),
    [
        (
            "{prompt: c?, better: 'yes.', worse: 'no.'}",
            "contradiction",
            "the opposite of the worked comparison in",
        ),
        ("{prompt: C?, better: 'No.', worse: 'Yes.'}", "given-away", "repeats the worked comparison in line 10"),
        ("{prompt: E?, better: Bad., worse: Good.}", "contradiction", "says the opposite of the example in line 8"),
        ("{prompt: E?, better: Bad., worse: Worse.}", "contradiction", "is what the example in line 8 criticizes"),
        ("{prompt: E?, better: Good., worse: Bad.}", "", ""),
        ("{prompt: Other?, better: Bad., worse: Good.}", "", ""),
        ("{prompt: E?, better: Bad., worse: Worse., principle: other}", "", ""),
        ("{prompt: C?, better: 'Yes.', worse: 'No.', principle: other}", "", ""),
    ],
)
def test_a_test_that_contradicts_what_the_judge_is_shown_is_named(write, test: str, code: str, words: str):
    path = write(f"{WORKED}  - {test}\n")
    assert [one[3] for one in found(path)] == ([code] if code else [])
    assert words in "".join(messages(path))


def test_an_example_where_nothing_has_to_change_contradicts_nothing(write):
    path = write(WORKED.replace("revision: Good.", "revision: Bad.") + "  - {prompt: E?, better: Bad., worse: No.}\n")
    assert found(path) == []


def test_two_tests_with_swapped_sides_are_named_once_at_the_later_one(write):
    path = write(
        "principles:\n" + KIND + "tests:\n  - {prompt: P?, better: A., worse: B.}\n"
        "  - {prompt: P?, better: B., worse: A., principle: kind}\n"
    )
    assert found(path) == [(8, 5, "warning", "contradiction")]
    assert "the test in line 7 under `kind`" in messages(path)[0]


# ---- draws


def principles(*rows: str) -> str:
    return "principles:\n" + "".join(
        f"  - {{id: p{number}, title: t, text: Number {number} of all. {row}}}\n" for number, row in enumerate(rows)
    ).replace("of all. ,", "of all.,")


def test_a_principle_whose_tags_no_prompt_has_is_never_drawn(write):
    path = write(principles("", ", applies_to: [thefts]", ", applies_to: [theft, weather]"))
    assert found(path) == [(6, 48, "warning", "never-drawn"), (7, 48, "warning", "unknown-tag")]
    assert "`thefts`. Did you mean `theft`?" in messages(path)[0]
    assert "There are: fraud, harmful, ordinary, theft." in messages(path)[1]


def test_a_principle_in_the_shadow_of_those_that_name_every_category_is_never_drawn(write):
    shadowed = ["", ", applies_to: [harmful]", ", applies_to: [theft]", ", applies_to: [harmful, fraud]"]
    path = write(principles(*shadowed))
    assert found(path) == [(6, 48, "warning", "never-drawn")]
    assert "`p2`, `p3` name the category of every prompt it applies to" in messages(path)[0]
    assert found(write(principles(*shadowed[:3]))) == [], "prompts about fraud draw it"


def test_a_tag_that_nothing_applies_to_is_named(write):
    path = write(principles(", applies_to: [harmful]"))
    assert found(path) == [(4, 1, "warning", "tag-without-principle")]
    assert "tagged `ordinary`" in messages(path)[0]


@pytest.mark.parametrize(("weight", "codes"), [("0.00099", ["rarely-drawn"]), ("0.0011", [])])
def test_a_weight_under_a_thousandth_of_the_draws_for_every_tag_is_named(write, weight: str, codes: list[str]):
    assert [one[3] for one in found(write(principles("", f", weight: {weight}")))] == codes


def test_a_small_weight_that_is_alone_for_some_tag_is_enough(write):
    path = write(principles(", applies_to: [harmful]", ", weight: 0.00001"))
    assert found(path) == []


# ---- lengths


def test_the_estimate_takes_characters_words_and_letters_beyond_ascii_into_account():
    assert estimated_tokens("a" * 40) == 10
    assert estimated_tokens("a b c d e f g h i j") == 13
    assert estimated_tokens("日本語") == 5  # three characters, and one word of 1.3


def test_one_long_principle_is_named_and_its_length_is_called_an_estimate(write):
    path = write(principles("", "").replace("Number 1 of all.", "very long words " * 100))
    assert found(path, max_tokens=500) == [(6, 5, "warning", "too-long")]
    assert "(an estimate from characters and words); --max-tokens is 500" in messages(path, max_tokens=500)[0]


def test_worked_examples_that_leave_no_room_are_named_once(write):
    example = f"  - {{id: a, principle: p0, prompt: P, response: {'long ' * 300}, critique: C., revision: V.}}\n"
    path = write(principles("", "") + "examples:\n" + example)
    assert found(path, max_tokens=600) == [(7, 1, "warning", "too-long")]


def test_a_test_that_is_too_long_for_the_judge_is_named(write):
    path = write(principles("") + f"tests:\n  - {{prompt: P, better: A., worse: {'long ' * 400}}}\n")
    assert found(path, max_tokens=500) == [(7, 5, "warning", "too-long")]


# ---- JSON


def test_the_json_list_has_the_six_keys_of_each_problem():
    problems = [Problem("a.yaml", 1, 2, "not-yaml", "M."), Problem("b.yaml", None, None, "unreadable", "N.", "warning")]
    assert json.loads(checks.as_json(problems)) == [
        {"file": "a.yaml", "line": 1, "column": 2, "severity": "error", "code": "not-yaml", "message": "M."},
        {"file": "b.yaml", "line": None, "column": None, "severity": "warning", "code": "unreadable", "message": "N."},
    ]
