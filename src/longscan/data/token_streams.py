"""Rows of a batch that read a token file on from batch to batch, for models that carry their state along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from longscan.core.random import RandomStream
from longscan.data.token_files import TokenDataset, gather

__all__ = ["TokenStreams"]


class TokenStreams(TokenDataset):
    """Neighbouring windows of a token file: batch number -> batch, a pure function of the seed.

    The rows start at equal distances on the ring of tokens, which the seed turns by a random angle. Each goes
    on from batch to batch, without end.

    Args:
        path: see `TokenDataset`.
        seq_len: tokens predicted in a window.
        batch_size: rows.
        seed: of the angle.

    Raises:
        LongscanError: the file is damaged, or shorter than one window.
    """

    def __init__(self, path: str | Path, seq_len: int, batch_size: int, seed: int = 0) -> None:
        super().__init__(path, seq_len, batch_size, seed)
        angle = int(RandomStream(seed, 0).raw(1)[0]) % len(self._tokens)
        self._first = angle + np.arange(batch_size) * len(self._tokens) // batch_size

    def batch(self, step: int) -> Tensor:
        """Return a batch; see `TokenDataset.batch`. Its rows go on where those of the one before end."""
        starts = (self._first + step * self.seq_len) % len(self._tokens)
        return gather(self._tokens, starts, self.seq_len)
