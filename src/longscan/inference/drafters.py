"""Drafters of speculative decoding: prompt lookup, and a small model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError
from longscan.inference.prefill import read
from longscan.inference.row import MAX_PENDING
from longscan.inference.sampling import to_array
from longscan.models import LanguageModel

__all__ = ["DraftModel", "Drafter", "PromptLookup", "to_ids"]

TAIL = 16  # tokens by which a drafter recognises a text


class Drafter(Protocol):
    """Proposes the next tokens of a text. A wrong draft costs time and changes nothing else."""

    k: int  # tokens per draft, at most

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """Return a draft.

        Args:
            ids: all tokens so far. Usually the text of the last call and a few more, so a drafter can reuse
                what it has computed.
            k: tokens requested.

        Returns:
            At most k tokens, possibly none.
        """


class _Known:
    """The text that a drafter has processed, and whether another text continues it."""

    def __init__(self) -> None:
        self.length = 0
        self._tail: list[int] = []

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether a text starts with the known one, judged by length and tail."""
        begin = max(0, self.length - TAIL)
        return len(ids) >= self.length and list(ids[begin : self.length]) == self._tail

    def take(self, ids: Sequence[int]) -> None:
        """Record that the drafter has processed this text."""
        self.length, self._tail = len(ids), list(ids[-TAIL:])


class PromptLookup:
    """Proposes the tokens that followed the last occurrence of the n-gram at the end of the text.

    It takes microseconds and helps where a text quotes its prompt: summaries, edits, code, tables.

    Args:
        ngram: the longest n-gram to look up; the shortest is 2.
        k: tokens per draft, at most.
        window: tokens at the end of a prompt that are searched.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(self, ngram: int = 3, k: int = 8, window: int = 1 << 16) -> None:
        check_whole("ngram", ngram, 2)
        check_whole("k", k, 1)
        check_whole("window", window, 1)
        self.ngram, self.k, self.window = ngram, k, window
        self._known = _Known()
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the index after its last occurrence

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """Return a draft; see `Drafter`."""
        begin = self._known.length
        if not begin or not self._known.continues(ids):
            begin, self._after = max(0, len(ids) - self.window), {}
        for n in range(2, self.ngram + 1):
            for end in range(max(n, begin), len(ids)):
                self._after[tuple(ids[end - n : end])] = end
        self._known.take(ids)
        for n in range(min(self.ngram, len(ids)), 1, -1):
            index = self._after.get(tuple(ids[-n:]))
            if index is not None:
                draft = list(ids[index : index + min(k, self.k)])
                while len(draft) < min(k, self.k):  # the text repeats itself: continue the repetition
                    draft.append(draft[len(draft) - (len(ids) - index)])
                return draft
        return []


class DraftModel:
    """A small model that proposes its greedy continuation.

    Args:
        model: with the tokenizer of the model that it drafts for.
        k: tokens per draft, at most.

    Raises:
        UsageError: k is less than 1.
    """

    def __init__(self, model: LanguageModel, k: int = 4) -> None:
        check_whole("k", k, 1)
        self.model, self.k = model, k
        self._known = _Known()
        self._live = model.init_state(1)
        self._commit = self._live.mark()  # after all accepted tokens
        self._ahead: list[int] = []  # draft tokens that the live state includes beyond them
        self._logits = np.empty(0, np.float32)  # (padded_vocab_size,) after the accepted tokens

    def check(self, model: LanguageModel) -> None:
        """Raise unless the draft model fits a model.

        Raises:
            LongscanError: they have different vocabularies.
        """
        mine, theirs = self.model.config.vocab_size, model.config.vocab_size
        if mine != theirs:
            raise LongscanError(
                f"the draft model has {mine:,} ids, the model {theirs:,}: a draft model needs the tokenizer "
                "of the model it drafts for."
            )

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """Return a draft; see `Drafter`."""
        logits = self._read(ids)
        vocab_size, drafts = self.model.config.vocab_size, list[int]()
        while True:
            drafts.append(int(logits[:vocab_size].argmax()))
            if len(drafts) >= min(k, self.k):
                break
            step, _ = self.model.step(to_ids(drafts[-1:], self.model), self._live)
            logits = to_array(step)[0]
        self._ahead = drafts[:-1]
        return drafts

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Process the text; return the logits (padded_vocab_size,) after it."""
        if not self._known.continues(ids):
            self._known, self._ahead = _Known(), []
            self._live = self.model.init_state(1)
            self._commit = self._live.mark()
        fresh, ahead = list(ids[self._known.length :]), self._ahead
        if len(fresh) > len(ahead) and fresh[: len(ahead)] == ahead:
            fresh = fresh[len(ahead) :]  # the drafts were right and are processed already
        else:
            self._live.rewind(self._commit)
        if len(fresh) > 2 * MAX_PENDING:
            logits, self._live = read(self.model, fresh, self._live, self._known.length)
            self._logits = to_array(logits)
        elif fresh:
            several, _ = self.model.advance(to_ids([fresh], self.model), self._live)
            self._logits = to_array(several[0, -1])
        self._commit = self._live.mark(self._commit)
        self._known.take(ids)
        return self._logits


def to_ids(ids: list[int] | list[list[int]], model: LanguageModel) -> Tensor:
    """Return token ids as a tensor on the model's device."""
    return torch.tensor(ids, device=model.device)
