"""Versions: the floors that have a reason, in what `pyproject.toml` asks for and in what is installed."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rlaif

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}
EXTRA = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]

FLOORS = {
    "transformers": "5.3",  # CVE-2026-4372
    "torch": "2.10",  # CVE-2026-24747
    "jinja2": "3.1.6",  # escapes from the sandbox were closed up to here
}
# Compromised, built on pickle, stalled, or in conflict with the pins above.
REFUSED = {"litellm", "diskcache", "sqlitedict", "distilabel", "argilla", "gradio", "streamlit", "vllm"}


def test_python_is_at_least_3_11() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_a_version_below_the_floor_is_neither_asked_for_nor_installed(name: str, floor: str) -> None:
    lower = [Version(one.version) for one in REQUIRED[name].specifier if one.operator in (">=", "==", "~=")]
    assert lower and max(lower) >= Version(floor)
    assert Version(version(name)) >= Version(floor)


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_is_installed_is_what_pyproject_asks_for(name: str) -> None:
    assert REQUIRED[name].specifier.contains(version(name), prereleases=True)


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_every_requirement_has_a_lower_bound(name: str) -> None:
    assert any(one.operator in (">=", "==", "~=") for one in REQUIRED[name].specifier)


def test_packages_that_were_refused_are_not_required() -> None:
    assert {found.name.lower() for found in (*REQUIRED.values(), *EXTRA)} & REFUSED == set()


def test_the_setup_script_installs_a_torch_that_pyproject_allows() -> None:
    pinned = set(re.findall(r"torch==([0-9.]+)", (ROOT / "scripts" / "setup").read_text(encoding="utf-8")))
    assert pinned and all(REQUIRED["torch"].specifier.contains(one) for one in pinned)


def test_every_requirement_but_torch_is_pinned_for_the_checkout_to_a_version_that_pyproject_allows() -> None:
    text = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    lines = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in lines}
    assert all(Version(pin) for pin in pins.values())
    for wanted in (*REQUIRED.values(), *EXTRA):
        name = canonicalize_name(wanted.name)
        if name not in ("torch", "tensorboard"):  # scripts/setup chooses the build; tracking is not for developing
            assert wanted.specifier.contains(pins[name]), name


def test_the_version_is_the_same_in_the_package_and_in_pyproject() -> None:
    assert rlaif.__version__ == PROJECT["version"] == version("rlaif-toolkit")
