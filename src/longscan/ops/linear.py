"""The linear map y = x W^T + b, by the fastest multiplication on this processor.

Few rows, as in decoding, go to a kernel that streams the weights once, at memory bandwidth. Many rows go to
torch: to oneDNN where MKL takes a slow path (AMD processors with AVX-512), else to torch's default.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _native
from longscan.ops._autocast import exact
from longscan.ops._derivatives import register_second

FEW_ROWS = 8

# --- 1. the equation ----------------------------------------------------------------------------------------


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the result of :func:`linear`, computed by torch."""
    return F.linear(x, weight, bias)


# --- 2. the op ----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, like torch.nn.functional.linear, but faster on some processors.

    Under autocast it is torch's own.

    Args:
        x: (..., n_in).
        weight: (n_out, n_in), in x's dtype.
        bias: (n_out,).

    Returns:
        (..., n_out).
    """
    if not _native.available(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    multiply_add: Any = _forward if _native.direct(weight) else torch.ops.longscan.linear
    y: Tensor = multiply_add(x, weight, bias)
    return y


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_lib.define("linear_backward(Tensor x, Tensor weight, Tensor dy) -> (Tensor dx, Tensor dweight)")

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::linear", lib=_lib)
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("longscan::linear_backward", lib=_lib)
def _(x, weight, dy):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _autograd(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = dweight = None
    if needs_weight:
        dx, dweight = torch.ops.longscan.linear_backward(x, weight, dy)
    elif needs_x:  # a frozen weight, as under an adapter, costs no gradient and keeps no input
        dx = torch.ops.longscan.linear(dy, weight.T, None)
    return dx, dweight, dy.flatten(0, -2).sum(0) if needs_bias else None


def _composite(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    """Run the op without the bias, whose gradient `_autograd` computes."""
    return (F.linear(x, weight),)


torch.library.register_autograd("longscan::linear", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::linear_backward", _lib, _composite, n_inputs=2)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, without gradients.

    Args:
        a: (m, k), any strides.
        b: (k, n), any strides.

    Returns:
        (m, n), not always contiguous.
    """
    if not (_native.prefers_onednn() and _native.available(a, b) and a.numel() and b.numel()):
        return a @ b  # oneDNN knows no empty matrices
    if a.shape[0] > b.shape[1]:  # the shorter side first: oneDNN is faster that way
        return _onednn(b.T, a).T
    return _onednn(a, b.T)


def multiplication() -> str:
    """Return the name of the float32 matrix library: "oneDNN", or "torch's default" (mostly MKL)."""
    return "oneDNN" if _native.prefers_onednn() else "torch's default"


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # with a stride of zero, as the gradient of a sum has, oneDNN takes a thousand times as long
    x, weight = (t.contiguous() if 0 in t.stride() else t for t in (x, weight))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# --- 5. the implementation ----------------------------------------------------------------------------------


def _forward(x, weight, bias):  # type: ignore[no-untyped-def]
    rows = x.numel() // x.shape[-1]
    if 0 < rows <= FEW_ROWS and _native.available(x, weight, bias):
        x, weight, bias = x.contiguous(), weight.contiguous(), _native.dense(bias)
        return _native.multiply(x, weight, None, bias, rows)
    if rows and _native.prefers_onednn() and _native.available(x, weight, bias):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


@exact
def _backward(x, weight, dy):  # type: ignore[no-untyped-def]
    flat, dflat = x.flatten(0, -2), dy.flatten(0, -2)
    if flat.numel() and _native.prefers_onednn() and _native.available(x, weight, dy):
        dx = _onednn(dflat, weight.T)
    else:
        dx = dflat @ weight
    return dx.view(x.shape), multiply(dflat.T, flat).contiguous()


_lib.impl("linear", _forward, "CompositeExplicitAutograd")
_lib.impl("linear_backward", _backward, "CompositeExplicitAutograd")
