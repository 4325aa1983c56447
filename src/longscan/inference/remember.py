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
    """What became of a signal.

    Attributes:
        memory: after the last sample.
        seconds: the time it took to take the signal in, reading it included.
        samples: how many of them can be told.
        energy: mean square of these.
        error: mean square of what is told wrongly.
        trace: what is told.
    """

    memory: Memory
    seconds: float
    samples: int
    energy: float
    error: float
    trace: Trace


def remember(signal: Signal, memory: Memory) -> Remembered:
    """Compress a signal, then tell it, piece by piece: memory does not grow with its length.

    Args:
        signal: of at least one sample.
        memory: an empty one of one channel.

    Returns:
        The coefficients, the error and what it took.

    Raises:
        LongscanError: the signal can't be read or is not finite.
    """
    start = time.perf_counter()
    for _, samples in signal.pieces():
        memory.write(samples)
    seconds, oldest = time.perf_counter() - start, memory.oldest
    trace, energy, error = Trace.empty(signal.length, signal.rate), 0.0, 0.0
    for begin, samples in signal.pieces(start=oldest):
        told = memory.reconstruct(torch.arange(begin, begin + len(samples)))[0]
        energy += float(samples.double().square().sum())
        error += float((told - samples).square().sum())
        trace.add(begin, told, signal.length)
    count = signal.length - oldest
    return Remembered(memory, seconds, count, energy / count, error / count, trace)
