"""A bank of diagonal state spaces: a channel has one input, n complex states and one output.

    h_l = exp(z) h_{l-1} + u_l,    y_l = 2 Re sum_n C_n h_{l,n}

z is the logarithm of the discretised state matrix, and B is absorbed into C. Each state stands for a
conjugate pair. Gu et al., 2022 (arXiv 2206.11893), section 3: the recurrent view of S4D; `vandermonde` is the
kernel of its convolutional view.
"""

from typing import Any

import torch
from torch import Tensor

from longscan.ops import _diagonal_chunked, _native
from longscan.ops._derivatives import composed, register_second
from longscan.ops._segments import check_seq_idx

# --- 1. the equation ----------------------------------------------------------------------------------------


def diagonal_ssm_ref(
    u: Tensor, z: Tensor, C: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`diagonal_ssm` token by token: the definition, slow."""
    batch, seq_len, _ = u.shape
    start = z.new_zeros(batch, *z.shape) if state is None else torch.view_as_complex(state.contiguous())
    rows, finals = [], []
    for b in range(batch):
        h, current, row = start[b], None, []
        for t in range(seq_len):
            if seq_idx is not None and seq_idx[b, t] < 0:
                row.append(torch.zeros_like(u[b, t]))
                continue
            if seq_idx is not None and current not in (None, int(seq_idx[b, t])):
                h = torch.zeros_like(h)
            current = None if seq_idx is None else int(seq_idx[b, t])
            h = z.exp() * h + u[b, t, :, None]
            row.append(2 * (C * h).real.sum(-1))
        rows.append(torch.stack(row))
        finals.append(h)
    return torch.stack(rows), torch.view_as_real(torch.stack(finals))


# --- 2. the op ----------------------------------------------------------------------------------------------


def diagonal_ssm(
    u: Tensor, z: Tensor, C: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply a diagonal state space to each channel.

    Args:
        u: (batch, seq_len, channels), any float type.
        z: (channels, n) complex, the logarithm of the discretised state matrix.
        C: (channels, n) complex, one of each conjugate pair.
        state: (batch, channels, n, 2), real and imaginary part of the initial state; zeros if None.
        seq_idx: (batch, seq_len) int32 or int64 for packed rows: a new value resets the state to zero.
            Negative values are padding: the state does not change and y is 0.

    Returns:
        y: (batch, seq_len, channels) of u's type.
        state: (batch, channels, n, 2), the final state; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
        TypeError: z or C is not complex, or seq_idx is not int32 or int64.
    """
    batch, seq_len = _check(u, z, C, state)
    seq_idx = check_seq_idx(seq_idx, batch, seq_len)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    a = z.to(torch.complex128).exp()  # in float32 the phase would lose its accuracy
    a_pairs, c_pairs = (torch.view_as_real(M.to(wide).resolve_conj()) for M in (a, C))
    before = None if state is None else state.to(dtype)
    if composed():
        y, after = _diagonal_chunked.forward(u.to(dtype), a_pairs, c_pairs, before, seq_idx)
        return y.to(u.dtype), after
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, z, C, state))
    y, after, _ = torch.ops.longscan.diagonal_ssm(u.to(dtype), a_pairs, c_pairs, before, seq_idx, keep)
    return y.to(u.dtype), after


def diagonal_ssm_step(state: Tensor, u: Tensor, z: Tensor, C: Tensor) -> Tensor:
    """Process one token and update the state in place: for decoding, without gradients.

    Args:
        state: (batch, channels, n, 2), overwritten.
        u: (batch, channels).
        z: (channels, n) complex.
        C: (channels, n) complex.

    Returns:
        y: (batch, channels).
    """
    with torch.no_grad():
        h = torch.view_as_complex(state)
        h.mul_(z.exp()).add_(u[..., None])
        y: Tensor = 2 * (C * h).real.sum(-1)
    return y.to(u.dtype)


def _check(u: Tensor, z: Tensor, C: Tensor, state: Tensor | None) -> tuple[int, int]:
    """Validate every shape; return (batch, seq_len)."""
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u: expected a non-empty (batch, seq_len, channels), got {tuple(u.shape)}")
    batch, seq_len, channels = u.shape
    for name, tensor in (("z", z), ("C", C)):
        if not tensor.is_complex():
            raise TypeError(f"{name}: expected complex numbers, got {tensor.dtype}")
    if z.dim() != 2 or len(z) != channels or z.shape[1] == 0 or C.shape != z.shape:
        shapes = f"{tuple(z.shape)} and {tuple(C.shape)}"
        raise ValueError(f"z, C: expected shape (channels={channels}, n) each, got {shapes}")
    expected = (batch, *z.shape, 2)
    if state is not None and state.shape != expected:
        raise ValueError(f"state: expected shape {expected}, got {tuple(state.shape)}")
    return batch, seq_len


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor u, Tensor a, Tensor c, Tensor? state, Tensor? seq_idx"
# boundaries: the state before every time tile, in the kernel's layout; the backward pass recomputes from it
_lib.define(f"diagonal_ssm({_INPUTS}, bool keep) -> (Tensor y, Tensor final_state, Tensor boundaries)")
_lib.define(
    f"diagonal_ssm_backward({_INPUTS}, Tensor boundaries, Tensor dy, Tensor? dfinal) -> "
    "(Tensor du, Tensor da, Tensor dc, Tensor dstate)"
)

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::diagonal_ssm", lib=_lib)
def _(u, a, c, state, seq_idx, keep):  # type: ignore[no-untyped-def]
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape[0], *a.shape),
        u.new_empty(_boundaries(u, a) if keep else 0),
    )


