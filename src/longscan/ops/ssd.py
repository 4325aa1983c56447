"""State space duality (Mamba-2, arXiv 2405.21060): a recurrence with one decay per head, as matrix products.

    S_t = exp(log_decay_t) S_{t-1} + dt_t x_t B_t'         a matrix (d_head, d_state) per head
    y_t = S_t C_t + D x_t

With log_decay = dt A it is the recurrence of Mamba-2; with dt = 1 it is linear attention of queries C, keys B
and values x, whose past decays: not at all for log_decay = 0, and at a constant rate in RetNet. A step may
have several rows of x, B and C (Mamba-3's MIMO). The state is float32 whatever the dtype of the inputs
(float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import _native, _ssd_chunked
from longscan.ops._derivatives import composed, register_second
from longscan.ops._segments import check_seq_idx, segments

__all__ = ["ssd", "ssd_ref", "ssd_step"]

# --- 1. the equation ----------------------------------------------------------------------------------------


def ssd_ref(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    rank: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`ssd`, step by step: the equation as written."""
    batch, seq_len, n_heads, d_head = x.shape
    B, C = (M.repeat_interleave(n_heads // M.shape[2], dim=2) for M in (B, C))  # of each head
    S = x.new_zeros(batch, n_heads, d_head, B.shape[3]) if initial_state is None else initial_state
    starts, padding = segments(x.new_zeros(batch, seq_len, dtype=torch.long) if seq_idx is None else seq_idx)
    ys = []
    for t in range(0, seq_len, rank):
        rows = slice(t, t + rank)
        S_prev = torch.where(starts[:, t, None, None, None], 0.0, S)
        added = torch.einsum("brh,brhp,brhn->bhpn", dt[:, rows], x[:, rows], B[:, rows])
        S_next = log_decay[:, t, :, None, None].exp() * S_prev + added
        S = torch.where(padding[:, t, None, None, None], S, S_next)
        y = torch.einsum("bhpn,brhn->brhp", S, C[:, rows])
        y = y if D is None else y + x[:, rows] * (D[:, None] if D.dim() == 1 else D)
        ys.append(torch.where(padding[:, rows, None, None], 0.0, y))
    return torch.cat(ys, 1), S


# --- 2. the op ----------------------------------------------------------------------------------------------


def ssd(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    rank: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of a state space with one decay per head, and its final state.

    Args:
        x: (batch, seq_len, n_heads, d_head) input, or values; any float type.
        dt: (batch, seq_len, n_heads) step sizes, the weights of the inputs.
        log_decay: (batch, seq_len, n_heads), in Mamba-2 dt A; negative numbers decay, -infinity forgets.
        B: (batch, seq_len, n_groups, d_state) input matrix, or keys; a group is shared by
            n_heads / n_groups adjacent heads.
        C: (batch, seq_len, n_groups, d_state) output matrix, or queries.
        D: (n_heads,) or (n_heads, d_head) skip connection.
        initial_state: (batch, n_heads, d_head, d_state), zeros if None.
        seq_idx: (batch, seq_len) int32 or int64 for packed rows: where the value changes a new sequence
            starts from a zero state (the first sequence of a row continues initial_state). Negative values
            are padding: the state passes through unchanged and y is 0.
        rank: so many adjacent rows are one step: they share the log_decay and the seq_idx of the first of
            them, all their inputs enter the state, and each reads it with its own C.

    Returns:
        y: (batch, seq_len, n_heads, d_head) in x's dtype.
        final_state: (batch, n_heads, d_head, d_state) after the last step, float32 (float64 for float64
            inputs).

    Raises:
        ValueError: shapes do not fit.
        TypeError: an argument is not floating point, or seq_idx is not int32 or int64.
    """
    batch, seq_len = _check(x, dt, log_decay, B, C, D, initial_state, rank)
    seq_idx = check_seq_idx(seq_idx, batch, seq_len)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = [None if t is None else t.to(dtype) for t in (x, dt, log_decay, B, C, D, initial_state)]
    if composed():
        y, final_state = _ssd_chunked.composite(*tensors, seq_idx, rank)  # type: ignore[arg-type, call-arg]
        return y.to(x.dtype), final_state
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final_state, _ = torch.ops.longscan.ssd(*tensors, seq_idx, rank, keep)
    return y.to(x.dtype), final_state


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
) -> Tensor:
    """Return the output of one more step, updating the state in place; for decoding, without gradients.

    Args:
        state: (batch, n_heads, d_head, d_state), overwritten with the new state.
        x: (batch, n_heads, d_head).
        dt: (batch, n_heads).
        log_decay: (batch, n_heads).
        B: (batch, n_groups, d_state).
        C: (batch, n_groups, d_state).
        D: (n_heads,) or (n_heads, d_head).

    Returns:
        y: (batch, n_heads, d_head).
    """
    with torch.no_grad():
        if _native.direct(state) and _use_native(1, x, dt, log_decay, B, C, D, state):
            _check(x[:, None], dt[:, None], log_decay[:, None], B[:, None], C[:, None], D, state, 1)
            return _native_step(x, dt, log_decay, B, C, D, state)
        heads = x.shape[1] // B.shape[1]
        B, C = (M.to(state.dtype).repeat_interleave(heads, 1) for M in (B, C))
        added = (dt[..., None] * x).to(state.dtype)[..., None] * B[:, :, None]
        state.mul_(log_decay.to(state.dtype).exp()[..., None, None]).add_(added)
        y = (state @ C[..., None])[..., 0].to(x.dtype)
        return y if D is None else y + x * (D[:, None] if D.dim() == 1 else D)


def _check(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    rank: int,
) -> tuple[int, int]:
    """Return (batch, seq_len); raise ValueError or TypeError unless all shapes and dtypes fit."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty (batch, seq_len, n_heads, d_head), got {tuple(x.shape)}")
    batch, seq_len, n_heads, d_head = x.shape
    if rank < 1 or seq_len % rank:
        raise ValueError(f"rank: expected a divisor of {seq_len} rows, got {rank}")
    good = B.dim() == 4 and B.shape[:2] == (batch, seq_len) and 0 not in B.shape
    if not good or n_heads % B.shape[2]:
        raise ValueError(
            f"B: expected {(batch, seq_len)} + (n_groups, d_state) with n_groups dividing {n_heads} heads, "
            f"got {tuple(B.shape)}"
        )
    if D is not None and D.shape not in ((n_heads,), (n_heads, d_head)):
        raise ValueError(f"D: expected {(n_heads,)} or {(n_heads, d_head)}, got {tuple(D.shape)}")
    for name, tensor, shape in (
        ("dt", dt, (batch, seq_len, n_heads)),
        ("log_decay", log_decay, (batch, seq_len, n_heads)),
        ("C", C, tuple(B.shape)),
        ("initial_state", initial_state, (batch, n_heads, d_head, B.shape[3])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("dt", dt), ("log_decay", log_decay), ("B", B), ("C", C), ("D", D)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected real floating point, got {tensor.dtype}")
    return batch, seq_len


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = (
    "Tensor x, Tensor dt, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
    "Tensor? seq_idx, int rank"
)
# boundaries: states from which the backward pass recomputes; their layout is the kernel's own.
_lib.define(f"ssd({_INPUTS}, bool keep) -> (Tensor y, Tensor final_state, Tensor boundaries)")
# An absent optional input has an empty gradient.
_lib.define(
    f"ssd_backward({_INPUTS}, Tensor boundaries, Tensor dy, Tensor? dfinal) -> (Tensor dx, Tensor ddt, "
    "Tensor dlog_decay, Tensor dB, Tensor dC, Tensor dD, Tensor dinitial_state)"
)


# --- 3. shapes ----------------------------------------------------------------------------------------------


MAX_NATIVE_HEAD, MAX_NATIVE_RANK = 512, 64  # LS_SSD_MAX_HEAD and LS_SSD_CHUNK of the kernel


def _use_native(rank: int, *tensors: Tensor | None) -> bool:
    x = tensors[0]
    assert x is not None
    fits = x.shape[-1] <= MAX_NATIVE_HEAD and rank <= MAX_NATIVE_RANK
    return fits and _native.available(*tensors)


def boundaries_shape(x: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
    """Return the shape of the kernel's boundaries, with d_head padded to whole vectors."""
    tiles = -(-x.shape[1] // (rank * (MAX_NATIVE_RANK // rank)))
    return x.shape[0], tiles, x.shape[2], -(-x.shape[3] // 32) * 32, B.shape[3]


@torch.library.register_fake("longscan::ssd", lib=_lib)
def _(x, dt, log_decay, B, C, D, initial_state, seq_idx, rank, keep):  # type: ignore[no-untyped-def]
    final_state = x.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    saved = keep and _use_native(rank, x, dt, log_decay, B, C, D, initial_state)
    return x.new_empty(x.shape), final_state, x.new_empty(boundaries_shape(x, B, rank) if saved else 0)


@torch.library.register_fake("longscan::ssd_backward", lib=_lib)
def _(x, dt, log_decay, B, C, D, initial_state, seq_idx, rank, boundaries, dy, dfinal):  # type: ignore[no-untyped-def]
    tensors = (x, dt, log_decay, B, C, D, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.rank, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # most callers use no gradient of the state, and none of the boundaries


def _autograd(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]
    *tensors, boundaries = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = torch.ops.longscan.ssd_backward(*tensors, ctx.rank, boundaries, dy, dfinal)
    given = (g if t is not None else None for g, t in zip(grads, tensors[:7], strict=True))
    return *given, None, None, None


torch.library.register_autograd("longscan::ssd", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::ssd_backward", _lib, _ssd_chunked.composite, n_inputs=9)


# --- 5. the native kernel -----------------------------------------------------------------------------------


def _layout(*tensors: Tensor | None) -> list[Any]:
    """Return x, dt, log_decay, B, C, D and the initial state in the kernel's layout; rows may be strided."""
    rows, dense = _native.rows, _native.dense
    arrange: tuple[Any, ...] = (rows, dense, dense, rows, rows, dense, dense)
    return [None if t is None else place(t) for place, t in zip(arrange, tensors, strict=True)]


def _fields(layout: list[Any], rank: int, rest: tuple[Tensor | None, ...]) -> list[int]:
    """Return the C struct ``ls_ssd`` up to ``boundaries``, for what `_layout` returned."""
    x, dt, log_decay, B, C, D, initial_state = layout
    sizes = (*x.shape, *B.shape[2:], rank, int(D is not None and D.dim() == 2))
    operands = (*_native.row_fields(x), *_native.row_fields(B), *_native.row_fields(C))
    strides = (x.stride(2), B.stride(2), C.stride(2))
    pointers = (_native.pointer(t) for t in (dt, log_decay, D, initial_state, *rest))
    return [*sizes, *operands, *strides, *pointers]


def _run(function: str, fields: list[int], backward_fields: list[int]) -> None:
    """Run a kernel of the C struct's fields before and after its workspace."""
    size = _native.workspace(f"{function}_workspace", [*fields, 0, *backward_fields])
    workspace = torch.empty(size, dtype=torch.float32, device="cpu")
    _native.call(function, [*fields, workspace.data_ptr(), *backward_fields])


def _forward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, rank, keep = inputs
    if not _use_native(rank, *tensors):
        y, final_state = _ssd_chunked.composite(*inputs[:-1])
        return y.contiguous(), final_state.clone(), y.new_empty(0)
    layout = _layout(*tensors)
    x, B = layout[0], layout[3]
    y, final_state = x.new_empty(x.shape), x.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    boundaries = x.new_empty(0)
    if keep:
        shape = boundaries_shape(x, B, rank)
        boundaries = (x.new_empty if shape[3] == x.shape[3] else x.new_zeros)(shape)  # padding is unwritten,
        if layout[6] is None:
            boundaries[:, 0] = 0.0  # and so is a state of zero
    rest = (seq_idx, y, final_state, boundaries if keep else None)
    _run("ls_ssd_forward", _fields(layout, rank, rest), [0] * 12)
    return y, final_state, boundaries


def _native_step(*inputs: Tensor | None) -> Tensor:
    """Run the kernel of one step on x, dt, log_decay, B, C, D and a contiguous state, which it updates."""
    layout = _layout(*(t if t is None else t[:, None] for t in inputs[:5]), *inputs[5:])
    x, state = layout[0], layout[6]
    y: Tensor = x.new_empty(x[:, 0].shape)
    _native.call("ls_ssd_step", _fields(layout, 1, (None, y, state, None)) + [0] * 13)
    return y


def _backward(*inputs):  # type: ignore[no-untyped-def]
    *tensors, seq_idx, rank, boundaries, dy, dfinal = inputs
    if not boundaries.numel() or not _use_native(rank, *tensors, dy, dfinal):
        plain = _ssd_chunked.backward(*tensors, seq_idx, rank, dy, dfinal)  # type: ignore[call-arg]
        return tuple(gradient.contiguous() for gradient in plain)
    gradients = [tensors[0].new_empty(0 if t is None else t.shape) for t in tensors]
    layout, dy, dfinal = _layout(*tensors), _native.rows(dy), _native.dense(dfinal)
    rest = [*_native.row_fields(dy), dy.stride(2), _native.pointer(dfinal)]
    rest += [g.data_ptr() if g.numel() else 0 for g in gradients]
    _run("ls_ssd_backward", _fields(layout, rank, (seq_idx, None, None, boundaries)), rest)
    return tuple(gradients)


_lib.impl("ssd", _forward, "CompositeExplicitAutograd")
_lib.impl("ssd_backward", _backward, "CompositeExplicitAutograd")
