"""Constitutions as YAML: what is written reads back as it was, and reads well."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif.constitution import Constitution, load
from rlaif.constitution_write import as_yaml
from rlaif.documents import shipped

TEXTS = [
    "Plain words.",
    "With: a colon",
    "With a # hash",
    "- like a list",
    "yes",
    "null",
    "12",
    "1.5e3",
    "~",
    "'quoted' and \"quoted\"",
    "ends with a colon:",
    "two\nlines",
    "a paragraph\n\n  indented: line\n\nand # more",
    "tabs\there",
    "double  space " + "word " * 40 + "end",
    "long " * 60 + "end",
    "long: " * 60 + "end # with marks",
    "x" * 300,
    "back\\slash",
    "ümläut 日本語 🙂",
    "{braces} [brackets], commas & *stars* !tag %percent @at `tick`",
    "a line\nthat ends in a space \nand goes on",
    "first\n...\n---\nlast",
]


def one(text: str) -> Constitution:
    example = {"id": "e", "principle": "p", "prompt": text, "response": text, "critique": text, "revision": text}
    return Constitution.model_validate(
        {
            "name": "sample",
            "version": "1.0",
            "description": text,
            "principles": [
                {"id": "p", "title": text, "text": text, "critique": text, "tags": [text, "b"], "weight": 2.5}
            ],
            "examples": [example],
            "comparisons": [{"prompt": text, "first": text, "second": "other", "better": "first"}],
            "tests": [{"prompt": text, "better": text, "worse": "other", "tag": text}],
        }
    )


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_reads_back_as_it_was(tmp_path: Path, text: str):
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(one(text)), encoding="utf-8")
    assert load(path) == one(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab :#-'\"\n[]{},&*!|>%@`?.0\\ \u00e9~"), min_size=1, max_size=160))
def test_any_mixture_of_marks_reads_back_as_it_was(tmp_path: Path, text: str):
    if not text.strip() or text.strip() == "other":
        return
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(one(text)), encoding="utf-8")
    assert load(path) == one(text)


@pytest.mark.parametrize("name", ["harmless", "helpful-honest"])
def test_a_shipped_constitution_reads_back_as_it_was(tmp_path: Path, name: str):
    original = load(shipped("constitutions") / f"{name}.yaml")
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(original), encoding="utf-8")
    assert load(path) == original
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_a_file_begins_with_the_schema_and_holds_comments_notes_and_no_defaults():
    text = as_yaml(one("Short text."), comments=["Why it is here."], notes={"p": "Seen 3 times."})
    assert text.splitlines()[:11] == [
        "# yaml-language-server: $schema=./constitution.schema.json",
        "# Why it is here.",
        "name: sample",
        'version: "1.0"',
        "description: Short text.",
        "",
        "principles:",
        "  # Seen 3 times.",
        "  - id: p",
        "    title: Short text.",
        "    text: Short text.",
    ]
    assert "applies_to" not in text
    assert "    weight: 2.5\n" in text


def test_a_long_paragraph_is_folded_and_lines_are_kept_as_lines():
    long = " ".join(["word"] * 60)
    assert f"    text: >-\n      {' '.join(['word'] * 22)}\n" in as_yaml(one(long))
    assert "    text: |-\n      two\n      lines\n" in as_yaml(one("two\nlines"))
