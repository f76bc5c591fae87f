"""Adapter folders: the configuration of a new LoRA adapter, and what can be taken over from a stored one."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rlaif.errors import ModelError
from rlaif.recipe import ModelSection

SCORE_KEY = "base_model.model.score.weight"
# What is taken over from an adapter folder's configuration. Dropout is not: it stays off.
_LORA_KEYS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
)
# Other ways of initializing LoRA change the base weights, which are everyone's.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


def new_config(lm: Any, settings: ModelSection) -> LoraConfig:
    """Return the configuration of a new adapter on a model."""
    targets = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),  # as in GPT-2
        task_type="CAUSAL_LM",
    )


def read_adapter(folder: Path, device: torch.device, hidden_size: int) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter folder: its configuration, and its weights with the head's among them under `SCORE_KEY`.

    Raises:
        ModelError: it is not a plain LoRA adapter, it holds NaN or infinity, or its head is not as wide as the model.
    """
    try:
        stored = json.loads((folder / "adapter_config.json").read_bytes())
        weights = load_file(folder / "adapter_model.safetensors", device=str(device))
        if stored["peft_type"] != "LORA" or stored.get("use_dora") or stored.get("bias", "none") != "none":
            raise ValueError("a plain LoRA adapter is expected, without DoRA and without biases")
        if stored.get("init_lora_weights", True) not in _HARMLESS_INIT:
            raise ValueError(f"`init_lora_weights: {stored['init_lora_weights']}` changes the base; convert it")
        kept = {key: stored[key] for key in _LORA_KEYS if stored.get(key) is not None}
        config = LoraConfig(**kept, lora_dropout=0.0, task_type="CAUSAL_LM")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as problem:
        raise ModelError(f"{folder}: not a LoRA adapter folder in safetensors form: {problem}.") from None
    broken = sorted(name for name, weight in weights.items() if not weight.isfinite().all())
    if broken:
        raise ModelError(
            f"{folder}: {len(broken)} of {len(weights)} tensors hold numbers that are not finite, `{broken[0]}` first. "
            "Train the adapter again with a lower learning rate."
        )
    score = weights.get(SCORE_KEY)
    if score is not None and (score.dim() != 2 or score.shape[1] != hidden_size):
        raise ModelError(f"{folder}: its head has the shape {list(score.shape)}; [outputs, {hidden_size}] is expected.")
    return config, weights


def refuse_other_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Refuse an adapter whose folder holds a tokenizer that gives tokens other ids than the base's.

    Further tokens in either do no harm. A folder without ``tokenizer.json`` tells nothing.

    Raises:
        ModelError: the first token that differs, and how many do.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        stored = json.loads(path.read_bytes())
        vocabulary = stored["model"]["vocab"]
        ids = vocabulary if isinstance(vocabulary, dict) else {entry[0]: at for at, entry in enumerate(vocabulary)}
        ids = ids | {one["content"]: one["id"] for one in stored.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
        raise ModelError(f"{path}: not a tokenizer's file: {problem!r}. Copy the adapter folder again.") from None
    own = tokenizer.get_vocab()
    shared = own.keys() & ids.keys()
    wrong = sorted((token for token in shared if own[token] != ids[token]), key=lambda token: str(token))
    if wrong or not shared:
        found = f"`{wrong[0]}` is token {ids[wrong[0]]} there and {own[wrong[0]]} here; " if wrong else ""
        raise ModelError(
            f"{folder}: the adapter belongs to another tokenizer: {found}{len(wrong)} of {len(shared)} shared tokens "
            "have other ids. An adapter reads the ids of the base model it was trained on, which is named in its "
            "adapter_config.json: use that model, or train the adapter on this one."
        )
