"""mamba_ssm.ops.triton.ssd_combined: Mamba-2's scan (SSD), as matrix products within chunks.

With one scalar a_t = exp(dt_t A) per head the recurrence h_t = a_t h_(t-1) + dt_t x_t B_t', y_t = h_t C_t is
within a chunk a masked product, y = (L * C B') (dt x) with L_ts = a_t ... a_(s+1); only the state at the end
of each chunk passes on (Dao and Gu 2024, arXiv 2405.21060, section 6). The chunk size changes the speed and
not the result.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat.checks import INTEGER, check_boundaries, expect, requires_tensors
from longscan.compat.norms import wide

__all__ = ["check_ssd", "mamba_chunk_scan", "mamba_chunk_scan_combined", "ssd_minimal_discrete"]

CHUNK = 64
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
    y, state = _chunked(X, A, B, C, initial, None)
    return y.to(X.dtype), state.to(X.dtype)


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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dt, A = dt.to(dtype), A.to(dtype)
    return _chunked(x.to(dtype) * dt[..., None], dt * A, B.to(dtype), C.to(dtype), initial_state, seq_idx)


def _chunked(
    x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and the final state of h_t = exp(log_a_t) h_(t-1) + x_t B_t', y_t = h_t C_t."""
    (batch, seq_len, n_heads, d_head), (n_groups, d_state) = x.shape, B.shape[2:]
    length = min(CHUNK, seq_len)
    n_chunks, per_group = -(-seq_len // length), n_heads // n_groups
    padding = n_chunks * length - seq_len  # zeros: no decay and no input, so the state stays
    x, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
    # (batch, chunk, group, head of the group, step, channel)
    x = x.view(batch, n_chunks, length, n_groups, per_group, d_head).permute(0, 1, 3, 4, 2, 5)
    log_a = F.pad(log_a, (0, 0, 0, padding)).view(batch, n_chunks, length, n_groups, per_group)
    total = log_a.permute(0, 1, 3, 4, 2).cumsum(-1)
    B, C = (t.view(batch, n_chunks, length, n_groups, 1, d_state).permute(0, 1, 3, 4, 2, 5) for t in (B, C))
    start, end, same = _sequences(seq_idx, batch, n_chunks, length, padding, x.device)

    decay = (total[..., None] - total[..., None, :]).masked_fill(~same, -torch.inf).exp()
    y = (decay * (C @ B.transpose(-1, -2))) @ x
    to_end = (total[..., -1:] - total).masked_fill(~end, -torch.inf).exp()
    added = (x * to_end[..., None]).transpose(-1, -2) @ B  # (..., d_head, d_state)
    from_start = total.masked_fill(~start, -torch.inf).exp()
    whole = from_start[..., -1].unbind(1)

    shape = (batch, n_groups, per_group, d_head, d_state)
    state = x.new_zeros(shape) if initial_state is None else initial_state.to(x.dtype).reshape(shape)
    states = []
    for decayed, new in zip(whole, added.unbind(1), strict=True):
        states.append(state)
        state = decayed[..., None, None] * state + new
    y = y + from_start[..., None] * (C @ torch.stack(states, 1).transpose(-1, -2))
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, n_chunks * length, n_heads, d_head)
    return y[:, :seq_len].contiguous(), state.reshape(batch, n_heads, d_head, d_state)


def _sequences(
    seq_idx: Tensor | None, batch: int, n_chunks: int, length: int, padding: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which steps see the state before their chunk, reach the one after it, and see each other.

    Returns:
        start: (batch, n_chunks, 1, 1, length).
        end: likewise.
        same: (batch, n_chunks, 1, 1, length, length), row t and column s <= t.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if seq_idx is None:
        every = causal.new_ones(1, 1, 1, 1, length)
        return every, every, causal.expand(1, 1, 1, 1, -1, -1)
    # a value may come back later in the row: number the runs
    runs = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(1), (1, 0))
    runs = torch.cat([runs, runs[:, -1:].expand(-1, padding)], 1).view(batch, n_chunks, 1, 1, length)
    last = runs[..., -1:]
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)
    return runs == before, runs == last, (runs[..., None] == runs[..., None, :]) & causal
