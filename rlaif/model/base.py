"""Loading one base model: embedded, from a local folder or from the Hub; in fp32, bf16, 8 or 4 bits."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # else grouped keys are copied for every query head
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from rlaif.documents import file_sha256
from rlaif.errors import DeviceError, ModelError
from rlaif.model import builtin
from rlaif.model.chat import ChatTokenizer
from rlaif.recipe import ModelSection

transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a CPU kernel we do not use


@dataclass
class Base:
    """A causal language model without adapters, its tokenizer, and what identifies it."""

    lm: Any
    tokenizer: ChatTokenizer
    identity: dict[str, Any]
    max_length: int

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        device: torch.device = next(self.lm.parameters()).device
        return device


def default_device() -> torch.device:
    """Return the first NVIDIA GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the floating-point type to compute in: ``auto`` is fp32 on a CPU and bf16 on a GPU.

    Raises:
        DeviceError: bf16 or fp16 was asked for on a CPU, where it runs hundreds of times slower than fp32.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu" and name != "float32":
        raise DeviceError(f"model.dtype: `{name}` on a CPU is hundreds of times slower than fp32; use `auto`.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def resolve(name: str) -> str:
    """Return what `transformers` can load: the folder of an embedded model, a local folder, or a Hub id."""
    if name in builtin.EMBEDDED:
        return str(builtin.fetch(name))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_base(settings: ModelSection) -> Base:
    """Load the model that a recipe names, frozen, in evaluation mode and without dropout.

    Raises:
        ModelError: no such model, not a causal language model, or no chat template.
        DeviceError: a floating-point type that this machine cannot use.
    """
    device = default_device()
    dtype = compute_dtype(settings.dtype, device)
    source = resolve(settings.model_name_or_path)
    options: dict[str, Any] = {"revision": settings.model_revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        lm = AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            attn_implementation=settings.attn_implementation,
            quantization_config=_quantization(settings, dtype),
        )
    except (OSError, ValueError, KeyError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise ModelError(
            f"model `{settings.model_name_or_path}`: cannot be loaded: {reason} Expected: an embedded model "
            f"({', '.join(builtin.EMBEDDED)}), a folder with a model in the Hugging Face format (safetensors), or the "
            "id of one on the Hub."
        ) from problem
    lm.requires_grad_(False)
    lm.eval()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 would repack the weights at the first forward pass in
            # evaluation mode, for a bf16 kernel without a backward pass: gradients vanish with a mere warning.
            module.support_avx512bf16_for_cpu = False
    stops = lm.generation_config.eos_token_id
    chat = ChatTokenizer(
        tokenizer,
        settings.model_name_or_path,
        [] if stops is None else [stops] if isinstance(stops, int) else stops,
    )
    return Base(lm, chat, identity(settings, source, config), int(config.get_text_config().max_position_embeddings))


def identity(settings: ModelSection, source: str, config: Any) -> dict[str, Any]:
    """Return what an answer of this model depends on, for the keys of stored work: weights, precision, template."""
    folder = Path(source)
    weights: Any = settings.model_revision or getattr(config, "_commit_hash", None)
    if folder.is_dir():
        names = ("*.safetensors", "config.json", "tokenizer.json", "chat_template.jinja")
        files = sorted(path for pattern in names for path in folder.glob(pattern))
        weights = {path.name: _weights_stamp(path) for path in files}
    return {
        "model": settings.model_name_or_path,
        "weights": weights,
        "load_in_4bit": settings.load_in_4bit,
        "load_in_8bit": settings.load_in_8bit,
        "dtype": settings.dtype,
    }


def _weights_stamp(path: Path) -> str:
    """Hash a small file; for weights, hash the size and the first mebibyte (headers and the first tensors)."""
    if path.stat().st_size < 64 << 20:
        return file_sha256(path)
    import hashlib

    with path.open("rb") as file:
        return f"{path.stat().st_size}-{hashlib.sha256(file.read(1 << 20)).hexdigest()}"


def _quantization(settings: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if settings.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.load_in_8bit else None
