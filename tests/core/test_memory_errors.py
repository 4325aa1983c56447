"""Memory that runs out is said to have run out, by whatever part of the program it was."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from longscan.core.memory_errors import out_of_memory

HUGE = 10**15


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (lambda: torch.empty(HUGE), "memory ran out: 4,000,000.0 GB more could not be allocated"),
        (lambda: np.empty(HUGE, np.float32), "memory ran out: 3,996,944.7 GB more"),  # rounded, in PiB
        (lambda: bytearray(HUGE), "memory ran out"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_errors(allocate: Callable[[], object], said: str) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    message = out_of_memory(caught.value)
    assert message
    assert message.startswith(said)
    assert "choose a smaller model, batch or sequence" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
)
def test_what_means_the_same(error: Exception) -> None:
    assert str(out_of_memory(error)).startswith("memory ran out")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ImportError("no module named x"), OSError(2, "No such file")]
)
def test_what_means_something_else(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_a_limit_on_the_address_space() -> None:
    """As with `ulimit -v`: too little to load torch."""
    done = subprocess.run(
        [sys.executable, "-m", "longscan", "generate", "Call me"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (350_000_000, 350_000_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the limit of this process is 350.0 MB (ulimit -v). Raise the limit" in done.stderr
    assert "bug in longscan" not in done.stderr
