"""mamba_ssm.ops.triton.layernorm_gated: norms with a gate, over the whole width or groups of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import expect, requires_tensors
from longscan.compat.norms import wide

__all__ = ["LayerNorm", "RMSNorm", "check_gated", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]


@requires_tensors
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Return norm(x) silu(z), or norm(x silu(z)).

    Args:
        x: (..., width).
        weight: (width,).
        bias: (width,).
        z: (..., width), the gate.
        eps: of the norm.
        group_size: channels of a group, normalised by itself; all if None.
        norm_before_gate: whether the norm comes before the gate.
        is_rms_norm: whether the norm is an RMS norm.

    Returns:
        (..., width) in x's dtype.
    """
    check_gated(x, weight, bias, z)
    if group_size and x.shape[-1] % group_size:
        raise ValueError(f"group_size: expected a divisor of the width {x.shape[-1]}, got {group_size}")
    if is_rms_norm and bias is None:
        n_groups = x.shape[-1] // (group_size or x.shape[-1])
        gate = None if z is None else wide(z)
        return ops.rms_norm(wide(x), weight, eps, gate, n_groups, norm_before_gate).to(x.dtype)
    y, gate = wide(x), None if z is None else F.silu(wide(z))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = torch.unflatten(y, -1, (-1, group_size or y.shape[-1]))
    if is_rms_norm:
        groups = F.rms_norm(groups, groups.shape[-1:], eps=eps)
    else:
        groups = F.layer_norm(groups, groups.shape[-1:], eps=eps)
    y = groups.flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


def check_gated(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None) -> None:
    """Check the tensors of `layernorm_fn`.

    Raises:
        ValueError: a shape doesn't fit.
        TypeError: a dtype doesn't.
    """
    expect({}, x=(x, x.shape))
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., width), got ()")
    expect({}, weight=(weight, x.shape[-1:]), bias=(bias, x.shape[-1:]), z=(z, x.shape))


@requires_tensors
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Return the result of `layernorm_fn` with an RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


@requires_tensors
def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """Return the result of `rmsnorm_fn`, which always computes in float32: upcast is without effect."""
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


class _GatedNorm(nn.Module):
    is_rms_norm = False
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.zeros_like(self.weight))
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the gated norm (..., hidden_size) of x, with the gate z of this shape."""
        settings = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, z, *settings)


class LayerNorm(_GatedNorm):
    """A layer norm with a gate.

    Args:
        hidden_size: the width.
        eps: see `layernorm_fn`; likewise the others.
        group_size: likewise.
        norm_before_gate: likewise.
        device: of the parameters.
        dtype: of the parameters.
    """


class RMSNorm(_GatedNorm):
    """An RMS norm with a gate; arguments as of `LayerNorm`."""

    is_rms_norm = True
