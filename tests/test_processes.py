"""Training in several processes: two that share a batch are one that has it whole, and they end together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_rows import comparison

from rlaif import launch
from rlaif.errors import ConfigError, StageError
from rlaif.stages import processes, reward_training

# --- without other processes -----------------------------------------------------------------------------------------

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.fixture
def second_of_three(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)


def test_a_process_knows_its_number_from_the_launcher_and_is_alone_without_one(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert (launch.process_count(), launch.process_rank(), launch.local_rank()) == (1, 0, 0)
    monkeypatch.setenv("WORLD_SIZE", "3")  # as some clusters set it for every job
    assert (launch.process_count(), launch.process_rank()) == (1, 0)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert (launch.process_count(), launch.process_rank(), launch.local_rank()) == (3, 1, 1)


def test_a_batch_is_shared_out_and_a_short_one_leaves_some_without_rows(second_of_three):
    assert processes.share([0, 1, 2, 3, 4, 5, 6]) == [1, 4]
    assert processes.share([0]) == []


def test_alone_a_process_has_all_rows_and_all_totals_and_orders_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert processes.share([0, 1, 2]) == [0, 1, 2]
    assert processes.totals(1.5, 2.0) == [1.5, 2.0]
    assert processes.options() == {}
    assert processes.order("reward_training", rows=[1]) is None
    with pytest.raises(RuntimeError, match="gloo"), processes.together():
        raise RuntimeError("gloo: not of another process, there is none")


def test_a_follower_keeps_its_base_for_the_roles_of_a_round_and_loads_another_for_the_next(monkeypatch):
    roles = []

    class Base:
        def __init__(self):
            self.roles = []
            roles.append(self.roles)

        def add_role(self, role, **options):
            assert role not in self.roles, f"role `{role}` exists already"
            self.roles.append(role)

        def freeze(self, role):
            pass

    monkeypatch.setattr(reward_training.SharedBase, "load", lambda *args, **options: Base())
    monkeypatch.setattr(reward_training, "_train", lambda *args: None)
    for number, role in [(1, "reward"), (1, "cost"), (2, "reward"), (2, "cost")]:
        job = {"role": role, "folder": "somewhere", "train": [], "watched": [], "seed": 0}
        told = {"model": {"model_name_or_path": "tiny"}, "settings": {"model": None}, "added": {"adapter": None}}
        reward_training.follow({**told, "job": job, "options": {}, "checkpoint": None, "steps": 1, "round": number})
    assert roles == [["reward", "cost"], ["reward", "cost"]]


def test_a_lost_process_is_told_in_a_sentence_and_other_trouble_is_not_touched(second_of_three):
    with pytest.raises(StageError, match="another process of this training has ended"), processes.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shape"), processes.together():
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepS")])
def test_what_accelerate_can_be_configured_to_do_and_this_package_cannot_is_refused(monkeypatch, variable, name):
    processes.refuse_unsupported()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"{name}.*not supported.*--multi_gpu"):
        processes.refuse_unsupported()


def test_only_what_is_trained_is_exchanged_between_processes():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    module[0].requires_grad_(False)
    processes.exchange_trainable(module)
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    assert ignored == {"0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


# --- two processes ---------------------------------------------------------------------------------------------------

COMMON = {"num_train_epochs": 2.0, "max_steps": -1, "save_steps": 1}


def rows_of(stage):
    """Rows whose number to train on leaves 1 for the last batch of 4, so that one of two processes has none."""
    if stage == "reward":
        signs = {"safer": 1.0, "chosen_safe": True, "rejected_safe": False}  # read where a cost is trained
        return [comparison(n, "good " * (1 + n % 3), "bad " * (1 + n % 2), **signs) for n in range(REWARD_ROWS)]
    from test_sft import demonstration

    return [demonstration(n, answer="yes, of course." * (1 + n % 3)) for n in range(SFT_ROWS)]


REWARD_ROWS, SFT_ROWS = 12, 11


def run_in(count, folder, model, stage, batch, *, prepare=lambda rank: None, **settings):
    settings = {**COMMON, "per_device_train_batch_size": batch, **settings}
    recipe, written = launched.prepared(folder, model, stage, rows_of(stage), **settings)
    return launched.commands([stage, recipe], count=count, prepare=prepare, name=folder.name), written


def stop_in_training(rank, number, act):
    """Let something happen in one process before its third step."""

    def prepare(own):
        from rlaif.stages.reward_training import RewardTrainer

        if own == rank:
            launched.at_call(RewardTrainer, "training_step", number, act)

    return prepare


KINDS = {
    "four bits": {"four_bit": True},
    "cost": {"cost": True, "num_adapters": 2},
    "stopped early": {
        "eval_steps": 1,
        "early_stopping_patience": 1,
        "num_train_epochs": 6.0,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
    },
}


def equal(model, stage):
    return in_two_and_in_one(model, stage, stage, {"eval_steps": 2} if stage == "reward" else {})


def in_two_and_in_one(model, stage, name, settings):
    outcomes = {}
    for count, batch in ((2, 2), (1, 4)):
        outcomes[count], _ = run_in(count, Path(f"{name}-{count}"), model, stage, batch, **settings)
    return outcomes


def kinds(model):
    return {name: in_two_and_in_one(model, "reward", name, settings) for name, settings in KINDS.items()}


def resumed(model):
    """A whole run; one whose second process is killed, then the first, and that then goes on to its end."""
    found = {"whole": run_in(2, Path("whole"), model, "reward", 2)[0]}
    for name, prepare in (
        ("second killed", stop_in_training(1, 4, launched.die)),
        ("first killed", stop_in_training(0, 2, launched.die)),
        ("continued", lambda rank: None),
    ):
        found[name], _ = run_in(2, Path("resumed"), model, "reward", 2, prepare=prepare)
    return found


def ended(model):
    from rlaif.errors import DataError

    def refuse():
        raise DataError("rows.jsonl:3: made up")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt_both(rank):
        stop_in_training(rank, 2, interrupt)(rank)

    return {
        "no rows": run_in(2, Path("none"), model, "reward", 2, max_length=3)[0],
        "in training": run_in(2, Path("error"), model, "reward", 2, prepare=stop_in_training(0, 2, refuse))[0],
        "in the second": run_in(2, Path("other"), model, "reward", 2, prepare=stop_in_training(1, 2, refuse))[0],
        "interrupted": run_in(2, Path("interrupted"), model, "reward", 2, prepare=interrupt_both)[0],
        "usage": launched.commands(["reward", "no-such-recipe"], name="usage"),
    }


SCENARIOS = {"equal": equal, "kinds": kinds, "resumed": resumed, "ended": ended}


def scenario(name, *words):
    command = [sys.executable, __file__, name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(folder, other):
    """How far the adapters of two folders are apart, at most."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def steps(folder, key):
    return [row["step"] for row in tiny_runs.rows(folder / "metrics.jsonl") if key in row]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), [("reward", 4), ("sft", 2)])
