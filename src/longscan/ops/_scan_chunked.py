"""The selective scan on any device and in any precision: a loop over chunks, a logarithmic scan inside each.

It runs without the native library, in float64 and on other devices than the CPU. Memory stays near that of
the inputs: only one chunk at a time exists as (batch, CHUNK, d_inner, d_state), and the backward pass
recomputes it from the state before the chunk.

Nothing leaks from one packed sequence into another or out of padding, not even NaN: such values are replaced
by zeros before they are multiplied, since zero times NaN is NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._segments import segments

CHUNK = 32  # steps of a chunk, as of the kernels' time tile, so that both save equally many states
LANE_PAD = 16  # the kernels pad channels to a multiple of this

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def boundaries_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    """Return (chunks, batch, padded d_inner, d_state): kernels pad each group's channels to whole vectors."""
    n_groups = max(M.shape[2] if M.dim() == 4 else 1 for M in (B, C))
    padded = n_groups * -(-(u.shape[2] // n_groups) // LANE_PAD) * LANE_PAD
    return -(-u.shape[1] // CHUNK), u.shape[0], padded, A.shape[1]


def _blank(x: Tensor, where: Tensor | None) -> Tensor:
    """Return x (batch, steps, ...) with zeros where a mask (batch, steps) is True."""
    return x if where is None else x.masked_fill(where.view(*where.shape, *[1] * (x.dim() - 2)), 0.0)


def _blank_padding(tensors: tuple[Tensor, ...], padding: Tensor | None) -> tuple[Tensor, ...]:
    """Return the time-varying tensors with zeros in padding; constant matrices are returned unchanged."""
    return tuple(x if x.dim() == 2 else _blank(x, padding) for x in tensors)


def _delta(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, padding: Tensor | None) -> Tensor:
    """Return the step sizes of the recurrence; 0 in padding, which leaves the state unchanged."""
    dt = _blank(dt, padding)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    return _blank(dt, padding)


def _chunk(M: Tensor, time: slice, d_inner: int) -> Tensor:
    """Return B or C over a slice of time, broadcastable to (batch, steps, d_inner, d_state)."""
    if M.dim() == 2:
        return M
    M = M[:, time]
    return M if M.shape[2] == 1 else M.repeat_interleave(d_inner // M.shape[2], dim=2)


def _linear_scan(a: Tensor, b: Tensor, h: Tensor, starts: Tensor | None) -> Tensor:
    """Return all h_t = a_t h_{t-1} + b_t along axis 1, by doubling, from h (batch, d_inner, d_state).

    Where starts (batch, steps) is set, h_t is b_t: earlier values are not even multiplied by zero.
    """
    step = 1
    while step < a.shape[1]:
        now = None if starts is None else starts[:, step:]
        b = torch.cat([b[:, :step], b[:, step:] + a[:, step:] * _blank(b[:, :-step], now)], 1)
        a = torch.cat([a[:, :step], a[:, step:] * _blank(a[:, :-step], now)], 1)
        if starts is not None:
            starts = torch.cat([starts[:, :step], starts[:, step:] | starts[:, :-step]], 1)
        step *= 2
    before = h[:, None] if starts is None else _blank(h[:, None].expand_as(a), starts)
    return b + a * before


def _chunk_states(
    delta: Tensor, x: Tensor, A: Tensor, B: Tensor, starts: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Return decays and states of a chunk, (batch, steps, d_inner, d_state) each, from the state h before."""
    a = torch.exp(delta[..., None] * A)
    return a, _linear_scan(a, x[..., None] * B, h, starts)


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op on any device and in float64: a loop over chunks, a logarithmic scan inside each."""
    batch, seq_len, d_inner = u.shape
    starts, padding = (None, None) if seq_idx is None else segments(seq_idx)
    delta = _delta(dt, dt_bias, dt_softplus, padding)
    u, B, C = _blank_padding((u, B, C), padding)
    x = delta * u
    h = u.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state.clone()
    ys, boundaries = [], []
    for begin in range(0, seq_len, CHUNK):
        time = slice(begin, begin + CHUNK)
        boundaries.append(h)
        now = None if starts is None else starts[:, time]
        _, states = _chunk_states(delta[:, time], x[:, time], A, _chunk(B, time, d_inner), now, h)
        ys.append((states * _chunk(C, time, d_inner)).sum(-1))
        h = states[:, -1].clone()  # a copy, or the view would hold the whole chunk
    y = torch.cat(ys, 1)
    y = y if D is None else y + D * u
    y = y if z is None else y * F.silu(_blank(z, padding))
    y = _blank(y, padding)
    if not keep:
        return y, h, u.new_empty(0)
    saved = u.new_zeros(boundaries_shape(u, A, B, C))
    saved[:, :, :d_inner] = torch.stack(boundaries)
    return y, h, saved


def backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    boundaries: Tensor,
    dout: Tensor,
    dfinal: Tensor | None,
) -> Gradients:
    """Run the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} chunk by chunk from the end, recomputing states."""
    d_inner = u.shape[2]
    boundaries = boundaries[:, :, :d_inner]
    starts, padding = (None, None) if seq_idx is None else segments(seq_idx)
    delta = _delta(dt, dt_bias, dt_softplus, padding)
    u, dt, B, C, dout = _blank_padding((u, dt, B, C, dout), padding)
    z = None if z is None else _blank(z, padding)
    x = delta * u
    dy = dout if z is None else dout * F.silu(z)
    du, ddelta, y = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
    dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    carry = (
        torch.zeros_like(boundaries[0]) if dfinal is None else dfinal
    )  # a_{t+1} g_{t+1} of the chunk's last step
    for index in reversed(range(boundaries.shape[0])):
        time = slice(index * CHUNK, (index + 1) * CHUNK)
        now = None if starts is None else starts[:, time]
        Bt, Ct = _chunk(B, time, d_inner), _chunk(C, time, d_inner)
        a, states = _chunk_states(delta[:, time], x[:, time], A, Bt, now, boundaries[index])
        y[:, time] = (states * Ct).sum(-1)
        ends = None if now is None else F.pad(now[:, 1:], (0, 1))  # the last steps of their sequences
        a_next = _blank(torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], 1), ends)
        direct = Ct * dy[:, time, :, None]
        ends = None if ends is None else ends.flip(1)
        g = _linear_scan(a_next.flip(1), direct.flip(1), carry, ends).flip(1)
        carry = _blank(a[:, :1] * g[:, :1], None if now is None else now[:, :1])[:, 0]
        before = torch.cat([boundaries[index][:, None], states[:, :-1]], 1)
        exponent = _blank(g * a * before, now)  # gradient of dt_t A
        dA += (exponent * delta[:, time, :, None]).sum((0, 1))
        gB = (g * Bt).sum(-1)
        ddelta[:, time] = (exponent * A).sum(-1) + gB * u[:, time]
        du[:, time] = gB * delta[:, time]
        _add_matrix(dB, g * x[:, time, :, None], time)
        _add_matrix(dC, states * dy[:, time, :, None], time)
    empty = u.new_empty(0)
    y = y if D is None else y + D * u
    du = du if D is None else du + D * dy
    dD = empty if D is None else (dy * u).sum((0, 1))
    dz = empty
    if z is not None:
        gate = torch.sigmoid(z)
        dz = _blank(dout * y * gate * (1 + z * (1 - gate)), padding)
    du, ddelta, dB, dC = _blank_padding((du, ddelta, dB, dC), padding)
    if dt_softplus:
        ddelta = ddelta * torch.sigmoid(dt if dt_bias is None else dt + dt_bias)
    ddt_bias = empty if dt_bias is None else ddelta.sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, dz, ddt_bias, empty if initial_state is None else carry


def _add_matrix(total: Tensor, part: Tensor, time: slice) -> None:
    """Add (batch, steps, d_inner, d_state) into the gradient of B or C, which may be constant or grouped."""
    if total.dim() == 2:
        total += part.sum((0, 1))
    else:
        groups = part.unflatten(2, (total.shape[2], -1))  # type: ignore[no-untyped-call]
        total[:, time] = groups.sum(3)
