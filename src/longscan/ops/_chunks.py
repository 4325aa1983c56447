"""Packed rows cut into chunks that never cross the start of a sequence: the places of tokens in them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops._segments import segments


class Chunks(NamedTuple):
    """Where the tokens of each chunk are; a time-invariant recurrence then treats all chunks alike.

    Attributes:
        left: (batch, n_chunks, size) int64 places in the flattened batch, tokens at the front of the chunk;
            the room behind them names the spare place that `take` adds to each row.
        right: the same with the tokens at the end.
        lengths: (batch, n_chunks) int64 tokens in each chunk.
        fresh: (batch, n_chunks) bool, whether the chunk starts from nothing, not from the state before it.
        seq_len: of the rows.
    """

    left: Tensor
    right: Tensor
    lengths: Tensor
    fresh: Tensor
    seq_len: int

    @classmethod
    def of(cls, u: Tensor, seq_idx: Tensor | None, size: int) -> Self:
        """Cut rows.

        Args:
            u: (batch, seq_len, ...), of which only shape and device count.
            seq_idx: (batch, seq_len) integers: a new value starts a new sequence, negative means padding.
            size: the most tokens of a chunk.
        """
        batch, seq_len, device = u.shape[0], u.shape[1], u.device
        if seq_idx is None:
            n_chunks = -(-seq_len // size)
            place = torch.arange(n_chunks * size, device=device).clamp(max=seq_len).expand(batch, -1)
            start = torch.zeros(1, 1, dtype=torch.bool, device=device).expand(batch, seq_len)
        else:
            start, padding = segments(seq_idx)
            rank = (~padding).cumsum(1) - 1  # of each token among those of its row
            origin = torch.where(start, rank, 0).cummax(1).values  # the rank at which its sequence starts
            offset = (rank - origin) % size
            chunk = ((offset == 0) & ~padding).cumsum(1) - 1
            n_chunks = max(1, int(chunk.max()) + 1)
            slot = torch.where(padding, n_chunks * size, chunk * size + offset)
            place = torch.full((batch, n_chunks * size + 1), seq_len, device=device)
            position = torch.arange(seq_len, device=device).expand(batch, -1)
            place = place.scatter(1, slot, position)[:, :-1]
        left = place.unflatten(1, (n_chunks, size))  # type: ignore[no-untyped-call]
        lengths = (left < seq_len).sum(2)
        fresh = F.pad(start, (0, 1)).gather(1, left[:, :, 0])
        shift = (torch.arange(size, device=device) + lengths[..., None]) % size
        right = left.gather(2, shift)
        rows = (torch.arange(batch, device=device) * (seq_len + 1))[:, None, None]
        return cls(left + rows, right + rows, lengths, fresh, seq_len)

    def take(self, u: Tensor, places: Tensor) -> Tensor:
        """Turn u (batch, seq_len, channels) into (batch, n_chunks, size, channels), zeros in the room.

        Args:
            u: of every token.
            places: `left` or `right`.
        """
        flat = F.pad(u, (0, 0, 0, 1)).flatten(0, 1)
        return flat.index_select(0, places.flatten()).view(*places.shape, u.shape[2])

    def give(self, y: Tensor, places: Tensor) -> Tensor:
        """Turn y (batch, n_chunks, size, channels) back into (batch, seq_len, channels), zeros at padding.

        Args:
            y: what lies in the room is dropped.
            places: `left` or `right`.
        """
        batch = len(places)
        flat = y.new_zeros(batch * (self.seq_len + 1), y.shape[3])
        flat = flat.index_copy(0, places.flatten(), y.flatten(0, 2))
        return flat.unflatten(0, (batch, -1))[:, : self.seq_len]  # type: ignore[no-untyped-call, no-any-return]