@torch.library.register_fake("longscan::diagonal_ssm_backward", lib=_lib)
def _(u, a, c, state, seq_idx, boundaries, dy, dfinal):  # type: ignore[no-untyped-def]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in (u, a, c, state))


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal, _):  # type: ignore[no-untyped-def]
    inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    du, da, dc, dstate = torch.ops.longscan.diagonal_ssm_backward(*inputs, dy, dfinal)
    return du, da, dc, None if inputs[3] is None else dstate, None, None


torch.library.register_autograd("longscan::diagonal_ssm", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::diagonal_ssm_backward", _lib, _diagonal_chunked.forward, n_inputs=5)

# --- 5. the native kernel -----------------------------------------------------------------------------------

MAX_NATIVE_STATE = 256
TILE, UNIT = 32, 64  # steps of a time tile, channels of a unit


def _use_native(a: Tensor, *tensors: Tensor | None) -> bool:
    return a.shape[1] <= MAX_NATIVE_STATE and _native.available(a, *tensors)


def _boundaries(u: Tensor, a: Tensor) -> int:
    """Return the size of the boundaries: (n, 2, UNIT) for each tile, row and unit of channels."""
    return -(-u.shape[1] // TILE) * u.shape[0] * -(-u.shape[2] // UNIT) * UNIT * a.shape[1] * 2


def _fields(u: Tensor, a: Tensor, rest: tuple[Tensor | None, ...]) -> list[int]:
    """The C struct ``ls_diagonal`` from its first field up to ``boundaries``."""
    return [*u.shape, a.shape[1], *_native.row_fields(u), *(_native.pointer(t) for t in (a, *rest))]


def _forward(u, a, c, state, seq_idx, keep):  # type: ignore[no-untyped-def]
    if not _use_native(a, u, c, state):
        unused = u.new_zeros(_boundaries(u, a) if keep else 0)
        return *_diagonal_chunked.forward(u, a, c, state, seq_idx), unused
    final_state = u.new_empty(u.shape[0], *a.shape)
    # the kernel leaves the padding of the last unit uninitialised
    make = u.new_zeros if u.shape[2] % UNIT else u.new_empty
    boundaries = make(_boundaries(u, a) if keep else 0)
    return _run_forward(u, a, c, state, seq_idx, final_state, boundaries), final_state, boundaries


def _run_forward(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    final_state: Tensor,
    boundaries: Tensor | None = None,
) -> Tensor:
    """Run the kernel; final_state may be the state itself."""
    u, a, c, state = _native.rows(u), a.contiguous(), c.contiguous(), _native.dense(state)
    y = u.new_empty(u.shape)
    boundaries = boundaries if boundaries is not None and boundaries.numel() else None
    rest = (c, state, seq_idx, y, final_state, boundaries)
    _native.call("ls_diagonal_forward", _fields(u, a, rest) + [0] * 9)
    return y


def _backward(u, a, c, state, seq_idx, boundaries, dy, dfinal):  # type: ignore[no-untyped-def]
    if not _use_native(a, u, c, state, dy, dfinal):
        return _diagonal_chunked.backward(u, a, c, state, seq_idx, dy, dfinal)
    gradients = [u.new_empty(0 if t is None else t.shape) for t in (u, a, c, state)]
    u, a, c, state = _native.rows(u), *map(_native.dense, (a, c, state))
    dy, dfinal = _native.rows(dy), _native.dense(dfinal)
    workspace = u.new_empty(2 * u.shape[0] * a.numel())
    fields = [*_fields(u, a, (c, state, seq_idx, None, None, boundaries)), *_native.row_fields(dy)]
    du, da, dc, dstate = gradients
    out = (dfinal, du, da, dc, None if state is None else dstate, workspace)
    _native.call("ls_diagonal_backward", fields + [_native.pointer(t) for t in out])
    return tuple(gradients)


_lib.impl("diagonal_ssm", _forward, "CompositeExplicitAutograd")
_lib.impl("diagonal_ssm_backward", _backward, "CompositeExplicitAutograd")
