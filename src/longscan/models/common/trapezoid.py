"""The recurrence of Mamba-3: a state whose input is that of two tokens, and whose B and C rotate with time.

    S_t = exp(log_decay_t) (S_{t-1} + early_t v_{t-1} k_{t-1}') + late_t v_t k_t'     of each head
    y_t = S_t q_t + D v_t

A sum v k' runs over the rank, if a token has several v and k. The state before the last term is a recurrence
with the input of one token, the one before, so that `ops.ssd` computes it:

    S'_t = exp(log_decay_t) (S'_{t-1} + (late_{t-1} + early_t) v_{t-1} k_{t-1}')
    S_t  = S'_t + late_t v_t k_t'
    y_t  = S'_t q_t + late_t v_t (k_t . q_t) + D v_t

Each output depends on its own token and earlier ones only, also where numbers are not finite. q and k come
from `ops.rotary`.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from longscan.models.common.state import over
from longscan.ops import ssd
from longscan.ops._autocast import exact
from longscan.ops._segments import check_seq_idx, segments

__all__ = ["Past", "Tokens", "advance", "before", "last", "trapezoid"]


class Past(NamedTuple):
    """Which token precedes each one, in packed and padded rows.

    Attributes:
        seq_idx: (batch, seq_len), see `Mixer.plan`.
        source: (batch, seq_len) int64 the token before each one: 0 is the one before the row, 1 the first.
        starts: (batch, seq_len) bool, whether the token starts a sequence, so that none precedes it.
        last: (batch,) int64 the last token of each row, counted likewise.
    """

    seq_idx: Tensor
    source: Tensor
    starts: Tensor
    last: Tensor

    @classmethod
    def of(cls, seq_idx: Tensor) -> Self:
        """Return the predecessors.

        Args:
            seq_idx: (batch, seq_len), see `Mixer.plan`.

        Raises:
            TypeError: it is not int32 or int64.
        """
        checked = check_seq_idx(seq_idx, *seq_idx.shape)
        assert checked is not None
        starts, padding = segments(checked)
        position = torch.arange(1, seq_idx.shape[1] + 1, device=seq_idx.device)
        latest = torch.where(padding, 0, position).cummax(1).values
        source = torch.cat([torch.zeros_like(latest[:, :1]), latest[:, :-1]], 1)
        return cls(checked, source, starts, latest[:, -1])


class Tokens(NamedTuple):
    """What the recurrence takes of tokens; leading axes are (batch, seq_len), or (batch,) in a step.

    Attributes:
        q: (..., rank, n_heads, d_state).
        k: (..., rank, n_heads, d_state).
        v: (..., rank, n_heads, d_head).
        log_decay: (..., n_heads).
        early: (..., n_heads) weight of the token before, ahead of the decay.
        late: (..., n_heads) weight of the token itself.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    early: Tensor
    late: Tensor


def before(x: Tensor, first: Tensor, past: Past | None) -> Tensor:
    """Return what precedes each token.

    Args:
        x: (batch, seq_len, ...) of the tokens.
        first: (batch, ...) what precedes each row.
        past: of packed and padded rows; None if rows are neither.

    Returns:
        x's shape; zero at the start of a packed sequence.
    """
    joined = torch.cat([first[:, None], x], 1)
    if past is None:
        return joined[:, :-1]
    rows = torch.arange(len(x), device=x.device)[:, None] * joined.shape[1]
    found = joined.flatten(0, 1).index_select(0, (rows + past.source).flatten()).view(x.shape)
    return torch.where(past.starts.view(*past.starts.shape, *(1 for _ in x.shape[2:])), 0.0, found)


def last(x: Tensor, first: Tensor, past: Past | None) -> Tensor:
    """Return what is last in each row, in memory of its own.

    Args:
        x: (batch, seq_len, ...) of the tokens.
        first: (batch, ...) what precedes each row; it is last where a row is all padding.
        past: see `before`.

    Returns:
        (batch, ...).
    """
    if past is None:
        return x[:, -1].clone()
    found = x[torch.arange(len(x), device=x.device), (past.last - 1).clamp(min=0)]
    return torch.where(over(past.last == 0, found), first, found)


@exact
def trapezoid(
    tokens: Tokens,
    k: Tensor,
    v: Tensor,
    D: Tensor,
    state: Tensor,
    past: Past | None,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of the recurrence, and its final state.

    Args:
        tokens: of rows.
        k: (batch, rank, n_heads, d_state) of the token before each row.
        v: (batch, rank, n_heads, d_head) likewise.
        D: (n_heads,) skip connection.
        state: (batch, n_heads, d_head, d_state) before the first token.
        past: see `before`.
        products: (batch, seq_len, rank, rank, n_heads) of each q and each k of a token, if they are known.

    Returns:
        y: (batch, seq_len, rank, n_heads, d_head).
        state: after the last token.
    """
    rank, late, none = tokens.v.shape[2], tokens.late, torch.zeros_like(tokens.late[:, 0])
    weight = tokens.log_decay.exp() * (before(late, none, past) + tokens.early)
    if past is not None:
        weight = torch.where(past.starts[..., None], 0.0, weight)
    weight, log_decay = (t.repeat_interleave(rank, 1) for t in (weight, tokens.log_decay))
    seq_idx = None if past is None else past.seq_idx.repeat_interleave(rank, 1)
    x, B, C = (t.flatten(1, 2) for t in (before(tokens.v, v, past), before(tokens.k, k, past), tokens.q))
    y, state = ssd(x, weight, log_decay, B, C, None, state, seq_idx, rank)
    pair = last(tokens.v, v, past), last(tokens.k, k, past)
    if products is None:
        products = torch.einsum("blrhn,blshn->blrsh", tokens.q, tokens.k)
    return y.view(tokens.v.shape) + _own(tokens, products, D), state + _outer(last(late, none, past), *pair)


@torch.no_grad()
@exact
def advance(state: Tensor, tokens: Tokens, k: Tensor, v: Tensor, D: Tensor) -> Tensor:
    """Return the output of one more token per row, updating the state in place.

    Args:
        state: (batch, n_heads, d_head, d_state), overwritten.
        tokens: one per row.
        k: (batch, rank, n_heads, d_state) of the token before.
        v: (batch, rank, n_heads, d_head) likewise.
        D: (n_heads,) skip connection.

    Returns:
        (batch, rank, n_heads, d_head).
    """
    decay = tokens.log_decay.exp()
    state *= decay[..., None, None]
    for weight, values, keys in ((decay * tokens.early, v, k), (tokens.late, tokens.v, tokens.k)):
        weighted = weight[:, None, :, None] * values
        for r in range(v.shape[1]):  # in place: a product of matrices would be a second state
            state.addcmul_(weighted[:, r, ..., None], keys[:, r, :, None])
    y = (state @ tokens.q.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return y + D[:, None] * tokens.v


def _outer(weight: Tensor, v: Tensor, k: Tensor) -> Tensor:
    """Return weight v k', summed over the rank: (batch, n_heads, d_head, d_state)."""
    return torch.einsum("brhp,brhn->bhpn", weight[:, None, :, None] * v, k)


def _own(tokens: Tokens, products: Tensor, D: Tensor) -> Tensor:
    """Return the part of the outputs that is from the token itself: late v (k . q) + D v."""
    v, late = tokens.v, tokens.late
    if v.shape[2] == 1:
        return (products[:, :, 0] * late[:, :, None] + D)[..., None] * v
    products = products * late[:, :, None, None]
    return torch.einsum("blrsh,blshp->blrhp", products, v) + D[:, None] * v
