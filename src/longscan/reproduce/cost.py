"""Time and peak memory of a computation in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longscan import ops

__all__ = ["time_and_memory"]


def time_and_memory(compute: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Return the time of a computation and the memory that it takes at its peak.

    Args:
        compute: called once to warm up, whose peak counts, and then `repeats` times.
        repeats: of which the median is taken.

    Returns:
        "ms", the median; "range", the shortest and the longest; "mb", the growth of the resident set at its
        peak, or None where the system does not say it.
    """
    ops.release_memory()
    before = _memory("VmRSS") if _forget_peak() else None
    compute()
    peak = _memory("VmHWM")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compute()
        times.append(1000 * (time.perf_counter() - start))
    mb = None if before is None or peak is None else (peak - before) / 1024
    return {"ms": statistics.median(times), "range": [min(times), max(times)], "mb": mb}


def _forget_peak() -> bool:
    """Reset the peak of the resident set; return whether this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(field: str) -> int | None:
    """Return a field of /proc/self/status in kB, None where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), None)
