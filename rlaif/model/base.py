"""Loading one base model: embedded, from a local folder or from the Hub; in fp32, bf16, 8 or 4 bits."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # else grouped keys are copied for every query head
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from rlaif import launch
from rlaif.documents import file_sha256
from rlaif.errors import DeviceError, ModelError
from rlaif.model import builtin
from rlaif.model.chat import ChatTokenizer
from rlaif.recipe import ModelSection

transformers_logging.disable_progress_bar()
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product of 8 bits

# What `transformers` raises for folders that are broken in one way or another.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
_HASHED_WHOLE = 64 << 20  # bytes; of larger files of weights samples are hashed
_SAMPLES, _SAMPLE = 256, 1 << 16  # how many, and bytes of each


@dataclass
class Base:
    """A causal language model without adapters, its tokenizer, and what identifies it."""

    lm: Any
    tokenizer: ChatTokenizer
    identity: dict[str, Any]
    max_length: int
    head: torch.Tensor | None = None  # of a reward model in place of a causal one: ``[1, hidden]``, fp32

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        device: torch.device = next(self.lm.parameters()).device
        return device


def default_device() -> torch.device:
    """Return the first NVIDIA GPU, or this process's own among several; else the CPU."""
    if launch.only_cpu() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank())


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


def load_base(settings: ModelSection, *, classifier: bool = False) -> Base:
    """Load the model that a recipe names, frozen, in evaluation mode and without dropout.

    Args:
        settings: the model.
        classifier: load a sequence classification model with one label: somebody else's reward model.

    Raises:
        ModelError: no such model, not a causal language model (or not such a classifier), or no chat template.
        DeviceError: a floating-point type that this machine cannot use.
    """
    device = default_device()
    dtype = compute_dtype(settings.dtype, device)
    source = resolve(settings.model_name_or_path)
    lm, tokenizer, config = _read(settings, source, device, dtype, classifier)
    head = _take_head(settings, lm) if classifier else None
    lm.requires_grad_(False)
    lm.eval()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 would repack the weights at the first forward pass in
            # evaluation mode, for a bf16 kernel without a backward pass: gradients vanish with a mere warning.
            module.support_avx512bf16_for_cpu = False
    stops = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)  # none of a classifier
    chat = ChatTokenizer(
        tokenizer,
        settings.model_name_or_path,
        [] if stops is None else [stops] if isinstance(stops, int) else stops,
        whole_turns=classifier,
    )
    longest = int(config.get_text_config().max_position_embeddings)
    return Base(lm, chat, identity(settings, source, config), longest, head)


