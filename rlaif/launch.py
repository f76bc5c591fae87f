"""What a launcher of several processes (`accelerate launch`, `torchrun`) tells each of them in its environment."""

import os

_NAMES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def process_count() -> int:
    """Return how many processes were launched together; 1 where no launcher says."""
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= _NAMES else 1


def process_rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def leads() -> bool:
    """Tell whether this process is the first: the run, which alone reads commands, asks, writes and speaks."""
    return process_rank() == 0


def local_rank() -> int:
    """Return the number of this process among those on its machine: the GPU that it computes on."""
    return int(os.environ.get("LOCAL_RANK", "0")) if process_count() > 1 else 0


def only_cpu() -> bool:
    """Tell whether `accelerate launch --cpu` asked to leave a GPU alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
