"""The diagonal state space on any device, in any precision: products within chunks, a loop over chunks.

With E_k = a^k, a chunk of l tokens with the initial state h computes

    y_t = sum_{s <= t} K_{t-s} u_s + 2 Re sum_n C_n E_{t+1,n} h_n,    K_k = 2 Re sum_n C_n E_{k,n}
    h  <- E_l h + sum_s E_{l-1-s} u_s

so the states within a chunk are never computed. The sum over s takes left-aligned tokens for y and
right-aligned ones for h, so that all chunks share the same tables. The backward pass recomputes the initial
states of the chunks. Conjugates are materialised: inside of an op, torch.compile loses lazy ones.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from longscan.ops._autocast import exact
from longscan.ops._chunks import Chunks, causal_parts

CHUNK = 64  # maximum tokens: the products within a chunk then cost about as much as those with its state


class _Tables(NamedTuple):
    """The factors of all chunks of `size` tokens.

    Attributes:
        E: (channels, n, size + 1) complex, powers of a.
        K: (channels, size) the kernel.
        into: (channels, size, 2 n) from the tokens to the final state, real and imaginary parts interleaved.
        out: (channels, size, 2 n) from the initial state to y.
    """

    E: Tensor
    K: Tensor
    into: Tensor
    out: Tensor

    @classmethod
    def of(cls, a: Tensor, C: Tensor, size: int) -> Self:
        """Compute the tables for a and C (channels, n) complex; size is a power of two."""
        power = a.to(torch.complex128)[..., None]  # as rounding errors accumulate over the powers
        E = torch.ones_like(power)
        while E.shape[2] < size:
            E, power = torch.cat([E, E * power], 2), power * power
        E = torch.cat([E, power], 2).to(a.dtype)
        weights = 2 * C[..., None] * E  # (channels, n, size + 1)
        K = weights[..., :-1].real.sum(1)
        into = torch.view_as_real(E[..., :-1].flip(2).transpose(1, 2).contiguous()).flatten(2)
        out = torch.view_as_real(weights[..., 1:].conj_physical().transpose(1, 2).contiguous()).flatten(2)
        return cls(E, K, into, out)


def _lags(K: Tensor) -> Tensor:
    """Return t - s for tokens t and s: (size, size)."""
    t = torch.arange(K.shape[1], device=K.device)
    return t[:, None] - t


def _toeplitz(K: Tensor) -> Tensor:
    """Return G_ts = K_{t-s}, zero above the diagonal: (channels, size, size)."""
    lags = _lags(K)
    return K[:, lags.clamp(min=0)] * (lags >= 0)


def _cut(u: Tensor, a: Tensor, c: Tensor, seq_idx: Tensor | None) -> tuple[Chunks, _Tables]:
    """Divide the rows into chunks, smaller ones if the rows are short, and compute the tables."""
    size = min(CHUNK, 1 << (u.shape[1] - 1).bit_length())
    a, c = (torch.view_as_complex(x.contiguous()) for x in (a, c))
    return Chunks.of(u, seq_idx, size), _Tables.of(a, c, size)


def _complex(x: Tensor) -> Tensor:
    """Return (..., 2 n) as complex (..., n)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # type: ignore[no-untyped-call]


def _real(x: Tensor) -> Tensor:
    """Return complex (..., n) as (..., 2 n)."""
    return torch.view_as_real(x).flatten(-2)


def _decay(tables: _Tables, chunks: Chunks, index: int) -> Tensor:
    """Return the decay of the state over chunk `index`: (batch, channels, n)."""
    return tables.E[..., chunks.lengths[:, index]].permute(2, 0, 1)


