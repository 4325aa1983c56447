"""longscan's ops made of torch's own, which torch's exporter knows; the loop alone becomes an op of ONNX.

Torch's exporter sees an op of ours as one node. `DECOMPOSITIONS` says what it is made of. These run where a
model is traced, never where it computes; models of images use no packed rows and no initial states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# whose import defines the ops
from longscan import ops

__all__ = ["DECOMPOSITIONS", "LINEAR_STEPS", "SCAN_STEPS"]

_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define("linear_steps(Tensor a, Tensor b, Tensor h) -> Tensor")
_lib.define("scan_steps(Tensor dt, Tensor x, Tensor A, Tensor B, Tensor C, Tensor h) -> Tensor")


@torch.library.register_fake("longscan::linear_steps", lib=_lib)
def _(a, b, h):  # type: ignore[no-untyped-def]
    return b.new_empty(b.shape)


@torch.library.register_fake("longscan::scan_steps", lib=_lib)
def _(dt, x, A, B, C, h):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def scan_steps(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """Return C_t . h_t of h_t = exp(dt_t A) h_{t-1} + x_t B_t, channels last: what `recurrence` says in ONNX.

    Args:
        dt: (seq_len, batch, n_groups, 1, d) step sizes.
        x: (seq_len, batch, n_groups, 1, d), dt_t times the input.
        A: (n_groups, d_state, d).
        B: (seq_len, batch, n_groups, d_state, 1).
        C: (seq_len, batch, n_groups, 1, d_state).
        h: (batch, n_groups, d_state, d), the state before the first step.

    Returns:
        (seq_len, batch, n_groups, 1, d).
    """
    ys = []
    for dt_t, x_t, B_t, C_t in zip(dt, x, B, C, strict=True):
        h = torch.exp(dt_t * A) * h + x_t * B_t
        ys.append(C_t @ h)
    return torch.stack(ys)


def linear_steps(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Return all states h_t = a_t h_{t-1} + b_t.

    Args:
        a: (seq_len, ...).
        b: (seq_len, ...).
        h: (...), the state before the first step.

    Returns:
        (seq_len, ...).
    """
    states = []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


_lib.impl("scan_steps", scan_steps, "CompositeExplicitAutograd")
_lib.impl("linear_steps", linear_steps, "CompositeExplicitAutograd")
#: the ops that are not decomposed any further
SCAN_STEPS: Any = torch.ops.longscan.scan_steps.default
LINEAR_STEPS: Any = torch.ops.longscan.linear_steps.default


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _rms_norm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, n_groups: int, norm_first: bool
) -> Tensor:
    return ops.rms_norm_ref(x, weight, eps, z, n_groups, norm_first)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return the convolution, padded on the left, and a state that nothing uses."""
    assert initial_state is None
    assert seq_idx is None
    d_inner, d_conv = weight.shape
    y = F.conv1d(F.pad(x.mT, (d_conv - 1, 0)), weight[:, None], bias, groups=d_inner).mT
    return F.silu(y) if silu else y, x.new_zeros(x.shape[0], d_conv - 1, d_inner)


def _selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, and a final state and boundaries that nothing uses."""
    assert z is None
    assert initial_state is None
    assert seq_idx is None
    (batch, seq_len, d_inner), (n_groups, d_state) = u.shape, B.shape[2:]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt

    def rows(x: Tensor) -> Tensor:  # (seq_len, batch, n_groups, 1, -1)
        return x.reshape(batch, seq_len, n_groups, 1, -1).transpose(0, 1)

    h = u.new_zeros(batch, n_groups, d_state, d_inner // n_groups)
    A = A.reshape(n_groups, -1, d_state).mT
    dt, x, B, C = rows(dt), rows(dt * u), rows(B), rows(C)
    # with one state a channel all decays are no larger than dt, so that less is left in the loop
    y = C * LINEAR_STEPS(torch.exp(dt * A), x * B, h) if d_state == 1 else SCAN_STEPS(dt, x, A, B.mT, C, h)
    y = y.transpose(0, 1).reshape(u.shape)
    y = y if D is None else y + D * u
    return y, u.new_zeros(batch, d_inner, d_state), u.new_empty(0)


def _check_paths(paths: Tensor) -> Tensor:
    """Return the paths, which were made by `scan_pattern`."""
    return paths.to(torch.int32, copy=True)


def _path_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    paths: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the scans: into the order of each path, one scan with a group a path, and back."""
    batch, n, n_paths, d_inner = dt.shape
    order = paths.long()
    steps = torch.arange(n, device=order.device).expand_as(order)
    back = torch.zeros_like(order).scatter(1, order, steps)
    each = torch.arange(n_paths, device=order.device)

    def take(x: Tensor, order: Tensor) -> Tensor:  # (batch, n, n_paths, -1) in another order
        index = (order.T * n_paths + each).flatten()
        return x.flatten(1, 2).index_select(1, index).reshape(batch, n, n_paths, -1)

    u = u.index_select(1, order.T.flatten()) if u.dim() == 3 else take(u, order)
    u, dt, B, C = u.reshape(batch, n, -1), take(dt, order).flatten(2), take(B, order), take(C, order)
    D, dt_bias = (None if x is None else x.flatten() for x in (D, dt_bias))
    y, *_ = _selective_scan(u, dt, A.flatten(0, 1), B, C, D, None, dt_bias, None, None, True, False)
    return take(y.reshape(batch, n, n_paths, d_inner), back).sum(2), u.new_empty(0)


#: op -> what it is made of
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.longscan.linear.default: _linear,
    torch.ops.longscan.rms_norm.default: _rms_norm,
    torch.ops.longscan.causal_conv1d.default: _causal_conv1d,
    torch.ops.longscan.selective_scan.default: _selective_scan,
    torch.ops.longscan.check_paths.default: _check_paths,
    torch.ops.longscan.path_scan.default: _path_scan,
}
