"""mamba_inner_fn and its variants: the Mamba block between its input and output projections.

They take xz, (batch, 2 d_inner, seq_len); differentiable in every tensor.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import COMPLEX, REAL, expect, requires_tensors
from longscan.compat.norms import normalize
from longscan.compat.selective_scan import expect_matrices, scan, time_first

__all__ = ["bimamba_inner_fn", "mamba_inner_fn", "mamba_inner_fn_no_out_proj", "mamba_inner_ref"]


@requires_tensors
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Return the block's outputs (batch, seq_len, d_model).

    Args:
        xz: (batch, 2 d_inner, seq_len), the projected input and the gate.
        conv1d_weight: (d_inner, 1, d_conv).
        conv1d_bias: (d_inner,).
        x_proj_weight: (dt_rank + 2 d_state, d_inner).
        delta_proj_weight: (d_inner, dt_rank).
        out_proj_weight: (d_model, d_inner).
        out_proj_bias: (d_model,).
        A: (d_inner, d_state), real or complex.
        B: a matrix as in `selective_scan_fn`, instead of one that is computed from the input.
        C: likewise.
        D: (d_inner,).
        delta_bias: (d_inner,).
        B_proj_bias: (d_state,), added to the computed B.
        C_proj_bias: likewise.
        delta_softplus: whether delta passes through a softplus after the bias.
        checkpoint_lvl: what their backward pass recomputes; without effect.
        b_rms_weight: (d_state,) of an RMS norm of B.
        c_rms_weight: (d_state,) of an RMS norm of C.
        dt_rms_weight: (d_inner,) of an RMS norm of the projected delta.
        b_c_dt_rms_eps: of these norms.
    """
    sizes = _check(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias),
        B_proj_bias,
        C_proj_bias,
    )
    expect(
        sizes, out_proj_weight=(out_proj_weight, "d_model d_inner"), out_proj_bias=(out_proj_bias, "d_model")
    )
    expect(sizes, b_rms_weight=(b_rms_weight, "d_state"), c_rms_weight=(c_rms_weight, "d_state"))
    expect(sizes, dt_rms_weight=(dt_rms_weight, "d_inner"))
    x, z = _convolved(xz, conv1d_weight, conv1d_bias)
    delta, Bs, Cs = _selection(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    if dt_rms_weight is not None:
        delta = _rms(delta, dt_rms_weight, b_c_dt_rms_eps)
    if b_rms_weight is not None:
        Bs = _rms(Bs.transpose(1, 2), b_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    if c_rms_weight is not None:
        Cs = _rms(Cs.transpose(1, 2), c_rms_weight, b_c_dt_rms_eps).transpose(1, 2)
    y = _scan(x, delta, A, Bs, Cs, D, z, delta_bias, delta_softplus)
    return F.linear(y.to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


@requires_tensors
def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Return the result of `mamba_inner_fn`, without norms of B, C and delta."""
    return mamba_inner_fn(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias),
        A=A,
        B=B,
        C=C,
        D=D,
        delta_bias=delta_bias,
        B_proj_bias=B_proj_bias,
        C_proj_bias=C_proj_bias,
        delta_softplus=delta_softplus,
    )


@requires_tensors
def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Return the gated outputs of the scan, (batch, d_inner, seq_len); arguments as in `mamba_inner_fn`."""
    _check(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias),
        B_proj_bias,
        C_proj_bias,
    )
    x, z = _convolved(xz, conv1d_weight, conv1d_bias)
    delta, Bs, Cs = _selection(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    return _scan(x, delta, A, Bs, Cs, D, z, delta_bias, delta_softplus).transpose(1, 2)


@requires_tensors
def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Return the outputs of a scan in both directions, (batch, seq_len, d_model).

    Arguments are those of `mamba_inner_fn`, and A_b (d_inner, d_state), A of the backward scan.
    """
    sizes = _check(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias),
        B_proj_bias,
        C_proj_bias,
    )
    expect(
        sizes, out_proj_weight=(out_proj_weight, "d_model d_inner"), out_proj_bias=(out_proj_bias, "d_model")
    )
    expect(sizes, COMPLEX if A.is_complex() else REAL, A_b=(A_b, "d_inner d_state"))
    x, z = _convolved(xz, conv1d_weight, conv1d_bias)
    delta, Bs, Cs = _selection(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y = _scan(x, delta, A, Bs, Cs, D, z, delta_bias, delta_softplus)
    Bs, Cs = _flip_matrix(Bs, A), _flip_matrix(Cs, A)
    y_b = _scan(x.flip(1), delta.flip(1), A_b, Bs, Cs, D, z.flip(1), delta_bias, delta_softplus)
    return F.linear((y + y_b.flip(1)).to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)


def _check(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> dict[str, int]:
    """Return the sizes that the arguments share, checked."""
    sizes: dict[str, int] = {}
    expect(sizes, conv1d_weight=(conv1d_weight, "d_inner 1 d_conv"), conv1d_bias=(conv1d_bias, "d_inner"))
    expect(sizes, xz=(xz, f"batch {2 * sizes['d_inner']} seq_len"))
    expect(sizes, COMPLEX, A=(A, "d_inner d_state"))
    expect(sizes, delta_proj_weight=(delta_proj_weight, "d_inner dt_rank"))
    width = sizes["d_state"] * (2 if A.is_complex() else 1)
    rank, n_computed = sizes["dt_rank"], (B is None) + (C is None)
    # columns of a B or C that is given may be there and are not used
    rows = f"{rank + n_computed * width} d_inner | {rank + 2 * width} d_inner"
    expect(sizes, x_proj_weight=(x_proj_weight, rows if n_computed < 2 else f"{rank + 2 * width} d_inner"))
    expect_matrices(sizes, A.is_complex(), B=B, C=C)
    expect(sizes, D=(D, "d_inner"), delta_bias=(delta_bias, "d_inner"))
    expect(sizes, B_proj_bias=(B_proj_bias, (width,)), C_proj_bias=(C_proj_bias, (width,)))
    return sizes


def _convolved(xz: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the convolved input and the gate, (batch, seq_len, d_inner) each."""
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x, _ = ops.causal_conv1d(x, weight.reshape(weight.shape[0], -1), bias, "silu")
    return x, z


def _selection(
    x: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta (batch, seq_len, d_inner), and B and C as `selective_scan_fn` takes them."""
    rank, d_state = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    selected = F.linear(x, x_proj_weight)
    delta = F.linear(selected[..., :rank], delta_proj_weight)
    if B is None:
        B = _matrix(selected[..., rank : rank + d_state], B_proj_bias, A)
    if C is None:
        C = _matrix(selected[..., -d_state:], C_proj_bias, A)
    return delta, B, C


def _matrix(M: Tensor, bias: Tensor | None, A: Tensor) -> Tensor:
    """Return B or C (batch, d_state, seq_len), for a complex A in pairs (batch, d_state, 2 seq_len)."""
    M = M if bias is None else M + bias.to(M.dtype)
    if not A.is_complex():
        return M.transpose(1, 2)
    return torch.unflatten(M, -1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)


def _flip_matrix(M: Tensor, A: Tensor) -> Tensor:
    if M.dim() == 2:
        return M
    return torch.unflatten(M, -1, (-1, 2)).flip(-2).flatten(-2) if A.is_complex() else M.flip(-1)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalize(x, weight, None, eps, is_rms_norm=True).to(x.dtype)


def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Return the gated outputs, (batch, seq_len, d_inner)."""
    if A.is_complex():
        parts = (x.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z.transpose(1, 2))
        return scan(*parts, delta_bias, delta_softplus)[0].transpose(1, 2)
    return ops.selective_scan(x, delta, A, *time_first(B, C), D, z, delta_bias, delta_softplus)[0]
