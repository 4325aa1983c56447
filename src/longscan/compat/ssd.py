"""mamba_ssm.ops.triton.ssd_combined: Mamba-2's scan (SSD, arXiv 2405.21060), computed by `ops.ssd`.

The chunk size of their kernels changes the speed and not the result; here it is without effect.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import INTEGER, check_boundaries, expect, requires_tensors
from longscan.compat.norms import wide

__all__ = ["check_ssd", "mamba_chunk_scan", "mamba_chunk_scan_combined", "ssd_minimal_discrete"]

Limits = tuple[float, float]
NO_LIMIT: Limits = (0.0, float("inf"))


@requires_tensors
def mamba_chunk_scan_combined(
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
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Return the outputs of the scan, and the states that were requested; all differentiable.

    Args:
        x: (batch, seq_len, n_heads, d_head).
        dt: (batch, seq_len, n_heads).
        A: (n_heads,).
        B: (batch, seq_len, n_groups, d_state).
        C: as B.
        chunk_size: of their kernel; without effect on the result.
        D: (n_heads,) or (n_heads, d_head).
        z: as x, a gate.
        dt_bias: (n_heads,).
        initial_states: (batch, n_heads, d_head, d_state).
        seq_idx: (batch, seq_len) for packed rows: a sequence starts from zeros where the value changes.
        cu_seqlens: (n_sequences + 1,) their boundaries in a batch of one row, for return_varlen_states.
        dt_softplus: whether dt passes through a softplus after the bias.
        dt_limit: the range that dt is clamped to, last.
        return_final_states: whether to return the state after the last step.
        return_varlen_states: whether to return the state after each sequence of cu_seqlens.
        state_dtype: of the states between chunks in their kernel; here they are at least float32.

    Returns:
        (batch, seq_len, n_heads, d_head) in x's dtype. The final states are (batch, n_heads, d_head,
        d_state), those of sequences (n_sequences, n_heads, d_head, d_state), both at least float32.
    """
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    if return_varlen_states:
        if cu_seqlens is None or initial_states is not None or x.shape[0] != 1:
            raise NotImplementedError(
                "return_varlen_states: expected cu_seqlens, a batch of one row and no initial_states"
            )
        check_boundaries("cu_seqlens", cu_seqlens, x.shape[1])
    dt = _step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    y, state = ssd(x, dt, A, B, C, initial_states, seq_idx)
    if D is not None:
        y = y + wide(x) * (D if D.dim() == 2 else D[:, None])
    y = y if z is None else y * F.silu(wide(z))
    results = [y.to(x.dtype)] + ([state] if return_final_states else [])
    if return_varlen_states:
        assert cu_seqlens is not None
        spans = [slice(*span) for span in torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1).tolist()]
        results.append(torch.cat([_last_state(x[:, s], dt[:, s], A, B[:, s], C[:, s]) for s in spans]))
    return results[0] if len(results) == 1 else tuple(results)


def _last_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the state after one sequence, zeros if it is empty."""
    if x.shape[1] == 0:
        return wide(x).new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    return ssd(x, dt, A, B, C, None, None)[1]


@requires_tensors
def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Return the outputs of `mamba_chunk_scan_combined`."""
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)
    assert isinstance(y, Tensor)
    return y


@requires_tensors
def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the final state of a discrete system.

    Args:
        X: (batch, seq_len, n_heads, d_head), dt x.
        A: (batch, seq_len, n_heads), dt A.
        B: (batch, seq_len, n_heads, d_state).
        C: as B.
        block_len: of their chunks; without effect on the result.
        initial_states: (batch, 1, n_heads, d_head, d_state).
    """
    sizes: dict[str, int] = {}
    expect(sizes, X=(X, "batch seq_len n_heads d_head"), A=(A, "batch seq_len n_heads"))
    expect(sizes, B=(B, "batch seq_len n_heads d_state"), C=(C, "batch seq_len n_heads d_state"))
    expect(sizes, initial_states=(initial_states, "batch 1 n_heads d_head d_state"))
    _check_steps("X", sizes)
    initial = None if initial_states is None else initial_states[:, 0]
    y, state = ops.ssd(X, torch.ones_like(A), A, B, C, None, initial)
    return y, state.to(X.dtype)


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Check the tensors of `mamba_chunk_scan_combined`.

    Raises:
        ValueError: a shape doesn't fit.
        TypeError: a dtype doesn't.
    """
    sizes: dict[str, int] = {}
    expect(sizes, x=(x, "batch seq_len n_heads d_head"), dt=(dt, "batch seq_len n_heads"), A=(A, "n_heads"))
    expect(sizes, B=(B, "batch seq_len n_groups d_state"), C=(C, "batch seq_len n_groups d_state"))
    expect(sizes, D=(D, "n_heads | n_heads d_head"), z=(z, "batch seq_len n_heads d_head"))
    states = "batch n_heads d_head d_state"
    expect(sizes, dt_bias=(dt_bias, "n_heads"), initial_states=(initial_states, states))
    expect(sizes, INTEGER, seq_idx=(seq_idx, "batch seq_len"))
    n_heads, n_groups = sizes["n_heads"], sizes["n_groups"]
    if n_groups == 0 or n_heads % n_groups:
        raise ValueError(f"B: expected a number of groups that divides {n_heads} heads, got {n_groups}")
    _check_steps("x", sizes)


def _check_steps(name: str, sizes: dict[str, int]) -> None:
    if sizes["seq_len"] == 0:
        raise ValueError(f"{name}: expected at least one step, got 0")


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, limit: Limits) -> Tensor:
    dt = wide(dt)
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    return dt if tuple(limit) == NO_LIMIT else dt.clamp(*limit)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (batch, seq_len, n_heads, d_head) and the final state; dt is (batch, seq_len, n_heads)."""
    if seq_idx is not None:  # a value may come back later in the row, or be negative: number the runs
        seq_idx = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(1), (1, 0))
    x, dt = wide(x), wide(dt)
    return ops.ssd(x, dt, dt * A.to(dt.dtype), B, C, None, initial_state, seq_idx)
