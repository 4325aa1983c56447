"""mamba_ssm.ops.triton.selective_state_update: one step of the recurrence, of Mamba or of Mamba-2's heads."""

import torch
from torch import Tensor

from longscan import ops
from longscan.compat.checks import check_rows, expect, requires_tensors

__all__ = ["selective_state_update", "selective_state_update_ref"]


@requires_tensors
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Return the outputs of one more step, updating the state in place; without gradients.

    Args:
        state: (batch, d_inner, d_state), or (batch, n_heads, d_head, d_state).
        x: (batch, d_inner), or (batch, n_heads, d_head).
        dt: as x.
        A: (d_inner, d_state), or (n_heads, d_head, d_state).
        B: (batch, d_state), or (batch, n_groups, d_state) with n_groups dividing n_heads.
        C: as B.
        D: (d_inner,), or (n_heads, d_head).
        z: as x, a gate.
        dt_bias: as D.
        dt_softplus: whether dt passes through a softplus after the bias.
        state_batch_indices: (batch,), the rows of a larger state that belong to this batch, each once. A
            negative one is padding: no state changes, and the output is zero.

    Returns:
        Of x's shape and dtype.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if state_batch_indices is not None:
        own = check_rows("state_batch_indices", state_batch_indices, x.shape[0], state.shape[0])
        if not own.all():
            y = torch.zeros_like(x)
            if own.any():
                gate, rows = None if z is None else z[own], state_batch_indices[own]
                y[own] = selective_state_update(
                    state, x[own], dt[own], A, B[own], C[own], D, gate, dt_bias, dt_softplus, rows
                )
            return y
    with torch.no_grad():
        rows = state if state_batch_indices is None else state[state_batch_indices.long()]
        # heads are adjacent channels with the same A, and groups adjacent heads
        h = rows.flatten(1, -2).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        D, dt_bias = (None if t is None else t.flatten() for t in (D, dt_bias))
        gate = None if z is None else z.flatten(1)
        y = ops.selective_scan_step(
            h, x.flatten(1), dt.flatten(1), A.flatten(0, -2), B, C, D, gate, dt_bias, dt_softplus
        )
        if state_batch_indices is not None:
            state[state_batch_indices.long()] = h.view(rows.shape).to(state.dtype)
        elif h.data_ptr() != state.data_ptr():  # h is a copy
            state.copy_(h.view(state.shape))
    return y.to(x.dtype).view(x.shape)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    rows = "batch" if state_batch_indices is None else "rows"
    expect(sizes, state=(state, f"{rows} d_inner d_state | {rows} n_heads d_head d_state"))
    channels = "n_heads d_head" if state.dim() == 4 else "d_inner"
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        expect(sizes, **{name: (tensor, f"batch {channels}")})
    expect(sizes, A=(A, f"{channels} d_state"), B=(B, "batch d_state | batch n_groups d_state"))
    expect(sizes, C=(C, B.shape), D=(D, channels), dt_bias=(dt_bias, channels))
    n_heads, n_groups = sizes.get("n_heads", 1), sizes.get("n_groups", 1)
    if n_groups == 0 or n_heads % n_groups:
        raise ValueError(f"B: expected a number of groups that divides {n_heads} heads, got {n_groups}")


selective_state_update_ref = selective_state_update
