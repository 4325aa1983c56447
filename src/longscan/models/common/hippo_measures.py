"""The measures of HiPPO, the equations they give, and their discretisation.

A measure weights the past. The coefficients of the past's best approximation by n orthogonal functions under
it follow the signal f by a linear equation, c' = A c + B f, whose A and B are known in closed form. HiPPO
(arXiv 2008.07669), LSSL and S4 start from them. The Fourier measures are of How to Train Your HiPPO, Gu,
Johnson, Timalsina, Rudra and Ré, 2022, arXiv 2206.12037.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longscan import ops
from longscan.core.config import nearest
from longscan.errors import LongscanError

__all__ = ["MEASURES", "SPANS", "held", "transition", "transitions"]


def transition(measure: str, n: int) -> tuple[Tensor, Tensor]:
    """Return the equation c' = A c + B f by which coefficients of the past follow the signal f.

    For "legs" it is c' = (A c + B f) / t. A window has length 1, that of "fourier" length 2; for a window r
    times as long, divide A and B by r.

    Args:
        measure: a key of MEASURES.
        n: number of coefficients; even for the Fourier measures.

    Returns:
        A: (n, n) float64, stable.
        B: (n,) float64.

    Raises:
        LongscanError: there is no such measure, or it has no such n.
    """
    if measure not in MEASURES:
        raise LongscanError(f"no measure called {measure!r}{nearest(measure, MEASURES)}")
    if n < 1:
        raise LongscanError(f"n: expected at least 1 coefficient, got {n}.")
    return MEASURES[measure](n)


def _degrees(n: int) -> tuple[Tensor, Tensor]:
    """Return the degrees 0, 1, ... and the norms sqrt(2 degree + 1) of Legendre's polynomials, each (n,)."""
    degree = torch.arange(n, dtype=torch.float64)
    return degree, (2 * degree + 1).sqrt()


def _legt(n: int) -> tuple[Tensor, Tensor]:
    """A sliding window with uniform weight."""
    degree, norm = _degrees(n)
    lag = degree[:, None] - degree  # row minus column
    sign = torch.where(lag < 0, 1 - 2 * (lag % 2), 1.0)
    return -torch.outer(norm, norm) * sign, norm


def _lmu(n: int) -> tuple[Tensor, Tensor]:
    """The window of "legt" in the scaling of the Legendre Memory Unit (Voelker et al. 2019)."""
    A, B = _legt(n)
    degree, norm = _degrees(n)
    scale = norm * (1 - 2 * (degree % 2))
    return scale[:, None] * A / scale, scale * B


def _lagt(n: int) -> tuple[Tensor, Tensor]:
    """An exponentially decaying weight: orthonormal Laguerre functions."""
    ones = torch.ones(n, n, dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) / 2 - ones.tril(), ones[0]


def _tlagt(n: int) -> tuple[Tensor, Tensor]:
    """An exponentially decaying weight: Laguerre polynomials, the form the paper prints."""
    ones = torch.ones(n, n, dtype=torch.float64)
    return -ones.tril(), ones[0]


def _waves(n: int) -> tuple[Tensor, Tensor]:
    """Return R (n, n), which rotates pairs of coefficients by 0, 1, ... per unit of angle, and B (n,)."""
    if n % 2:
        raise LongscanError(f"n: expected an even number, for pairs of cosine and sine, got {n}.")
    turns = torch.zeros(n - 1, dtype=torch.float64)
    turns[::2] = torch.arange(n // 2)
    B = torch.zeros(n, dtype=torch.float64)
    B[::2], B[0] = math.sqrt(2), 1  # the constant is its own norm; its sine, entry 1, stays zero
    return torch.diag(turns, -1) - torch.diag(turns, 1), B


def _fourier(n: int) -> tuple[Tensor, Tensor]:
    """A sliding window of length 2, as a Fourier series."""
    R, B = _waves(n)
    return math.pi * R - torch.outer(B, B), B


def _foud(n: int) -> tuple[Tensor, Tensor]:
    """An exponentially decaying weight, as a Fourier series of period 1."""
    R, B = _waves(n)
    return 2 * math.pi * R - torch.eye(n, dtype=torch.float64) / 2, B


#: name -> its n -> A, B; "legs" weights the whole past uniformly
MEASURES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": ops.legs_matrices,
    "legt": _legt,
    "lmu": _lmu,
    "lagt": _lagt,
    "tlagt": _tlagt,
    "fourier": _fourier,
    "foud": _foud,
}

#: how far back n functions reconstruct, in the measure's own time: the window, or what has not decayed yet
SPANS: dict[str, Callable[[int], float]] = {
    "legs": lambda n: 1.0,
    "legt": lambda n: 1.0,
    "lmu": lambda n: 1.0,
    "lagt": lambda n: 2.0 * n,
    "tlagt": lambda n: 8.0,
    "fourier": lambda n: 2.0,
    "foud": lambda n: 1.0,
}


@functools.lru_cache(maxsize=32)
def held(measure: str, n: int, dt: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A_bar (n, n) and B_bar (n,) of a measure other than "legs", by zero-order hold.

    Args:
        measure: a key of MEASURES.
        n: number of coefficients.
        dt: duration of a sample, in the measure's own time.
    """
    with torch.device("cpu"):
        A, B = transition(measure, n)
        both = torch.zeros(n + 1, n + 1, dtype=torch.float64)  # f is a constant state: A may be singular
    both[:n, :n], both[:n, n] = A * dt, B * dt
    step = torch.matrix_exp(both).numpy()
    return step[:n, :n], step[:n, n]


def transitions(
    measure: str, n: int, dt: float, seen: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the discretised equation for the next sample, given how many came before it.

    Args:
        measure: a key of MEASURES.
        n: number of coefficients.
        dt: duration of a sample, see `held`; "legs" has none.
        seen: numbers of samples so far.

    Returns:
        A_bar: (len(seen), n, n); (1, n, n) if the measure is not "legs", where all are the same.
        B_bar: (len(seen), n) or (1, n).
    """
    if measure != "legs":
        A_bar, B_bar = held(measure, n, dt)
        return A_bar[None], B_bar[None]
    blocks = [(_legs_steps(n, k // _STEPS), k % _STEPS) for k in seen]
    return np.stack([A[i] for (A, _), i in blocks]), np.stack([B[i] for (_, B), i in blocks])


_STEPS = 64  # steps of "legs" computed at a time


@functools.lru_cache(maxsize=64)
def _legs_steps(n: int, block: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A_bar and B_bar of each sample of a block, by the bilinear rule."""
    with torch.device("cpu"):
        A, B = (matrix.numpy() for matrix in ops.legs_matrices(n))
    k = np.arange(block * _STEPS + 1, (block + 1) * _STEPS + 1)[:, None, None]
    both = np.linalg.solve(
        np.eye(n) - A / (2 * k), np.concatenate([np.eye(n) + A / (2 * k), B[:, None] / k], 2)
    )
    return both[..., :n], both[..., n]
