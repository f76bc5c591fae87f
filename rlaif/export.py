"""A run's PPO for engines that scale further: prompts, reward scorer and settings in the form verl or OpenRLHF takes.

What is exported is what the stage `ppo` would do: its prompts in its order, the reward model of the stage `reward`
asked over HTTP (`rlaif reward serve`), and its settings in the engine's words (`rlaif.export_settings`). What has no
counterpart there is listed, and a setting without which it would be another algorithm is refused.
"""

import json
import shlex
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars

from rlaif import files
from rlaif.errors import ConfigError
from rlaif.export_settings import VERSIONS, Exported, settings_for
from rlaif.model.base import load_tokenizer, resolve
from rlaif.pipeline import journal_copy, open_run
from rlaif.progress import Progress
from rlaif.records import Prompt
from rlaif.stages.ppo_prompts import prompts_of_update
from rlaif.stages.run import Run

ADDRESS = "http://127.0.0.1:5000"

_HEAD = """\
#!/usr/bin/env bash
# {title}
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
gpus="${{GPUS:-1}}"
export RLAIF_REWARD_URL="${{RLAIF_REWARD_URL:-{address}}}"
"""
_MODEL = "model={base}\n"
_PINNED = """\
# The commit that the adapters stand on.
model="$(python3 -c 'import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))' {base} {revision})"
"""
# The adapter is merged in float32: rounded to bfloat16, the sum would lose part of what was learned.
_MERGE = """
# The policy starts from the SFT adapter and is held to it, so the adapter becomes part of the model.
merged="$here/merged"
if [ ! -f "$merged/config.json" ]; then
    python3 - "$model" {adapter} "$merged" <<'END'
import os
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged + ".new")
AutoTokenizer.from_pretrained(adapter).save_pretrained(merged + ".new")
os.rename(merged + ".new", merged)
END
fi
model="$merged"
"""


def export(engine: str, folder: Path, output: Path | None = None) -> Path:
    """Write a folder with which an engine does what a run's stage `ppo` would do; return it.

    Args:
        engine: `verl` or `openrlhf`.
        folder: the run.
        output: a folder that is not there yet; None: ``export-ENGINE`` in the run folder.

    Raises:
        ConfigError: no such engine, the folder is there, or the recipe's PPO cannot be done there.
        StageError: the reward model or the SFT adapter is not there yet.
    """
    if engine not in VERSIONS:
        raise ConfigError(f"`{engine}`: no engine to export to. Expected one of: {', '.join(VERSIONS)}.")
    loaded = open_run(folder)
    output = output or folder / f"export-{engine}"
    if output.exists():
        raise ConfigError(f"{output}: is there already. Remove it, or name another folder.")
    ppo = loaded.recipe.ppo
    if ppo.rewards or ppo.reward_function:
        raise ConfigError(
            f"ppo.{'rewards' if ppo.rewards else 'reward_function'}: only the model of the stage `reward` can be asked "
            "over HTTP (`rlaif reward serve`). Leave this key out of the recipe, or train here."
        )
    with journal_copy(folder) as book:
        run = Run(loaded, folder, book, Progress(quiet=True))
        run.output("reward", "adapter")
        train = ordered_prompts(run)
        tokenizer = load_tokenizer(loaded.recipe.model.model_name_or_path, loaded.recipe.model.model_revision)
        longest = max(len(tokenizer.prompt(row.messages)) for row in train)
        found = settings_for(engine, loaded.recipe, longest)
        with files.fresh_folder(output) as fresh:
            if engine == "verl":
                _write_verl(run, fresh, train, found)
            else:
                _write_openrlhf(run, fresh, train, found)
            (fresh / "README.md").write_text(_readme(run, engine, found), encoding="utf-8")
    return output


def ordered_prompts(run: Run) -> list[Prompt]:
    """Return the prompts of all updates in the order in which `ppo` samples them, `rollout_batch` an update."""
    settings = run.recipe.ppo
    prompts = run.select("train", settings.prompts_per_tag)
    updates = (prompts_of_update(run, prompts, update) for update in range(settings.updates))
    return [prompt for rows in updates for prompt in rows[:: settings.samples_per_prompt]]


def _write_verl(run: Run, folder: Path, train: list[Prompt], found: Exported) -> None:
    disable_progress_bars()
    heldout = [row for row in run.prompts if row.split == "eval"] or train
    for name, rows in (("train", train), ("heldout", heldout)):
        Dataset.from_list([_verl_row(run, index, row) for index, row in enumerate(rows)]).to_parquet(
            folder / f"{name}.parquet"
        )
    scorer = package_files("rlaif").joinpath("verl_reward.py").read_text(encoding="utf-8")
    (folder / "reward.py").write_text(scorer, encoding="utf-8")
    places = {
        "data.train_files": "$here/train.parquet",
        "data.val_files": "$here/heldout.parquet",
        "reward.custom_reward_function.path": "$here/reward.py",
        "actor_rollout_ref.model.path": "$model",
        **({"critic.model.path": "$model"} if run.recipe.ppo.has_critic else {}),
        "trainer.default_local_dir": "$here/checkpoints",
    }
    lines = [f"\"{key}='{place}'\"" for key, place in places.items()]  # Hydra reads what is between its own quotes
    lines += ['trainer.n_gpus_per_node="$gpus"', "reward.custom_reward_function.name=compute_score"]
    lines += [shlex.quote(f"{key}={value}") for key, value in found.settings.items()]
    _write_script(run, folder, "verl", ["python3 -m verl.trainer.main_ppo", *lines])


