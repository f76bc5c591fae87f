"""The tables of `scripts/bench/quickstart` and `scripts/bench/ppo`, from figures made up here."""

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from rlaif.journal import Journal, Manifest, Unit, write_manifest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"


def script(name: str):
    loader = SourceFileLoader(f"bench_{name}", str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(f"bench_{name}", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return script("quickstart")


def manifest(folder: Path, stage: str, seconds: float, memory: float, **counts: int) -> None:
    folder.mkdir()
    write_manifest(folder, Manifest(stage, {}, {}, counts, seconds, memory, {}))


def test_a_row_for_each_finished_stage_and_their_sum(bench, tmp_path: Path) -> None:
    manifest(tmp_path / "1-revise", "revise", 61.4, 2.041)
    manifest(tmp_path / "3-label", "label", 10.0, 1.5)
    manifest(tmp_path / "5-ppo", "ppo", 100.0, 3.25, updates=2, responses=8)
    (tmp_path / "4-reward").mkdir()  # not finished
    rows = [{"rollout/response_tokens": 10.25}, {"rollout/response_tokens": 5.0}]
    (tmp_path / "5-ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Journal(tmp_path / "journal.db") as journal:
        journal.put([Unit("revise", "a", 0, "h", {"text": "x", "logprobs": []}, tokens=30)])
        journal.put([Unit("revise", "b", 0, "h", {"text": "y", "logprobs": []}, tokens=12)])
        journal.put([Unit("label", "a/given", 0, "h", {"text": "", "logprobs": [-1.0, -2.0]}, tokens=200)])
    assert bench.table(tmp_path).splitlines()[2:] == [
        "| revise | 61 | 2.04 | 42 |  |",
        "| label | 10 | 1.50 |  | 200 |",
        "| ppo | 100 | 3.25 | 61 |  |",
        "| all | 171 | 3.25 | 103 | 200 |",
    ]


def test_a_folder_that_holds_a_run_already_is_refused(bench, tmp_path: Path, capsys) -> None:
    (tmp_path / "journal.db").write_text("")
    assert bench.bench(tmp_path, []) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_machine_is_described_by_what_rlaif_env_found(bench) -> None:
    text = bench.machine({"gpu": "none", "memory": "8.0 GiB", "something else": "1"})
    assert text.splitlines() == ["| machine | |", "|---|---|", "| memory | 8.0 GiB |", "| gpu | none |"]


def test_ratios_of_ppo_are_of_steps_that_were_taken_in_one_turn() -> None:
    ppo = script("ppo")
    theirs = [ppo.Step([1.0, 2.0, 7.0], 20.0, 8.0), ppo.Step([2.0, 3.0, 15.0], 50.0, 10.0)]
    ours = [ppo.Step([1.0, 1.0, 3.0], 6.0, 4.0), ppo.Step([1.0, 1.0, 2.0], 5.0, 4.0)]

    def spread(values: list[float], digits: int = 2) -> str:
        return " ".join(f"{value:.{digits}f}" for value in values)

    assert ppo.tables({"trl": theirs, "trunk": ours}, spread).splitlines() == [
        "",
        "| variant | sampling | scoring | updating | all, s | processor time, s | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| trl | 1.0 2.0 | 2.0 3.0 | 7.0 15.0 | 10.0 20.0 | 20.0 50.0 | 10.00 |",
        "| trunk | 1.0 1.0 | 1.0 1.0 | 3.0 2.0 | 5.0 4.0 | 6.0 5.0 | 4.00 |",
        "",
        "| against TRL | time | processor time | memory |",
        "|---|---:|---:|---:|",
        "| trunk | 0.50 0.20 | 0.30 0.10 | 0.50 0.40 |",
    ]
