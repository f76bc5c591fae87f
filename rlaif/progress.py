"""Progress: a bar with tokens per second and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_LINE_EVERY_SECONDS = 20.0


class Task:
    """One piece of work of known size."""

    interrupted = False  # set by the command line at Ctrl+C

    def __init__(self, progress: "Progress", title: str, total: int):
        self.title, self.total, self.done, self.tokens = title, total, 0, 0
        self._progress, self._started, self._printed = progress, time.monotonic(), time.monotonic()
        self._bar = progress.rich.add_task(title, total=total, note="") if progress.rich else None

    def advance(self, count: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Record that `count` items are done, and how many tokens they took.

        Raises:
            KeyboardInterrupt: there was one, and it fell into a finalizer or a callback, which swallow it.
        """
        if Task.interrupted:
            raise KeyboardInterrupt
        self.done, self.tokens = self.done + count, self.tokens + tokens
        seconds = max(time.monotonic() - self._started, 1e-6)
        rate = f"{self.tokens / seconds:.0f} tokens/s" if self.tokens else ""
        text = "  ".join(part for part in (rate, note) if part)
        if self._progress.rich and self._bar is not None:
            self._progress.rich.update(self._bar, advance=count, note=text)
        elif time.monotonic() - self._printed > PLAIN_LINE_EVERY_SECONDS and self.done < self.total:
            self._printed = time.monotonic()
            left = seconds / max(self.done, 1) * (self.total - self.done)
            self._progress.say(f"  {self.title}: {self.done}/{self.total}  {text}  about {left:.0f} s left")


class Progress:
    """Where stages say what they do; one object for a whole run."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.rich: RichProgress | None = None
        self._quiet = quiet

    def say(self, line: str) -> None:
        """Print one line; text of models and files is shown as it is, control characters removed."""
        clean = "".join(char for char in line if char.isprintable() or char in "\n\t")
        self.console.print(clean, markup=False, emoji=False)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Show one piece of work while it runs."""
        if self._quiet or not sys.stderr.isatty() or self.rich is not None:
            yield Task(self, title, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as self.rich:
            try:
                yield Task(self, title, total)
            finally:
                self.rich = None