def _verl_row(run: Run, index: int, prompt: Prompt) -> dict[str, Any]:
    return {
        "data_source": f"rlaif/{run.recipe.name}",
        "prompt": prompt.messages,
        "ability": prompt.tag,
        "reward_model": {"style": "model", "ground_truth": ""},
        "extra_info": {
            "index": index,
            "id": prompt.id,
            "messages": json.dumps(prompt.messages, ensure_ascii=False),
        },
    }


def _write_openrlhf(run: Run, folder: Path, train: list[Prompt], found: Exported) -> None:
    rows = [{"id": row.id, "datasource": row.tag, "messages": row.messages} for row in train]
    files.write_jsonl(folder / "train.jsonl", rows)
    lines = [
        '--actor.model_name_or_path "$model"',
        *(['--critic.model_name_or_path "$model"'] if run.recipe.ppo.has_critic else []),
        '--reward.remote_url "$RLAIF_REWARD_URL/get_reward"',
        '--data.prompt_dataset "$here/train.jsonl"',
        "--data.input_key messages --data.apply_chat_template",
        *(f'--{role}.num_nodes 1 --{role}.num_gpus_per_node "$gpus"' for role in ("actor", "critic", "ref")),
        '--vllm.num_engines "$gpus" --vllm.gpu_memory_utilization 0.5 --vllm.enable_sleep',
        "--train.colocate_all --ds.enable_sleep",
        '--ckpt.path "$here/checkpoints" --ckpt.output_dir "$here/policy"',
    ]
    lines += [f"--{key} {value}".strip() for key, value in found.settings.items()]
    _write_script(run, folder, "openrlhf", ["python3 -m openrlhf.cli.train_ppo_ray", *lines])


def _write_script(run: Run, folder: Path, engine: str, words: list[str]) -> None:
    title = f"PPO of the run {run.recipe.name} in {engine} {VERSIONS[engine]}; README.md says what was carried over."
    source, revision = resolve(run.recipe.model.model_name_or_path), run.recipe.model.model_revision
    pinned = revision is not None and not Path(source).is_dir()
    text = _HEAD.format(title=title, address=ADDRESS)
    text += (_PINNED if pinned else _MODEL).format(base=shlex.quote(source), revision=shlex.quote(revision or ""))
    if "sft" in run.recipe.stages:
        text += _MERGE.format(adapter=shlex.quote(str(run.output("sft", "adapter").resolve())))
    text += "\n" + " \\\n    ".join([*words, '"$@"']) + "\n"
    script = folder / "run.sh"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)


def _readme(run: Run, engine: str, found: Exported) -> str:
    recipe = run.recipe
    ensemble = recipe.ppo.reward_model.ensemble
    serve = ["rlaif", "reward", "serve", "--model", str(run.folder.resolve())]
    serve += [] if ensemble == "mean" else ["--ensemble", ensemble]
    order = "" if engine == "verl" else "; OpenRLHF shuffles them"
    left = "\n".join(f"| `{key}` | {reason} |" for key, reason in found.left.items())
    return f"""\
# PPO of the run {recipe.name} in {engine} {VERSIONS[engine]}

```bash
{shlex.join(serve)}
GPUS=8 ./run.sh
```

The reward model answers at {ADDRESS}; another address goes into `RLAIF_REWARD_URL`. What follows `./run.sh` is handed
on to the engine and overrides what stands there. The prompts stand in the order of the stage `ppo`,
{recipe.ppo.rollout_batch} for each of its {recipe.ppo.updates} updates{order}.

{_START[engine] if "sft" in recipe.stages else _NO_START}

## Not carried over

| ours | there |
|---|---|
{left}
"""


_NO_START = "There is no SFT adapter: the policy starts from the base and is held to it."
_START = {
    "verl": """\
`run.sh` first merges the SFT adapter into the base, into `merged/`: verl's reference is the model without its adapter,
and it shall be the SFT policy. A new adapter is trained on it. With `actor_rollout_ref.model.lora_adapter_path` the SFT
adapter itself would be trained on, and the KL would be that to the base.""",
    "openrlhf": """\
`run.sh` first merges the SFT adapter into the base, into `merged/`, and OpenRLHF trains all weights of that: its vLLM
does not take over the weights of an adapter (https://github.com/OpenRLHF/OpenRLHF/issues/1349).""",
}