def _states(u: Tensor, tables: _Tables, chunks: Chunks, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each chunk's initial state, (batch, n_chunks, channels, n), and the final state of the last."""
    into = _complex(torch.einsum("bjsc,csm->bjcm", chunks.take(u, chunks.right), tables.into))
    h = into.new_zeros(into.shape[0], *into.shape[2:]) if state is None else torch.view_as_complex(state)
    before = []
    for index in range(into.shape[1]):
        h = h.masked_fill(chunks.fresh[:, index, None, None], 0)
        before.append(h)
        h = _decay(tables, chunks, index) * h + into[:, index]
    return torch.stack(before, 1), h


@exact
def forward(
    u: Tensor, a: Tensor, c: Tensor, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the op; a and c (channels, n, 2) are exp(z) and C; see `diagonal.diagonal_ssm`."""
    state = None if state is None else state.contiguous()
    chunks, tables = _cut(u, a, c, seq_idx)
    before, final = _states(u, tables, chunks, state)
    finite, after = causal_parts(chunks.take(u, chunks.left), 2)
    y = torch.einsum("cts,bjsc->bjtc", _toeplitz(tables.K), finite)
    y = y if after is None else y + after
    y = y + torch.einsum("ctm,bjcm->bjtc", tables.out, _real(before))
    return chunks.give(y, chunks.left).contiguous(), torch.view_as_real(final.contiguous())


@exact
def backward(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, a, c and the state."""
    state = None if state is None else state.contiguous()
    chunks, tables = _cut(u, a, c, seq_idx)
    before, _ = _states(u, tables, chunks, state)
    u_left, u_right, dy = (
        chunks.take(x, indices) for x, indices in ((u, chunks.left), (u, chunks.right), (dy, chunks.left))
    )
    # backwards in time: g is the gradient of a chunk's final state
    direct = _complex(torch.einsum("ctm,bjtc->bjcm", tables.out, dy))
    g = torch.zeros_like(before[:, 0]) if dfinal is None else torch.view_as_complex(dfinal.contiguous())
    after = []
    for index in reversed(range(before.shape[1])):
        after.append(g)
        g = direct[:, index] + _decay(tables, chunks, index).conj_physical() * g
        g = g.masked_fill(chunks.fresh[:, index, None, None], 0)
    dinto = torch.stack(after[::-1], 1)  # (batch, n_chunks, channels, n)
    du = chunks.give(torch.einsum("cts,bjtc->bjsc", _toeplitz(tables.K), dy), chunks.left)
    du = du + chunks.give(torch.einsum("csm,bjcm->bjsc", tables.into, _real(dinto)), chunks.right)
    # gradients of the tables, then of a and c
    dG = torch.einsum("bjtc,bjsc->cts", dy, u_left)
    lags = _lags(tables.K)
    dG = (dG * (lags >= 0)).flatten(1)
    dK = torch.zeros_like(tables.K).index_add(1, lags.clamp(min=0).flatten(), dG)
    dout = _complex(torch.einsum("bjtc,bjcm->ctm", dy, _real(before))).conj_physical().transpose(1, 2)
    dweights = torch.zeros_like(tables.E)
    dweights[..., :-1] = 2 * dK[:, None]
    dweights[..., 1:] += 2 * dout
    dE = dweights * torch.view_as_complex(c.contiguous())[..., None].conj_physical()
    dE[..., :-1] += _complex(torch.einsum("bjsc,bjcm->csm", u_right, _real(dinto))).transpose(1, 2).flip(2)
    k = torch.arange(tables.E.shape[2], device=u.device)
    last = (chunks.lengths.flatten()[:, None] == k).to(dE.dtype)  # E_l of each chunk, by its length
    dE += torch.einsum("bcn,bk->cnk", (before.conj_physical() * dinto).flatten(0, 1), last)
    da = torch.view_as_real((k[1:] * tables.E[..., :-1].conj_physical() * dE[..., 1:]).sum(2))
    dc = torch.view_as_real((tables.E.conj_physical() * dweights).sum(2))
    return du.contiguous(), da, dc, u.new_empty(0) if state is None else torch.view_as_real(g.contiguous())