def test_two_processes_with_half_the_batch_each_are_one_with_the_whole_batch(tiny_model, stage, number):
    outcomes = scenario("equal", tiny_model, stage)
    assert [[code for code, _ in outcome] for outcome in outcomes.values()] == [[0, 0], [0]], outcomes
    assert outcomes["2"][1][1] == ""  # the second process says nothing
    two, one = (Path(f"{stage}-{count}/run/{number}-{stage}") for count in (2, 1))
    counts = [json.loads((folder / "manifest.json").read_text())["counts"] for folder in (two, one)]
    assert counts[0]["train"] % 4 == 1  # the last batch has one row, so one process has none
    assert (counts[0].pop("processes"), counts[0]["steps"]) == (2, counts[1]["steps"])
    ours, theirs = (tiny_runs.rows(folder / "metrics.jsonl") for folder in (two, one))
    assert len(ours) == len(theirs) > counts[0]["steps"]
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        compared = own.keys() - ({"sft/heldout_loss"} if stage == "sft" else set())  # a mean over batches of 2, or of 4
        assert {key: own[key] for key in compared} == pytest.approx({key: other[key] for key in compared}, abs=1e-5)
    assert steps(two, f"{stage}/loss") == list(range(1, counts[0]["steps"] + 1))
    assert apart(two, one) < 1e-5


