"""The norms with residuals and gates against their formulas, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat import fused_kernels, gated_norms, norms, norms_v1

WIDTH = 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, RESIDUAL, X1 = (normal(2, 5, WIDTH, seed=seed) for seed in range(3))
WEIGHT, BIAS, WEIGHT1, BIAS1 = (normal(WIDTH, seed=seed) for seed in range(3, 7))


def literal(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, is_rms_norm: bool, eps: float = 1e-6
) -> Tensor:
    centred = x if is_rms_norm else x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def close(ours: Any, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_norm_and_residual(is_rms_norm: bool, bias: Tensor | None) -> None:
    settings: dict[str, Any] = {"is_rms_norm": is_rms_norm, "eps": 1e-3}
    close(norms.layer_norm_fn(X, WEIGHT, bias, **settings), literal(X, WEIGHT, bias, **settings))
    y, total = norms.layer_norm_fn(X, WEIGHT, bias, RESIDUAL, prenorm=True, **settings)
    close(total, X + RESIDUAL)
    close(y, literal(X + RESIDUAL, WEIGHT, bias, **settings))


def test_parallel_norms_rowscale_and_the_linear_map() -> None:
    y, y1, total = norms.layer_norm_fn(
        X, WEIGHT, BIAS, RESIDUAL, X1, WEIGHT1, BIAS1, prenorm=True, is_rms_norm=True
    )
    close(total, X + X1 + RESIDUAL)
    close(y, literal(X + X1 + RESIDUAL, WEIGHT, BIAS, is_rms_norm=True))
    close(y1, literal(X + X1 + RESIDUAL, WEIGHT1, BIAS1, is_rms_norm=True))
    scale = normal(2, 5, seed=8)
    scaled = norms.rms_norm_fn(X, WEIGHT, None, rowscale=scale)
    close(scaled, literal(X * scale[..., None], WEIGHT, None, is_rms_norm=True))
    M = normal(3, WIDTH, seed=9)
    mapped, total = norms.layer_norm_linear_fn(X, WEIGHT, BIAS, M, None, RESIDUAL, prenorm=True)
    close(mapped, literal(X + RESIDUAL, WEIGHT, BIAS, is_rms_norm=False) @ M.T)
    close(total, X + RESIDUAL)
    with pytest.raises(NotImplementedError, match="rowscale"):
        norms.layer_norm_fn(X, WEIGHT, BIAS, x1=X1, rowscale=scale)


def test_gradients() -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (X, WEIGHT, BIAS, RESIDUAL)]

    def both(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return norms.layer_norm_fn(x, weight, bias, residual, prenorm=True, is_rms_norm=True)

    assert torch.autograd.gradcheck(both, leaves)


def test_dropout_returns_what_is_left() -> None:
    torch.manual_seed(0)
    y, total, mask, none = norms.layer_norm_fn(
        X, WEIGHT, BIAS, RESIDUAL, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert none is None
    assert 0 < mask.double().mean() < 1
    close(total, X * mask / 0.75 + RESIDUAL)
    same = norms.layer_norm_ref(X, WEIGHT, BIAS, RESIDUAL, dropout_p=0.25, prenorm=True, dropout_mask=mask)
    close(same[0], y)
    close(same[1], total)


@pytest.mark.parametrize(
    ("residual", "in_fp32", "expected"),
    [
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (torch.float32, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_dtypes(residual: torch.dtype | None, in_fp32: bool, expected: torch.dtype) -> None:
    x = X.bfloat16()
    added = None if residual is None else RESIDUAL.to(residual)
    y, total = norms.rms_norm_fn(x, WEIGHT.float(), None, added, prenorm=True, residual_in_fp32=in_fp32)
    assert (y.dtype, total.dtype) == (torch.bfloat16, expected)


def test_version_1_has_another_order() -> None:
    y, total = norms_v1.layer_norm_fn(X, WEIGHT, BIAS, RESIDUAL, 1e-3, True, False, True)
    close(y, literal(X + RESIDUAL, WEIGHT, BIAS, is_rms_norm=True, eps=1e-3))
    assert torch.equal(norms_v1.rms_norm_fn(X, WEIGHT, BIAS, RESIDUAL, True, False, 1e-3)[0], y)
    close(norms_v1.layer_norm_ref(X, WEIGHT, BIAS, RESIDUAL, 1e-3, True, True)[1], total)
    close(
        norms_v1.rms_norm_ref(X, WEIGHT, BIAS, None, 1e-3),
        literal(X, WEIGHT, BIAS, is_rms_norm=True, eps=1e-3),
    )


def test_rms_norm_module() -> None:
    module = norms.RMSNorm(WIDTH, eps=1e-3, dtype=torch.float64)
    assert module.bias is None
    assert list(module.state_dict()) == ["weight"]
    y, total = module(X, RESIDUAL, prenorm=True)
    close(y, literal(X + RESIDUAL, torch.ones(WIDTH, dtype=torch.float64), None, is_rms_norm=True, eps=1e-3))
    close(total, X + RESIDUAL)


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("kind", [gated_norms.RMSNorm, gated_norms.LayerNorm])
def test_gated_norms(kind: Any, norm_before_gate: bool, group_size: int | None) -> None:
    module = kind(WIDTH, 1e-3, group_size, norm_before_gate, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(WEIGHT)
        if module.bias is not None:
            module.bias.copy_(BIAS)
    gate, is_rms = F.silu(RESIDUAL), kind is gated_norms.RMSNorm
    x = X if norm_before_gate else X * gate
    size = group_size or WIDTH
    parts = [
        literal(part, torch.ones(1, dtype=torch.float64), None, is_rms_norm=is_rms, eps=1e-3)
        for part in x.split(size, dim=-1)
    ]
    expected = torch.cat(parts, -1) * WEIGHT + (0 if is_rms else BIAS)
    close(module(X, RESIDUAL), expected * gate if norm_before_gate else expected)
    inputs = X.clone().requires_grad_(), RESIDUAL.clone().requires_grad_()
    assert torch.autograd.gradcheck(module, inputs)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_gated_norm_forward_and_backward(is_rms_norm: bool) -> None:
    bias = None if is_rms_norm else BIAS
    settings = (2, False, is_rms_norm)
    leaves = [
        tensor if tensor is None else tensor.clone().requires_grad_()
        for tensor in (X, WEIGHT, bias, RESIDUAL)
    ]
    y = gated_norms.layernorm_fn(*leaves, 1e-3, *settings)  # type: ignore[arg-type]
    expected = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], X1))
    out, dz = torch.empty_like(X), torch.empty_like(X)
    first, *_ = fused_kernels._layer_norm_fwd(X, WEIGHT, bias, 1e-3, RESIDUAL, out, *settings)
    assert first is out
    close(out, y.detach())
    *found, again = fused_kernels._layer_norm_bwd(
        *(X1, X, WEIGHT, bias, 1e-3, None, None, RESIDUAL, *settings, True, dz)
    )
    assert found[3] is dz
    close(again, y.detach())
    for gradient, leaf in zip(found, leaves, strict=True):
        if leaf is not None:
            close(gradient, next(expected))
