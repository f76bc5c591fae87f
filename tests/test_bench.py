"""Tables of `scripts/bench/quickstart` and `scripts/bench/ppo` from made-up figures; a run of `scripts/bench/gpu`."""

import argparse
import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from rlaif.journal import Journal, Manifest, Unit, write_manifest
from rlaif.stages.run import Run

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


def loaded(name: str):
    loader = SourceFileLoader(f"bench_{name}", str(BENCH / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return loaded("quickstart")


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
    ppo = loaded("ppo")
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


def told(**changes):
    small = {
        "shape": "tiny",
        "prompt": 24,
        "new": 8,
        "rollout": 4,
        "microbatch": 2,
        "epochs": 1,
        "updates": 1,
        "rank": 4,
    }
    rest = {"no_checkpointing": False, "peak_tflops": 1.0, "scratch": None, "threads": 1}
    return argparse.Namespace(**small | rest | changes)


def test_model_flops_are_two_for_each_number_and_token_and_attentions() -> None:
    gpu = loaded("gpu")
    shape = gpu.SHAPES["tiny"]
    numbers = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 704) + 4096 * 256
    forward = 10 * (2 * numbers + 4 * 4 * 256 * 5)
    assert gpu.flops(shape, 10, 5) == forward
    assert gpu.flops(shape, 10, 5, backward=True) == 3 * forward
    readings, trained = 6, 2 * 3  # sampling, five roles; a backward pass of the policy and one of the critic
    assert gpu.flops_of_update(shape, told()) == (readings + trained) * gpu.flops(shape, 4 * 32, 16)


@pytest.mark.slow
def test_five_roles_of_a_random_base_run_on_a_cpu_as_a_rehearsal(tmp_path: Path, no_sync: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_base", Run.load_base)  # the script puts another in its place
        found = loaded("gpu").measure(told(), tmp_path)
    assert found["parameters"] == 4915200 and found["tokens"] == "24+8" and len(found["updates"]) == 1
    assert found["seconds_per_update"] > 0 and found["sampled_tokens_per_second"] > 0 and found["utilization"] > 0
    assert 0 < found["expected_tensors_gib"] < found["expected_gib"] < found["separate_gib"]
