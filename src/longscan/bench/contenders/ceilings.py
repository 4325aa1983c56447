"""Ceilings: the time a part of the work takes at the fastest rate of the hardware.

Runs in the workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longscan import ops
from longscan.bench.worker import Run

__all__ = ["exp_fma", "matmul", "read_memory"]

PROBE = 10**8  # state updates on every thread: long enough that waking the threads does not count
PRODUCTS = 10**9  # of integers, likewise
# precision of the weights -> types to multiply in: quantised weights may be unpacked
TYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "bf16": (torch.float32, torch.bfloat16),
    "int8": (torch.float32,),
    "int4": (torch.float32,),
    "w8a8": (torch.float32, torch.int8),
    "w4a8": (torch.float32, torch.int8),
}
BITS = {"int8": 16, "int4": 16, "w8a8": 8, "w4a8": 8}  # of activations that integers multiply


def exp_fma(n_states: int) -> Run:
    """Prepare the state updates of a scan that never leave the registers.

    Args:
        n_states: state updates of the work.

    Returns:
        What to measure.
    """

    def run() -> dict[str, Any]:
        rate = ops.native_probe(PROBE)
        if rate is None:
            raise RuntimeError(f"no native library: {ops.native_info().reason}")
        return {"seconds": n_states / rate}

    return run


def matmul(n_rows: int, shapes: list[list[float]], backward: bool, precision: str = "float32") -> Run:
    """Prepare the matrix products of a model; one of each size is measured.

    Args:
        n_rows: tokens.
        shapes: (width in, width out, how many) of the weights of each size.
        backward: whether to multiply for the gradients of inputs and weights too.
        precision: of the weights; the fastest of their TYPES counts, or for integers the rate of their
            arithmetic with operands from the first cache.

    Returns:
        What to measure.
    """
    products: list[tuple[Tensor, Tensor]] = []
    times: list[float] = []
    for n_in, n_out, n in shapes:
        x, weight = torch.randn(n_rows, int(n_in)), torch.randn(int(n_out), int(n_in))
        dy = torch.randn(n_rows, int(n_out))
        more = [(x, weight.T), *([(dy, weight), (dy.T, x)] if backward else [])]
        products += more
        times += [n] * len(more)

    n_products = sum(
        n * x.shape[0] * x.shape[1] * y.shape[1] for n, (x, y) in zip(times, products, strict=True)
    )
    ways = [(kind, way) for kind in TYPES[precision] for way in WAYS[kind]]
    cast = {kind: [(_as(x, kind), _as(y, kind)) for x, y in products] for kind in TYPES[precision]}

    def seconds(multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
        begin = time.perf_counter()
        multiply(left, right)
        return time.perf_counter() - begin

    def run() -> dict[str, Any]:
        # each product by the fastest type and library of torch
        best = (min(seconds(way, *cast[kind][i]) for kind, way in ways) for i in range(len(products)))
        total = sum(n * each for n, each in zip(times, best, strict=True))
        rate = ops.native_multiply_probe(PRODUCTS, BITS[precision]) if precision in BITS else None
        return {"seconds": total if rate is None else min(total, n_products / rate)}

    return run


WAYS: dict[torch.dtype, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    torch.float32: (torch.mm, ops.multiply),
    torch.bfloat16: (torch.mm,),
    torch.int8: (torch._int_mm,),
}


def _as(x: Tensor, kind: torch.dtype) -> Tensor:
    """Return a matrix of random numbers as another type, for int8 in the range of quantised weights."""
    return (x * 32).round().clamp(-127, 127).to(kind) if kind == torch.int8 else x.to(kind)


def read_memory(n_bytes: float, probe: int) -> Run:
    """Prepare reading uncached memory with all threads, at full bandwidth.

    Args:
        n_bytes: the work has to read.
        probe: bytes that are read to measure the bandwidth.

    Returns:
        What to measure.
    """

    def run() -> dict[str, Any]:
        rate = ops.native_read_probe(probe)
        if rate is None:
            raise RuntimeError(f"no native library: {ops.native_info().reason}")
        return {"seconds": n_bytes / rate}

    return run
