"""The selective scan (Mamba, arXiv 2312.00752, equation 2 and algorithm 2).

    h_t = exp(dt_t A) * h_{t-1} + dt_t B_t u_t         zero-order hold on A, Euler on B
    y_t = (C_t . h_t + D u_t) * silu(z_t)

with its gradients, for an initial and a final state, packed sequences and padding. The state h is float32
whatever the dtype of the inputs (float64 for float64 inputs).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _native, _scan_chunked
from longscan.ops._derivatives import composed, register_second
from longscan.ops._scan_chunked import boundaries_shape
from longscan.ops._segments import check_seq_idx, segments

MAX_NATIVE_STATE = 256

# --- 1. the equation ----------------------------------------------------------------------------------------


def selective_scan_ref(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`selective_scan`, step by step: the equation as written."""
    batch, seq_len, d_inner = u.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state
    starts, padding = segments(u.new_zeros(batch, seq_len, dtype=torch.long) if seq_idx is None else seq_idx)
    ys = []
    for t in range(seq_len):
        skip = padding[:, t, None, None]
        h_prev = torch.where(starts[:, t, None, None], 0.0, h)
        A_bar = torch.exp(dt[:, t, :, None] * A)  # (batch, d_inner, d_state)
        B_bar_u = (dt[:, t] * u[:, t])[..., None] * _at(B, t, d_inner)
        h = torch.where(skip, h, A_bar * h_prev + B_bar_u)
        y = (h * _at(C, t, d_inner)).sum(-1)
        y = y if D is None else y + D * u[:, t]
        y = y if z is None else y * F.silu(z[:, t])
        ys.append(torch.where(padding[:, t, None], 0.0, y))
    return torch.stack(ys, 1), h


