"""Constitutions: loading and merging, hashes, the draw of a principle, the schema, and the shipped files."""

import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rlaif import constitution as constitutions
from rlaif.constitution import Constitution, Principle, applying, diff, draw, load, tagged
from rlaif.documents import shipped
from rlaif.errors import ConstitutionError

SHIPPED = sorted(shipped("constitutions").glob("*.yaml"))
SCHEMA = shipped("constitutions") / "constitution.schema.json"
REFRESH = (
    'python -c "import json, pathlib, rlaif.constitution as c; '
    "pathlib.Path('constitutions/constitution.schema.json')"
    '.write_text(json.dumps(c.json_schema(), indent=2) + chr(10))"'
)
WEIGHTS = [0.25, 0.5, 0.5, 0.75, 1, 1, 1, 1, 1.25, 1.5, 1.5, 2, 2, 2.5, 3, 5]
PLAIN = """\
name: plain
version: "1"
description: For tests.
principles:
  - {id: kind, title: Kindness, text: The answer is kind.}
  - id: honest
    title: Honesty
    text: |
      The answer is honest.
    weight: 2
    applies_to: [harmful, ordinary]
examples:
  - {id: one, principle: kind, prompt: P, response: R, critique: C, revision: V}
comparisons:
  - {prompt: P, first: A, second: B, better: second}
tests:
  - {prompt: P, better: A, worse: B, principle: honest, tag: harmful}
"""
# What is changed in PLAIN, into what, and how the complaint begins: line, column (from 1), key, problem.
FAULTS = r"""
name: plain => name: Plain => 1:1: name: lower-case letters and digits with single hyphens are exp
version: "1" => version: 1.0 => 2:1: version: Input should be a valid string (found 1.0; put it in q
For tests. => ' ' => 3:1: description: an empty text; at least one word is expected (found ' ')
{id: kind, => {id: Kind, => 5:6: principles.0.id: lower-case
{id: kind, => {id: ki--nd, => 5:6: principles.0.id: lower-case
{id: kind, => {id: -kind, => 5:6: principles.0.id: lower-case
{id: kind, => {id: "kind\n", => 5:6: principles.0.id: lower-case
{id: kind, => {id: 1, => 5:6: principles.0.id: Input should be a valid string (found 1; put it in quotes
{id: kind, => { => 5:5: principles.0.id: this key is missing. Add it.
{id: kind, => {id: honest, => 6:5: principles.1.id: `honest` stands already in line 5. Choose another
title: Kindness => title: '' => 5:16: principles.0.title: an empty text
title: Kindness => tilte: Kindness => 5:16: principles.0.tilte: unknown key; did you mean `title`?
weight: 2 => weight: 0 => 10:5: principles.1.weight: Input should be greater than 0 (found 0)
weight: 2 => weight: .inf => 10:5: principles.1.weight: Input should be a finite number (found inf)
weight: 2 => weight: .nan => 10:5: principles.1.weight: Input should be a finite number (found nan)
weight: 2 => weight: true => 10:5: principles.1.weight: Input should be a valid number (found True)
weight: 2 => weight: '2' => 10:5: principles.1.weight: Input should be a valid number (found '2')
weight: 2 => critique: ' ' => 10:5: principles.1.critique: an empty text
[harmful, ordinary] => harmful => 11:5: principles.1.applies_to: Input should be a valid list
[harmful, ordinary] => [harmful, ''] => 11:27: principles.1.applies_to.1: an empty text
principle: kind => principle: rude => 13:15: examples.0.principle: no principle `rude`; there are: h
better: second => better: third => 15:38: comparisons.0.better: Input should be 'first' or 'second'
second: B => second: 'A ' => 15:27: comparisons.0.second: the same text as `first`; two different
worse: B => worse: ' A' => 17:28: tests.0.worse: the same text as `better`; two different answers
principle: honest => principle: rude => 17:38: tests.0.principle: no principle `rude`; there are: h
tag: harmful => tag: '' => 17:57: tests.0.tag: an empty text; at least one word is expected
tests: => test: => 16:1: test: unknown key; did you mean `tests`?
"""
HEAD = 'name: child\nversion: "1"\ndescription: d\n'


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def plain(write) -> Constitution:
    return load(write(PLAIN))


