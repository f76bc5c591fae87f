"""The page on reliability and security against the tests that it names."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
PROMISES = ["R1", "R2", "R3", "R4", "R5", "R9", "R10"]
THREATS = ["T1", "T2", "T3", "T4", "T5", "T8", "T9", "T10", "T12", "T14", "T16", "T17", "T18"]


def rows(heading: str) -> list[list[str]]:
    text = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines][1:]


@functools.cache
def named_in(path: Path) -> dict[str, bool]:
    """Return the tests of a file, each with whether it is marked slow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = any(isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node.value) for node in tree.body)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = module or any("mark.slow" in ast.unparse(one) for one in node.decorator_list
                                             if "parametrize" not in ast.unparse(one))  # fmt: skip
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = module
    return found


def test_every_promise_and_threat_has_one_row_without_an_empty_cell() -> None:
    for heading, names in (("Promises", PROMISES), ("Threats", THREATS)):
        found = rows(heading)
        assert [row[0].split(":")[0] for row in found] == names
        assert all(len(row) == 4 and all(row) for row in found)
        assert all("::" in row[2] for row in found)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+::\w+)`", PAGE))))
def test_every_test_that_the_page_names_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert (TESTS / f"{file}.py").is_file() and test in named_in(TESTS / f"{file}.py")


def test_slow_tests_are_called_slow_and_others_are_not() -> None:
    for row in (*rows("Promises"), *rows("Threats")):
        for part in row[2].split(";"):
            for name in re.findall(r"`(test_\w+::\w+)`", part):
                file, _, test = name.partition("::")
                assert named_in(TESTS / f"{file}.py")[test] == part.strip().startswith("slow: "), name