def _at(M: Tensor, t: int, d_inner: int) -> Tensor:
    """Return B or C at step t, broadcastable to (batch, d_inner, d_state)."""
    if M.dim() == 2:
        return M
    return M[:, t, None] if M.dim() == 3 else M[:, t].repeat_interleave(d_inner // M.shape[2], dim=1)


# --- 2. the op ----------------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of the selective state space, and its final state.

    Args:
        u: (batch, seq_len, d_inner) input, any float type.
        dt: (batch, seq_len, d_inner) step sizes, before bias and softplus, if any.
        A: (d_inner, d_state) real; negative entries decay.
        B: input matrix: (d_inner, d_state) constant, (batch, seq_len, d_state) selective, or
            (batch, seq_len, n_groups, d_state), where each group is shared by d_inner / n_groups adjacent
            channels.
        C: output matrix, of the same three forms as B.
        D: (d_inner,) skip connection.
        z: (batch, seq_len, d_inner) gate.
        dt_bias: (d_inner,) added to dt.
        dt_softplus: whether dt passes through a softplus (after the bias).
        initial_state: (batch, d_inner, d_state), zeros if None.
        seq_idx: (batch, seq_len) int32 or int64 for packed rows: where the value changes a new sequence
            starts from a zero state (the first sequence of a row continues initial_state). Negative values
            are padding: the state passes through unchanged and y is 0.

    Returns:
        y: (batch, seq_len, d_inner) in u's dtype.
        final_state: (batch, d_inner, d_state) after the last step, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
        TypeError: an argument is not floating point, or seq_idx is not int32 or int64.
    """
    batch, seq_len = _check(u, dt, A, B, C, D, z, dt_bias, initial_state)
    seq_idx = check_seq_idx(seq_idx, batch, seq_len)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    B, C = (M.unsqueeze(2) if M.dim() == 3 else M for M in (B, C))
    tensors = [None if t is None else t.to(dtype) for t in (u, dt, A, B, C, D, z, dt_bias, initial_state)]
    if composed():
        y, final_state = _composite(*tensors, seq_idx, dt_softplus)
        return y.to(u.dtype), final_state
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final_state, _ = torch.ops.longscan.selective_scan(*tensors, seq_idx, dt_softplus, keep)
    return y.to(u.dtype), final_state


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Return the output of one more step, updating the state in place; for decoding, without gradients.

    Args:
        state: (batch, d_inner, d_state), overwritten with the new state.
        u: (batch, d_inner) input; dt and z likewise.
        dt: (batch, d_inner).
        A: (d_inner, d_state).
        B: (batch, d_state) or (batch, n_groups, d_state); a constant matrix as B.expand(batch, d_inner,
            d_state).
        C: as B.
        D: (d_inner,).
        z: (batch, d_inner).
        dt_bias: (d_inner,).
        dt_softplus: as in :func:`selective_scan`.

    Returns:
        y: (batch, d_inner).
    """
    with torch.no_grad():
        z = None if z is None else z.unsqueeze(1)
        u, dt, B, C = (t.unsqueeze(1) for t in (u, dt, B, C))
        if _native.direct(state) and _use_native(u, dt, A, B, C, D, z, dt_bias, state):
            _check(u, dt, A, B, C, D, z, dt_bias, state)
            B, C = (M.unsqueeze(2) if M.dim() == 3 else M for M in (B, C))
            layout = _native_layout((u, dt, A, B, C, D, z, dt_bias, state))
            return _run_forward(layout, None, dt_softplus, state, None).squeeze(1)
        y, new_state = selective_scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state=state)
        state.copy_(new_state)
    return y.squeeze(1)


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[int, int]:
    """Return (batch, seq_len); raise ValueError or TypeError unless all shapes and dtypes fit."""
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u: expected a non-empty (batch, seq_len, d_inner), got {tuple(u.shape)}")
    batch, seq_len, d_inner = u.shape
    if A.dim() != 2 or A.shape[0] != d_inner or A.shape[1] == 0:
        raise ValueError(f"A: expected (d_inner={d_inner}, d_state), got {tuple(A.shape)}")
    d_state = A.shape[1]
    for name, tensor, shape in (
        ("dt", dt, (batch, seq_len, d_inner)),
        ("D", D, (d_inner,)),
        ("z", z, (batch, seq_len, d_inner)),
        ("dt_bias", dt_bias, (d_inner,)),
        ("initial_state", initial_state, (batch, d_inner, d_state)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, M in (("B", B), ("C", C)):
        # by the number of axes first: batch may be symbolic, and is never compared with d_inner
        good = M.shape == ((d_inner, d_state) if M.dim() == 2 else (batch, seq_len, d_state)) or (
            M.dim() == 4
            and M.shape[:2] == (batch, seq_len)
            and M.shape[3] == d_state
            and M.shape[2] > 0
            and d_inner % M.shape[2] == 0
        )
        if not good:
            raise ValueError(
                f"{name}: expected {(d_inner, d_state)}, {(batch, seq_len, d_state)} or {(batch, seq_len)} + "
                f"(n_groups, {d_state}) with n_groups dividing {d_inner}, got {tuple(M.shape)}"
            )
    n_groups = [M.shape[2] if M.dim() == 4 else 1 for M in (B, C) if M.dim() > 2]  # of those that vary
    if len(set(n_groups)) > 1:
        raise ValueError(f"B and C: expected the same n_groups, got {n_groups[0]} and {n_groups[1]}")
    for name, tensor in (("u", u), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected real floating point, got {tensor.dtype}")
    return batch, seq_len


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? seq_idx, bool dt_softplus"
)
# boundaries: the state before every time tile, from which the backward pass recomputes; its layout is the
# kernel's own.
_lib.define(f"selective_scan({_INPUTS}, bool keep) -> (Tensor y, Tensor final_state, Tensor boundaries)")
# An absent optional input has an empty gradient.
_lib.define(
    f"selective_scan_backward({_INPUTS}, Tensor boundaries, Tensor dy, Tensor? dfinal) -> "
    "(Tensor du, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
    "Tensor dz, Tensor ddt_bias, Tensor dinitial_state)"
)


# --- 3. shapes ----------------------------------------------------------------------------------------------


def _use_native(*tensors: Tensor | None) -> bool:
    A = tensors[2]
    assert A is not None
    return A.shape[1] <= MAX_NATIVE_STATE and _native.available(*tensors)


@torch.library.register_fake("longscan::selective_scan", lib=_lib)
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, keep):  # type: ignore[no-untyped-def]
    shape = boundaries_shape(u, A, B, C) if keep else (0,)
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape), u.new_empty(shape)


@torch.library.register_fake("longscan::selective_scan_backward", lib=_lib)
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, boundaries, dy, dfinal):  # type: ignore[no-untyped-def]
    return tuple(
        u.new_empty(0) if t is None else t.new_empty(t.shape)
        for t in (u, dt, A, B, C, D, z, dt_bias, initial_state)
    )


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.dt_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # most callers use no gradient of the state, and none of the boundaries


def _autograd(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]
    *tensors, boundaries = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = torch.ops.longscan.selective_scan_backward(*tensors, ctx.dt_softplus, boundaries, dy, dfinal)
    given = (g if t is not None else None for g, t in zip(gradients, tensors[:9], strict=True))
    return *given, None, None, None


