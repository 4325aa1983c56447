"""Private functions of mamba_ssm.ops.triton, for blocks with a backward pass of their own, such as Hydra's.

What only their kernels pass from forward to backward is recomputed, and None in its place.
"""

from typing import Any

import torch
from torch import Tensor

from longscan.compat.checks import expect, requires_tensors
from longscan.compat.gated_norms import check_gated, layernorm_fn
from longscan.compat.ssd import NO_LIMIT, Limits, check_ssd, mamba_chunk_scan_combined

__all__ = [
    "_layer_norm_bwd",
    "_layer_norm_fwd",
    "_mamba_chunk_scan_combined_bwd",
    "_mamba_chunk_scan_combined_fwd",
]


@requires_tensors
def _mamba_chunk_scan_combined_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, None, None, None, Tensor]:
    """Return y, y before the gate (None without z), three times None, and the final states.

    Arguments are those of `mamba_chunk_scan_combined`.
    """
    if cu_seqlens is not None:
        raise NotImplementedError("cu_seqlens: use mamba_chunk_scan_combined(return_varlen_states=True)")
    settings = (dt_bias, initial_states, seq_idx, None, dt_softplus, dt_limit, True)
    with torch.no_grad():
        y, states = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, *settings)
        before = None
        if z is not None:
            before = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, None, *settings)[0]
    return y, before, None, None, None, states


@requires_tensors
def _mamba_chunk_scan_combined_bwd(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor | None,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dfinal_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
    dx: Tensor | None = None,
    ddt: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    dz: Tensor | None = None,
    recompute_output: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias and initial_states, on request y too.

    Arguments are those of `mamba_chunk_scan_combined`; dx, ddt, dB, dC and dz are written in place, if given.
    """
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    states_shape = (x.shape[0], *x.shape[2:], B.shape[-1])
    expect({}, dout=(dout, x.shape), dfinal_states=(dfinal_states, states_shape), dx=(dx, x.shape))
    expect({}, ddt=(ddt, dt.shape), dB=(dB, B.shape), dC=(dC, B.shape), dz=(dz, x.shape))
    leaves, buffers = [x, dt, A, B, C, D, z, dt_bias, initial_states], (dx, ddt, None, dB, dC, None, dz)
    with torch.enable_grad():
        own = [None if t is None else t.detach().requires_grad_() for t in leaves]
        arguments: list[Any] = [*own[:5], chunk_size, *own[5:], seq_idx, None, dt_softplus, dt_limit, True]
        y, states = mamba_chunk_scan_combined(*arguments)
    pairs = [(y, dout.to(y.dtype))] + ([] if dfinal_states is None else [(states, dfinal_states)])
    gradients = _gradients(pairs, own)
    for index, buffer in enumerate(buffers):
        if buffer is not None:
            gradients[index] = buffer.copy_(gradients[index])  # type: ignore[arg-type]
    return (*gradients, y.detach()) if recompute_output else tuple(gradients)


@requires_tensors
def _layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> tuple[Tensor, None, None]:
    """Return the gated norm and twice None; as `layernorm_fn`. out is filled, if given."""
    expect({}, out=(out, x.shape))
    with torch.no_grad():
        y = layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)
    return (y if out is None else out.copy_(y)), None, None


@requires_tensors
def _layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    z: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    recompute_output: bool = False,
    dz: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and z, on request the norm too; dz and out are filled."""
    check_gated(x, weight, bias, z)
    expect({}, dy=(dy, x.shape), dz=(dz, x.shape), out=(out, x.shape))
    with torch.enable_grad():
        own = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, z)]
        arguments: list[Any] = [*own, eps, group_size, norm_before_gate, is_rms_norm]
        y = layernorm_fn(*arguments)
    gradients = _gradients([(y, dy)], own)
    if dz is not None:
        gradients[3] = dz.copy_(gradients[3])  # type: ignore[arg-type]
    if not recompute_output:
        return tuple(gradients)
    return (*gradients, y.detach() if out is None else out.copy_(y.detach()))


def _gradients(pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor | None]) -> list[Tensor | None]:
    """Return the gradient of each leaf, None for an absent one."""
    present = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([y for y, _ in pairs], present, [dy for _, dy in pairs]))
    return [None if t is None else next(found) for t in leaves]
