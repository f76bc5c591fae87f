"""PPO on a score that can be computed, `brief`, from variant to variant and seed to seed: runs, figures, tables.

By default the policy is a random model of two layers with characters as tokens, so that the whole takes minutes; what
it says is noise, but what its optimization does is not. `--model` takes another one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import yaml
from study import Table, mean, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlaif import files
from rlaif.errors import RlaifError
from rlaif.pipeline import run_recipe
from rlaif.progress import Progress
from rlaif.recipe import load_recipe
from rlaif.records import read_jsonl
from rlaif.stages.rewards import brief

LAST = 5  # updates at the end of a run whose figures are averaged
LENGTH = 24
PROMPTS = 96  # half of them for training
WORDLESS = brief([], [""])[0]
SPACE, NEWLINE = "Ġ", "Ċ"  # as tokenizers write them
COLUMNS = [
    "variant",
    "words",
    "less the first row's, by seed",
    "wordless",
    "KL to the reference, nats",
    "entropy, nats",
]
SCORED = {
    "stages": ["ppo", "evaluate"],
    "prompts": ["numbers.jsonl"],
    "ppo": {
        "reward_function": "brief",
        "updates": 16,
        "rollout_batch": 24,
        "minibatch": 24,
        "microbatch": 24,
        "num_ppo_epochs": 2,
        "learning_rate": 3.0e-3,
        "lam": 1.0,
        "kl_coef": 0.05,
        "save_every_updates": 16,
        "sampling": {"max_new_tokens": LENGTH, "temperature": 1.0},
    },
    "evaluate": {"judge_prompts_per_tag": 0, "sampling": {"max_new_tokens": LENGTH, "temperature": 1.0}},
}
# The same score, but known to PPO only through a reward model of four heads, trained on pairs that it has judged.
LEARNED = SCORED | {
    "stages": ["label", "reward", "ppo", "evaluate"],
    "constitution": "harmless",
    "label": {
        "judge_method": "function",
        "judge_function": "brief",
        "allow_weak_judge": True,
        "self_test_rows": 0,
        "gold_rate": 0.0,
        "attacks": 0,
        "samples_per_prompt": 4,
        "sampling": {"max_new_tokens": LENGTH, "temperature": 1.0},
    },
    "reward": {"num_heads": 4, "start_from": "base", "allow_weak_reward": True, "num_train_epochs": 4.0, "suspects": 0},
    "ppo": {key: value for key, value in SCORED["ppo"].items() if key != "reward_function"},
}


class Variant(NamedTuple):
    """A row of a table: its name, and what it sets in the recipe."""

    name: str
    sets: Sequence[str] = ()


CURVES = [
    "variant",
    "seed",
    "score by update, in deviations",
    "moved by an update, thousandths of a nat per token",
    "loss on plain text, first and last",
]
Part = tuple[str, dict | str, Sequence[Variant]]  # its name, the content of a recipe or the name of one, its rows


class Outcome(NamedTuple):
    """What a run came to, on prompts that it was not trained on, at temperature 1."""

    words: float  # of the mean response that has any
    wordless: int  # responses without a word, which `brief` scores with -10
    kl: float  # nats a response
    entropy: float  # nats a token, over the last updates
    before: float  # words of the untrained model
    curve: list[float]  # the mean score of each update, in deviations from the first
    moved: list[float]  # nats per token from the policy that sampled to those of an update's steps, their mean
    text: list[float]  # nats per token of text that is not learned from, before each update; empty: there is none


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options of the studies of PPO."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, required=True, help="where the recipes, the model and the runs go")
    options.add_argument("--model", help="absent: a random model of two layers, or that of a shipped recipe")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--updates", type=int, help="absent: as the recipe says")
    options.add_argument("--only", nargs="*", help="variants whose names contain one of these words; absent: all")
    return options


def outcomes(
    recipe: dict | str, variants: Sequence[Variant], options: argparse.Namespace, name: str
) -> dict[str, list[Outcome]]:
    """Run every variant with every seed; return what each came to, by variant.

    All variants of a seed share a folder, so that labels and a reward model are made once; PPO is run again for each.
    """
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = recipe if isinstance(recipe, str) else written(options.folder, name, recipe)
    model = options.model or (None if isinstance(recipe, str) else random_model(options.folder / "model"))
    given = [f"{key}={value}" for key, value in (("model", model), ("ppo.updates", options.updates)) if value]
    wanted = [one for one in variants if not options.only or any(word in one.name for word in options.only)]
    found: dict[str, list[Outcome]] = {one.name: [] for one in wanted}
    for seed in range(1, options.seeds + 1):
        folder = options.folder / f"{name}-{seed}"
        for variant in wanted:
            sets = [*variant.sets, *given, f"seed={seed}", f"output={folder}"]
            run_recipe(load_recipe(path, sets), Progress(quiet=True))
            found[variant.name].append(read(folder))
            print(f"{name}, seed {seed}: {variant.name}: {found[variant.name][-1][:5]}", file=sys.stderr, flush=True)
    return found


def written(folder: Path, name: str, recipe: dict) -> Path:
    """Write a recipe, but for its model, and its prompts; return the recipe's path."""
    rows = [
        {"id": f"n-{n}", "prompt": f"What is {n}?", "tag": "ordinary", "split": ("train", "eval")[n % 2]}
        for n in range(PROMPTS)
    ]
    files.write_jsonl(folder / "numbers.jsonl", rows)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **recipe}), encoding="utf-8")
    return path


