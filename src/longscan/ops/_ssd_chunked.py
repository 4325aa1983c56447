"""State space duality on any device and in any precision: matrix products inside chunks, a loop over them.

Inside a chunk of Q rows the recurrence is attention under a mask of decays (arXiv 2405.21060, section 6):

    y_t += sum_{s <= t} (C_t . B_s) exp(l_{s+1} + ... + l_t) dt_s x_s           l = log_decay
    Z    = sum_s exp(l_{s+1} + ... + l_Q) dt_s x_s B_s'                         added to the state
    y_t += exp(l_1 + ... + l_t) S C_t                                           the state before the chunk

Sums of log decays are never differences of longer sums, so a decay of zero (a log of -infinity) is exact.
Chunks do not cross the start of a sequence, and nothing passes from a step to earlier ones, not even NaN.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from longscan.ops._chunks import Chunks, causal_parts

__all__ = ["CHUNK", "backward", "composite"]

CHUNK = 64  # rows; on CPUs, 32 to 128 differ by less than a fifth


class _Parts(NamedTuple):
    """The inputs in chunks: axes (batch, n_chunks, n_groups, heads of each group or 1, Q, channels).

    Attributes:
        chunks: the rows of each chunk.
        u: dt x, zero where a chunk has no row; so are B and C.
        B: input matrix.
        C: output matrix.
        sums: (..., Q, Q) sum of l_{s+1} ... l_t at [t, s], meaningless before s.
        causal: (Q, Q) whether the step of s is not after that of t; rows of one step see each other.
        decay: (..., Q) of the state before the chunk, up to each row.
    """

    chunks: Chunks
    u: Tensor
    B: Tensor
    C: Tensor
    sums: Tensor
    causal: Tensor
    decay: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        dt: Tensor,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        seq_idx: Tensor | None,
        rank: int,
    ) -> Self:
        """Return the parts of the op's inputs."""
        n_groups = B.shape[2]
        chunks = Chunks.of(x, seq_idx, rank * max(1, CHUNK // rank))
        u, logs = (_take(t, chunks, n_groups) for t in (x * dt[..., None], log_decay[..., None]))
        B, C = (_take(t, chunks, n_groups) for t in (B, C))
        logs = logs[..., 0]
        step = torch.arange(logs.shape[-1], device=logs.device) // rank
        first = torch.arange(len(step), device=step.device) % rank == 0
        logs = torch.where(first, logs, 0.0)  # a step has one decay, that of its first row
        later = torch.where(step[:, None] > step, logs[..., None], 0.0)
        return cls(chunks, u, B, C, later.cumsum(-2), step[:, None] >= step, logs.cumsum(-1).exp())

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return decays and attention weights (..., Q, Q) inside the chunks."""
        decays = torch.where(self.causal, self.sums.exp(), 0.0)
        return decays, torch.where(self.causal, (self.C @ self.B.mT) * decays, 0.0)

    def states(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the states before each chunk (batch, n_chunks, ..., d_head, d_state), and the last one."""
        added = (self.u * self.sums[..., -1, :, None].exp()).mT @ self.B
        shape = added[:, 0].shape
        state = added.new_zeros(shape) if initial_state is None else initial_state.reshape(shape)
        states = []
        for index in range(added.shape[1]):
            state = torch.where(_over(self.chunks.fresh[:, index]), 0.0, state)
            states.append(state)
            state = self.decay[:, index, ..., -1, None, None] * state + added[:, index]
        return torch.stack(states, 1), state

    def give(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Return y (batch, n_chunks, n_groups, heads of each, Q, ...) as (batch, seq_len, ...)."""
        y = y.transpose(3, 4).transpose(2, 3).flatten(3)
        return self.chunks.give(y, self.chunks.left).view(shape)


def composite(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Return what `ssd` returns, of torch operations that can be differentiated any number of times."""
    parts = _Parts.of(x, dt, log_decay, B, C, seq_idx, rank)
    finite, after = causal_parts(parts.u, -2)
    y = parts.weights()[1] @ finite
    y = y if after is None else y + after
    states, last = parts.states(initial_state)
    y = parts.give(y + parts.decay[..., None] * (parts.C @ states.mT), x.shape)
    if D is not None:
        y = y + _tokens(x, seq_idx) * _of_head(D)
    return y, last.reshape(x.shape[0], *x.shape[2:], B.shape[3])


def backward(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    rank: int,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients, of the same chunks in reverse; the attention weights are computed again."""
    dy = _tokens(dy, seq_idx)
    parts = _Parts.of(x, dt, log_decay, B, C, seq_idx, rank)
    chunks, u, decay = parts.chunks, parts.u, parts.decay
    states, last = parts.states(initial_state)
    dout = _take(dy, chunks, B.shape[2])
    decays, weights = parts.weights()
    read = (decay[..., None] * dout).mT @ parts.C  # gradient of the state before each chunk, from its rows
    dstate = torch.zeros_like(last) if dfinal is None else dfinal.reshape(last.shape)
    dafter = []
    for index in reversed(range(read.shape[1])):
        dafter.append(dstate)
        dstate = decay[:, index, ..., -1, None, None] * dstate + read[:, index]
        dstate = torch.where(_over(chunks.fresh[:, index]), 0.0, dstate)
    G = torch.stack(dafter[::-1], 1)  # gradient of the state after each chunk

    to_end = torch.where(parts.causal[-1], parts.sums[..., -1, :], 0.0).exp()[..., None]
    written = to_end * (parts.B @ G.mT)  # part of du from the state
    du = weights.mT @ dout + written
    dscores = torch.where(parts.causal, (dout @ u.mT) * decays, 0.0)
    seen = decay[..., None] * (parts.C @ states.mT)  # part of y from the state
    dC = (dscores @ parts.B + decay[..., None] * (dout @ states)).sum(3, keepdim=True)
    dB = (dscores.mT @ parts.C + to_end * (u @ G)).sum(3, keepdim=True)

    # a log decay l_r lies between s and t for s < r <= t
    pairs = (dscores * (parts.C @ parts.B.mT)).flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)
    from_state = (seen * dout).sum(-1).flip(-1).cumsum(-1).flip(-1)
    to_state = (written * u).sum(-1)
    to_state = to_state.cumsum(-1) - to_state
    through = (decay[..., -1, None, None] * states * G).sum((-2, -1))[..., None]
    dlogs = pairs + from_state + to_state + through
    dlogs = torch.where(torch.arange(dlogs.shape[-1], device=x.device) % rank == 0, dlogs, 0.0)

    du = parts.give(du, x.shape)
    tokens = _tokens(x, seq_idx)
    dx, ddt = du * _tokens(dt, seq_idx)[..., None], (du * tokens).sum(-1)
    dx = dx if D is None else dx + dy * _of_head(D)
    empty = x.new_empty(0)
    dD = empty
    if D is not None:
        dD = (dy * tokens).sum((0, 1)) if D.dim() == 2 else (dy * tokens).sum((0, 1, 3))
    dlog_decay = parts.give(dlogs[..., None], dt.shape)
    dinitial = empty if initial_state is None else dstate.reshape(initial_state.shape)
    return dx, ddt, dlog_decay, parts.give(dB, B.shape), parts.give(dC, C.shape), dD, dinitial


def _take(tensor: Tensor, chunks: Chunks, n_groups: int) -> Tensor:
    """Return (batch, n_chunks, n_groups, heads of each, Q, channels) of (batch, seq_len, heads, channels)."""
    taken = chunks.take(tensor.flatten(2), chunks.left)
    taken = taken.unflatten(3, (n_groups, -1, tensor.shape[3]))  # type: ignore[no-untyped-call]
    return taken.transpose(2, 3).transpose(3, 4)  # type: ignore[no-any-return]


def _tokens(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return x (batch, seq_len, ...) with zeros in padding."""
    if seq_idx is None:
        return x
    return x.masked_fill((seq_idx < 0).view(*seq_idx.shape, *(1 for _ in x.shape[2:])), 0.0)


def _of_head(D: Tensor) -> Tensor:
    """Return D to multiply (..., n_heads, d_head) by."""
    return D[:, None] if D.dim() == 1 else D


def _over(rows: Tensor) -> Tensor:
    """Return rows (batch,) to broadcast over states."""
    return rows.view(-1, 1, 1, 1, 1)
