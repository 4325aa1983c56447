"""Batches of about equal length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence

from longscan.core.random import RandomStream
from longscan.tokenizers.wordpiece import Framed

__all__ = ["by_length", "shuffled"]


WINDOW = 16  # batches whose texts are sorted by length together


def shuffled(lengths: Sequence[int], rows: int, stream: RandomStream) -> list[list[int]]:
    """Put all examples into batches of about equal length, in random order.

    Args:
        lengths: of each example.
        rows: examples in a batch; the last one may have less.
        stream: of the epoch, see `order.EpochOrder`.

    Returns:
        The numbers of the examples in each batch.
    """
    order = stream.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), WINDOW * rows):
        window = sorted(order[start : start + WINDOW * rows], key=lambda place: lengths[place])
        batches += [window[first : first + rows] for first in range(0, len(window), rows)]
    return [batches[place] for place in stream.permutation(len(batches))]


def by_length(framed: Sequence[Framed], rows: int) -> list[list[int]]:
    """Put texts into batches of about equal length, so that little is padding.

    Args:
        framed: the texts.
        rows: texts in a batch.

    Returns:
        The numbers of the texts in each batch.
    """
    order = sorted(range(len(framed)), key=lambda place: len(framed[place].ids))
    return [order[start : start + rows] for start in range(0, len(order), rows)]