def weighted(weights: list[float]) -> Constitution:
    principles = [{"id": f"p{n}", "title": "t", "text": "x", "weight": w} for n, w in enumerate(weights)]
    data = {"name": "n", "version": "1", "description": "d", "principles": principles}
    return Constitution.model_validate(data)


def changed(constitution: Constitution, identifier: str, **change: Any) -> Constitution:
    """Return a copy in which one principle differs."""
    principles = [p.model_copy(update=change) if p.id == identifier else p for p in constitution.principles]
    return constitution.model_copy(update={"principles": principles})


def complaints(path: Path) -> list[str]:
    with pytest.raises(ConstitutionError) as caught:
        load(path)
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


def drawn(constitution: Constitution, count: int, step: int = 0) -> list[str]:
    """Return the ids drawn for `count` prompts."""
    return [draw(constitution, seed=7, prompt_id=f"q{n}", step=step, tag="ordinary").id for n in range(count)]


# ---- principles


def test_requests_are_built_from_the_text_where_no_wording_is_given(plain: Constitution):
    kind = plain.principle("kind")
    for words in (kind.critique_request(), kind.revision_request(), kind.comparison_question()):
        assert "The answer is kind.\n" in words
        assert words.strip() == words
    assert len({kind.critique_request(), kind.revision_request(), kind.comparison_question()}) == 3


def test_a_given_wording_is_used_as_it_is():
    words = {"critique": "Criticize.", "revision": "Revise.", "comparison": "Which?"}
    principle = Principle.model_validate({"id": "p", "title": "t", "text": "x", **words})
    assert principle.critique_request() == "Criticize."
    assert principle.revision_request() == "Revise."
    assert principle.comparison_question() == "Which?"


def test_white_space_around_a_text_is_dropped_and_inside_kept(write):
    path = write(PLAIN.replace("      The answer is honest.\n", "      The answer\n\n        is honest.\n\n"))
    assert load(path).principle("honest").text == "The answer\n\n  is honest."


def test_an_unknown_principle_is_named_with_those_there_are(plain: Constitution):
    with pytest.raises(ConstitutionError, match="plain: no principle `rude`; there are: kind, honest."):
        plain.principle("rude")


# ---- loading


def test_a_file_is_read_with_its_defaults(plain: Constitution):
    kind, honest = plain.principles
    assert (kind.weight, kind.tags, kind.applies_to, kind.critique) == (1.0, [], [], None)
    assert (honest.weight, honest.applies_to, honest.text) == (
        2.0,
        ["harmful", "ordinary"],
        "The answer is honest.",
    )
    assert plain.examples[0].principle == "kind"
    assert plain.comparisons[0].better == "second"
    assert (plain.tests[0].principle, plain.tests[0].tag) == ("honest", "harmful")


@pytest.mark.parametrize("fault", FAULTS.strip().split("\n"))
def test_a_fault_is_reported_with_file_line_and_column(write, fault: str):
    old, new, complaint = fault.split(" => ")
    assert old in PLAIN
    lines = complaints(write(PLAIN.replace(old, new, 1)))
    assert any(line.startswith(f"file.yaml:{complaint}") for line in lines), lines


def test_faults_between_entries_are_all_reported_at_once(write):
    text = PLAIN.replace("id: honest", "id: kind").replace("principle: honest", "principle: rude")
    text = text.replace(
        "comparisons:",
        "  - {id: one, principle: bold, prompt: P, response: R, critique: C, revision: V}\ncomparisons:",
    )
    assert complaints(write(text)) == [
        "file.yaml:6:5: principles.1.id: `kind` stands already in line 5. Choose another id.",
        "file.yaml:14:6: examples.1.id: `one` stands already in line 13. Choose another id.",
        "file.yaml:14:15: examples.1.principle: no principle `bold`; there are: kind.",
        "file.yaml:18:38: tests.0.principle: no principle `rude`; there are: kind.",
    ]


