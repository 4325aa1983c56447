"""RMSNorm (arXiv 1910.07467), with the gate of Mamba-2 before or after it.

norm(u) = u / sqrt(mean(u^2) + eps) * weight       of each group of adjacent channels
y = norm(x),   norm(x silu(z))   or   norm(x) silu(z)
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _native
from longscan.ops._derivatives import composed, register_second

__all__ = ["rms_norm", "rms_norm_ref"]

# --- 1. the equation ----------------------------------------------------------------------------------------


def rms_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    n_groups: int = 1,
    norm_first: bool = False,
) -> Tensor:
    """Return the result of :func:`rms_norm`, in torch's own operations."""
    u = x if z is None or norm_first else x * F.silu(z)
    groups = torch.unflatten(u, -1, (n_groups, -1))
    y = F.rms_norm(groups, groups.shape[-1:], None, eps).flatten(-2)
    y = y if weight is None else y * weight
    return y if z is None or not norm_first else y * F.silu(z)


# --- 2. the op ----------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    n_groups: int = 1,
    norm_first: bool = False,
) -> Tensor:
    """Return vectors divided by the root of their mean square, computed in at least float32.

    Args:
        x: (..., width), any float type.
        weight: (width,), or None for ones.
        eps: added to the mean square.
        z: (..., width) the gate, if there is one.
        n_groups: of adjacent channels, each with a mean square of its own.
        norm_first: whether the gate comes after the norm.

    Returns:
        (..., width) in x's dtype.

    Raises:
        ValueError: shapes do not fit.
    """
    if not x.dim() or not x.shape[-1] or n_groups < 1 or x.shape[-1] % n_groups:
        raise ValueError(
            f"x: expected (..., width) with width a multiple of {n_groups}, got {tuple(x.shape)}"
        )
    for name, tensor, shape in (("weight", weight, x.shape[-1:]), ("z", z, x.shape)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = [None if t is None else t.to(dtype) for t in (x, weight, z)]
    norm: Any = _composite if composed() or not x.numel() else torch.ops.longscan.rms_norm
    return norm(*wide, eps, n_groups, norm_first).to(x.dtype)  # type: ignore[no-any-return]


def _composite(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, n_groups: int, norm_first: bool
) -> Tensor:
    return rms_norm_ref(x, weight, eps, z, n_groups, norm_first)


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor x, Tensor? weight, Tensor? z, float eps, int n_groups, bool norm_first"
_lib.define(f"rms_norm({_INPUTS}) -> Tensor")
# An absent optional input has an empty gradient.
_lib.define(f"rms_norm_backward({_INPUTS}, Tensor dy) -> (Tensor dx, Tensor dweight, Tensor dz)")


# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::rms_norm", lib=_lib)
def _(x, weight, z, eps, n_groups, norm_first):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("longscan::rms_norm_backward", lib=_lib)
def _(x, weight, z, eps, n_groups, norm_first, dy):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(0 if t is None else t.shape) for t in (x, weight, z))


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.n_groups, ctx.norm_first = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    settings = (ctx.eps, ctx.n_groups, ctx.norm_first)
    grads = torch.ops.longscan.rms_norm_backward(*tensors, *settings, dy)
    return *(g if t is not None else None for g, t in zip(grads, tensors, strict=True)), None, None, None


def _backward_torch(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    n_groups: int,
    norm_first: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward op on any device and in float64: du = (g - n mean(g n)) / sqrt(mean(u^2) + eps)."""
    gate = None if z is None else F.silu(z)
    u = x if gate is None or norm_first else x * gate
    groups = torch.unflatten(u, -1, (n_groups, -1))
    scale = (groups.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = groups * scale
    dout = dy * gate if gate is not None and norm_first else dy
    g = torch.unflatten(dout if weight is None else dout * weight, -1, (n_groups, -1))
    du = (scale * (g - normed * (g * normed).mean(-1, keepdim=True))).flatten(-2)
    normed = normed.flatten(-2)
    empty = x.new_empty(0)
    dweight = empty if weight is None else (dout * normed).reshape(-1, x.shape[-1]).sum(0)
    if z is None or gate is None:
        return du, dweight, empty
    dgate = dy * (normed if weight is None else normed * weight) if norm_first else du * x
    s = torch.sigmoid(z)
    return du if norm_first else du * gate, dweight, dgate * s * (1 + z * (1 - s))


torch.library.register_autograd("longscan::rms_norm", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::rms_norm_backward", _lib, lambda *inputs: (_composite(*inputs),), n_inputs=6)


# --- 5. the native kernel -----------------------------------------------------------------------------------

_UNITS = 64  # LS_NORM_UNITS of the kernel


def _rows(x: Tensor) -> Tensor:
    """Return x (..., width) as (rows, width), a view if rows are evenly spaced."""
    x = _native.rows(x)
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x.reshape(-1, x.shape[-1])


def _fields(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, n_groups: int, norm_first: bool
) -> list[int]:
    """Return the C struct ``ls_rms_norm`` up to the weight."""
    (bits,) = struct.unpack("q", struct.pack("d", eps))
    sizes = (len(x), n_groups, x.shape[1] // n_groups, int(norm_first))
    strides = (x.stride(0), 0 if z is None else z.stride(0))
    return [*sizes, *strides, bits, *map(_native.pointer, (x, z, weight))]


def _forward(x, weight, z, *settings):  # type: ignore[no-untyped-def]
    if not _native.available(x, weight, z):
        return _composite(x, weight, z, *settings)
    y = x.new_empty(x.shape)
    x, weight, z = _rows(x), _native.dense(weight), None if z is None else _rows(z)
    _native.call("ls_rms_norm_forward", [*_fields(x, weight, z, *settings), y.data_ptr(), *[0] * 6])
    return y


def _backward(x, weight, z, eps, n_groups, norm_first, dy):  # type: ignore[no-untyped-def]
    settings = (eps, n_groups, norm_first)
    if not _native.available(x, weight, z, dy):
        return _backward_torch(x, weight, z, *settings, dy)
    gradients = [x.new_empty(0 if t is None else t.shape) for t in (x, weight, z)]
    dx, dweight, dz = gradients
    x, weight, z, dy = _rows(x), _native.dense(weight), None if z is None else _rows(z), _rows(dy)
    workspace = x.new_empty(0 if weight is None else _UNITS * x.shape[1])
    rest = [0, dy.data_ptr(), dy.stride(0), *(t.data_ptr() for t in (dx, dz, dweight, workspace))]
    _native.call("ls_rms_norm_backward", [*_fields(x, weight, z, *settings), *rest])
    return tuple(gradients)


_lib.impl("rms_norm", _forward, "CompositeExplicitAutograd")
_lib.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")
