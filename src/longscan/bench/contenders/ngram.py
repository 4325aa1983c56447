"""An n-gram language model with interpolated Kneser-Ney smoothing, in NumPy.

Kneser and Ney 1995 (Improved backing-off for m-gram language modeling), interpolated and with three discounts
as in Chen and Goodman 1999 (An empirical study of smoothing techniques for language modeling).

A document starts after an end-of-text id and ends with one; no n-gram crosses it. An n-gram is a number, its
index among the sorted keys `context * vocab_size + token` of its order; the context is itself the
number of an n-gram one token shorter. So a text is counted by one sort per order, and found by bisection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["NGram"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

USUAL = (0.5, 1.0, 1.5)  # discounts where the text is too short to estimate them


class _Level(NamedTuple):
    """The n-grams of one order; the last entry stands for all unseen ones."""

    keys: Ints  # (n_grams + 1,) sorted
    shares: Floats  # (n_grams + 1,) discounted, of the token in its context
    rests: Floats  # (n_contexts + 1,) the mass that discounting left for the shorter contexts


class NGram:
    """Probabilities of tokens given at most order - 1 tokens before them.

    With a(g) the count of an n-gram g, or below the highest order the number of different tokens seen before
    it (unless g opens a document, where nothing comes before), D its discount and c' the context c without
    its first token:

        p(w | c) = (a(c w) - D(a(c w)) + p(w | c') Σ_v D(a(c v))) / Σ_v a(c v)

    The empty context falls back to 1 / vocab_size, a context never seen to the one a token shorter.

    Args:
        tokens: (n_tokens,) ids of the training text, each document ending with `eos_id`.
        vocab_size: one more than the largest id.
        eos_id: the end-of-text id.
        order: tokens in the longest n-gram, at least 1.
    """

    def __init__(
        self, tokens: npt.NDArray[np.integer[Any]], vocab_size: int, eos_id: int, order: int = 5
    ) -> None:
        self.vocab_size, self.eos_id = vocab_size, eos_id
        ids = tokens.astype(np.int64)  # (n_tokens,) the n-gram that ends with each token
        targets, past = ids, self._past(ids)
        keys, counts = np.arange(vocab_size), np.bincount(targets, minlength=vocab_size)
        opens = np.zeros(vocab_size, bool)
        self._levels: list[_Level] = []
        n_contexts = 1
        for length in range(2, order + 1):
            at = np.flatnonzero(past >= length - 1)
            longer, first, inverse, occurrences = np.unique(
                self._before(ids)[at] * vocab_size + targets[at],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            ends = at[first]  # where each of the longer n-grams first ends
            lefts = np.bincount(ids[ends], minlength=len(keys))
            self._levels.append(self._level(keys, np.where(opens, counts, lefts), n_contexts))
            n_contexts, opens = len(keys), past[ends] == length - 1
            ids = np.full_like(ids, -1)
            ids[at] = inverse
            keys, counts = longer, occurrences
        self._levels.append(self._level(keys, counts, n_contexts))

    def probabilities(self, tokens: npt.NDArray[np.integer[Any]]) -> Floats:
        """Return the probability of each token of a text, given those before it in its document.

        Args:
            tokens: (n_tokens,) ids, each document ending with the end-of-text id; the last may be open.

        Returns:
            (n_tokens,), all above 0.
        """
        targets = tokens.astype(np.int64)
        past = self._past(targets)
        p = np.full(len(targets), 1 / self.vocab_size)
        contexts = np.zeros_like(targets)  # (n_tokens,) number of the n-gram before each token, -1 if unseen
        for length, level in enumerate(self._levels, 1):
            keys = contexts * self.vocab_size + targets
            indices = np.searchsorted(level.keys, keys)
            seen = level.keys[indices] == keys
            p = seen * level.shares[indices] + level.rests[contexts] * p
            contexts = np.where(past >= length, self._before(np.where(seen, indices, -1)), -1)
        return p

    def _past(self, targets: Ints) -> Ints:
        """Return the number of tokens before each one in its document, the opening end of text included."""
        at = np.arange(len(targets))
        return at + 1 - np.maximum.accumulate(np.where(self._before(targets) == self.eos_id, at, 0))

    def _before(self, ids: Ints) -> Ints:
        """Return ids shifted right by one; the text starts after an end of text."""
        return np.concatenate([[self.eos_id], ids])[:-1]

    def _level(self, keys: Ints, counts: Ints, n_contexts: int) -> _Level:
        """Return the probabilities of all n-grams of an order from their counts."""
        discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
        contexts = keys // self.vocab_size
        totals = np.bincount(contexts, counts, n_contexts)
        rests = np.ones(n_contexts + 1)  # unseen: the shorter context decides alone
        np.divide(np.bincount(contexts, discounts, n_contexts), totals, out=rests[:-1], where=totals > 0)
        return _Level(
            keys=np.append(keys, np.iinfo(np.int64).max),
            shares=np.append((counts - discounts) / totals[contexts], 0.0),
            rests=rests,
        )


def _discounts(counts: Ints) -> tuple[float, ...]:
    """Return the discounts of n-grams counted once, twice, more often (Chen and Goodman).

    With n_i n-grams counted i times and Y = n_1 / (n_1 + 2 n_2): D_i = i - (i + 1) Y n_{i+1} / n_i.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    if not n[1:5].all():
        return USUAL
    y = n[1] / (n[1] + 2 * n[2])
    discounts = tuple(float(i - (i + 1) * y * n[i + 1] / n[i]) for i in (1, 2, 3))
    return discounts if min(discounts) > 0 else USUAL