def test_a_constitution_without_principles_is_refused(write):
    assert complaints(write(HEAD + "principles: []\n"))[0].startswith("file.yaml:4:1: principles: List should have at")
    assert complaints(write(HEAD)) == ["file.yaml:1:1: principles: this key is missing. Add it."]


def test_a_constitution_does_not_change_once_it_is_read(plain: Constitution):
    with pytest.raises(ValueError, match="frozen"):
        plain.principles[0].weight = 3.0  # type: ignore[misc]


# ---- extends


def test_a_child_overrides_in_place_and_adds_behind(write):
    write(PLAIN, "base.yaml")
    child = write(
        HEAD + "extends: base.yaml\nprinciples:\n"
        "  - {id: brave, title: t, text: Brave.}\n"
        "  - {id: kind, title: t, text: Kinder.}\n"
        "examples:\n"
        "  - {id: two, principle: honest, prompt: P, response: R, critique: C, revision: V}\n"
        "  - {id: one, principle: brave, prompt: P, response: R, critique: C, revision: V}\n"
        "comparisons:\n  - {prompt: Q, first: A, second: B, better: first}\n"
        "tests:\n  - {prompt: Q, better: A, worse: B, principle: kind}\n",
        "child.yaml",
    )
    merged = load(child)
    assert merged.name == "child"
    assert [(p.id, p.text) for p in merged.principles] == [
        ("kind", "Kinder."),
        ("honest", "The answer is honest."),
        ("brave", "Brave."),
    ]
    assert [(e.id, e.principle) for e in merged.examples] == [("one", "brave"), ("two", "honest")]
    assert [c.prompt for c in merged.comparisons] == ["P", "Q"]
    assert [t.prompt for t in merged.tests] == ["P", "Q"]


def test_a_chain_of_three_is_resolved_beside_each_file(write):
    write(PLAIN, "base.yaml")
    middle = HEAD + "extends: ../base.yaml\nprinciples: [{id: kind, title: t, text: Two.}]\n"
    write(middle, "deep/middle.yaml")
    top = HEAD + "extends: deep/middle.yaml\nprinciples: [{id: last, title: t, text: Three.}]\n"
    assert [p.text for p in load(write(top)).principles] == ["Two.", "The answer is honest.", "Three."]


def test_a_shipped_constitution_can_be_extended_from_anywhere(write):
    own = "principles: [{id: own, title: t, text: Own.}]\n"
    merged = load(write(HEAD + "extends: harmless.yaml\n" + own))
    assert [p.id for p in merged.principles][-1] == "own"
    assert len(merged.principles) > 12
    write(PLAIN, "harmless.yaml")
    assert len(load(write(HEAD + "extends: harmless.yaml\n" + own)).principles) == 3, "beside comes first"


def test_a_file_without_extends_hashes_as_the_same_content_split_in_two(write):
    whole = load(write(PLAIN))
    first, rest = PLAIN.split("  - id: honest\n")
    write(first, "first.yaml")
    split = HEAD + "extends: first.yaml\nprinciples:\n  - id: honest\n" + rest
    assert load(write(split, "split.yaml")).hash == whole.hash


