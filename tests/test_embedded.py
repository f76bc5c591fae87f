"""The whole pipeline on the real embedded model with a 4-bit base, as small as it can be; slow."""

import json
import os
import subprocess
import sys

import pytest

SMALL = [
    "revise.prompts_per_tag={harmful: 4, ordinary: 4}",
    "revise.must_refuse_tags=[]",
    "revise.filters=[empty]",
    "sft.max_steps=2",
    "sft.per_device_train_batch_size=4",
    "reward.max_steps=2",
    "reward.allow_weak_reward=true",
    "label.method=contrast",
    "label.prompts_per_tag={harmful: 4, ordinary: 4}",
    "label.sampling.max_new_tokens=24",
    "ppo.prompts_per_tag={harmful: 4, ordinary: 4}",
    "ppo.updates=1",
    "ppo.rollout_batch=4",
    "ppo.minibatch=4",
    "ppo.microbatch=4",
    "ppo.num_ppo_epochs=1",
    "evaluate.prompts_per_tag={harmful: 2, ordinary: 2}",
    "evaluate.judge_prompts_per_tag=1",
]


@pytest.mark.slow
def test_the_quickstart_made_small_runs_on_the_embedded_model_in_4_bits(tmp_path):
    command = [sys.executable, "-c", "from rlaif.cli import main; main()", "run", "quickstart"]
    for setting in [*SMALL, f"output={tmp_path / 'run'}"]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    run = tmp_path / "run"
    chains = [json.loads(line) for line in (run / "1-revise" / "chains.jsonl").read_text().splitlines()]
    assert len(chains) == 8
    assert all(len(chain["response"].split()) >= 3 for chain in chains)
    (update,) = [json.loads(line) for line in (run / "5-ppo" / "metrics.jsonl").read_text().splitlines()]
    assert update["policy/ratio"] == 1.0
    assert update["policy/kl_to_old"] == 0.0
    assert update["policy/clip_fraction"] == 0.0
    assert abs(update["rollout/kl_to_reference"]) < 1e-6
    assert update["rollout/logprob_gap"] < 1e-3
    results = json.loads((run / "6-evaluate" / "results.json").read_text())
    assert results["policies"] == ["base", "sft", "ppo"]
    assert "quickstart" in (run / "report.html").read_text()