@pytest.mark.slow
def test_two_processes_train_every_kind_of_reward_model_as_one_does(tiny_model_64):
    found = scenario("kinds", tiny_model_64)
    assert found.keys() == KINDS.keys()
    for name, outcomes in found.items():
        assert [[code for code, _ in outcome] for outcome in outcomes.values()] == [[0, 0], [0]], outcomes
        assert outcomes["2"][1][1] == ""
        two, one = (Path(f"{name}-{count}/run/4-reward") for count in (2, 1))
        counts = [json.loads((folder / "manifest.json").read_text())["counts"] for folder in (two, one)]
        assert counts[0].pop("processes") == 2
        assert counts[0] == pytest.approx(counts[1])
        for role in ("", "reward-2", "cost") if name == "cost" else ("",):
            assert apart(two / role, one / role) < 1e-5
    stopped = json.loads(Path("stopped early-2/run/4-reward/manifest.json").read_text())["counts"]
    assert stopped["dev"] > 0 and stopped["steps"] < 6 * -(-stopped["train"] // 4)  # of all the steps of its epochs


@pytest.mark.slow
def test_a_run_whose_processes_were_killed_goes_on_to_what_the_whole_run_wrote_to_the_bit(tiny_model):
    found = scenario("resumed", tiny_model)
    codes = {name: [code for code, _ in outcome] for name, outcome in found.items()}
    assert codes == {
        "whole": [0, 0],
        "second killed": [2, -signal.SIGKILL],
        "first killed": [-signal.SIGKILL, 2],
        "continued": [0, 0],
    }, found
    assert "another process of this training has ended" in found["second killed"][0][1]
    assert "was killed. Run the command again." in found["first killed"][1][1]
    assert "Traceback" not in json.dumps(found)
    assert "continuing after step" in found["continued"][0][1]
    whole, resumed = (Path(name) / "run/4-reward" for name in ("whole", "resumed"))
    assert tiny_runs.lasting(whole.parent).keys() == tiny_runs.lasting(resumed.parent).keys()
    own, other = tiny_runs.results(resumed), tiny_runs.results(whole)
    assert {name: own[name] == other[name] for name in other if name != "manifest.json"} == dict.fromkeys(
        other.keys() - {"manifest.json"}, True
    )
    assert steps(resumed, "reward/loss") == list(range(1, len(steps(whole, "reward/loss")) + 1))


@pytest.mark.slow
def test_however_one_process_ends_all_end_with_its_code_and_one_message(tiny_model):
    found = scenario("ended", tiny_model)
    codes = {name: [code for code, _ in outcome] for name, outcome in found.items()}
    assert codes == {
        "no rows": [2, 2],
        "in training": [2, 2],
        "in the second": [2, 2],
        "interrupted": [130, 130],
        "usage": [2, 2],
    }, found
    said = {name: [text.count("rlaif: ") for _, text in outcome] for name, outcome in found.items()}
    assert said == {
        "no rows": [1, 0],
        "in training": [1, 0],
        "in the second": [1, 1],  # the second one says why, the first one that it lost it
        "interrupted": [0, 0],
        "usage": [1, 0],
    }, found
    assert "rows.jsonl:3: made up" in found["in training"][0][1]
    assert "rlaif: process 1: rows.jsonl:3: made up" in found["in the second"][1][1]
    assert "interrupted; nothing finished is lost" in found["interrupted"][0][1]
    assert "Traceback" not in json.dumps(found)


if __name__ == "__main__":
    import rlaif.cli
    import rlaif.pipeline
    import rlaif.stages.reward

    if sys.argv[-1] == "sft":
        import rlaif.stages.sft  # noqa: F401

    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))
