"""The pre-training data of BERT: pairs of texts with masked tokens.

A pair is two spans of sentences. Half of the second ones follow the first (label 0), the others are random
(label 1). 15 % of the tokens of a pair are selected for prediction: 80 % of these are replaced by [MASK], 10
% by a random token, 10 % are unchanged. The procedure and its numbers are those of Devlin et al. 2018 (arXiv
1810.04805), appendix A.1 and A.2, and of their create_pretraining_data. Deviations: masks are drawn anew in
every epoch (dynamic masking), not ten times in advance; whether a pair is short (one in ten) is drawn per
pair, not per document, because a document may be a novel.

A batch is a pure function of the seed and its number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.random import STEPS, EpochOrder, RandomStream
from longscan.data.token_files import open_tokens
from longscan.errors import LongscanError, UsageError
from longscan.models.bert import PretrainingBatch
from longscan.models.common.losses import IGNORE
from longscan.tokenizers.wordpiece import WordPieceTokenizer, fit

__all__ = ["PairDataset", "hide"]


CHOSEN, HIDDEN, REPLACED = 0.15, 0.8, 0.1  # of all tokens; of those selected

SHORT = 0.1  # of the pairs


class _Stretch(NamedTuple):
    """A span of sentences, and how many of its tokens are truncated."""

    first: int
    end: int  # the sentence after the last
    front: int  # tokens left out at the beginning
    back: int  # and at the end


class _Pair(NamedTuple):
    """What is to be framed."""

    a: _Stretch
    b: _Stretch
    is_random: bool


class PairDataset:
    """Pairs of texts with masked tokens, from a token file: batch number -> batch.

    Each epoch divides all documents into new pairs of about `seq_len` tokens, and shuffles them. All epochs
    have as many pairs as the first; surplus pairs are skipped.

    Args:
        path: a file of tokens of a `SentenceTokenizer`.
        tokenizer: the vocabulary.
        seq_len: tokens in a framed pair, at most.
        batch_size: pairs in a batch.
        seed: of all that is drawn, 0 to 2**64 - 1.

    Raises:
        LongscanError: the file is damaged, or holds fewer than two sentences.
        UsageError: `seq_len` is too small for a pair.
    """

    def __init__(
        self, path: Path, tokenizer: WordPieceTokenizer, seq_len: int, batch_size: int, seed: int = 0
    ) -> None:
        if seq_len < 8:
            raise UsageError(f"seq_len: expected 8 or more for a pair of texts, got {seq_len}.")
        self.tokenizer, self.seq_len, self.batch_size, self.seed = tokenizer, seq_len, batch_size, seed
        self._tokens = open_tokens(path)
        marks = np.flatnonzero((self._tokens == tokenizer.sep_id) | (self._tokens == tokenizer.cls_id))
        starts = np.concatenate([[0], marks[:-1] + 1]) if len(marks) else marks
        sentence = (self._tokens[marks] == tokenizer.sep_id) & (marks > starts)
        document = np.cumsum(self._tokens[marks] == tokenizer.cls_id)[sentence]
        self._starts: list[int] = starts[sentence].tolist()
        self._ends: list[int] = marks[sentence].tolist()
        if len(self._starts) < 2:
            raise LongscanError(
                f"{path} has {count(len(self._starts), 'sentence')}: pairs need two. Give more text."
            )
        edges = np.flatnonzero(np.diff(document, prepend=-1, append=-1)).tolist()
        self._documents = list(itertools.pairwise(edges))  # first sentence, and the one after
        self._plans = EpochOrder(seed, self._plan)
        self.pairs_per_epoch = len(self._plans[0])

    def batch(self, step: int) -> PretrainingBatch:
        """Return a batch.

        Args:
            step: its number, from 0, without end.

        Returns:
            The pairs, padded to the longest.
        """
        return self._make(range(step * self.batch_size, (step + 1) * self.batch_size), step)

    def walk(self, limit: int | None = None) -> Iterator[PretrainingBatch]:
        """Go through the first epoch, for evaluation.

        Args:
            limit: pairs at most.

        Yields:
            The batches; the last one may be smaller.
        """
        numbers = range(self.pairs_per_epoch)[:limit]
        for start in range(0, len(numbers), self.batch_size):
            yield self._make(numbers[start : start + self.batch_size], start)

    def _make(self, numbers: range, step: int) -> PretrainingBatch:
        """Return the pairs of these numbers, framed and masked."""
        pairs = []
        for number in numbers:
            epoch, index = divmod(number, self.pairs_per_epoch)
            plan = self._plans[epoch]
            pairs.append(plan[index % len(plan)])
        framed = [self.tokenizer.frame(self._cut(a), self._cut(b), self.seq_len) for a, b, _ in pairs]
        ids, types = self.tokenizer.collate(framed)
        limit = math.ceil(CHOSEN * self.seq_len)
        ids, labels = hide(ids, self.tokenizer, RandomStream(self.seed, STEPS + step), limit)
        return PretrainingBatch(ids, types, labels, torch.tensor([int(pair.is_random) for pair in pairs]))

    def _cut(self, stretch: _Stretch) -> list[int]:
        """Return the tokens of a stretch."""
        tokens = self._tokens[self._starts[stretch.first] : self._ends[stretch.end - 1]]
        ids: list[int] = tokens[tokens != self.tokenizer.sep_id].tolist()
        return ids[stretch.front : len(ids) - stretch.back]

    def _plan(self, stream: RandomStream) -> list[_Pair]:
        """Return the pairs of an epoch in order."""
        pairs = [pair for document in self._documents for pair in self._pair_up(document, stream)]
        return [pairs[index] for index in stream.permutation(len(pairs)).tolist()]

    def _pair_up(self, document: tuple[int, int], stream: RandomStream) -> list[_Pair]:
        """Return the pairs of a document; sentences that a random text replaced start the next pair."""
        pairs = []
        at, end = document
        while at < end:
            target = self.seq_len - 3
            if stream.random() < SHORT:
                target = 2 + stream.below(target - 1)
            stop = self._reach(at, end, target)
            middle = at + 1 + stream.below(stop - at - 1) if stop - at > 1 else stop
            is_random = stop - at == 1 or stream.random() < 0.5
            if is_random:
                other = self._elsewhere(document, stream)
                start = other[0] + stream.below(other[1] - other[0])
                second = start, self._reach(start, other[1], target - self._count(at, middle))
            else:
                second = middle, stop
            pairs.append(self._trim((at, middle), second, is_random, stream))
            at = middle if is_random else stop
        return pairs

    def _elsewhere(self, document: tuple[int, int], stream: RandomStream) -> tuple[int, int]:
        """Return another document at random; the same one after ten attempts, or if there is no other."""
        other = document
        for _ in range(10):
            other = self._documents[stream.below(len(self._documents))]
            if other != document:
                break
        return other

    def _reach(self, at: int, end: int, target: int) -> int:
        """Return the sentence before which a stretch has `target` tokens, at least one sentence later."""
        count = 0
        while at < end:
            count += self._ends[at] - self._starts[at]
            at += 1
            if count >= target:
                break
        return at

    def _count(self, first: int, end: int) -> int:
        """Count the tokens of some sentences."""
        return sum(self._ends[at] - self._starts[at] for at in range(first, end))

    def _trim(self, a: tuple[int, int], b: tuple[int, int], is_random: bool, stream: RandomStream) -> _Pair:
        """Return a pair truncated to `seq_len`, dropping the longer text's tokens at either end."""
        lengths = self._count(*a), self._count(*b)
        limits = fit(*lengths, self.seq_len - 3)
        excess = [length - limit for length, limit in zip(lengths, limits, strict=True)]
        front = [stream.heads(count) for count in excess]  # a coin for each
        return _Pair(
            _Stretch(*a, front[0], excess[0] - front[0]),
            _Stretch(*b, front[1], excess[1] - front[1]),
            is_random,
        )