def is_classifier(settings: ModelSection) -> bool:
    """Tell whether the model that a recipe names is a sequence classification model, by its configuration.

    Raises:
        ModelError: there is no such model.
    """
    source = resolve(settings.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(source, revision=settings.model_revision, trust_remote_code=False)
    except (*_BROKEN, StrictDataclassError) as problem:
        raise _unusable(settings, problem) from problem
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _take_head(settings: ModelSection, lm: Any) -> torch.Tensor:
    """Take the head off a sequence classification model, having checked that it alone makes a score of a state.

    Returns:
        Its weight ``[1, hidden]``, fp32.
    """
    score = getattr(lm, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None or score.out_features != 1:
        found = "no layer `score`" if score is None else f"`score` is {score}"
        raise ModelError(
            f"model `{settings.model_name_or_path}`: {found}. A reward model is expected that scores its last token "
            "with one linear layer without a bias: `AutoModelForSequenceClassification` of a decoder with one label."
        )
    weight = score.weight.detach().float()
    ids = torch.arange(1, 5, device=weight.device).unsqueeze(0)
    with torch.no_grad():
        theirs = lm(input_ids=ids, use_cache=False).logits.float()
        state = getattr(lm, lm.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    if not torch.allclose(state.float() @ weight.T, theirs, atol=1e-2, rtol=1e-2):
        raise ModelError(
            f"model `{settings.model_name_or_path}`: its score is not a projection of its last hidden state; the model "
            f"type `{lm.config.model_type}` is not supported as a reward model."
        )
    lm.score = nn.Identity()  # so that no adapter is put on it
    return weight


def _read(
    settings: ModelSection, source: str, device: torch.device, dtype: torch.dtype, classifier: bool
) -> tuple[Any, Any, Any]:
    """Read the model, its tokenizer and its configuration; weights must be safetensors, and all there."""
    options: dict[str, Any] = {"revision": settings.model_revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _drop_dropout(config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        lm, report = kind.from_pretrained(
            source,
            **options,
            config=config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            attn_implementation=settings.attn_implementation,
            quantization_config=_quantization(settings, dtype, classifier),
            output_loading_info=True,
        )
        if report["missing_keys"]:
            name = min(report["missing_keys"])
            what = "a sequence classification model" if classifier else "a causal language model"
            raise ValueError(f"{len(report['missing_keys'])} tensors of {what} are missing: {name}.")
    except (*_BROKEN, SafetensorError, StrictDataclassError) as problem:
        raise _unusable(settings, problem) from problem
    return lm, tokenizer, config


def _unusable(settings: ModelSection, problem: Exception) -> ModelError:
    reason = " ".join(str(problem).split())[:300] or type(problem).__name__
    return ModelError(
        f"model `{settings.model_name_or_path}`: cannot be loaded: {reason} Expected: an embedded model "
        f"({', '.join(builtin.EMBEDDED)}), a folder with a model in the Hugging Face format (safetensors), or the "
        "id of one on the Hub."
        + (" Try `model.attn_implementation: eager`." if "attn_implementation" in str(problem) else "")
    )


def load_tokenizer(name: str, revision: str | None = None) -> ChatTokenizer:
    """Load the tokenizer of a model and nothing else: an embedded name, a local folder or a Hub id (and its commit).

    Raises:
        ModelError: no such model, no tokenizer, or no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), revision=revision, trust_remote_code=False)
    except _BROKEN as problem:
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise ModelError(
            f"model `{name}`: its tokenizer cannot be loaded: {reason} Expected: an embedded model "
            f"({', '.join(builtin.EMBEDDED)}), a folder with a tokenizer, or the id of a model on the Hub."
        ) from problem
    return ChatTokenizer(tokenizer, name)


def _drop_dropout(config: Any) -> None:
    """Set every rate of dropout to 0: attention reads its own from here, not from a module."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and "drop" in name:
                setattr(part, name, 0.0)


def identity_of(settings: ModelSection, kind: str | None = None, *, fetch: bool = False) -> dict[str, Any]:
    """Return the identity of the model that a recipe names, without loading it.

    Args:
        settings: the model.
        kind: of the device that it would be on, ``cpu`` or ``cuda``; None for the one that is here.
        fetch: whether its configuration may be fetched.

    Raises:
        ModelError: there is no such model, or its configuration is not on this machine.
        DeviceError: a floating-point type that such a device cannot use.
    """
    name = settings.model_name_or_path
    if not fetch and name in builtin.EMBEDDED and not builtin.is_fetched(name):
        return {"model": name, "weights": "not fetched yet"}
    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=settings.model_revision, trust_remote_code=False, local_files_only=not fetch
        )
    except (*_BROKEN, StrictDataclassError) as problem:
        if fetch:
            raise _unusable(settings, problem) from problem
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"model `{name}`: its configuration is not on this machine: {reason} A plan fetches nothing; fetch the "
            "model first, or run the recipe."
        ) from problem
    return identity(settings, source, config, torch.device(kind) if kind else None)


def identity(settings: ModelSection, source: str, config: Any, device: torch.device | None = None) -> dict[str, Any]:
    """Return what an answer of this model depends on, for the keys of stored work: weights, precision, template."""
    folder = Path(source)
    weights: Any = settings.model_revision or getattr(config, "_commit_hash", None)
    if folder.is_dir():
        files = sorted(path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in folder.glob(pattern))
        weights = {path.name: _stamp(path) for path in files}
    return {
        "model": settings.model_name_or_path,
        "weights": weights,
        "load_in_4bit": settings.load_in_4bit,
        "bnb_4bit_quant_type": settings.bnb_4bit_quant_type if settings.load_in_4bit else None,
        "use_bnb_nested_quant": settings.use_bnb_nested_quant if settings.load_in_4bit else None,
        "load_in_8bit": settings.load_in_8bit,
        "dtype": str(compute_dtype(settings.dtype, device or default_device())),
    }


def _stamp(path: Path) -> str:
    """Hash a file; of a large one, its size and samples from all over it, since fine-tuning changes most tensors."""
    size = path.stat().st_size
    if size < _HASHED_WHOLE:
        return file_sha256(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return f"{size}-{digest.hexdigest()}"


def _quantization(settings: ModelSection, dtype: torch.dtype, classifier: bool) -> BitsAndBytesConfig | None:
    kept = {"llm_int8_skip_modules": ["score"]} if classifier else {}  # of 4 bits as well, in spite of its name
    if settings.load_in_4bit:
        return BitsAndBytesConfig(
            **kept,
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(**kept, load_in_8bit=True) if settings.load_in_8bit else None
