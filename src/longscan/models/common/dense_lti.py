"""Time-invariant systems with dense matrices: the recurrence in chunks, as matrix products.

Inside a chunk every output is a sum over the chunk's inputs (K) and over the state before it (out); one pass
over the chunks carries the state along (into, powers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.models.common.lti import System
from longscan.ops._chunks import Chunks, causal_parts
from longscan.ops._derivatives import composed

__all__ = ["DenseSystem", "Tables", "chunked"]

CHUNK = 64


class Tables(NamedTuple):
    """What a chunk of recurrences x = A x + B u, y = C x multiplies by.

    Attributes:
        into: (channels, size, N) A^s B.
        K: (channels, n_outputs, size) C A^s B.
        out: (channels, size, n_outputs, N) C A^(t + 1).
        powers: (channels, N, N) each, A to the powers of two.
    """

    into: Tensor
    K: Tensor
    out: Tensor
    powers: tuple[Tensor, ...]

    @classmethod
    def of(cls, system: tuple[Tensor, Tensor, Tensor], size: int, dtype: torch.dtype) -> Tables:
        """Return the tables, computed by doubling in O(N^3 log size).

        Args:
            system: A_bar (channels, N, N), B_bar (channels, N), C (channels, n_outputs, N), real.
            size: steps of a chunk, a power of two.
            dtype: of the result; the computation is in float64, since all tokens would share its errors.
        """
        A, B, C = (matrix.double() for matrix in system)
        squares, into, out = [A], B[:, None], (C @ A)[:, None]
        while into.shape[1] < size:
            into = torch.cat([into, into @ squares[-1].mT], 1)
            out = torch.cat([out, out @ squares[-1][:, None]], 1)
            squares.append(squares[-1] @ squares[-1])
        K = torch.einsum("cmn,csn->cms", C, into)
        return cls(into.to(dtype), K.to(dtype), out.to(dtype), tuple(square.to(dtype) for square in squares))

    def cut(self, size: int) -> Tables:
        """Return the tables of shorter chunks.

        Args:
            size: a power of two.
        """
        powers = self.powers[: size.bit_length()]
        return Tables(self.into[:, :size], self.K[:, :, :size], self.out[:, :size], powers)


class DenseSystem(System):
    """A bank of systems whose recurrence runs in chunks, with dense matrices."""

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the discrete systems as real matrices.

        Returns:
            A_bar: (channels, N, N).
            B_bar: (channels, N).
            C: (channels, n_outputs, N).
        """
        raise NotImplementedError

    def scan(self, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `System.scan`."""
        size = min(CHUNK, 1 << (u.shape[1] - 1).bit_length())
        learning = torch.is_grad_enabled() or composed()
        tables = Tables.of(self.dense(), size, u.dtype) if learning else self.cached(self._tables).cut(size)
        y, after = chunked(tables, u, None if state is None else state.flatten(2), seq_idx)
        return y, after.view(self.init_state(len(u)).ssm.shape)

    def _tables(self) -> Tables:
        """Return the tables of whole chunks."""
        return Tables.of(self.dense(), CHUNK, self.dtype)


def chunked(tables: Tables, u: Tensor, state: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a bank of recurrences in chunks.

    Args:
        tables: what a chunk multiplies by.
        u: (batch, seq_len, channels).
        state: (batch, channels, N); zeros if None.
        seq_idx: (batch, seq_len), see `Mixer.plan`.

    Returns:
        y: (batch, seq_len, channels n_outputs).
        state: (batch, channels, N) after the last token.
    """
    size = tables.into.shape[1]
    chunks = Chunks.of(u, seq_idx, size)
    t = torch.arange(size, device=u.device)
    lags = t[:, None] - t
    toeplitz = tables.K[:, :, lags.clamp(min=0)] * (lags >= 0)  # (channels, n_outputs, size, size)
    entering = torch.einsum("bjsc,csn->bjcn", chunks.take(u, chunks.right), tables.into.flip(1))
    x, before = u.new_zeros(entering[:, 0].shape) if state is None else state, []
    for index in range(entering.shape[1]):
        x = torch.where(chunks.fresh[:, index, None, None], 0, x)
        before.append(x)
        x = _after(x, tables.powers, chunks.lengths[:, index]) + entering[:, index]
    finite, after = causal_parts(chunks.take(u, chunks.left), 2)
    y = torch.einsum("cmts,bjsc->bjtcm", toeplitz, finite)
    y = y if after is None else y + after[..., None]
    y = y + torch.einsum("ctmn,bjcn->bjtcm", tables.out, torch.stack(before, 1))
    return chunks.give(y.flatten(3), chunks.left), x


def _after(x: Tensor, powers: Sequence[Tensor], steps: Tensor) -> Tensor:
    """Return the states x (batch, channels, N) after steps (batch,) of zero input, by the powers of A_bar."""
    for j, power in enumerate(powers):
        bit = (steps >> j) & 1 == 1
        if bool(bit.any()):
            x = torch.where(bit[:, None, None], torch.einsum("bcn,cmn->bcm", x, power), x)
    return x