def read(folder: Path) -> Outcome:
    """Return what a finished run came to."""
    answers = [row for _, row in read_jsonl(folder / "6-evaluate" / "responses.jsonl")]
    rows = [row for row in answers if row["policy"] == "ppo"]
    words = words_of(rows)
    updates = [row for _, row in read_jsonl(folder / "5-ppo" / "metrics.jsonl")]
    return Outcome(
        fmean(words),
        len(rows) - len(words),
        fmean(row["kl"] for row in rows),
        fmean(row["policy/entropy"] for row in updates[-LAST:]),
        fmean(words_of([row for row in answers if row["policy"] == "base"])),
        [row["rollout/score"] for row in updates],
        [row["policy/kl_to_old"] for row in updates],
        [row["ptx/heldout_loss"] for row in updates if "ptx/heldout_loss" in row],
    )


def words_of(rows: Sequence[dict]) -> list[float]:
    """Return how many words each response has, of those that have any."""
    return [-10 * score for score in brief([], [row["text"] for row in rows]) if score > WORDLESS]


def rows_of(found: dict[str, list[Outcome]]) -> Table:
    """Return a row for each variant; differences are of the same seed from the first variant."""
    first = next(iter(found.values()))
    return [
        [
            name,
            mean([one.words for one in seeds]),
            " ".join(f"{one.words - other.words:+.1f}" for one, other in zip(seeds, first, strict=True)),
            " ".join(str(one.wordless) for one in seeds),
            mean([one.kl for one in seeds]),
            mean([one.entropy for one in seeds]),
        ]
        for name, seeds in found.items()
    ]


def curves_of(found: dict[str, list[Outcome]]) -> Table:
    """Return a row for each variant and seed: of every fourth update, and of the last."""
    return [
        [
            name,
            str(seed),
            " ".join(f"{value:.1f}" for value in [*one.curve[:-1:4], one.curve[-1]]),
            " ".join(f"{1000 * value:.1f}" for value in [*one.moved[:-1:4], one.moved[-1]]),
            " ".join(f"{value:.3f}" for value in [*one.text[:1], *one.text[1:][-1:]]),
        ]
        for name, seeds in found.items()
        for seed, one in enumerate(seeds, 1)
    ]


def main(parts: Sequence[Part], options: argparse.Namespace, *, curves: Sequence[str] = ()) -> int:
    """Run the parts of a study and print a table of each; of those in `curves` the curves too."""
    try:
        for name, recipe, variants in parts:
            found = outcomes(recipe, variants, options, name)
            if found:
                before = mean([one.before for one in next(iter(found.values()))])
                updates = len(next(iter(found.values()))[0].curve)
                print(f"\n{name}, {options.seeds} seeds, {updates} updates; untrained: {before} words\n")
                print(table(COLUMNS, rows_of(found)))
                if name in curves:
                    print("\n" + table(CURVES, curves_of(found)))
    except RlaifError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def random_model(folder: Path) -> Path:
    """Write a Llama of two layers with random weights and ASCII characters as tokens, unless it is there.

    Bytes that are no text would not come back from it, and `evaluate` reads texts.
    """
    if (folder / "config.json").is_file():
        return folder
    tokens = ["<|pad|>", "<|start|>", "<|end|>", *map(chr, range(33, 127)), SPACE, NEWLINE]
    raw = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
