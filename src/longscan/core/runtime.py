"""The process: its CPU threads, its memory, and the signals that stop a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from longscan.core.checks import check_whole

__all__ = ["StopSignals", "available_memory", "use_threads"]


# of a container, cgroup 2 and 1: its limit, what it uses, and how much of that is the cache of files
LIMITS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
MAX_THREADS = 1024  # torch's thread pool crashes the process when it cannot start all threads


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads.

    Args:
        threads: their number; None leaves the choice to torch.

    Raises:
        UsageError: the number is out of range.
    """
    if threads is not None:
        check_whole("threads", threads, 1, MAX_THREADS)
        torch.set_num_threads(threads)


def available_memory() -> int | None:
    """Return the bytes available to this process without swapping, None if unknown.

    What limits a container, its cgroup, counts too.
    """
    known = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, limit, used, cache in LIMITS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number
            lines = Path(folder, "memory.stat").read_text().splitlines()
            cached = int(dict(line.split() for line in lines)[cache])
            numbers = [int(Path(folder, name).read_text()) for name in (limit, used)]
            known.append(numbers[0] - numbers[1] + cached)
    return max(0, min(known)) if known else None


class StopSignals:
    """Records SIGINT, SIGTERM or SIGHUP while it is entered; a second SIGINT raises KeyboardInterrupt.

    Signals that the process ignores, such as SIGHUP under nohup, stay ignored.
    """

    CAUGHT: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere the caller handles signals
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
