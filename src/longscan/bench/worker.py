"""One contender in a process of its own: `python -m longscan.bench.worker JOB`.

JOB is a JSON object: `job` names a function as "module:function", `arguments` are its keyword arguments. The
function prepares everything and returns what to measure, a callable without arguments. That may return
a dictionary of details, whose "seconds", if present, replaces the time measured here. Orders come on stdin, a
line of JSON each; so go the replies on stdout.

A fresh process per contender keeps one contender's memory, threads and imports out of another's numbers.
Nothing heavy is imported here: the job brings what it needs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from longscan.ops import keep_memory

__all__ = ["Clock", "Run", "extra_memory", "main", "peak_memory", "resident_memory", "settle", "turn"]

Run = Callable[[], dict[str, Any] | None]
Clock = Callable[[], float]


def turn(run: Run, budget: float, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Return the time of one run, or the median of as many as fit if they are short.

    Args:
        run: what to measure.
        budget: seconds to spend.
        clock: shows seconds.

    Returns:
        "seconds" and the details of the run.
    """
    begin = clock()
    first = _timed(run, clock)
    if 3 * (clock() - begin) > budget:
        return first
    # the first of many short runs only wakes threads and caches
    rest: list[dict[str, Any]] = []
    end = clock() + budget
    while not rest or clock() < end:
        rest.append(_timed(run, clock))
    return rest[0] | {"seconds": statistics.median(one["seconds"] for one in rest)}


def extra_memory(run: Run) -> int:
    """Return by how many bytes one run raises the peak of the resident set."""
    settle()
    before = resident_memory()
    run()
    return max(0, peak_memory() - before)


def settle() -> None:
    """Return free memory to the system, and reset the peak of the resident set."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # pages freed by earlier runs would be taken again unseen
    _reset_peak()


def resident_memory() -> int:
    """Return the resident set of this process in bytes, 0 if unknown."""
    return _status("VmRSS") or 0


def peak_memory() -> int:
    """Return the peak resident set of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Prepare the job named on the command line, then serve orders until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what peers print goes to stderr, not between the replies
    keep_memory()  # for every contender alike: page faults are otherwise a matter of luck
    order = json.loads(sys.argv[1])
    module, name = order["job"].split(":")
    run: Run = getattr(importlib.import_module(module), name)(**order["arguments"])
    settle()  # the peak is that of the runs, not of preparing
    _reply(replies, {})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "memory":
            _reply(replies, {"extra_bytes": extra_memory(run)})
        else:
            _reply(replies, turn(run, order["budget"]))


def _reply(stream: TextIO, values: dict[str, Any]) -> None:
    """Send a line of JSON with the peak resident set."""
    stream.write(json.dumps(values | {"peak_bytes": peak_memory()}) + "\n")


def _timed(run: Run, clock: Clock) -> dict[str, Any]:
    """Run once under the clock."""
    begin = clock()
    details = run() or {}
    return {"seconds": clock() - begin} | details


def _reset_peak() -> None:
    """Reset the peak of the resident set; where that is not allowed, the peak overestimates."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes, None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    main()
