"""HiPPO-LegS with the zero-order hold, in closed form.

The coefficients of a piecewise constant signal are differences of the integrals of Legendre polynomials;
those of an earlier signal, followed by zeros, are a linear map of its coefficients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["hold", "hold_adjoint", "legendre", "stretch"]


def legendre(x: Tensor, n: int) -> Iterator[Tensor]:
    """Yield the Legendre polynomials of degree 0, 1, ... n - 1 at x, by their three-term recurrence."""
    before, now = torch.zeros_like(x), torch.ones_like(x)
    for degree in range(n):
        yield now
        before, now = now, ((2 * degree + 1) * x * now - degree * before) / (degree + 1)


def _edges(samples: int, start: int, like: Tensor) -> Tensor:
    """Return the edges of the samples, in [-1, 1] over the whole past: (samples + 1,) float64."""
    edges = torch.arange(start, start + samples + 1, dtype=torch.float64, device=like.device)
    return 2 * edges / (start + samples) - 1


def _integrals(x: Tensor, n: int) -> Iterator[Tensor]:
    """Yield sqrt(2 degree + 1) / 2 times the integral from -1 to x of each polynomial below degree n."""
    yield (x + 1) / 2
    before = iter(legendre(x, n + 1))
    lower, middle = next(before), next(before)
    for degree, upper in enumerate(before, 1):  # (2 d + 1) P_d is the derivative of P_{d+1} - P_{d-1}
        yield (upper - lower) / (2 * math.sqrt(2 * degree + 1))
        lower, middle = middle, upper


def hold(f: Tensor, state: Tensor, start: int) -> Tensor:
    """Return the coefficients (channels, n) after the samples f (channels, samples)."""
    channels, samples = f.shape
    zero = f.new_zeros(channels, 1)
    # the sum of f_k (integral to its right edge - to its left edge), with each edge taken once
    drops = torch.cat([zero, f], 1) - torch.cat([f, zero], 1)  # (channels, samples + 1)
    edges = _edges(samples, start, f)
    new = [drops @ row.to(f.dtype) for row in _integrals(edges, state.shape[1])]
    stretched = state @ stretch(state.shape[1], start, start + samples).to(state).mT
    return stretched + torch.stack(new, 1)


def hold_adjoint(dfinal: Tensor, samples: int, start: int) -> Tensor:
    """Return the gradient of each sample, (channels, samples)."""
    df = dfinal.new_zeros(len(dfinal), samples)
    for weight, row in zip(
        dfinal.unbind(1), _integrals(_edges(samples, start, dfinal), dfinal.shape[1]), strict=True
    ):
        df += weight[:, None] * row.diff().to(df.dtype)
    return df


def stretch(n: int, start: int, end: int) -> Tensor:
    """Return the map (n, n) float64 from coefficients over `start` samples to those over `end`, after zeros.

    The integrand is a polynomial of degree below 2 n, so Gauss quadrature with n nodes is exact.
    """
    if not start:
        return torch.zeros(n, n, dtype=torch.float64, device="cpu")
    nodes, weights = (torch.from_numpy(values) for values in _gauss(n))
    ratio = start / end
    norm = (2 * torch.arange(n, dtype=torch.float64, device="cpu") + 1).sqrt()[:, None]
    old = norm * torch.stack(list(legendre(nodes, n)))  # (n, nodes)
    new = norm * torch.stack(list(legendre((nodes + 1) * ratio - 1, n)))
    return (new * weights) @ old.mT * (ratio / 2)


@functools.cache
def _gauss(n: int) -> tuple[Any, Any]:
    """Return the nodes and weights of Gauss-Legendre quadrature."""
    return np.polynomial.legendre.leggauss(n)
