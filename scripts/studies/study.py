"""What the studies share: their options, the rows with their frozen features, figures over seeds, and tables."""

import argparse
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from features import frozen
from heads import HeadSettings, inputs_of
from torch import Tensor

from rlaif.errors import DataError
from rlaif.human.labels import read_comparisons
from rlaif.maths.agreement import wilson
from rlaif.model.roles import SharedBase
from rlaif.progress import Progress
from rlaif.recipe import ModelSection, RewardSection
from rlaif.records import Comparison
from rlaif.stages.reward_data import usable

EMBEDDED_LAYERS = [10, 20, 30]
Table = list[list[str]]


class Data(NamedTuple):
    """The rows of a study and the base that reads them."""

    base: SharedBase
    rows: list[Comparison]
    about: str


def options_of(description: str) -> argparse.ArgumentParser:
    """Return the options that all studies have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--data", type=Path, required=True, help="comparisons: any file that `rlaif human import` reads"
    )
    options.add_argument("--cache", type=Path, required=True, help="a folder for the frozen features")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--layers", type=int, nargs="+", default=EMBEDDED_LAYERS, help="whose states a head reads")
    options.add_argument("--rows", type=int, help="so many rows, drawn once for all seeds; absent: all")
    options.add_argument("--max-length", type=int, default=512, help="tokens; longer rows are left out and counted")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--folds", type=int, default=5, help="of the cross-fitting")
    return options


def parser(description: str, rates: Sequence[float]) -> argparse.ArgumentParser:
    """Return the options of the studies that plant labels."""
    options = options_of(description)
    options.add_argument("--words-only", action="store_true", help="the bag of words alone: no features, no heads")
    options.add_argument("--rates", type=float, nargs="+", default=list(rates), help="shares of planted rows")
    add_head_options(options)
    options.add_argument("--lora", type=float, nargs="*", default=[], help="rates for the reward stage itself")
    options.add_argument("--lora-epochs", type=float, default=1.0)
    options.add_argument("--lora-learning-rate", type=float, default=RewardSection().learning_rate)
    options.add_argument("--lora-folder", type=Path, help="where their run folders go; needed with --lora")
    return options


def add_head_options(options: argparse.ArgumentParser) -> None:
    """Add the options that `head_settings` reads."""
    for name, kind in HeadSettings.__annotations__.items():
        given = HeadSettings._field_defaults[name]
        options.add_argument(f"--{name.replace('_', '-')}", type=kind, default=given, help=f"of the heads: {given}")


def head_settings(options: argparse.Namespace) -> HeadSettings:
    """Return the settings of heads that the options name."""
    return HeadSettings(**{name: getattr(options, name) for name in HeadSettings._fields})


def load(options: argparse.Namespace) -> Data:
    """Load the base and read the rows that can be used: comparisons that prefer a side.

    Raises:
        DataError: the base's layers cannot be read, or too few rows are left.
    """
    base = SharedBase.load(ModelSection(model_name_or_path=options.model))
    if not base.packs or not all(1 <= one <= len(base.lm.get_decoder().layers) for one in options.layers):
        raise DataError(f"--model {options.model}: the layers {options.layers} cannot be read; name others.")
    imported = read_comparisons(options.data)
    found = usable(base, imported.comparisons, options.max_length, {})
    rows = [row for row in found.rows if isinstance(row, Comparison) and row.preference > 0.5]
    about = f"{len(rows)} comparisons of {options.data.name}"
    about += f" ({len(imported.unused)} not importable, {len(found.unused)} not usable"
    about += f", {len(found.rows) - len(rows)} ties)"
    random.Random(0).shuffle(rows)
    if options.rows:
        rows = rows[: options.rows]
        about += f", of which {len(rows)} were drawn"
    if len(rows) < 2 * options.folds:
        raise DataError(f"{options.data}: {len(rows)} usable rows; at least two a fold are needed.")
    return Data(base, rows, about)


def head_inputs(data: Data, rows: Sequence[Comparison], options: argparse.Namespace) -> Tensor:
    """Return what heads read of rows, ``[n, 2, D]``, from the cache or computed into it."""
    return inputs_of(frozen(data.base, rows, options.layers, options.cache, Progress()))


# --- figures -------------------------------------------------------------------------------------------------------


def accuracy(values: Sequence[float], rows: int) -> str:
    """Return the mean over seeds, Wilson's interval for so many rows, and the least and greatest seed."""
    mean = statistics.fmean(values)
    found = wilson(mean * rows, rows)
    return f"{three(mean)} [{three(found.low)}, {three(found.high)}]{spread(values)}"


def mean(values: Sequence[float | None]) -> str:
    """Return the mean over seeds with the least and the greatest; a dash where no seed has a number."""
    known = [value for value in values if value is not None]
    return f"{three(statistics.fmean(known))}{spread(known)}" if known else "-"


def spread(values: Sequence[float]) -> str:
    """Return the least and the greatest of several values in brackets."""
    return f" ({three(min(values))} to {three(max(values))})" if len(values) > 1 else ""


def three(value: float | None) -> str:
    """Return a number with three digits after the point, without a leading zero."""
    return "-" if value is None else re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def percent(rate: float) -> str:
    """Return a rate as a percentage."""
    return f"{100 * rate:g} %"


def table(header: Sequence[str], rows: Table) -> str:
    """Return a table in Markdown, the first column aligned to the left."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(header) - 1)}", *lines[1:]])