@pytest.mark.parametrize("name", ["none.yaml", "folder", "x" * 300, '"a\\0b"'])
def test_a_missing_parent_is_reported_at_the_key_that_names_it(write, tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    (line,) = complaints(write(HEAD + f"extends: {name}\nprinciples: [{{id: a, title: t, text: T.}}]\n"))
    assert line.startswith("file.yaml:4:1: extends: no file ")


def test_a_fault_in_the_parent_is_reported_in_the_parent(write):
    write(PLAIN.replace("weight: 2", "weight: -2"), "base.yaml")
    path = write(HEAD + "extends: base.yaml\nprinciples: [{id: a, title: t, text: T.}]\n")
    assert complaints(path)[0].startswith("base.yaml:10:5: principles.1.weight: ")
    write(PLAIN.replace("principle: honest", "principle: rude"), "base.yaml")
    assert complaints(path)[0].startswith("base.yaml:17:38: tests.0.principle: no principle `rude`")


def test_a_parent_may_name_a_principle_of_the_child(write):
    write(PLAIN.replace("principle: honest", "principle: a"), "base.yaml")
    assert load(write(HEAD + "extends: base.yaml\nprinciples: [{id: a, title: t, text: T.}]\n")).tests


def test_a_cycle_is_refused_with_its_chain(write):
    def file(name: str, parent: str) -> Path:
        return write(HEAD + f"extends: {parent}\nprinciples: [{{id: a, title: t, text: T.}}]\n", name)

    first = file("a.yaml", "b.yaml")
    file("b.yaml", "./c.yaml")
    file("c.yaml", "b.yaml")
    expected = "extends: the chain comes back: a.yaml -> b.yaml -> c.yaml -> b.yaml. Remove a link."
    assert complaints(first) == [f"c.yaml:4:1: {expected}"]
    assert complaints(file("self.yaml", "self.yaml"))[0].endswith("self.yaml -> self.yaml. Remove a link.")


# ---- hashes


def test_the_hash_ignores_what_no_model_sees(write, plain: Constitution):
    text = "# a comment\n" + PLAIN.replace("title: Kindness", "title: Other, tags: [x]")
    text = text.replace("name: plain", "name: other").replace('"1"', '"2"').replace("For tests.", "Other.")
    text = text.replace("prompt: P, first: A, second: B", "second: B, first: A, prompt: P")
    text = text.replace("[harmful, ordinary]", "[ordinary, harmful, ordinary]").replace("weight: 2", "weight: 2.0")
    assert load(write(text)).hash == plain.hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{id: kind,", "{id: mild,"),
        ("The answer is kind.", "The answer is mild."),
        ("weight: 2", "weight: 3"),
        ("weight: 2", "critique: Criticize."),
        ("weight: 2", "revision: Revise."),
        ("weight: 2", "comparison: Which?"),
        ("[harmful, ordinary]", "[harmful]"),
        ("[harmful, ordinary]", "[]"),
        ("critique: C", "critique: D"),
        ("principle: kind", "principle: honest"),
        ("better: second", "better: first"),
        ("worse: B", "worse: C"),
        ("principle: honest, ", ""),
    ],
)
def test_the_hash_changes_with_everything_that_a_model_sees(write, plain: Constitution, old: str, new: str):
    text = PLAIN.replace(old, new, 1)
    if old == "{id: kind,":
        text = text.replace("principle: kind", "principle: mild")
    assert load(write(text)).hash != plain.hash


def test_the_hash_of_some_parts_ignores_the_others(write, plain: Constitution):
    other = load(write(PLAIN.replace("worse: B", "worse: C")))
    assert other.hash_of("principles", "examples") == plain.hash_of("principles", "examples")
    assert other.hash_of("tests") != plain.hash_of("tests")
    assert plain.hash == plain.hash_of("tests", "comparisons", "examples", "principles")
    assert plain.hash_of("principles") != plain.hash_of("examples")


def test_the_hash_of_a_principle_covers_its_words_and_not_how_often_it_is_drawn(plain: Constitution):
    kind = plain.principle("kind")
    for change in ({"title": "x"}, {"tags": ["x"]}, {"weight": 9.0}, {"applies_to": ["x"]}):
        assert kind.model_copy(update=change).hash == kind.hash
    for key in ("id", "text", "critique", "revision", "comparison"):
        assert kind.model_copy(update={key: "new"}).hash != kind.hash
    assert kind.model_copy(update={"critique": kind.critique_request()}).hash == kind.hash


# ---- parts


def test_a_part_holds_the_principles_of_its_tags_in_their_order():
    constitution = load(shipped("constitutions") / "harmless.yaml")
    harmless, helpful = tagged(constitution, ["harmless"]), tagged(constitution, ["helpful", "other"])
    assert [p.id for p in helpful.principles] == ["calm-tone", "refuse-with-reason", "no-needless-refusal"]
    known = [p.id for p in constitution.principles]
    assert (
        sorted([*harmless.principles, *helpful.principles], key=lambda p: known.index(p.id)) == constitution.principles
    )
    assert [p.id for p in tagged(load(shipped("constitutions") / "helpful-honest.yaml"), ["harmless"]).principles] == [
        "stay-safe"
    ]


def test_a_part_without_principles_is_an_error_that_names_the_tags():
    with pytest.raises(
        ConstitutionError, match=r"no principle is tagged `kind` or `odd`; its tags: harmless, helpful\."
    ):
        tagged(load(shipped("constitutions") / "harmless.yaml"), ["kind", "odd"])
    with pytest.raises(ConstitutionError, match=r"harmless \(tagged `helpful`\): no principle applies to .* `theft`"):
        applying(
            tagged(load(shipped("constitutions") / "harmless.yaml"), ["helpful"]).model_copy(update={"principles": []}),
            "theft",
        )


# ---- the draw


def test_the_winner_has_the_highest_weighted_rendezvous_score():
    constitution = weighted(WEIGHTS)
    for number, found in enumerate(drawn(constitution, 50, step=3)):
        scores = {}
        for principle in constitution.principles:
            key = f'[7,"q{number}",3,"{principle.id}"]'
            bits = int(hashlib.sha256(key.encode()).hexdigest()[:13], 16)  # 52 bits
            scores[principle.id] = -principle.weight / math.log((bits + 0.5) / 2**52)
        assert found == max(scores, key=scores.__getitem__)


def test_draws_stay_what_they_were_in_earlier_versions():
    assert " ".join(drawn(weighted(WEIGHTS), 12)) == "p10 p7 p15 p15 p10 p9 p13 p11 p13 p11 p10 p3"


def test_draws_follow_the_weights():
    draws = 8000
    counts = Counter(drawn(weighted(WEIGHTS), draws))
    assert sum(WEIGHTS) == 24.75
    chi_square = sum(
        (counts[f"p{n}"] - draws * weight / 24.75) ** 2 / (draws * weight / 24.75) for n, weight in enumerate(WEIGHTS)
    )
    assert chi_square < 37.70  # the 99.9 % point of chi-square with 15 degrees of freedom


def test_draws_of_two_steps_are_independent_and_with_replacement():
    # Equal weights: the same one twice with probability 1/4; 4 standard deviations of 2000 trials are 77.
    constitution = weighted([1, 1, 1, 1])
    same = sum(a == b for a, b in zip(drawn(constitution, 2000), drawn(constitution, 2000, step=1), strict=True))
    assert 423 <= same <= 577


def test_the_order_of_prompts_and_of_principles_changes_no_draw():
    constitution = weighted(WEIGHTS)
    shuffled = random.Random(0).sample(constitution.principles, len(WEIGHTS))
    assert drawn(constitution.model_copy(update={"principles": shuffled}), 300) == drawn(constitution, 300)


def test_rewording_a_principle_changes_no_draw():
    constitution = weighted(WEIGHTS)
    other = changed(constitution, "p15", text="Other.", title="Other", critique="Other.", tags=["other"])
    assert drawn(other, 300) == drawn(constitution, 300)


def test_a_new_principle_takes_its_share_and_moves_no_other_draw():
    before, after = drawn(weighted(WEIGHTS), 2000), drawn(weighted([*WEIGHTS, 2.75]), 2000)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"p16"}
    assert 146 <= len(moved) <= 254  # a tenth of 2000, and 4 standard deviations (13.4) either way


