"""Progress of long work: a bar for a single pass, a display with rate and time left for a run."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich takes a tenth of a second to import, and most commands need no display
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["Bar", "Display", "Snapshot", "Terminal", "duration"]


class Bar:
    """A progress bar on stderr, shown only on a terminal and only if the work takes a while."""

    PATIENCE = 0.5  # seconds before the bar appears

    def __init__(self) -> None:
        self._enabled, self._begin = sys.stderr.isatty(), time.perf_counter()
        self._bar: Any = None

    def show(self, what: str, done: int, total: int | None, numbers: str = "") -> None:
        """Show the progress.

        Args:
            what: the name of the work.
            done: in any unit.
            total: in the same unit; None if unknown.
            numbers: text beside the bar.
        """
        if not self._enabled or time.perf_counter() - self._begin < self.PATIENCE:
            return
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.add_task(what, numbers="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, numbers=numbers)

    def clear(self) -> None:
        """Remove the bar, so that something else can be printed."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._begin = None, time.perf_counter()


def _rich_bar() -> Any:
    """Return a new bar."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # otherwise rich would send stdout to stderr
        redirect_stderr=False,
    )


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The progress of a run after a step; the loss is in the run's own unit."""

    step: int
    total: int
    loss: float
    valid: str | None  # the last validation: "1.234 bits/byte"
    tokens_per_second: float
    item: str = "tok"  # the unit of the throughput: "texts"
    seconds_left: float


class Display:
    """Shows nothing, the default of a library; subclasses override its methods."""

    def line(self, text: str) -> None:
        """Show a permanent line.

        Args:
            text: the line.
        """

    def prepare(self, done: int, total: int) -> None:
        """Show the progress of tokenisation.

        Args:
            done: bytes of text tokenised so far.
            total: bytes of all text.
        """

    def show(self, snapshot: Snapshot) -> None:
        """Show the progress of the training.

        Args:
            snapshot: the run after a step.
        """

    def within(self, what: str, done: int, total: int) -> None:
        """Show the progress within a step that takes long.

        Args:
            what: a name for the step.
            done: in any unit.
            total: in the same unit.
        """

    def validated(self, valid: str | None) -> None:
        """Show the result of a validation.

        Args:
            valid: as in a `Snapshot`.
        """

    def close(self) -> None:
        """Stop drawing."""


class Terminal(Display):
    """Shows a bar on stderr if it is a terminal, else a line every few steps.

    When its terminal or pipe is closed it falls silent, so that the run goes on.

    Args:
        every: steps between the lines.
        console: the console to print to; stderr if None.
    """

    def __init__(self, every: int, console: Console | None = None) -> None:
        from rich.console import Console

        self.every = every
        self.console = console or Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.snapshot: Snapshot | None = None  # the last one shown
        self.preparation = Bar()

    def line(self, text: str) -> None:
        """Show a permanent line above the bar."""
        # samples of an untrained model may contain escape codes
        safe = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        with self._quiet_when_closed():
            self.preparation.clear()
            self.console.print(safe, markup=False, soft_wrap=True)

    def prepare(self, done: int, total: int) -> None:
        """Show a bar if tokenisation takes a while."""
        with self._quiet_when_closed():
            self.preparation.show("tokens", done, total, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    def show(self, snapshot: Snapshot) -> None:
        """Redraw the bar, or print a line if it is due."""
        self.snapshot = snapshot
        if self.console.is_terminal:
            with self._quiet_when_closed():
                self._draw(snapshot)
        elif snapshot.step % self.every == 0 or snapshot.step in (1, snapshot.total):
            self.line(f"step {snapshot.step:,}/{snapshot.total:,}  {_numbers(snapshot)}")

    def within(self, what: str, done: int, total: int) -> None:
        """Add a percentage to the bar; before the first step a bar of its own shows it."""
        with self._quiet_when_closed():
            if self.bar is not None and self.snapshot is not None:
                numbers = f"{_numbers(self.snapshot)}  {what} {100 * done // total} %"
                self.bar.update(self.bar.task_ids[0], numbers=numbers)
            else:
                self.preparation.show(what, done, total)

    def validated(self, valid: str | None) -> None:
        """Redraw the bar with the validation; without a bar a line has shown it already."""
        if self.snapshot is not None and self.bar is not None:
            self.show(replace(self.snapshot, valid=valid))

    def close(self) -> None:
        """Stop redrawing the bar."""
        with self._quiet_when_closed():
            self.preparation.clear()
            if self.bar is not None:
                self.bar.stop()
        self.bar = None

    def _draw(self, snapshot: Snapshot) -> None:
        """Draw the bar."""
        if self.bar is None:
            from rich.progress import Progress

            self.preparation.clear()
            self.bar = Progress(*_columns(), console=self.console, refresh_per_second=4)
            self.bar.add_task("train", total=snapshot.total, numbers="")
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=snapshot.step, numbers=_numbers(snapshot))

    @contextlib.contextmanager
    def _quiet_when_closed(self) -> Iterator[None]:
        """Silence the console once its terminal or pipe is closed."""
        try:
            yield
        except OSError:  # EIO of a closed terminal, EPIPE of a closed pipe
            self.console.quiet = True


def duration(seconds: float) -> str:
    """Return a duration, rounded for readers.

    Args:
        seconds: the duration.

    Returns:
        "42 s", "7 min", "3 h 05 min".
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _columns() -> list[ProgressColumn]:
    """Return the columns of the bar."""
    from rich.progress import BarColumn, TextColumn

    return [
        TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}"),
    ]


def _numbers(snapshot: Snapshot) -> str:
    """Return the loss, validation, throughput and time left as text."""
    parts = [f"loss {snapshot.loss:.3f}"]
    if snapshot.valid is not None:
        parts.append(f"valid {snapshot.valid}")
    parts += [
        f"{snapshot.tokens_per_second:,.0f} {snapshot.item}/s",
        f"{duration(snapshot.seconds_left)} left",
    ]
    return "  ".join(parts)
