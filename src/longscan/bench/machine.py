"""The machine that the numbers were measured on, and the load of other processes on it."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import longscan
from longscan import ops

__all__ = ["OthersLoad", "installed", "machine", "multiplies_bf16", "versions"]

_PACKAGES = ("torch", "numpy", "mambapy", "transformers", "peft", "lm-eval", "llama-cpp-python", "openvino")


def machine(threads: int) -> dict[str, Any]:
    """Return a description of this machine.

    Args:
        threads: of every contender.

    Returns:
        cpu, cores, threads, memory_bytes, system, backend (longscan's kernels).
    """
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": ops.backend(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, longscan, torch and the peers that are installed."""
    packages = {name: version for name in _PACKAGES if (version := _version(name))}
    return {"python": platform.python_version(), "longscan": longscan.__version__, **packages}


def installed(package: str) -> bool:
    """Return whether a package can be used here."""
    return _version(package) is not None


def multiplies_bf16() -> bool:
    """Return whether the processor multiplies bfloat16; where it does not, torch takes minutes for it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(text.split())


class OthersLoad:
    """The share of the machine that other processes take from now on; children of this one are not others.

    A child counts once it has ended and been waited for, so ask after that.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Return the share of all cores since the start, from 0 to 1; None if unknown."""
        if self._start is None or (now := self._now()) is None:
            return None
        elapsed, busy, own = (after - before for after, before in zip(now, self._start, strict=True))
        return max(0.0, busy - own) / max(elapsed * (os.cpu_count() or 1), 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Return seconds: on the clock, busy over all cores, taken by this process and its ended children."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def _version(package: str) -> str | None:
    """Return the installed version of a package, None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Return the number of cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"
