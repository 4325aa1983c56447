"""Errors that mean that memory ran out, however Python, NumPy, torch and the loader of libraries say so."""

from __future__ import annotations

import contextlib
import errno
import re

__all__ = ["out_of_memory"]

_ASKED = re.compile(
    r"tried to allocate (?P<torch>[\d.]+) ?(?P<unit>[KMGTP]iB|bytes)|"
    r"Unable to allocate (?P<numpy>[\d.]+) (?P<numpy_unit>[KMGTP]iB|bytes)",
    re.IGNORECASE,
)
_SHORT = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|failed to map segment|"
    r"Cannot allocate memory|unable to mmap|Unable to allocate|CUDA out of memory|can't start new thread",
    re.IGNORECASE,
)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}


def out_of_memory(error: BaseException) -> str | None:
    """Return what to print of an error that means that memory ran out; None if it means something else.

    Args:
        error: any.
    """
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not short and not (isinstance(error, (RuntimeError, ImportError)) and _SHORT.search(str(error))):
        return None
    asked = _ASKED.search(str(error))
    what = "memory ran out"
    if asked:
        number, unit = (asked["torch"] or asked["numpy"]), (asked["unit"] or asked["numpy_unit"])
        what += f": {_size(float(number) * _UNITS[unit.lower()])} more could not be allocated"
    limit = _limit()
    if limit is not None:
        what += f", and the limit of this process is {_size(limit)} (ulimit -v)"
        remedy = "Raise the limit"
    else:
        remedy = "Close other programs"
    return f"{what}. {remedy}, or choose a smaller model, batch or sequence, or a narrower precision."


def _limit() -> int | None:
    """Return the limit of this process's address space in bytes; None if it has none."""
    with contextlib.suppress(ImportError):  # which only Unix has
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        return None if soft == resource.RLIM_INFINITY else soft
    return None


def _size(n_bytes: float) -> str:
    """Return a size with its unit: "1.5 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.1f} {unit}"
    return f"{n_bytes:,.0f} bytes"
