"""The whole pipeline on the real embedded model with a 4-bit base, as small as it can be; slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SMALL = [
    "revise.prompts_per_tag={harmful: 2, ordinary: 2}",
    "revise.must_refuse_tags=[]",
    "revise.filters=[empty]",
    "revise.sampling.max_new_tokens=24",
    "sft.max_steps=2",
    "sft.per_device_train_batch_size=2",
    "reward.max_steps=2",
    "reward.gradient_accumulation_steps=1",
    "reward.allow_weak_reward=true",
    "label.method=contrast",
    "label.prompts_per_tag={harmful: 2, ordinary: 2}",
    "label.sampling.max_new_tokens=8",
    "ppo.prompts_per_tag={harmful: 2, ordinary: 2}",
    "ppo.updates=1",
    "ppo.rollout_batch=2",
    "ppo.minibatch=2",
    "ppo.microbatch=2",
    "ppo.num_ppo_epochs=1",
    "ppo.sampling.max_new_tokens=8",
    "evaluate.prompts_per_tag={harmful: 1, ordinary: 1}",
    "evaluate.judge_prompts_per_tag=1",
    "evaluate.sampling.max_new_tokens=8",
]
TESTS, PAIRS = 2, 8  # of its constitution, and of its example labels


def with_few_tests_and_pairs(folder):
    """Write the quickstart's constitution and labels with the first tests and pairs only; return what names them."""
    constitution = YAML(typ="safe").load(ROOT / "constitutions" / "harmless.yaml")
    constitution["tests"] = constitution["tests"][:TESTS]
    (folder / "harmless.yaml").write_text(json.dumps(constitution))  # JSON is YAML
    pairs = (ROOT / "recipes" / "human-example.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(pairs[:PAIRS]))
    return [f"constitution={folder / 'harmless.yaml'}", f"human.files=[{folder / 'pairs.jsonl'}]"]


@pytest.mark.slow
def test_the_quickstart_made_small_runs_on_the_embedded_model_in_4_bits(tmp_path):
    command = [sys.executable, "-c", "from rlaif.cli import main; main()", "run", "quickstart"]
    for setting in [*SMALL, *with_few_tests_and_pairs(tmp_path), f"output={tmp_path / 'run'}"]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    run = tmp_path / "run"
    chains = [json.loads(line) for line in (run / "1-revise" / "chains.jsonl").read_text().splitlines()]
    assert len(chains) == 4
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
