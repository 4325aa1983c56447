"""mamba_split_conv1d_scan_combined: the whole Mamba-2 block after its input projection."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import INTEGER, expect, requires_tensors
from longscan.compat.conv import silu
from longscan.compat.gated_norms import rmsnorm_fn
from longscan.compat.ssd import NO_LIMIT, Limits, mamba_chunk_scan_combined

__all__ = ["mamba_conv1d_scan_ref", "mamba_split_conv1d_scan_combined", "mamba_split_conv1d_scan_ref"]


@requires_tensors
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: Limits = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the block's outputs, and on request its final states.

    Args:
        zxbcdt: (batch, seq_len, 2 d_mlp + 2 d_inner + 2 n_groups d_state + n_heads), the projected input: a
            gated MLP's two halves if its width d_mlp is positive, the gate, what is convolved (x, B, C), dt.
        conv1d_weight: (d_inner + 2 n_groups d_state, d_conv).
        conv1d_bias: of as many channels.
        dt_bias: (n_heads,).
        A: (n_heads,).
        D: (n_heads,), or (n_heads, d_head).
        chunk_size: as in `mamba_chunk_scan_combined`; likewise the others.
        initial_states: likewise.
        seq_idx: likewise; the convolution keeps the sequences apart too.
        dt_limit: likewise.
        return_final_states: likewise.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (d_inner,) of the gated RMS norm in n_groups groups; if None, the gate alone.
        rmsnorm_eps: of this norm.
        outproj_weight: (d_model, d_mlp + d_inner) of the output projection, none if None.
        outproj_bias: (d_model,).
        headdim: d_head, where D does not show it.
        ngroups: n_groups.
        norm_before_gate: see `layernorm_fn`.
        state_dtype: as in `mamba_chunk_scan_combined`.

    Returns:
        (batch, seq_len, d_model), without output projection d_mlp + d_inner channels; the final states are
        (batch, n_heads, d_head, d_state).
    """
    sizes: dict[str, int] = {}
    expect(sizes, zxbcdt=(zxbcdt, "batch seq_len channels"), D=(D, "n_heads | n_heads d_head"))
    expect(sizes, dt_bias=(dt_bias, "n_heads"), A=(A, "n_heads"))
    expect(sizes, conv1d_weight=(conv1d_weight, "d_conv_in d_conv"), conv1d_bias=(conv1d_bias, "d_conv_in"))
    expect(sizes, INTEGER, seq_idx=(seq_idx, "batch seq_len"))
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim: expected the channels of a head, since D has only one entry per head")
    n_heads, d_head = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    assert d_head is not None
    d_inner, d_conv_in = n_heads * d_head, conv1d_weight.shape[0]
    d_bc = _width_of_b(d_conv_in, d_inner, ngroups)
    d_mlp, odd = divmod(zxbcdt.shape[-1] - d_inner - d_conv_in - n_heads, 2)
    if d_mlp < 0 or odd:
        raise ValueError(
            f"zxbcdt: expected at least {d_inner + d_conv_in + n_heads} channels, and an even number more, "
            f"got {zxbcdt.shape[-1]}"
        )
    sizes["d_inner"] = d_inner
    expect(sizes, rmsnorm_weight=(rmsnorm_weight, "d_inner"))
    expect(sizes, outproj_weight=(outproj_weight, f"d_model {d_mlp + d_inner}"))
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias: expected an outproj_weight too, got None")
    expect(sizes, outproj_bias=(outproj_bias, "d_model"))
    mlp, z, conv_in, dt = torch.split(zxbcdt, [2 * d_mlp, d_inner, d_conv_in, n_heads], dim=-1)
    convolution = "silu" if silu(activation) else None
    conv_in, _ = ops.causal_conv1d(conv_in, conv1d_weight, conv1d_bias, convolution, seq_idx=seq_idx)
    x, B, C = torch.split(conv_in, [d_inner, d_bc, d_bc], dim=-1)
    heads = torch.unflatten(z, -1, (n_heads, d_head))
    result = mamba_chunk_scan_combined(
        torch.unflatten(x, -1, (n_heads, d_head)),
        dt,
        A,
        torch.unflatten(B, -1, (ngroups, -1)),
        torch.unflatten(C, -1, (ngroups, -1)),
        chunk_size,
        D,
        z=heads if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y, states = result[0].flatten(2), result[1]
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, d_inner // ngroups, norm_before_gate)
    if d_mlp > 0:
        gate, value = mlp.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * value, y], -1)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def _width_of_b(d_conv_in: int, d_inner: int, n_groups: int) -> int:
    """Return n_groups d_state, of channels that hold x, B and C."""
    d_bc, odd = divmod(d_conv_in - d_inner, 2)
    if odd or d_bc <= 0 or n_groups < 1 or d_bc % n_groups:
        raise ValueError(
            f"conv1d_weight: expected {d_inner} channels of x, and {n_groups} groups of B and as many of C, "
            f"got {d_conv_in}"
        )
    return d_bc


