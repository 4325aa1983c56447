"""Compress a signal online into HiPPO coefficients and reconstruct it from them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from longscan.data.signals import Signal, Trace
from longscan.models.hippo_memory import Memory

__all__ = ["Remembered", "remember"]


@dataclass(frozen=True)
class Remembered:
    """A compressed signal and its reconstruction.

    Attributes:
        memory: after the last sample.
        seconds: the duration of the compression, loading the signal included.
        samples: the number of samples that are reconstructed.
        energy: mean square of these samples.
        error: mean squared error of the reconstruction.
        trace: the reconstruction.
    """

    memory: Memory
    seconds: float
    samples: int
    energy: float
    error: float
    trace: Trace


def remember(signal: Signal, memory: Memory) -> Remembered:
    """Return a signal compressed and reconstructed, piece by piece: memory use does not grow with its length.

    Args:
        signal: of at least one sample.
        memory: an empty one of one channel.

    Raises:
        LongscanError: the signal can't be read or is not finite.
    """
    start = time.perf_counter()
    for _, samples in signal.pieces():
        memory.write(samples)
    seconds, oldest = time.perf_counter() - start, memory.oldest
    trace, energy, error = Trace.empty(signal.length, signal.rate), 0.0, 0.0
    for begin, samples in signal.pieces(start=oldest):
        reconstruction = memory.reconstruct(torch.arange(begin, begin + len(samples)))[0]
        energy += float(samples.double().square().sum())
        error += float((reconstruction - samples).square().sum())
        trace.add(begin, reconstruction, signal.length)
    count = signal.length - oldest
    return Remembered(memory, seconds, count, energy / count, error / count, trace)
