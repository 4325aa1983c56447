"""Packed rows divided into chunks that never cross the start of a sequence."""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._derivatives import composed
from longscan.ops._segments import segments


def causal_parts(u: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Split off what is not finite, which a product with zeros would carry to earlier steps: 0 · NaN is NaN.

    Args:
        u: any shape.
        dim: of time.

    Returns:
        finite: u with 0 for NaN and infinity.
        after: u's shape, to be added to the product: NaN from the first such value on, 0 before it. None if
            all is finite, as far as that may be asked.
    """
    traced = composed() or torch.compiler.is_compiling() or u.is_meta
    if not traced and bool(u.detach().sum().isfinite()):  # one pass, where the other way takes four
        return u, None
    return torch.nan_to_num(u, 0.0, 0.0, 0.0), (u.detach() * 0).cumsum(dim)


class Chunks(NamedTuple):
    """Indices of the tokens of each chunk, with which a time-invariant recurrence treats all chunks alike.

    Attributes:
        left: (batch, n_chunks, size) int64 indices into the flattened batch, with a chunk's tokens
            left-aligned; padding has the index of the extra element that `take` appends to each row.
        right: the same, right-aligned.
        lengths: (batch, n_chunks) int64 tokens in each chunk.
        fresh: (batch, n_chunks) bool, whether the chunk starts from a zero state.
        seq_len: of the rows.
    """

    left: Tensor
    right: Tensor
    lengths: Tensor
    fresh: Tensor
    seq_len: int

    @classmethod
    def of(cls, u: Tensor, seq_idx: Tensor | None, size: int) -> Self:
        """Return the chunks of rows.

        Args:
            u: (batch, seq_len, ...), of which only shape and device are used.
            seq_idx: (batch, seq_len) integers: a new value starts a new sequence, negative means padding.
            size: the most tokens of a chunk.
        """
        batch, seq_len, device = u.shape[0], u.shape[1], u.device
        if seq_idx is None:
            n_chunks = -(-seq_len // size)
            index = torch.arange(n_chunks * size, device=device).clamp(max=seq_len).expand(batch, -1)
            start = torch.zeros(1, 1, dtype=torch.bool, device=device).expand(batch, seq_len)
        else:
            start, padding = segments(seq_idx)
            rank = (~padding).cumsum(1) - 1  # of each token among those of its row
            origin = torch.where(start, rank, 0).cummax(1).values  # the rank at which its sequence starts
            offset = (rank - origin) % size
            chunk = ((offset == 0) & ~padding).cumsum(1) - 1
            n_chunks = max(1, int(chunk.max()) + 1)
            slot = torch.where(padding, n_chunks * size, chunk * size + offset)
            index = torch.full((batch, n_chunks * size + 1), seq_len, device=device)
            position = torch.arange(seq_len, device=device).expand(batch, -1)
            index = index.scatter(1, slot, position)[:, :-1]
        left = index.unflatten(1, (n_chunks, size))  # type: ignore[no-untyped-call]
        lengths = (left < seq_len).sum(2)
        fresh = F.pad(start, (0, 1)).gather(1, left[:, :, 0])
        shift = (torch.arange(size, device=device) + lengths[..., None]) % size
        right = left.gather(2, shift)
        rows = (torch.arange(batch, device=device) * (seq_len + 1))[:, None, None]
        return cls(left + rows, right + rows, lengths, fresh, seq_len)

    def take(self, u: Tensor, index: Tensor) -> Tensor:
        """Return u (batch, seq_len, channels) as (batch, n_chunks, size, channels), with zeros in padding.

        Args:
            u: one value per token.
            index: `left` or `right`.
        """
        flat = F.pad(u, (0, 0, 0, 1)).flatten(0, 1)
        return flat.index_select(0, index.flatten()).view(*index.shape, u.shape[2])

    def give(self, y: Tensor, index: Tensor) -> Tensor:
        """Return y (batch, n_chunks, size, channels) as (batch, seq_len, channels), with zeros in padding.

        Args:
            y: values in padding are dropped.
            index: `left` or `right`.
        """
        batch = len(index)
        flat = y.new_zeros(batch * (self.seq_len + 1), y.shape[3])
        flat = flat.index_copy(0, index.flatten(), y.flatten(0, 2))
        return flat.unflatten(0, (batch, -1))[:, : self.seq_len]  # type: ignore[no-untyped-call, no-any-return]
