"""Parallel text: sentence pairs from files, as ids, in batches of sentences of about equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.random import EpochOrder, RandomStream
from longscan.data.text_files import iter_lines
from longscan.errors import LongscanError
from longscan.tokenizers.base import Tokenizer

__all__ = [
    "EOS",
    "PAD",
    "SPECIAL",
    "Batch",
    "Batches",
    "IdPairs",
    "TextPairs",
    "read_lines",
    "read_pairs",
    "rows",
]

SPECIAL = ("<pad>", "<s>", "</s>")  # the first ids of a translator's vocabulary
PAD, BOS, EOS = range(3)
HEADER = ("source", "target")


class TextPairs(NamedTuple):
    """Sentences, and the same in the other language."""

    source: list[str]
    target: list[str]
    dropped: int  # pairs of which a side was empty

    def select(self, indices: Sequence[int]) -> TextPairs:
        """Return some pairs."""
        return TextPairs([self.source[i] for i in indices], [self.target[i] for i in indices], 0)

    def __str__(self) -> str:
        dropped = f" ({self.dropped:,} with an empty side dropped)" if self.dropped else ""
        return f"{count(len(self.source), 'pair')}{dropped}"


class Batch(NamedTuple):
    """Pairs as a translator takes them."""

    source: Tensor  # (batch, src_len) tokens, EOS, PAD
    target: Tensor  # (batch, tgt_len) BOS, tokens, EOS, PAD

    @property
    def tokens(self) -> int:
        """How many target tokens there are to predict."""
        return int((self.target[:, 1:] != PAD).sum())


def read_pairs(source: str | Path, target: str | Path | None = None) -> TextPairs:
    r"""Read sentence pairs.

    Lines end with "\n" and nothing else, since a sentence may hold other separators. White space around a
    sentence is stripped. A pair whose source or target is empty is dropped and counted.

    Args:
        source: one sentence a line; or, without `target`, a table of tab-separated columns, the first two of
            which are source and target. A first row of "source", "target", in either case, is a
            header. Also .gz or .xz.
        target: line n is the translation of line n of `source`.

    Returns:
        The pairs.

    Raises:
        LongscanError: unequal numbers of lines, a row without a tab, no UTF-8, a damaged file, no pair.
        OSError: a file can't be read.
    """
    if target is not None:
        lines, others = read_lines(source), read_lines(target)
        if len(lines) != len(others):
            raise LongscanError(
                f"{source} has {len(lines):,} lines and {target} has {len(others):,}: expected as many, line "
                "n of one translating line n of the other. Was a file cut short?"
            )
        found = list(zip(lines, others, strict=True))
    else:
        found = _read_table(Path(source))
    pairs = [(first.strip(), second.strip()) for first, second in found if first.strip() and second.strip()]
    if not pairs:
        where = source if target is None else f"{source} and {target}"
        what = f"all {len(found):,} have an empty side" if found else "empty"
        raise LongscanError(f"no sentence pairs in {where}: {what}.")
    return TextPairs([pair[0] for pair in pairs], [pair[1] for pair in pairs], len(found) - len(pairs))


def read_lines(path: str | Path) -> list[str]:
    r"""Read the lines of a file.

    Args:
        path: UTF-8, also .gz or .xz; lines end with "\n" and nothing else.

    Returns:
        The lines, without their ends.

    Raises:
        LongscanError: it is not UTF-8, or damaged; its lines end with CR alone, or one is too long.
        OSError: it can't be read.
    """
    lines = list(iter_lines(Path(path)))
    if len(lines) - (not lines[-1]) == 1 and "\r" in lines[0].rstrip("\r"):
        raise LongscanError(
            f"{path}: expected lines that end with LF, got CR alone: tr '\\r' '\\n' < IN > OUT"
        )
    return lines if lines[-1] else lines[:-1]


def rows(sentences: Sequence[Sequence[int]], *, bos: bool) -> Tensor:
    """Return sentences as one padded tensor.

    Args:
        sentences: ids of each, without special ones.
        bos: whether they begin with BOS: targets do, sources don't.

    Returns:
        (batch, longest) ids: BOS perhaps, tokens, EOS, then PAD.
    """
    length = max(map(len, sentences)) + 1 + bos
    table = torch.full((len(sentences), length), PAD)
    for row, ids in zip(table, sentences, strict=True):
        framed = [*([BOS] if bos else []), *ids, EOS]
        row[: len(framed)] = torch.tensor(framed)
    return table


@dataclass(frozen=True)
class IdPairs:
    """Sentence pairs as ids, in arrays that are written and read as they are.

    Attributes:
        source: (n_source_tokens,) int32, all sentences concatenated.
        source_ends: (n_pairs,) int64, where each ends.
        target: (n_target_tokens,) int32.
        target_ends: (n_pairs,) int64.
    """

    source: npt.NDArray[np.int32]
    source_ends: npt.NDArray[np.int64]
    target: npt.NDArray[np.int32]
    target_ends: npt.NDArray[np.int64]

    @classmethod
    def encode(cls, pairs: TextPairs, tokenizer: Tokenizer, max_len: int) -> tuple[Self, TextPairs]:
        """Turn text into ids.

        Args:
            pairs: the text.
            tokenizer: of both languages.
            max_len: tokens that a sentence may have, its end included; longer pairs are dropped.

        Returns:
            The pairs as ids, and as text.
        """
        sides = [tokenizer.encode_batch(side) for side in (pairs.source, pairs.target)]
        chosen = [i for i, pair in enumerate(zip(*sides, strict=True)) if max(map(len, pair)) < max_len]
        arrays: list[Any] = []
        for side in sides:
            arrays.append(np.fromiter(chain.from_iterable(side[i] for i in chosen), np.int32))
            arrays.append(np.cumsum([len(side[i]) for i in chosen], dtype=np.int64))
        return cls(*arrays), pairs.select(chosen)

    def __len__(self) -> int:
        return len(self.source_ends)

    @cached_property
    def source_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each source sentence, its end included."""
        return np.diff(self.source_ends, prepend=0) + 1

    @cached_property
    def target_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each target sentence, its end included."""
        return np.diff(self.target_ends, prepend=0) + 1

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by their names."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def fingerprint(self) -> str:
        """Return a hash of everything."""
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def gather(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return some pairs.

        Args:
            indices: (batch,) which.
        """
        sides = []
        for ids, ends, lengths in (
            (self.source, self.source_ends, self.source_lengths),
            (self.target, self.target_ends, self.target_lengths),
        ):
            sides.append([ids[ends[i] - lengths[i] + 1 : ends[i]].tolist() for i in indices])
        return Batch(rows(sides[0], bos=False), rows(sides[1], bos=True))

    def in_order(self, batch_tokens: int) -> Iterator[Batch]:
        """Yield all pairs once, the shortest first.

        Args:
            batch_tokens: see `Batches`.
        """
        order = np.argsort(self.source_lengths + self.target_lengths, kind="stable")
        for start, end in _cut(self, order, batch_tokens):
            yield self.gather(order[start:end])


