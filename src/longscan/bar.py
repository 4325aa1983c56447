"""The progress bar of commands that read and write."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Bar"]


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
