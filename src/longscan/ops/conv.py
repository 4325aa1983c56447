"""Causal depthwise convolution along time, the short memory before every selective scan.

    y_t[d] = act(bias[d] + sum_k weight[d, k] x_{t - (d_conv - 1) + k}[d])

The initial state holds the d_conv - 1 inputs before the first token; by default they are zeros.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops import _native
from longscan.ops._derivatives import composed, register_second
from longscan.ops._segments import check_seq_idx

MAX_NATIVE_WIDTH = 8

# --- 1. the equation ----------------------------------------------------------------------------------------


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`causal_conv1d`, token by token with a sliding window: the definition."""
    batch, seq_len, d_inner = x.shape
    window = x.new_zeros(batch, weight.shape[1] - 1, d_inner) if initial_state is None else initial_state
    rows, finals = [], []
    for b in range(batch):
        past, current, row = window[b], None, []
        for t in range(seq_len):
            if seq_idx is not None and seq_idx[b, t] < 0:
                row.append(torch.zeros_like(x[b, t]))
                continue
            if seq_idx is not None and current not in (None, int(seq_idx[b, t])):
                past = torch.zeros_like(past)
            current = None if seq_idx is None else int(seq_idx[b, t])
            taps = torch.cat([past, x[b, t : t + 1]])  # (d_conv, d_inner)
            y = (taps * weight.T).sum(0)
            y = y if bias is None else y + bias
            row.append(F.silu(y) if activation == "silu" else y)
            past = taps[1:]
        rows.append(torch.stack(row))
        finals.append(past)
    return torch.stack(rows), torch.stack(finals)


