"""What the benchmarks share: a text to cut prompts from, timing in turns, and the table of results."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
Variant = Callable[[int], int]  # given a seed: how many tokens, or pairs, were done


class Timed(NamedTuple):
    """One run of one variant."""

    rate: float  # per second of the clock
    cpu_rate: float  # per second of processor time, of all threads
    peak: float  # GiB


def machine(threads: int) -> str:
    """Describe processor, load and versions in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {model}"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{where}; {threads} threads; load {load}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def text_ids(base) -> tuple[list[int], list[int]]:
    """Return the shipped prompts as one stream of ids, and the ids that close a user's turn."""
    stream = base.tokenizer.prompt([{"role": "user", "content": shipped_text()}])
    short = base.tokenizer.prompt([{"role": "user", "content": "one"}])
    other = base.tokenizer.prompt([{"role": "user", "content": "two"}])
    same = next(i for i in range(1, len(short)) if short[-i] != other[-i]) - 1
    return stream[: len(stream) - same], short[len(short) - same :]


def shipped_text() -> str:
    """Return the texts of the shipped prompts, one after the other."""
    rows = [json.loads(line) for path in sorted((ROOT / "prompts").glob("*.jsonl")) for line in path.open()]
    return " ".join(row["prompt"] for row in rows if "prompt" in row)  # attacks.jsonl holds something else


def reset_peak() -> None:
    """Forget how much memory this process has needed so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident size back


def peak_gib() -> float:
    """Return the most memory since `reset_peak`, in GiB: a GPU's, else the resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def timed(run: Variant, seed: int) -> Timed:
    """Run a variant once."""
    gc.collect()
    reset_peak()
    began, began_cpu = time.perf_counter(), time.process_time()
    done = run(seed)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return Timed(done / seconds, done / cpu, peak_gib())


def spread(values: list[float], digits: int = 2) -> str:
    """Return median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def compare(theirs: dict[str, Variant], ours: dict[str, Variant], repeats: int, unit: str) -> None:
    """Run all variants in turns; print each, and ours against the best of theirs, repeat by repeat."""
    found: dict[str, list[Timed]] = {name: [] for name in [*theirs, *ours]}
    for repeat in range(repeats):
        for name, run in (theirs | ours).items():
            one = timed(run, repeat * 1000)
            found[name].append(one)
            print(
                f"{name}: {one.rate:.2f} {unit}, {one.cpu_rate:.2f} per processor second, {one.peak:.2f} GiB, "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    print(f"\n| variant | {unit} | per processor second | peak GiB |\n|---|---:|---:|---:|")
    for name, runs in found.items():
        peak = max(one.peak for one in runs)
        print(f"| {name} | {spread([r.rate for r in runs])} | {spread([r.cpu_rate for r in runs])} | {peak:.2f} |")
    if not theirs or not ours:
        return
    for name in ours:
        for field, words in (("rate", "by the clock"), ("cpu_rate", "by processor time")):
            rates = {other: [getattr(one, field) for one in found[other]] for other in [*theirs, name]}
            best = max(theirs, key=lambda other, rates=rates: statistics.median(rates[other]))
            factors = [a / b for a, b in zip(rates[name], rates[best], strict=True)]
            print(f"\n{name} against {best}, {words}: {spread(factors)} times")