def hide(
    ids: Tensor, tokenizer: WordPieceTokenizer, stream: RandomStream, limit: int
) -> tuple[Tensor, Tensor]:
    """Return framed texts with masked tokens, and their labels.

    Args:
        ids: (batch, seq_len) int64, padded.
        tokenizer: its vocabulary.
        stream: randomness.
        limit: the most tokens to select in a row.

    Returns:
        ids: likewise, masked: 15 % of the tokens of each row, at least one and at most `limit`.
        labels: the original token where one was selected, else -100.
    """
    before = ids.numpy()
    fixed = np.isin(before, (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id))
    n_chosen = np.clip(np.round(CHOSEN * (before != tokenizer.pad_id).sum(1)), 1, limit)  # (batch,)
    order = np.where(fixed, 2.0, stream.uniform(before.shape))
    chosen = (order.argsort(1, kind="stable").argsort(1) < n_chosen[:, None]) & ~fixed
    dice = stream.uniform(before.shape)
    anything = (stream.uniform(before.shape) * tokenizer.vocab_size).astype(np.int64)
    after = np.where(chosen & (dice < HIDDEN), tokenizer.mask_id, before)
    after = np.where(chosen & (dice >= 1 - REPLACED), anything, after)
    labels = np.where(chosen, before, IGNORE)
    return torch.from_numpy(after), torch.from_numpy(labels)
