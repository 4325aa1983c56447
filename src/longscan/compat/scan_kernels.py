"""selective_scan_cuda, selective_scan_cuda_core and selective_scan_cuda_oflex: positional functions.

`fwd` returns y, and x, which holds at [:, :, -1, 1::2] the last state; `bwd` returns the gradients. Chunks
have 2,048 steps as theirs; x holds for each the product of exp(dt A) and the state, both since the start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat.checks import expect, requires_tensors
from longscan.compat.selective_scan import check_scan, scan

__all__ = ["bwd", "core_bwd", "core_fwd", "fwd", "oflex_bwd", "oflex_fwd"]

CHUNK = 2048


@requires_tensors
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    /,
) -> list[Tensor]:
    """Return [y before the gate, x] and, with z, the gated y; shapes as in `selective_scan_fn`."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    y, x = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [y, x] if z is None else [y, x, (y * F.silu(z.to(y.dtype))).to(u.dtype)]


@requires_tensors
def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
    nrows: int = 1,
    /,
) -> list[Tensor | None]:
    """Return [du, ddelta, dA, dB, dC, dD, ddelta_bias], with z also dz, on request also the gated y.

    dz is written into the given tensor, if there is one; x and out are recomputed.
    """
    tensors = (u, delta, A, B, C, D, delta_bias, z)
    expect({}, dz=(dz, u.shape))
    y, (*gradients, new_dz) = _backward(dout, tensors, delta_softplus)
    if z is None:
        return gradients
    assert new_dz is not None
    dz = new_dz if dz is None else dz.copy_(new_dz)
    return [*gradients, dz, *([y] if recompute_out_z else [])]


@requires_tensors
def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    /,
) -> list[Tensor]:
    """Return [y, x]; shapes as in `selective_scan_fn`."""
    check_scan(u, delta, A, B, C, D, None, delta_bias)
    return list(_forward(u, delta, A, B, C, D, delta_bias, delta_softplus))


@requires_tensors
def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    /,
) -> list[Tensor | None]:
    """Return [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return _backward(dout, (u, delta, A, B, C, D, delta_bias, None), delta_softplus)[1][:-1]


@requires_tensors
def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
    /,
) -> list[Tensor]:
    """Return [y, x]; y is float32 if out_float, else in u's dtype."""
    check_scan(u, delta, A, B, C, D, None, delta_bias)
    wide = u.float() if out_float and u.dtype != torch.float64 else u
    return list(_forward(wide, delta, A, B, C, D, delta_bias, delta_softplus))


oflex_bwd = core_bwd


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and x of a forward pass without gate; the arguments are checked."""
    seq_len = u.shape[2]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    per_step = 2 if A.is_complex() else 1  # entries of B and C along time
    total = torch.zeros_like(u[..., 0], dtype=wide)
    state, ys, xs = None, [], []
    for start in range(0, seq_len, CHUNK):
        stop = min(start + CHUNK, seq_len)
        part = slice(start * per_step, stop * per_step)
        Bs, Cs = (M if M.dim() == 2 else M[..., part] for M in (B, C))
        dt = delta[..., start:stop]
        y, state = scan(u[..., start:stop], dt, A, Bs, Cs, D, None, delta_bias, delta_softplus, state)
        dt = dt.to(wide) if delta_bias is None else dt.to(wide) + delta_bias.to(wide)[:, None]
        total = total + (F.softplus(dt) if delta_softplus else dt).sum(-1)
        xs.append(torch.stack([torch.exp(total[..., None] * A).to(state.dtype), state], -1).flatten(2))
        ys.append(y)
    return torch.cat(ys, -1), torch.stack(xs, 2)


def _backward(
    dout: Tensor, tensors: Sequence[Tensor | None], delta_softplus: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return y and the gradients of u, delta, A, B, C, D, delta_bias and z."""
    u, delta, A, B, C, D, delta_bias, z = tensors
    check_scan(u, delta, A, B, C, D, z, delta_bias)  # type: ignore[arg-type]
    assert u is not None
    expect({}, dout=(dout, u.shape))
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        u, delta, A, B, C, D, delta_bias, z = leaves
        assert u is not None
        assert delta is not None
        assert A is not None
        assert B is not None
        assert C is not None
        wide = u.to(torch.promote_types(u.dtype, dout.dtype))
        y, _ = scan(wide, delta, A, B, C, D, z, delta_bias, delta_softplus)
    present = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(y, present, dout.to(y.dtype)))
    return y.detach().to(u.dtype), [None if t is None else next(gradients) for t in leaves]
