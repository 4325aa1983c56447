"""Dropout: how much, how even, and what flows back."""

from __future__ import annotations

import pytest
import torch

from longscan.ops import dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_the_share_that_is_dropped_and_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(501, 399, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    kept = y != 0
    n = x.numel()
    assert abs((~kept).double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
    rows, columns = kept.double().mean(0), kept.double().mean(1)  # the same everywhere
    assert rows.std() < 1.3 * (p * (1 - p) / 501) ** 0.5
    assert columns.std() < 1.3 * (p * (1 - p) / 399) ** 0.5
    neighbours = (kept[:, 1:].double() - 1 + p) * (kept[:, :-1].double() - 1 + p)
    assert abs(neighbours.mean()) < 4 * p * (1 - p) / n**0.5  # one decision tells nothing of the next
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_nothing_happens_outside_training_or_at_zero() -> None:
    x = torch.randn(3)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (5, 7, 3)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape).transpose(0, -1) if shape else torch.ones(shape)
    y = dropout(x, 0.5)
    assert y.shape == x.shape
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_the_seed_decides() -> None:
    x = torch.ones(100)
    torch.manual_seed(3)
    one, other = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(one, dropout(x, 0.5))
    assert not torch.equal(one, other)