class Batches:
    """Endless batches: in every epoch each pair once, in another order, beside pairs of about its length.

    Args:
        pairs: the pairs.
        batch_tokens: about how many tokens a batch has on its longer side, padding included.
        seed: of the order.
    """

    JITTER = 3.0  # tokens of both sides by which a pair may stray from its place in the order of lengths

    def __init__(self, pairs: IdPairs, batch_tokens: int, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        self._lengths = pairs.source_lengths + pairs.target_lengths
        # the number of batches must not depend on the epoch: they are cut once, where the lengths say
        self._cuts = _cut(pairs, np.argsort(self._lengths, kind="stable"), batch_tokens)
        self._epochs = EpochOrder(seed, self._shuffle)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._cuts)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: a function of nothing but the pairs, the seed and the step.

        Args:
            step: from 0.
        """
        epoch, index = divmod(step, len(self))
        order, turn = self._epochs[epoch]
        start, end = self._cuts[turn[index]]
        return self.pairs.gather(order[start:end])

    def _shuffle(self, stream: RandomStream) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the order of the pairs (n_pairs,), and that of the batches cut out of it (n_batches,)."""
        jitter = self.JITTER * stream.uniform((len(self._lengths),))
        return np.argsort(self._lengths + jitter, kind="stable"), stream.permutation(len(self))


def _cut(pairs: IdPairs, order: npt.NDArray[np.int64], batch_tokens: int) -> list[tuple[int, int]]:
    """Divide an order of pairs into batches of at most so many tokens, of at least one pair."""
    longer = np.maximum(pairs.source_lengths, pairs.target_lengths)[order].tolist()
    cuts, start, longest = [], 0, 0
    for index, length in enumerate(longer):
        longest = max(longest, length)
        if longest * (index - start + 1) > batch_tokens and index > start:
            cuts.append((start, index))
            start, longest = index, length
    return [*cuts, (start, len(longer))]


def _read_table(path: Path) -> list[tuple[str, str]]:
    """Read the first two columns of a table."""
    found, first = [], True
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t")
        if len(columns) < 2:
            if not line.strip():
                found.append(("", ""))
                continue
            raise LongscanError(
                f"{path}, line {number:,}: expected source and target with a tab between, found no tab. "
                "For two files of lines give both of them."
            )
        if not first or tuple(column.strip().lower() for column in columns[:2]) != HEADER:
            found.append((columns[0], columns[1]))
        first = False
    return found
