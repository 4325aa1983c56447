"""The process: its CPU threads, and signals that stop a run in good order."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

import torch

from longscan.errors import UsageError

__all__ = ["Signals", "use_threads"]


MAX_THREADS = 1024  # torch's pool crashes the process when it cannot start as many as it is told


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads.

    Args:
        threads: how many; None leaves the choice to torch.

    Raises:
        UsageError: less than 1, or more than any machine has.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads: expected 1 or more, got {threads}.")
        if threads > MAX_THREADS:
            raise UsageError(f"threads: expected at most {MAX_THREADS:,}, got {threads:,}.")
        torch.set_num_threads(threads)


class Signals:
    """Catches SIGINT, SIGTERM and SIGHUP while a run goes on; a second SIGINT is a KeyboardInterrupt.

    What the process was started to ignore, as nohup does with SIGHUP, it goes on ignoring.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere signals are the caller's affair.
        main = threading.current_thread() is threading.main_thread()
        self._before = {
            number: signal.signal(number, self._handle)
            for number in self.CAUGHT
            if main and signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
