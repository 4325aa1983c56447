"""Contenders measured side by side: each in a fresh process, taking turns: A B C, A B C, ..."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import longscan
from longscan.bench.machine import available_memory, installed

__all__ = ["Contender", "Measurement", "Pace", "faster", "race"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to measure.

    Attributes:
        name: what the tables call it.
        job: the function that prepares it, see `longscan.bench.worker`.
        arguments: that function's keyword arguments, plain values.
        packages: the optional packages it needs.
        peer: whether it is somebody else's, left out by --no-peers.
        patience: a first run of more seconds than this is the only one.
        needs_bytes: memory without which it is not started.
    """

    name: str
    job: str
    arguments: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    peer: bool = False
    patience: float = math.inf
    needs_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How thoroughly to measure.

    Attributes:
        repeats: turns each contender takes after its first run, which only warms up.
        budget: seconds a turn of a short contender is filled with.
        threads: for every contender.
        peers: whether peers run.
        tell: receives a line before each contender's first run.
    """

    repeats: int = 5
    budget: float = 0.5
    threads: int = 1
    peers: bool = True
    tell: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of a contender.

    Attributes:
        name: the contender's.
        seconds: one per turn; empty if it failed.
        warm: False if the only number is that of a first run.
        peak_bytes: highest resident set of the whole process since it was prepared, if known.
        extra_bytes: how far one run raises the resident set, if that was asked for.
        details: whatever else the job measured.
        note: why there is no number, if there is none.
    """

    name: str
    seconds: tuple[float, ...] = ()
    warm: bool = True
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the turns, in seconds; NaN if there are none."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    def as_row(self) -> dict[str, Any]:
        """Return plain values; times in seconds, None where nothing was measured."""
        times = self.seconds
        return {
            "contender": self.name,
            "seconds": self.median if times else None,
            "seconds_min": min(times, default=None),
            "seconds_max": max(times, default=None),
            "repeats": len(times),
            "warm": self.warm,
            "peak_bytes": self.peak_bytes,
            "extra_bytes": self.extra_bytes,
            "note": self.note,
            **self.details,
        }


def race(
    title: str, contenders: Sequence[Contender], pace: Pace, *, memory: bool = False
) -> dict[str, Measurement]:
    """Measure contenders against each other.

    All first runs come first; what is slower than its patience ends there. The others then take turns, so
    that a machine that drifts drifts for all of them.

    Args:
        title: what they contend in, for progress.
        contenders: who.
        pace: how thoroughly.
        memory: whether to run each once more for its extra memory.

    Returns:
        Contender's name -> measurement, in the order given; those that are not to run are left out.
    """
    runners = [
        _Runner(c) for c in contenders if (pace.peers or not c.peer) and all(map(installed, c.packages))
    ]
    try:
        for runner in runners:
            runner.start(pace.threads)
        for runner in runners:
            runner.ready()
        for runner in runners:
            pace.tell(f"{title}: {runner.contender.name}")
            runner.first()
        for _ in range(pace.repeats):
            for runner in runners:
                runner.turn(pace)
        for runner in runners if memory else ():
            runner.memory()
    finally:
        for runner in runners:
            runner.close()
    return {runner.contender.name: runner.result() for runner in runners}


def faster(found: Mapping[str, Measurement], ours: str, *others: str) -> float:
    """Compare speeds.

    Args:
        found: the measurements of a race.
        ours: a contender.
        others: contenders, of which the fastest counts.

    Returns:
        How many times faster ours is; NaN if there is nothing to compare.
    """
    times = [found[name].median for name in others if name in found and found[name].seconds]
    return min(times) / found[ours].median if times else math.nan


class _FailedError(Exception):
    """The worker ended or could not run."""


class _Runner:
    """Drives the process of one contender and gathers what it says."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.seconds: list[float] = []
        self.warm = True
        self.reply: dict[str, Any] = {}
        self.note = ""
        self.process: subprocess.Popen[str] | None = None
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)

    def start(self, threads: int) -> None:
        """Start the process, if there is memory for it."""
        needs, free = self.contender.needs_bytes, available_memory()
        if free is not None and needs > free:
            self.note = f"not run: needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        else:
            self.process = self._start(threads)

    def ready(self) -> None:
        """Wait until everything is prepared, so that nobody prepares while another is measured."""
        if self.process:
            self._attempt(None)

    def first(self) -> None:
        """Run once, to warm up; or for good, if that took long."""
        reply = self._attempt({"do": "run", "budget": 0}) if self.process else None
        if reply and reply["seconds"] > self.contender.patience:
            self.seconds, self.warm = [reply["seconds"]], False
            self.close()

    def turn(self, pace: Pace) -> None:
        """Take one turn, unless this contender is out of the race."""
        if self.process and (reply := self._attempt({"do": "run", "budget": pace.budget})):
            self.seconds.append(reply["seconds"])

    def memory(self) -> None:
        """Measure the extra memory of one run, unless this contender is out of the race."""
        if self.process:
            self._attempt({"do": "memory"})

    def result(self) -> Measurement:
        """Return what was gathered."""
        used = ("seconds", "peak_bytes", "extra_bytes")
        return Measurement(
            name=self.contender.name,
            seconds=tuple(self.seconds),
            warm=self.warm,
            peak_bytes=self.reply.get("peak_bytes"),
            extra_bytes=self.reply.get("extra_bytes"),
            details={key: value for key, value in self.reply.items() if key not in used},
            note=self.note,
        )

    def close(self) -> None:
        """End the process, if it still runs, and take no more turns."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        self.complaints.close()

    def _start(self, threads: int) -> subprocess.Popen[str]:
        """Start the worker."""
        source = str(Path(longscan.__file__).parent.parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",  # nothing here is worth a download
        }
        job = {"job": self.contender.job, "arguments": self.contender.arguments}
        return subprocess.Popen(
            [sys.executable, "-m", "longscan.bench.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )

    def _attempt(self, order: dict[str, Any] | None) -> dict[str, Any] | None:
        """Send an order, if any, and wait for the reply; note a failure and return None."""
        try:
            reply = self._exchange(order)
        except _FailedError as failure:
            self.note = f"failed: {failure}"
            self.seconds = []
            self.close()
            return None
        self.reply |= reply
        return reply

    def _exchange(self, order: dict[str, Any] | None) -> dict[str, Any]:
        """Send an order and return the reply."""
        assert self.process
        assert self.process.stdin
        assert self.process.stdout
        try:
            if order is not None:
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace").strip().splitlines()
            killed = (
                "the system killed it, perhaps for want of memory"
                if code == -9
                else f"it ended with code {code}"
            )
            raise _FailedError(said[-1] if said and code > 0 else killed)
        reply: dict[str, Any] = json.loads(line)
        return reply