def test_a_heavier_principle_only_gains_draws():
    constitution = weighted(WEIGHTS)
    before, after = drawn(constitution, 1000), drawn(changed(constitution, "p4", weight=3.0), 1000)
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {"p4"}


def test_seed_prompt_and_step_each_change_draws():
    constitution = weighted([1.0] * 16)
    key = {"seed": 1, "prompt_id": "a", "step": 0, "tag": "ordinary"}
    found = [draw(constitution, **{**key, "seed": n}).id for n in range(40)]
    assert len(set(found)) > 8
    assert len({draw(constitution, **{**key, "prompt_id": str(n)}).id for n in range(40)}) > 8
    assert len({draw(constitution, **{**key, "step": n}).id for n in range(40)}) > 8


def test_only_principles_that_apply_to_the_tag_are_drawn(plain: Constitution):
    def ids(tag: str) -> set[str]:
        return {draw(plain, seed=0, prompt_id=str(n), step=0, tag=tag).id for n in range(60)}

    assert ids("ordinary") == ids("harmful") == {"kind", "honest"}
    assert ids("lookalike") == {"kind"}


def test_the_tag_itself_does_not_enter_the_draw(plain: Constitution):
    for number in range(60):
        key = {"seed": 0, "prompt_id": str(number), "step": 0}
        assert draw(plain, tag="harmful", **key) == draw(plain, tag="ordinary", **key)


