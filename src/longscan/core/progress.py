"""What long work shows: a progress bar for a single pass, a display with rate and time left for a run."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

__all__ = ["Bar", "Display", "Snapshot", "Terminal", "duration"]


class Bar:
    """A progress bar on stderr: only on a terminal, only if the work takes a while, gone when it is done."""

    PATIENCE = 0.5  # seconds that need no bar

    def __init__(self) -> None:
        self._wanted, self._begin = sys.stderr.isatty(), time.perf_counter()
        self._bar: Any = None

    def show(self, what: str, done: int, total: int | None, words: str = "") -> None:
        """Show how far the work is.

        Args:
            what: is going on.
            done: in any unit.
            total: in the same; None if nobody knows.
            words: numbers to show beside the bar.
        """
        if not self._wanted or time.perf_counter() - self._begin < self.PATIENCE:
            return
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.add_task(what, words="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, words=words)

    def clear(self) -> None:
        """Remove the bar, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._begin = None, time.perf_counter()


def _rich_bar() -> Any:
    """Build the bar; rich is imported only by those who look at one."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[words]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # or what goes to stdout would end up on stderr
        redirect_stderr=False,
    )


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a run stands after a step; loss in the run's own unit."""

    step: int
    total: int
    loss: float
    valid: str | None  # the last validation: "1.234 bits/byte"
    tokens_per_second: float
    item: str = "tok"  # what the tokens are where they are no tokens: "texts"
    seconds_left: float


class Display:
    """Keeps silent: the default of a library. Subclasses speak."""

    def line(self, text: str) -> None:
        """Show a line that stays.

        Args:
            text: the line.
        """

    def prepare(self, done: int, total: int) -> None:
        """Show how much text has become tokens.

        Args:
            done: bytes.
            total: of all text.
        """

    def show(self, snapshot: Snapshot) -> None:
        """Show how the training goes.

        Args:
            snapshot: the run after a step.
        """

    def validated(self, valid: str | None) -> None:
        """Show a validation beside the step it was made after.

        Args:
            valid: its result, as in a `Snapshot`.
        """

    def close(self) -> None:
        """Leave the screen in order."""


class Terminal(Display):
    """Writes to stderr: a bar if it is a terminal, else a line every few steps.

    It falls silent when nobody reads any more: a run does not end because its terminal has gone.

    Args:
        every: steps between the lines.
        console: where to; stderr if None.
    """

    def __init__(self, every: int, console: Console | None = None) -> None:
        self.every = every
        self.console = console or Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.snapshot: Snapshot | None = None  # the last one shown
        self.preparation = Bar()

    def line(self, text: str) -> None:
        """Show a line that stays, above the bar."""
        safe = CONTROL.sub(
            "\N{REPLACEMENT CHARACTER}", text
        )  # a young model writes anything, also escape codes
        with self._readers():
            self.preparation.clear()
            self.console.print(safe, markup=False, soft_wrap=True)

    def prepare(self, done: int, total: int) -> None:
        """Show a bar if it takes a while."""
        with self._readers():
            self.preparation.show("tokens", done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    def show(self, snapshot: Snapshot) -> None:
        """Redraw the bar, or write a line if it is time."""
        self.snapshot = snapshot
        if self.console.is_terminal:
            with self._readers():
                self._draw(snapshot)
        elif snapshot.step % self.every == 0 or snapshot.step in (1, snapshot.total):
            self.line(f"step {snapshot.step:,}/{snapshot.total:,}  {_words(snapshot)}")

    def validated(self, valid: str | None) -> None:
        """Redraw the bar with the validation; a line says it already."""
        if self.snapshot is not None and self.bar is not None:
            self.show(replace(self.snapshot, valid=valid))

    def close(self) -> None:
        """Stop redrawing the bar."""
        with self._readers():
            self.preparation.clear()
            if self.bar is not None:
                self.bar.stop()
        self.bar = None

    def _draw(self, snapshot: Snapshot) -> None:
        """Draw the bar."""
        if self.bar is None:
            self.bar = Progress(*_columns(), console=self.console, refresh_per_second=4)
            self.bar.add_task("train", total=snapshot.total, words="")
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=snapshot.step, words=_words(snapshot))

    @contextlib.contextmanager
    def _readers(self) -> Iterator[None]:
        """Write to whoever reads; to nobody, without a word, once they have gone."""
        try:
            yield
        except OSError:  # EIO of a terminal that was closed, EPIPE of a pipe
            self.console.quiet = True


def duration(seconds: float) -> str:
    """Say how long something takes, to the precision a reader wants.

    Args:
        seconds: the time.

    Returns:
        "42 s", "7 min", "3 h 05 min".
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _columns() -> list[ProgressColumn]:
    """The parts of the bar's line."""
    return [
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[words]}"),
    ]


def _words(snapshot: Snapshot) -> str:
    """The numbers of a snapshot."""
    parts = [f"loss {snapshot.loss:.3f}"]
    if snapshot.valid is not None:
        parts.append(f"valid {snapshot.valid}")
    parts += [
        f"{snapshot.tokens_per_second:,.0f} {snapshot.item}/s",
        f"{duration(snapshot.seconds_left)} left",
    ]
    return "  ".join(parts)