# --- 2. the op ----------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the causal convolution of each channel with its own short filter, and the final state.

    Args:
        x: (batch, seq_len, d_inner) input, any float type.
        weight: (d_inner, d_conv); the last column is the tap of the current token.
        bias: (d_inner,).
        activation: None or "silu".
        initial_state: (batch, d_conv - 1, d_inner), the inputs before the first token, oldest first; zeros if
            None.
        seq_idx: (batch, seq_len) int32 or int64 for packed rows: a sequence never sees tokens of another one.
            Negative values are padding: the window does not move and y is 0.

    Returns:
        y: (batch, seq_len, d_inner) in x's dtype.
        final_state: (batch, d_conv - 1, d_inner), the last inputs, which are the next call's initial_state;
            float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit or the activation is unknown.
        TypeError: seq_idx is not int32 or int64.
    """
    batch, seq_len = _check(x, weight, bias, activation, initial_state)
    seq_idx = check_seq_idx(seq_idx, batch, seq_len)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = [None if t is None else t.to(dtype) for t in (x, weight, bias, initial_state)]
    convolve: Any = _forward_torch if composed() else torch.ops.longscan.causal_conv1d
    y, final_state = convolve(*tensors, seq_idx, activation == "silu")
    return y.to(x.dtype), final_state


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Return the output for one more token, updating the state in place; for decoding, without gradients.

    Args:
        state: (batch, d_conv - 1, d_inner), overwritten: the oldest input is dropped, x is appended.
        x: (batch, d_inner).
        weight: (d_inner, d_conv).
        bias: (d_inner,).
        activation: None or "silu".

    Returns:
        y: (batch, d_inner).
    """
    with torch.no_grad():
        x = x.unsqueeze(1)
        if _native.direct(state) and _use_native(weight, x, bias, state):
            _check(x, weight, bias, activation, state)
            return _run_forward(x, weight, bias, state, None, activation == "silu", state).squeeze(1)
        y, new_state = causal_conv1d(x, weight, bias, activation, initial_state=state)
        state.copy_(new_state)
    return y.squeeze(1)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> tuple[int, int]:
    """Return (batch, seq_len); raise ValueError unless all shapes fit."""
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty (batch, seq_len, d_inner), got {tuple(x.shape)}")
    batch, seq_len, d_inner = x.shape
    if weight.dim() != 2 or weight.shape[0] != d_inner or weight.shape[1] == 0:
        raise ValueError(f"weight: expected (d_inner={d_inner}, d_conv), got {tuple(weight.shape)}")
    past = (batch, weight.shape[1] - 1, d_inner)
    if bias is not None and bias.shape != (d_inner,):
        raise ValueError(f"bias: expected shape {(d_inner,)}, got {tuple(bias.shape)}")
    if initial_state is not None and initial_state.shape != past:
        raise ValueError(f"initial_state: expected shape {past}, got {tuple(initial_state.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    return batch, seq_len


_lib: Any = torch.library.Library("longscan", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, bool silu"
_lib.define(f"causal_conv1d({_INPUTS}) -> (Tensor y, Tensor final_state)")
_lib.define(
    f"causal_conv1d_backward({_INPUTS}, Tensor dy, Tensor? dfinal) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)"
)

# --- 3. shapes ----------------------------------------------------------------------------------------------


@torch.library.register_fake("longscan::causal_conv1d", lib=_lib)
def _(x, weight, bias, initial_state, seq_idx, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


@torch.library.register_fake("longscan::causal_conv1d_backward", lib=_lib)
def _(x, weight, bias, initial_state, seq_idx, silu, dy, dfinal):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state)
    )


# --- 4. gradients -------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    gradients = torch.ops.longscan.causal_conv1d_backward(*tensors, ctx.silu, dy, dfinal)
    return *(g if t is not None else None for g, t in zip(gradients, tensors[:4], strict=True)), None, None


def _sources(seq_idx: Tensor | None, batch: int, seq_len: int, d_conv: int, device: torch.device) -> Tensor:
    """Return the index of each tap's input in [zero, initial state, x] along time.

    Returns:
        (batch, seq_len + 1, d_conv) indices: rows of taps oldest first; row t < seq_len for output t, and the
        last d_conv - 1 entries of row seq_len are the final state. Index 0 is a row of zeros.
    """
    past = d_conv - 1
    if seq_idx is None:
        taps = torch.arange(seq_len + 1, device=device)[:, None] + torch.arange(d_conv, device=device) + 1
        taps[seq_len] -= 1
        return taps.expand(batch, -1, -1)
    real = seq_idx >= 0
    count = real.cumsum(1)  # tokens so far
    # Pack every row: slot j holds the source of the row's j-th entry, the initial state first, then its
    # tokens.
    slots = torch.zeros(batch, past + seq_len + 1, dtype=torch.long, device=device)
    owner = torch.full_like(slots, -1)
    slots[:, :past] = torch.arange(1, past + 1, device=device)
    position = torch.arange(seq_len, device=device).expand(batch, -1)
    target = torch.where(real, past + count - 1, past + seq_len)  # padding goes to the spare slot
    slots.scatter_(1, target, position + past + 1)
    owner.scatter_(1, target, seq_idx.long())
    first = owner[:, past].clone()
    owner[:, :past] = first[:, None]  # the initial state belongs to the first sequence
    # A sequence id may come back later in the row: count the starts, so that every run has its own number.
    run = torch.nn.functional.pad((owner[:, 1:] != owner[:, :-1]).long().cumsum(1), (1, 0))
    end = torch.cat([count, count[:, -1:]], 1)  # entries before and including each output, past excluded
    index = (end[..., None] + past - d_conv) + torch.arange(
        d_conv, device=device
    )  # (batch, seq_len + 1, d_conv)
    flat = index.clamp(min=0).flatten(1)
    same = run.gather(1, flat).view_as(index) == run.gather(1, (end + past - 1).clamp(min=0))[..., None]
    source = torch.where(same & (index >= 0), slots.gather(1, flat).view_as(index), 0)
    padding = torch.nn.functional.pad(~real, (0, 1))
    return source.masked_fill(padding[..., None], 0)


def _gather(x: Tensor, initial_state: Tensor | None, weight: Tensor) -> Tensor:
    """Return [zero, initial state, x] along time: (batch, d_conv + seq_len, d_inner)."""
    batch, _, d_inner = x.shape
    past = x.new_zeros(batch, weight.shape[1] - 1, d_inner) if initial_state is None else initial_state
    return torch.cat([x.new_zeros(batch, 1, d_inner), past, x], 1)


def _pick(rows: Tensor, source: Tensor) -> Tensor:
    """Return the rows (batch, n, d_inner) at source (batch, m): (batch, m, d_inner)."""
    return rows.gather(1, source[..., None].expand(-1, -1, rows.shape[2]))


def _pre_activation(rows: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor) -> Tensor:
    y = sum(weight[:, k] * _pick(rows, source[:, :-1, k]) for k in range(weight.shape[1]))
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias


def _forward_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Run the op on any device and in float64, one gather per tap; differentiable any number of times."""
    source = _sources(seq_idx, x.shape[0], x.shape[1], weight.shape[1], x.device)
    rows = _gather(x, initial_state, weight)
    y = _pre_activation(rows, weight, bias, source)
    y = F.silu(y) if silu else y
    y = y if seq_idx is None else y.masked_fill((seq_idx < 0)[..., None], 0.0)
    return y, _pick(rows, source[:, -1, 1:])


def _backward_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_conv = weight.shape[1]
    source = _sources(seq_idx, x.shape[0], x.shape[1], d_conv, x.device)
    rows = _gather(x, initial_state, weight)
    if seq_idx is not None:
        dy = dy.masked_fill((seq_idx < 0)[..., None], 0.0)
    if silu:
        y = _pre_activation(rows, weight, bias, source)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    drows, dweight = torch.zeros_like(rows), torch.empty_like(weight)
    for k in range(d_conv):
        index = source[:, :-1, k, None].expand_as(x)
        drows.scatter_add_(1, index, dy * weight[:, k])
        dweight[:, k] = (dy * rows.gather(1, index)).sum((0, 1))
    if dfinal is not None:
        drows.scatter_add_(1, source[:, -1, 1:, None].expand(-1, -1, x.shape[2]), dfinal)
    empty = x.new_empty(0)
    dbias = empty if bias is None else dy.sum((0, 1))
    dinitial = empty if initial_state is None else drows[:, 1:d_conv].clone()
    return drows[:, d_conv:].clone(), dweight, dbias, dinitial


torch.library.register_autograd("longscan::causal_conv1d", _autograd, setup_context=_setup_context, lib=_lib)
register_second("longscan::causal_conv1d_backward", _lib, _forward_torch, n_inputs=6)

# --- 5. the native kernel -----------------------------------------------------------------------------------


def _use_native(weight: Tensor, *tensors: Tensor | None) -> bool:
    return weight.shape[1] <= MAX_NATIVE_WIDTH and _native.available(weight, *tensors)


def _fields(x: Tensor, weight: Tensor, silu: bool, rest: tuple[Tensor | None, ...]) -> list[int]:
    """Return the C struct ``ls_conv`` from its first field up to ``final_state``."""
    operands = (_native.pointer(t) for t in (weight, *rest))
    return [*x.shape, weight.shape[1], int(silu), *_native.row_fields(x), *operands]


def _forward(x, weight, bias, initial_state, seq_idx, silu):  # type: ignore[no-untyped-def]
    if not _use_native(weight, x, bias, initial_state):
        return _forward_torch(x, weight, bias, initial_state, seq_idx, silu)
    final_state = x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return _run_forward(x, weight, bias, initial_state, seq_idx, silu, final_state), final_state


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    final_state: Tensor,
) -> Tensor:
    """Run the kernel; final_state may be the initial state itself."""
    x, weight = _native.rows(x), weight.contiguous()
    bias, initial_state = _native.dense(bias), _native.dense(initial_state)
    y = x.new_empty(x.shape)
    rest = (bias, initial_state, seq_idx, y, final_state)
    _native.call("ls_conv_forward", _fields(x, weight, silu, rest) + [0] * 9)
    return y


def _backward(x, weight, bias, initial_state, seq_idx, silu, dy, dfinal):  # type: ignore[no-untyped-def]
    if not _use_native(weight, x, bias, initial_state, dy, dfinal):
        return _backward_torch(x, weight, bias, initial_state, seq_idx, silu, dy, dfinal)
    gradients = [x.new_empty(0 if t is None else t.shape) for t in (x, weight, bias, initial_state)]
    x, weight, bias, initial_state = _native.rows(x), *map(_native.dense, (weight, bias, initial_state))
    dy, dfinal = _native.rows(dy), _native.dense(dfinal)
    workspace = x.new_empty(x.shape[0] * x.shape[2] * (weight.shape[1] + 1))
    fields = [*_fields(x, weight, silu, (bias, initial_state, seq_idx, None, None)), *_native.row_fields(dy)]
    dx, dweight, dbias, dinitial = gradients
    out = (dfinal, dx, dweight, dbias, None if initial_state is None else dinitial, workspace)
    _native.call("ls_conv_backward", fields + [_native.pointer(t) for t in out])
    return tuple(gradients)


_lib.impl("causal_conv1d", _forward, "CompositeExplicitAutograd")
_lib.impl("causal_conv1d_backward", _backward, "CompositeExplicitAutograd")
