"""Contenders measured side by side, each in a fresh process, in turns: A B C, A B C, ..."""

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
from longscan.bench.machine import installed
from longscan.core.runtime import available_memory

__all__ = ["Contender", "Measurement", "Settings", "compare", "faster"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to measure.

    Attributes:
        name: in the tables.
        job: the function that prepares it, see `longscan.bench.worker`.
        arguments: that function's keyword arguments, plain values.
        packages: the optional packages it needs.
        peer: whether it is another project's, left out by --no-peers.
        patience: seconds; if the first run takes longer, it is the only one.
        needs_bytes: free memory it needs to be started.
    """

    name: str
    job: str
    arguments: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    peer: bool = False
    patience: float = math.inf
    needs_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a benchmark.

    Attributes:
        repeats: turns of each contender after its first run, which only warms up.
        budget: seconds to fill with runs in the turn of a short contender.
        threads: for every contender.
        peers: whether peers run.
        notify: receives a line before each contender's first run.
        installed: whether a package can be used here.
        compare: what measures contenders; see the function of this name.
    """

    repeats: int = 5
    budget: float = 0.5
    threads: int = 1
    peers: bool = True
    notify: Callable[[str], None] = lambda line: None
    installed: Callable[[str], bool] = installed
    compare: Callable[..., dict[str, Measurement]] = field(default_factory=lambda: compare)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of a contender.

    Attributes:
        name: the contender's.
        seconds: one per turn; empty if it failed.
        warm: False if the only number is that of a first run.
        peak_bytes: highest resident set of the whole process since it was prepared, if known.
        extra_bytes: how far one run raises the resident set, if requested.
        details: what else the job measured.
        note: why there is no number, if so.
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


def compare(
    title: str, contenders: Sequence[Contender], settings: Settings, *, memory: bool = False
) -> dict[str, Measurement]:
    """Return measurements of contenders that take turns in fresh processes.

    All first runs come first; a contender slower than its patience ends there. The others then take turns, so
    that a drifting machine drifts for all of them.

    Args:
        title: what is measured, for progress.
        contenders: what to measure.
        settings: of the benchmark.
        memory: whether to run each once more for its extra memory.

    Returns:
        Contender's name -> measurement, in the order given; without peers that are excluded or not installed.
    """
    runners = [
        _Runner(c)
        for c in contenders
        if (settings.peers or not c.peer) and all(map(settings.installed, c.packages))
    ]
    try:
        for runner in runners:
            runner.start(settings.threads)
        for runner in runners:
            runner.ready()
        for runner in runners:
            settings.notify(f"{title}: {runner.contender.name}")
            runner.first()
        for _ in range(settings.repeats):
            for runner in runners:
                runner.turn(settings)
        for runner in runners if memory else ():
            runner.memory()
    finally:
        for runner in runners:
            runner.close()
    return {runner.contender.name: runner.result() for runner in runners}


def faster(results: Mapping[str, Measurement], ours: str, *others: str) -> float:
    """Return how many times faster one contender is than the fastest of others; NaN without any of them.

    Args:
        results: of `compare`.
        ours: a contender.
        others: contenders.
    """
    times = [results[name].median for name in others if name in results and results[name].seconds]
    return min(times) / results[ours].median if times else math.nan


class _FailedError(Exception):
    """The worker ended or could not run."""


class _Runner:
    """Drives the process of one contender and collects its replies."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.seconds: list[float] = []
        self.warm = True
        self.reply: dict[str, Any] = {}
        self.note = ""
        self.process: subprocess.Popen[str] | None = None
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)

    def start(self, threads: int) -> None:
        """Start the process, if there is memory for it."""
        needs, free = self.contender.needs_bytes, available_memory()
        if free is not None and needs > free:
            self.note = f"not run: needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        else:
            self.process = self._start(threads)

    def ready(self) -> None:
        """Wait until the job is prepared, so that none prepares while another is measured."""
        if self.process:
            self._attempt(None)

    def first(self) -> None:
        """Run once to warm up; a run that takes longer than the patience is the result."""
        reply = self._attempt({"do": "run", "budget": 0}) if self.process else None
        if reply and reply["seconds"] > self.contender.patience:
            self.seconds, self.warm = [reply["seconds"]], False
            self.close()

    def turn(self, settings: Settings) -> None:
        """Take one turn, unless this contender has ended."""
        if self.process and (reply := self._attempt({"do": "run", "budget": settings.budget})):
            self.seconds.append(reply["seconds"])

    def memory(self) -> None:
        """Measure the extra memory of one run, unless this contender has ended."""
        if self.process:
            self._attempt({"do": "memory"})

    def result(self) -> Measurement:
        """Return the measurement."""
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
        """End the process if it is running."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        self.stderr.close()

    def _start(self, threads: int) -> subprocess.Popen[str]:
        """Start the worker."""
        source = str(Path(longscan.__file__).parent.parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",  # a download is no part of a benchmark
        }
        job = {"job": self.contender.job, "arguments": self.contender.arguments}
        return subprocess.Popen(
            [sys.executable, "-m", "longscan.bench.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
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
            self.stderr.seek(0)
            lines = self.stderr.read().decode(errors="replace").strip().splitlines()
            killed = (
                "the system killed it, perhaps out of memory" if code == -9 else f"it ended with code {code}"
            )
            raise _FailedError(lines[-1] if lines and code > 0 else killed)
        reply: dict[str, Any] = json.loads(line)
        return reply