def _composite(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the op as a composite of torch operations, differentiable any number of times."""
    y, final_state, _ = _scan_chunked.forward(*inputs, False)  # type: ignore[call-arg]
    return y, final_state


torch.library.register_autograd("longscan::selective_scan", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::selective_scan_backward", _lib, _composite, n_inputs=11)


# --- 5. the native kernel -----------------------------------------------------------------------------------


def _matrix_fields(M: Tensor) -> tuple[tuple[int, int, int], int]:
    """Return ``ls_rows`` and the group stride of B or C; a negative time stride marks a constant matrix."""
    return ((M.data_ptr(), 0, -1), 0) if M.dim() == 2 else (_native.row_fields(M), M.stride(2))


def _fields(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_softplus: bool,
    rest: tuple[Tensor | None, ...],
) -> list[int]:
    """Return the C struct ``ls_scan`` from its first field up to ``boundaries``."""
    n_groups = max(M.shape[2] if M.dim() == 4 else 1 for M in (B, C))
    (b_fields, b_group), (c_fields, c_group) = _matrix_fields(B), _matrix_fields(C)
    operands = (*_native.row_fields(u), *_native.row_fields(dt), *_native.row_fields(z), *b_fields, *c_fields)
    sizes = (*u.shape, A.shape[1], n_groups, int(dt_softplus))
    return [*sizes, *operands, b_group, c_group, *(_native.pointer(t) for t in (A, *rest))]


def _native_layout(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return the op's nine tensor inputs in the kernels' layout; time-varying ones may keep their strides."""
    layout = [_native.rows, _native.rows, _native.dense, _matrix, _matrix, _native.dense, _native.rows]
    layout += [_native.dense, _native.dense]
    return [None if t is None else arrange(t) for arrange, t in zip(layout, tensors, strict=True)]


def _matrix(M: Tensor) -> Tensor:
    return M.contiguous() if M.dim() == 2 else _native.rows(M)


def _forward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, dt_softplus, keep = inputs
    u, A = tensors[0], tensors[2]
    if not _use_native(*tensors):
        return _scan_chunked.forward(*inputs)
    final_state = u.new_empty(u.shape[0], *A.shape)
    boundaries = u.new_empty(0)
    if keep:
        shape = boundaries_shape(u, A, *tensors[3:5])
        boundaries = (u.new_empty if shape[2] == u.shape[2] else u.new_zeros)(shape)  # padding is unwritten
    layout = _native_layout(tensors)
    y = _run_forward(layout, seq_idx, dt_softplus, final_state, boundaries if keep else None)
    return y, final_state, boundaries


def _run_forward(
    layout: list[Any],
    seq_idx: Tensor | None,
    dt_softplus: bool,
    final_state: Tensor,
    boundaries: Tensor | None,
) -> Tensor:
    """Run the kernel on what `_native_layout` returned; final_state may be the initial state itself."""
    u, dt, A, B, C, D, z, dt_bias, initial_state = layout
    y: Tensor = u.new_empty(u.shape)
    rest = (D, dt_bias, initial_state, seq_idx, y, final_state, boundaries)
    _native.call("ls_scan_forward", _fields(u, dt, A, B, C, z, dt_softplus, rest) + [0] * 17)
    return y


def _backward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, dt_softplus, boundaries, dy, dfinal = inputs
    if not _use_native(*tensors, dy, dfinal):
        return _scan_chunked.backward(*inputs)
    gradients = [tensors[0].new_empty(0 if t is None else t.shape) for t in tensors]
    u, dt, A, B, C, D, z, dt_bias, initial_state = _native_layout(tensors)
    dy, dfinal = _native.rows(dy), _native.dense(dfinal)
    n_groups = max(M.shape[2] if M.dim() == 4 else 1 for M in (B, C))
    workspace = u.new_empty(_native.scan_workspace(*u.shape, A.shape[1], n_groups))
    rest = (D, dt_bias, initial_state, seq_idx, None, None, boundaries)
    du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state = gradients
    dinitial = None if initial_state is None else dinitial_state
    out = (dfinal, du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial, workspace)
    fields = [*_fields(u, dt, A, B, C, z, dt_softplus, rest), *_native.row_fields(dy)]
    _native.call("ls_scan_backward", fields + [_native.pointer(t) for t in out] + [0, 0, 0])
    return tuple(gradients)


_lib.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_lib.impl("selective_scan_backward", _backward, "CompositeExplicitAutograd")