def test_a_tag_without_principles_is_refused_by_name(plain: Constitution):
    only_honest = plain.model_copy(update={"principles": plain.principles[1:]})
    with pytest.raises(ConstitutionError, match="plain: no principle applies to prompts tagged `lookalike`. Add"):
        draw(only_honest, seed=0, prompt_id="a", step=0, tag="lookalike")


@pytest.mark.parametrize(("weights", "winner"), [([1e308, 1e-308], "p0"), ([5e-324, 1.0], "p1")])
def test_extreme_weights_do_not_overflow(weights: list[float], winner: str):
    assert set(drawn(weighted(weights), 50)) == {winner}


# ---- differences and the schema


def test_diff_names_what_was_added_removed_reworded_and_reweighted(plain: Constitution):
    new = changed(plain, "honest", text="Other.", title="Other")
    brave = plain.principles[0].model_copy(update={"id": "brave"})
    new = new.model_copy(update={"principles": [brave, *new.principles[1:]]})
    assert diff(plain, new) == (["brave"], ["kind"], ["honest"], [])
    assert diff(new, plain) == (["kind"], ["brave"], ["honest"], [])
    assert diff(plain, changed(plain, "kind", weight=4.0)).reweighted == ["kind"]
    assert diff(plain, changed(plain, "kind", applies_to=["x"])) == ([], [], [], ["kind"])
    assert diff(plain, changed(plain, "kind", title="Other")) == diff(plain, plain) == ([], [], [], [])


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads(SCHEMA.read_text(encoding="utf-8")) if SCHEMA.is_file() else None
    assert committed == constitutions.json_schema(), f"refresh it: {REFRESH}"


def test_every_key_of_the_schema_is_described():
    schema = constitutions.json_schema()
    kinds = [schema, *schema["$defs"].values()]
    assert len(kinds) == 5
    for kind in kinds:
        assert kind["additionalProperties"] is False
        for name, value in kind["properties"].items():
            assert value.get("description", "").endswith("."), f"{kind['title']}.{name}"


# ---- the shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_constitution_loads_and_serves_every_tag(path: Path):
    constitution = load(path)
    assert constitution.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=./constitution.schema.json\n")
    for tag in ("harmful", "ordinary", "lookalike"):
        assert draw(constitution, seed=0, prompt_id="a", step=0, tag=tag).applies(tag)


@pytest.mark.parametrize(("name", "principles", "tests"), [("harmless", 12, 20), ("helpful-honest", 8, 20)])
def test_the_shipped_constitutions_have_enough_principles_and_tests(name: str, principles: int, tests: int):
    constitution = load(shipped("constitutions") / f"{name}.yaml")
    assert len(constitution.principles) >= principles
    assert len(constitution.tests) >= tests


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_keys_of_shipped_files_are_those_of_the_schema(path: Path):
    schema = constitutions.json_schema()
    data = YAML(typ="safe", pure=True).load(path)
    assert set(data) <= set(schema["properties"])
    assert set(schema["required"]) <= set(data)
    for principle in data["principles"]:
        assert set(principle) <= set(schema["$defs"]["Principle"]["properties"])
