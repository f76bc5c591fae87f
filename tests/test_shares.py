"""PPO in several processes: two that share the rows are one that has them all, and they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from rlaif import launch
from rlaif.errors import ConfigError
from rlaif.model.sampling import Batch, Sample
from rlaif.stages import processes, shares

# --- without other processes -----------------------------------------------------------------------------------------


class Others:
    """Stands for the other processes: what this one adds up is kept, and theirs is added."""

    def __init__(self, monkeypatch, rank, count):
        for name, value in {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(shares._Now, "together", True)
        monkeypatch.setattr(processes, "add_up", self.add_up)
        self.given, self.theirs = [], 0.0

    def add_up(self, found):
        self.given.append(found.clone())
        return found + self.theirs


def test_alone_everything_is_handed_on_as_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    part = torch.randn(3, 2)
    assert shares.whole(part, 3) is part
    assert shares.own([1, 2, 3]) == [1, 2, 3]
    assert shares.own_rows(3).tolist() == [0, 1, 2]
    assert shares.added({"loss": 0.1}) == {"loss": 0.1}
    assert shares.from_first(lambda: [0.1], 1) == [0.1]
    assert (shares.count(), launch.leads()) == (1, True)


def test_a_stage_before_or_after_is_the_first_process_s_alone(monkeypatch):
    Others(monkeypatch, 0, 3)
    monkeypatch.setattr(shares._Now, "together", False)
    assert (shares.count(), launch.leads(), shares.own([1, 2, 3])) == (1, True, [1, 2, 3])


def test_rows_come_back_to_their_places(monkeypatch):
    others = Others(monkeypatch, 1, 3)
    assert shares.own("abcde") == "be"
    mine = torch.tensor([[1.5, torch.nan], [2.5, 7.0]])
    others.theirs = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0], [3.0, 3.0], [0.0, 0.0]])
    found = shares.whole(mine, 5)
    expected = torch.tensor([[1.0, 1.0], [1.5, torch.nan], [2.0, 2.0], [3.0, 3.0], [2.5, 7.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_process_without_a_row_of_few_gets_what_the_others_found(monkeypatch):
    others = Others(monkeypatch, 1, 2)
    others.theirs = torch.tensor([[1.0, 2.0]])
    assert shares.whole(torch.zeros(0, 2), 1).tolist() == [[1.0, 2.0]]


def test_a_function_is_given_its_own_rows_of_the_batch_and_of_lists(monkeypatch):
    others = Others(monkeypatch, 1, 2)
    batch = Batch(*(torch.arange(3).unsqueeze(1) for _ in range(5)))

    @shares.by_rows
    def add(size, texts, batch):
        assert (size, texts) == (7, ["b"])
        return batch.ids[:, 0] * 10, batch.response_ids

    first, second = add(7, ["a", "b", "c"], batch)
    assert first.tolist() == [0, 10, 0]
    assert second.tolist() == [[0], [1], [0]]
    assert len(others.given) == 2


def test_the_first_process_alone_asks(monkeypatch):
    others = Others(monkeypatch, 1, 2)
    others.theirs = torch.tensor([0.5, torch.nan], dtype=torch.float64)
    found = shares.from_first(lambda: pytest.fail("asked"), 2)
    assert found[0] == 0.5
    assert found[1] != found[1]
    assert not launch.leads()


def test_the_first_process_alone_has_somebody_sample_and_all_have_the_samples(monkeypatch):
    samples = [Sample([5, 128000, 2], [-0.1, -2.5, 0.0], True), Sample([7], [-1e-7], False)]
    first, others = Others(monkeypatch, 0, 2), []
    assert shares.samples_of_first(lambda: samples, 2, 4) == samples
    other = Others(monkeypatch, 1, 2)
    other.theirs = first.given[0]
    assert shares.samples_of_first(lambda: others.append("asked"), 2, 4) == samples
    assert not others and not other.given[0].any()


# --- two processes ---------------------------------------------------------------------------------------------------

# What several processes could get wrong: a mean that is not over all tokens, a price that differs, an uneven share.
VARIANTS = {
    "gae": {
        "rollout_batch": 6,
        "minibatch": 3,
        "microbatch": 1,
        "kl_target": 0.5,
        "target_kl": 1.0,
        "whiten_rewards": True,
        "critic": "trunk",
        "ptx_coef": 0.5,
        "ptx_length": 8,
        "ptx_batch": 3,
        "ptx_heldout": 5,
    },
    "grpo": {
        "rollout_batch": 3,
        "samples_per_prompt": 2,
        "minibatch": 6,
        "microbatch": 2,
        "advantage_estimator": "grpo",
        "rewards": [
            {"name": "good", "model": True},
            {"name": "short", "function": "brief", "weight": 2.0},
            {"name": "long", "length": 4, "weight": 0.1},
        ],
    },
    "adapter": {"critic": "adapter", "rollout_batch": 4, "minibatch": 4, "microbatch": 2, "entropy_coef": 0.01},
}


def prepared(folder, model, **settings):
    from rlaif.recipe import load_recipe
    from rlaif.stages.run import Run

    if "ptx_coef" in settings:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text("Some plain text that is no conversation, to be learned beside. " * 3)
        settings |= {"ptx_file": "text.txt"}
    # At 1e-2 one process with another microbatch differs as much: steps that large amplify rounding.
    settings = {"learning_rate": 1e-3, "updates": 3, **settings}
    path = tiny_runs.write_recipe(folder / "tiny.yaml", model, output=str(folder / "run"), ppo=settings)
    run = Run(load_recipe(path), folder / "run", None, None)
    tiny_runs.with_sft(run)
    tiny_runs.with_reward(run)
    return path


def run_in(count, folder, model, *, prepare=lambda rank: None, **settings):
    path = prepared(folder, model, **settings)
    return launched.commands(["ppo", path], count=count, prepare=prepare, name=folder.name)


def equal(model):
    return {
        f"{name}-{count}": run_in(count, Path(f"{name}-{count}"), model, **VARIANTS[name], updates=2)
        for name in VARIANTS
        for count in (2, 1)
    }


def stop_in(rank, number, act):
    def prepare(own):
        import rlaif.stages.ppo

        if own == rank:
            launched.at_call(rlaif.stages.ppo, "estimate", number, act)

    return prepare


def ended(model):
    """A whole run; one whose second process is killed, then the first, and that then goes on; other ends."""
    from rlaif.errors import DataError

    def refuse():
        raise DataError("made up")

    found = {"whole": run_in(2, Path("whole"), model)}
    path = prepared(Path("resumed"), model)
    for name, prepare in (
        ("second killed", stop_in(1, 2, launched.die)),
        ("first killed", stop_in(0, 2, launched.die)),
        ("continued", lambda rank: None),
    ):
        found[name] = launched.commands(["ppo", path], count=2, prepare=prepare, name="resumed")
    found["error"] = run_in(2, Path("error"), model, prepare=stop_in(0, 2, refuse))
    return found


SCENARIOS = {"equal": equal, "ended": ended}


def scenario(name, *words):
    done = subprocess.run([sys.executable, __file__, name, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def codes(found):
    return {name: [code for code, _ in outcome] for name, outcome in found.items()}


def files_of(name):
    return Path(name) / "run" / "5-ppo"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_two_processes_with_half_of_the_rows_each_are_one_with_all_of_them(tiny_model):
    found = scenario("equal", tiny_model)
    assert codes(found) == {f"{name}-{n}": [0] * n for name in VARIANTS for n in (2, 1)}, found
    for name in VARIANTS:
        assert found[f"{name}-2"][1][1] == ""  # the second process says nothing
        two, one = files_of(f"{name}-2"), files_of(f"{name}-1")
        counts = [json.loads((folder / "manifest.json").read_text())["counts"] for folder in (two, one)]
        assert counts[0].pop("processes") == 2
        assert counts[0].pop("critic") == counts[1].pop("critic")
        assert counts[0] == pytest.approx(counts[1], rel=1e-4, abs=1e-4)
        ours, theirs = (tiny_runs.rows(folder / "metrics.jsonl") for folder in (two, one))
        assert len(ours) == len(theirs) == 2
        for own, other in zip(ours, theirs, strict=True):
            assert own == pytest.approx(other, rel=1e-4, abs=2e-5), name
        samples = [tiny_runs.rows(folder / "samples.jsonl") for folder in (two, one)]
        assert [row["response"] for row in samples[0]] == [row["response"] for row in samples[1]]
        assert {path.relative_to(two) for path in two.rglob("*")} == {path.relative_to(one) for path in one.rglob("*")}
        weights = [load_file(folder / "policy" / "adapter_model.safetensors") for folder in (two, one)]
        assert weights[0].keys() == weights[1].keys()
        start = load_file(two.parent / "2-sft" / "adapter" / "adapter_model.safetensors")
        apart = max((weights[0][key] - weights[1][key]).abs().max().item() for key in start)
        moved = max((weights[1][key] - start[key]).abs().max().item() for key in start)
        assert apart < 2e-5 < 1e-3 < moved, name
    assert tiny_runs.rows(files_of("gae-1") / "metrics.jsonl")[0]["ptx/loss"] > 0
    assert (files_of("adapter-2") / "critic" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_however_one_process_ends_all_end_and_the_run_goes_on_to_the_bit(tiny_model):
    found = scenario("ended", tiny_model)
    assert codes(found) == {
        "whole": [0, 0],
        "second killed": [2, -signal.SIGKILL],
        "first killed": [-signal.SIGKILL, 2],
        "continued": [0, 0],
        "error": [2, 2],
    }, found
    assert "another process of this training has ended" in found["second killed"][0][1]
    assert "continuing after step 2" in found["continued"][0][1]
    assert [text.count("made up") for _, text in found["error"]] == [1, 0]
    assert "Traceback" not in json.dumps(found)
    own, other = (tiny_runs.results(files_of(name)) for name in ("resumed", "whole"))
    assert own.keys() == other.keys()
    assert [name for name in other if own[name] != other[name]] in ([], ["manifest.json"])


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_recipe_runs_under_the_launcher_that_users_have(tiny_model):
    path = tiny_runs.write_recipe(Path("tiny.yaml"), tiny_model, stages=["revise", "sft", "label", "reward", "ppo"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words += ["--main_process_port", str(port), "-m", "rlaif", "run", path]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training in 2 processes") == 3
    for stage in ("2-sft", "4-reward", "5-ppo"):
        assert json.loads((Path("runs/tiny") / stage / "manifest.json").read_text())["counts"]["processes"] == 2


def test_fewer_responses_than_processes_are_refused(monkeypatch):
    from types import SimpleNamespace

    Others(monkeypatch, 0, 5)
    settings = SimpleNamespace(minibatch=4)
    with pytest.raises(ConfigError, match="ppo.minibatch: 4 responses cannot be shared out over 5 processes"):
        shares._refuse_few_rows(SimpleNamespace(recipe=SimpleNamespace(ppo=settings)))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    import rlaif.cli
    import rlaif.pipeline
    import rlaif.stages.ppo  # noqa: F401

    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))
