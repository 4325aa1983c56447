"""Tokenised examples with the tokens to learn marked: saved, packed into rows, and as batches.

Packing puts examples one behind the other in rows of seq_len tokens. seq_idx tells them apart, so states are
reset between them and no loss crosses: a packed row is exactly its examples, each by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from longscan.errors import LongscanError

__all__ = ["Batch", "Example", "collate", "load_examples", "pack", "save_examples", "shorten"]

IGNORE = -100  # a label that is not learnt, as everywhere in torch


class Example(NamedTuple):
    """Tokens.

    Attributes:
        ids: (n,) int32.
        trained: (n,) bool, whether each is learnt; the first can't be, as nothing predicts it.
    """

    ids: np.ndarray
    trained: np.ndarray

    @property
    def learnt(self) -> int:
        """The number of tokens that are learnt."""
        return int(self.trained[1:].sum())


class Batch(NamedTuple):
    """The input of a forward pass: ids, seq_idx and labels, each (rows, seq_len) int64."""

    ids: Tensor
    seq_idx: Tensor
    labels: Tensor


def shorten(example: Example, seq_len: int, running: bool) -> list[Example]:
    """Return an example in pieces of at most seq_len tokens that teach something.

    Args:
        example: of any length.
        seq_len: the most tokens.
        running: whether it goes on in further pieces, as running text may; else its end is cut off.
    """
    # pieces overlap by a token, so that each token but the first is predicted
    starts = range(0, max(1, len(example.ids) - 1), seq_len - 1) if running else (0,)
    pieces = [Example(*(part[start : start + seq_len] for part in example)) for start in starts]
    return [piece for piece in pieces if piece.learnt]


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Return which examples share a row: best fit, the longest first.

    Args:
        lengths: of the examples, each at most seq_len.
        seq_len: the capacity of a row.

    Returns:
        The indices of the examples in each row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # the space left in each row and its index, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect_left(free, (lengths[index], -1))
        if fit < len(free):
            left, row = free.pop(fit)
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], row))
    return rows


def collate(rows: Iterable[Iterable[Example]]) -> Batch:
    """Return rows of examples as a batch, as long as the longest row.

    Args:
        rows: the examples in each row.
    """
    packed = [list(row) for row in rows]
    width = max(sum(len(example.ids) for example in row) for row in packed)
    ids, seq_idx, labels = (np.full((len(packed), width), fill, np.int64) for fill in (0, -1, IGNORE))
    for row, examples in enumerate(packed):
        start = 0
        for number, (tokens, trained) in enumerate(examples):
            part = slice(start, start + len(tokens))
            ids[row, part], seq_idx[row, part] = tokens, number
            labels[row, part] = np.where(trained, tokens, IGNORE)
            start += len(tokens)
    return Batch(*map(torch.from_numpy, (ids, seq_idx, labels)))


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples to a safetensors file.

    Args:
        path: of the file.
        examples: any number.
    """
    empty = [Example(np.zeros(0, np.int32), np.zeros(0, np.bool_))]
    save_file(
        {
            "ids": np.concatenate([one.ids for one in [*examples, *empty]]),
            "trained": np.concatenate([one.trained for one in [*examples, *empty]]).astype(np.uint8),
            "lengths": np.array([len(one.ids) for one in examples], np.int64),
        },
        path,
    )


def load_examples(path: Path) -> list[Example]:
    """Return what `save_examples` wrote.

    Args:
        path: of the file.

    Raises:
        LongscanError: it is damaged.
        OSError: it can't be read.
    """
    try:
        arrays = load_file(path)
        ids, trained, lengths = (arrays[name] for name in ("ids", "trained", "lengths"))
        if int(lengths.sum()) != len(ids) or len(ids) != len(trained):
            raise KeyError("as many tokens as its lengths say")
    except (SafetensorError, KeyError) as error:
        raise LongscanError(f"{path} is damaged: it lacks {error}. Start a new run.") from error
    ends = np.cumsum(lengths)
    return [
        Example(ids[start:end], trained[start:end].astype(np.bool_))
        for start, end in zip(ends - lengths, ends, strict=True)
    ]
