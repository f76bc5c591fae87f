"""What verl and OpenRLHF are given: prompts, a scorer, settings; read back, executed, asked."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_rewards
import tiny_runs
from typer.testing import CliRunner

import rlaif.export
from rlaif import verl_reward
from rlaif.cli import app
from rlaif.errors import ConfigError, StageError
from rlaif.export_settings import settings_for
from rlaif.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")


def recipe(*, model=None, reward=None, **ppo):
    return Recipe.model_validate(
        {
            "name": "mine",
            "model": {"model_name_or_path": "m", **(model or {})},
            "reward": reward or {},
            "ppo": ppo,
        }
    )


def both(**ppo):
    return (settings_for(engine, recipe(**ppo), 90) for engine in ("verl", "openrlhf"))


# --- settings --------------------------------------------------------------------------------------------------------


def test_verl_counts_minibatches_in_prompts_and_we_in_responses():
    found = settings_for("verl", recipe(rollout_batch=8, samples_per_prompt=4, minibatch=16, microbatch=2), 90).settings
    assert found["data.train_batch_size"] == "8"
    assert found["actor_rollout_ref.rollout.n"] == "4"
    assert found["actor_rollout_ref.actor.ppo_mini_batch_size"] == "4"
    assert found["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"] == "2"
    with pytest.raises(ConfigError, match="minibatch.*no whole number of prompts"):
        settings_for("verl", recipe(rollout_batch=4, samples_per_prompt=4, minibatch=2, microbatch=2), 90)


@pytest.mark.parametrize(
    ("ours", "verl", "openrlhf"),
    [
        ("gae", ("gae", "token-mean", "True"), ("gae", "token-mean")),
        ("rloo", ("rloo", "seq-mean-token-sum-norm", "True"), ("rloo", "token-mean")),
        ("grpo", ("grpo", "seq-mean-token-mean", "False"), ("group_norm", "seq-mean-token-mean")),
        ("dr_grpo", ("grpo", "seq-mean-token-sum-norm", "False"), ("dr_grpo", "token-mean")),
    ],
)
def test_an_estimator_is_written_with_its_mean_and_its_place_of_the_kl(ours, verl, openrlhf):
    samples = {} if ours == "gae" else {"samples_per_prompt": 2}
    first, second = (one.settings for one in both(advantage_estimator=ours, kl_coef=0.03, **samples))
    assert (
        first["algorithm.adv_estimator"],
        first["actor_rollout_ref.actor.loss_agg_mode"],
        first["algorithm.use_kl_in_reward"],
    ) == verl
    assert first["algorithm.norm_adv_by_std_in_grpo"] == str(ours == "grpo")
    assert ("critic.optim.lr" in first, "critic.max_norm" in second) == (ours == "gae", ours == "gae")
    assert (second["algo.advantage.estimator"], second["actor.loss_agg_mode"]) == openrlhf
    in_loss = verl[2] == "False"
    assert ("algo.kl.use_loss" in second, second["algo.kl.estimator"]) == (in_loss, "k3" if in_loss else "k1")
    assert first["algorithm.kl_ctrl.kl_coef"] == second["algo.kl.init_coef"] == "0.03"


def test_the_batch_mean_as_baseline_is_refused_by_verl_and_has_a_name_at_openrlhf():
    with pytest.raises(ConfigError, match="has nothing like `reinforce`"):
        settings_for("verl", recipe(advantage_estimator="reinforce"), 90)
    found = settings_for("openrlhf", recipe(advantage_estimator="reinforce"), 90).settings
    assert found["algo.advantage.estimator"] == "flash_reinforce"


def test_lengths_ranges_and_adapters_are_carried_over():
    first, second = both(cliprange=0.1, cliprange_value=0.3, score_clip=5.0, sampling={"max_new_tokens": 20})
    assert first.settings["data.max_prompt_length"] == "90"
    assert first.settings["data.max_response_length"] == second.settings["rollout.max_new_tokens"] == "20"
    assert second.settings["data.max_len"] == "110"
    actor = "actor_rollout_ref.actor.clip_ratio"
    assert {first.settings[key] for key in (actor, f"{actor}_low", f"{actor}_high")} == {"0.1"}
    assert first.settings["critic.cliprange_value"] == second.settings["critic.value_clip"] == "0.3"
    assert second.settings["reward.clip_range"] == "-5.0 5.0"
    assert "ppo.score_clip: 5.0" in first.left
    assert "ppo.score_clip: 5.0" not in second.left
    given = recipe(model={"lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]})
    assert settings_for("verl", given, 90).settings["actor_rollout_ref.model.target_modules"] == "[q_proj,v_proj]"
    assert not [key for key in second.settings if "lora" in key or key == "actor.adam.lr"]
    assert any(key.startswith("ppo.learning_rate: 0.0001") for key in second.left)
    first, second = both(warmup_updates=5, updates=20)
    assert first.settings["critic.optim.lr_warmup_steps"] == "5"
    assert second.settings["actor.lr_warmup_ratio"] == "0.25"
    assert "ppo.warmup_updates: 5" not in {**first.left, **second.left}


def test_whatever_was_changed_and_has_no_counterpart_is_listed():
    changed = {"kl_target": 6.0, "target_kl": 0.1, "missing_eos_penalty": 1.0, "whiten_rewards": True}
    for found in both(**changed, vf_coef=0.2, sample_every_updates=5):
        assert {f"ppo.{key}: {value}" for key, value in changed.items()} < found.left.keys()
        assert {"ppo.vf_coef: 0.2", "ppo.critic: auto", "ppo.sample_every_updates: 5"} < found.left.keys()
    found = settings_for("verl", recipe(lr_scheduler_type="linear"), 90)
    assert "`constant` is written" in found.left["ppo.lr_scheduler_type: linear"]


def test_what_comes_before_and_after_the_exported_ppo_is_listed():
    settings = {"name": "mine", "model": "m", "stages": ["revise", "sft", "label", "reward", "rejection", "ppo"]}
    assert "stages: rejection before ppo" in settings_for("verl", Recipe.model_validate(settings), 90).left
    both_rounds = settings | {"stages": [*settings["stages"][:4], "ppo", "rejection", "evaluate"], "rounds": 2}
    left = settings_for("verl", Recipe.model_validate(both_rounds), 90).left
    assert "stages: rejection before ppo" not in left and "rounds.count: 2" in left


def test_texts_in_the_template_of_another_reward_model_are_refused():
    other = recipe(reward={"model": "theirs", "start_from": "base"})
    with pytest.raises(ConfigError, match=r"reward.model: OpenRLHF sends texts.*verl"):
        settings_for("openrlhf", other, 90)
    assert settings_for("verl", other, 90).settings


def test_a_module_name_that_a_shell_or_hydra_would_read_is_refused():
    with pytest.raises(ConfigError, match="lora_target_modules"):
        settings_for("verl", recipe(model={"lora_target_modules": ["q_proj", "a,b"]}), 90)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    folder = tiny_rewards.finished(tmp_path_factory.mktemp("exported") / "run", tiny_model)
    with tiny_runs.opened(folder, tiny_model) as run:
        tiny_runs.with_sft(run)
    return folder


def export(engine, folder, output):
    done = CliRunner().invoke(app, ["export", engine, str(folder), str(output)], catch_exceptions=False)
    assert done.stdout.strip() == str(output / "run.sh")
    return output


@pytest.mark.slow
def test_prompts_stand_in_the_order_in_which_ppo_samples_them(run, tiny_model, tmp_path):
    from datasets import load_dataset

    from rlaif.stages.ppo_prompts import prompts_of_update

    with tiny_runs.opened(tmp_path / "other", tiny_model) as opened:
        chosen = opened.select("train", opened.recipe.ppo.prompts_per_tag)
        expected = [row for update in range(3) for row in prompts_of_update(opened, chosen, update)]
    verl, openrlhf = (export(engine, run, tmp_path / engine) for engine in ("verl", "openrlhf"))
    read = load_dataset("parquet", data_files=str(verl / "train.parquet"), cache_dir=str(tmp_path / "cache"))["train"]
    assert read["prompt"][:] == [row.messages for row in expected]
    assert [row["id"] for row in read["extra_info"]] == [row.id for row in expected]
    assert [json.loads(row["messages"]) for row in read["extra_info"]] == [row.messages for row in expected]
    assert set(read.column_names) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    rows = tiny_runs.rows(openrlhf / "train.jsonl")
    assert [(row["id"], row["messages"]) for row in rows] == [(row.id, row.messages) for row in expected]
    for folder in (verl, openrlhf):
        subprocess.run(["bash", "-n", folder / "run.sh"], check=True)
        readme = (folder / "README.md").read_text()
        assert f"rlaif reward serve --model {run.resolve()}" in readme
        assert "| `ppo.vf_coef: 0.1` |" in readme
    kept = load_dataset("parquet", data_files=str(verl / "heldout.parquet"), cache_dir=str(tmp_path / "cache"))["train"]
    assert not {row["id"] for row in kept["extra_info"]} & {row.id for row in expected}


def spoken(script, tmp_path):
    """What the script would call its engine with: the program is replaced by one that writes its words down."""
    (tmp_path / "bin").mkdir()
    words = tmp_path / "words"
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/bash\n[ "$1" = - ] || printf "%s\\0" "$@" > {words}\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "GPUS": "4"}
    subprocess.run([script, "trainer.nnodes=2"], check=True, env=environment)
    return words.read_text().split("\0")[:-1]


def test_the_script_takes_the_commit_that_the_adapters_stand_on(tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif.export.resolve", lambda name: name)  # a model of the Hub
    pinned = {"model_name_or_path": "org/a model", "model_revision": "abc123"}
    (tmp_path / "huggingface_hub.py").write_text(
        "def snapshot_download(name, revision): return f'{name} at {revision}'"
    )
    stages = ["label", "reward", "ppo"]
    with tiny_runs.opened(tmp_path / "runs", "none", stages=stages, model=pinned, label={"method": "judge"}) as run:
        rlaif.export._write_script(run, tmp_path, "verl", ['printf "%s" "$model"; true'])
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", tmp_path / "run.sh"], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "org/a model at abc123"


@pytest.mark.slow
def test_the_script_calls_the_engine_wherever_it_is_put(run, tmp_path):
    place = tmp_path / "a place, with 1 space"
    words = spoken(export("verl", run, place) / "run.sh", tmp_path)
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    assert {
        f"data.train_files='{place}/train.parquet'",
        f"reward.custom_reward_function.path='{place}/reward.py'",
        f"actor_rollout_ref.model.path='{place}/merged'",
        "trainer.n_gpus_per_node=4",
        "actor_rollout_ref.actor.optim.override_optimizer_config={eps:1e-05}",
    } < set(words)
    assert words[-1] == "trainer.nnodes=2"
    assert all(word.count("=") >= 1 for word in words[2:])


@pytest.mark.slow
def test_the_exported_scorer_gives_the_scores_of_the_server(run, tmp_path, monkeypatch):
    from rlaif.reward_server import Server
    from rlaif.reward_service import Service, encode_group
    from rlaif.scoring import Scorer

    place = export("verl", run, tmp_path / "verl")
    spec = importlib.util.spec_from_file_location("exported", place / "reward.py")
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    scorer = Scorer.load(run)
    server = Server(("127.0.0.1", 0), Service(scorer, name="mine", key="sesame"), lambda line: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    monkeypatch.setenv("RLAIF_REWARD_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        prompt = [{"role": "user", "content": "Hello?"}]
        asked = ("rlaif/mine", "Good day.", "", {"messages": json.dumps(prompt), "num_turns": 2})
        with pytest.raises(RuntimeError, match="401"):
            exported.compute_score(*asked)
        monkeypatch.setenv("RLAIF_REWARD_KEY", "sesame")
        found = exported.compute_score(*asked)
        answer = {"role": "assistant", "content": "Good day."}
        expected = scorer.score([encode_group(scorer.model, prompt, [[answer]])])[0][0].score
        assert found == pytest.approx(expected, abs=1e-5)
    finally:
        server.shutdown()
        thread.join()
    monkeypatch.setattr(exported.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="refused"):
        exported.compute_score(*asked)


def test_a_server_with_too_much_to_do_is_asked_again(monkeypatch):
    import io
    import urllib.error

    tries = []

    def urlopen(request, timeout):
        tries.append(json.loads(request.data))
        if len(tries) < 3:
            raise urllib.error.HTTPError(request.full_url, 503, "", {}, io.BytesIO(b"busy"))
        return io.BytesIO(b'{"data": [{"probs": [0.25]}]}')

    waits = []
    monkeypatch.setattr(verl_reward.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(verl_reward.time, "sleep", waits.append)
    asked = {"messages": '[{"role": "user", "content": "Hm?"}]'}
    assert verl_reward.compute_score("", "Yes.", "", asked) == 0.25
    assert waits == [1, 2]
    assert tries[0]["input"] == [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.slow
def test_the_merged_model_says_what_base_and_adapter_say(run, tiny_model, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from rlaif.model import sampling
    from rlaif.model.roles import SharedBase
    from rlaif.recipe import ModelSection

    script = (export("openrlhf", run, tmp_path / "there") / "run.sh").read_text()
    program = script.split("<<'END'\n")[1].split("\nEND\n")[0]
    adapter, merged = run / "2-sft" / "adapter", tmp_path / "merged"
    monkeypatch.setattr(sys, "argv", ["-", str(tiny_model), str(adapter), str(merged)])
    exec(program, {})
    base = SharedBase.load(ModelSection(model_name_or_path=str(tiny_model), lora_r=4))
    base.add_role("policy", adapter=adapter)
    batch = sampling.pack(base, [[1, 70, 71]], [[80, 81]])
    with base.acting_as("policy"), torch.no_grad():
        expected = sampling.response_logits(base, batch, sampling.hidden_states(base, batch), 1.0)
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[1, 70, 71, 80]])).logits[:, 2:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        assert (plain(input_ids=torch.tensor([[1, 70, 71, 80]])).logits[:, 2:] - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_with_the_reason(run, tiny_model, tmp_path):
    from rlaif.export import export as write

    with pytest.raises(ConfigError, match="`trlx`: no engine to export to"):
        write("trlx", run)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        write("verl", run, tmp_path / "there")
    own = tmp_path / "own"
    tiny_runs.write_recipe(own / "recipe.yaml", tiny_model, ppo={"reward_function": "brief"})
    with pytest.raises(ConfigError, match=r"ppo.reward_function: only the model of the stage `reward`"):
        write("verl", own)
    tiny_runs.write_recipe(own / "recipe.yaml", tiny_model)
    with pytest.raises(StageError, match="4-reward"):
        write("verl", own)
    assert not Path(own / "export-verl").exists()
