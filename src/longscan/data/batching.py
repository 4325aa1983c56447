"""Batches of about equal length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence

from longscan.core.random import RandomStream
from longscan.tokenizers.wordpiece import Framed

__all__ = ["by_length", "shuffled"]


WINDOW = 16  # batches whose texts are sorted by length together


def shuffled(lengths: Sequence[int], rows: int, stream: RandomStream) -> list[list[int]]:
    """Return batches of examples of about equal length, in random order.

    Args:
        lengths: of each example.
        rows: examples per batch; the last batch may have fewer.
        stream: of the epoch, see `EpochOrder`.

    Returns:
        The indices of the examples in each batch.
    """
    order = stream.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), WINDOW * rows):
        window = sorted(order[start : start + WINDOW * rows], key=lambda index: lengths[index])
        batches += [window[first : first + rows] for first in range(0, len(window), rows)]
    return [batches[index] for index in stream.permutation(len(batches))]


def by_length(framed: Sequence[Framed], rows: int) -> list[list[int]]:
    """Return batches of texts sorted by length, which minimises padding.

    Args:
        framed: the texts.
        rows: texts per batch.

    Returns:
        The indices of the texts in each batch.
    """
    order = sorted(range(len(framed)), key=lambda index: len(framed[index].ids))
    return [order[start : start + rows] for start in range(0, len(order), rows)]