@requires_tensors
def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: Limits = NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Return the outputs of `mamba_split_conv1d_scan_combined`."""
    y = mamba_split_conv1d_scan_combined(
        *(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, None, None, dt_limit, False),
        *(activation, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups),
        norm_before_gate,
    )
    assert isinstance(y, Tensor)
    return y


@requires_tensors
def mamba_conv1d_scan_ref(
    xBC: Tensor,  # noqa: N803
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limits = NO_LIMIT,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Return the outputs of a convolution and a scan, (batch, seq_len, n_heads, d_head).

    Args:
        xBC: (batch, seq_len, d_inner + 2 n_groups d_state).
        conv1d_weight: of as many channels, and width d_conv.
        conv1d_bias: likewise.
        dt: (batch, seq_len, n_heads).
        A: (n_heads,).
        chunk_size: as in `mamba_chunk_scan_combined`; likewise the others.
        D: likewise.
        z: (batch, seq_len, d_inner), a gate.
        dt_bias: likewise.
        dt_softplus: likewise.
        dt_limit: likewise.
        activation: of the convolution.
        headdim: d_head, where neither z nor D shows it.
        ngroups: n_groups.
    """
    sizes: dict[str, int] = {}
    expect(sizes, xBC=(xBC, "batch seq_len d_conv_in"), conv1d_weight=(conv1d_weight, "d_conv_in d_conv"))
    expect(sizes, conv1d_bias=(conv1d_bias, "d_conv_in"), A=(A, "n_heads"), dt=(dt, "batch seq_len n_heads"))
    expect(sizes, D=(D, "n_heads | n_heads d_head"), z=(z, "batch seq_len d_inner"))
    n_heads = sizes["n_heads"]
    if z is not None:
        headdim = z.shape[-1] // n_heads
    elif D is not None and D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim: expected the channels of a head, since neither z nor D shows them")
    d_inner = n_heads * headdim
    expect(sizes | {"d_inner": d_inner}, z=(z, "batch seq_len d_inner"))
    d_bc = _width_of_b(sizes["d_conv_in"], d_inner, ngroups)
    convolution = "silu" if silu(activation) else None
    convolved, _ = ops.causal_conv1d(xBC, conv1d_weight, conv1d_bias, convolution)
    x, B, C = torch.split(convolved, [d_inner, d_bc, d_bc], dim=-1)
    y = mamba_chunk_scan_combined(
        torch.unflatten(x, -1, (n_heads, headdim)),
        dt,
        A,
        torch.unflatten(B, -1, (ngroups, -1)),
        torch.unflatten(C, -1, (ngroups, -1)),
        chunk_size,
        D,
        z=None if z is None else torch.unflatten(z, -1, (n_heads, headdim)),
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    assert isinstance(y, Tensor)
    return y
