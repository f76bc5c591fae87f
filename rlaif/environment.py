"""Versions and hardware, as a bug report needs them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "rlaif-toolkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors",
    "jinja2", "pydantic", "ruamel.yaml", "typer",
)  # fmt: skip


def describe() -> dict[str, str]:
    """Return names and versions: Python, packages, processor, memory, GPU, embedded models."""
    import torch

    from rlaif.model.builtin import EMBEDDED, is_fetched

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["processor"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        found["gpu"] = "none"
    found["embedded models"] = ", ".join(f"{name}{'' if is_fetched(name) else ' (not fetched)'}" for name in EMBEDDED)
    return found
