"""Speculative decoding: a draft of the next tokens is read in one pass, and what the model agrees with stays.

The model draws its own token at each drafted place, with the text's own random numbers, one for each token,
and accepts the draft for as long as it is what was drawn. So the text is token for token the one without
drafts, greedy or sampled; that is more than rejection sampling keeps, which is the distribution.

A recurrent state cannot drop tokens from its end, so before drafts are read the state is copied (of keys and
values only their number), and if one of them was wrong the copy comes back. Tokens accepted from that round
are then known but not read: they wait as `pending` and are read in the next round together with the next
drafts, for the weights are read once whatever the number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError
from longscan.inference.prefill import read
from longscan.inference.sampling import to_array
from longscan.models import LanguageModel, State

__all__ = ["DraftModel", "Drafter", "Pace", "PromptLookup", "Speculator", "Text"]

MAX_PENDING = 16  # tokens that wait; more are read without drafts first
WINDOW = 1 << 16  # tokens at the end of a prompt in which a lookup searches
TAIL = 16  # tokens by which a drafter recognises the text it knows


class Drafter(Protocol):
    """Guesses how a text goes on. A wrong guess costs time and changes nothing."""

    k: int  # tokens it can guess at most

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """Guess.

        Args:
            ids: all tokens so far. Mostly it is the text of the last call with some more at its end, so
                that what was computed for it can be kept.
            k: tokens wanted.

        Returns:
            At most k tokens; none is an answer too.
        """


class _Known:
    """How much of a text a drafter has taken in, and whether another text is that one continued."""

    def __init__(self) -> None:
        self.length = 0
        self._tail: list[int] = []

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether a text begins, to all appearances, with the one that is known."""
        begin = max(0, self.length - TAIL)
        return len(ids) >= self.length and list(ids[begin : self.length]) == self._tail

    def take(self, ids: Sequence[int]) -> None:
        """Know this text from now on."""
        self.length, self._tail = len(ids), list(ids[-TAIL:])


class PromptLookup:
    """Guesses that a text goes on as it did the last time when its last few tokens stood there.

    It costs microseconds and helps where a text quotes its prompt: summaries, edits, code, tables.

    Args:
        ngram: tokens that have to agree, preferably; two are the least.
        k: tokens to guess at most.

    Raises:
        UsageError: a number makes no sense.
    """

    def __init__(self, ngram: int = 3, k: int = 8) -> None:
        check_whole("ngram", ngram, 2)
        check_whole("k", k, 1)
        self.ngram, self.k = ngram, k
        self._known = _Known()
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the text went on after the last one

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """Guess; see `Drafter`."""
        begin = self._known.length
        if not begin or not self._known.continues(ids):
            begin, self._after = max(0, len(ids) - WINDOW), {}
        for n in range(2, self.ngram + 1):
            for end in range(max(n, begin), len(ids)):
                self._after[tuple(ids[end - n : end])] = end
        self._known.take(ids)
        for n in range(min(self.ngram, len(ids)), 1, -1):
            place = self._after.get(tuple(ids[-n:]))
            if place is not None:
                guess = list(ids[place : place + min(k, self.k)])
                while len(guess) < min(k, self.k):  # the text repeats itself: go on with the repetition
                    guess.append(guess[len(guess) - (len(ids) - place)])
                return guess
        return []


class DraftModel:
    """A small model that writes the likeliest continuation.

    Args:
        model: with the tokenizer of the model it guesses for.
        k: tokens to guess at most.

    Raises:
        UsageError: k is less than 1.
    """

    def __init__(self, model: LanguageModel, k: int = 4) -> None:
        check_whole("k", k, 1)
        self.model, self.k = model, k
        self._known = _Known()
        self._live = model.init_state(1)
        self._commit = self._live.mark()  # after all tokens that are certain
        self._ahead: list[int] = []  # guesses that the live state has read beyond
        self._logits = np.empty(0, np.float32)  # (padded_vocab_size,) after the tokens that are certain

    def check(self, model: LanguageModel) -> None:
        """Insist that the draft model can guess for a model.

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
        """Guess; see `Drafter`."""
        logits = self._read(ids)
        vocab_size, drafts = self.model.config.vocab_size, list[int]()
        while True:
            drafts.append(int(logits[:vocab_size].argmax()))
            if len(drafts) >= min(k, self.k):
                break
            step, _ = self.model.step(_tensor(drafts[-1:], self.model), self._live)
            logits = to_array(step)[0]
        self._ahead = drafts[:-1]
        return drafts

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Take the text in; return the logits (padded_vocab_size,) after it."""
        if not self._known.continues(ids):
            self._known, self._ahead = _Known(), []
            self._live = self.model.init_state(1)
            self._commit = self._live.mark()
        fresh, ahead = list(ids[self._known.length :]), self._ahead
        if len(fresh) > len(ahead) and fresh[: len(ahead)] == ahead:
            fresh = fresh[len(ahead) :]  # the guesses were right and are read already
        else:
            self._live.rewind(self._commit)
        if len(fresh) > 2 * MAX_PENDING:
            logits, self._live = read(self.model, fresh, self._live, self._known.length)
            self._logits = to_array(logits)
        elif fresh:
            several, _ = self.model.advance(_tensor([fresh], self.model), self._live)
            self._logits = to_array(several[0, -1])
        self._commit = self._live.mark(self._commit)
        self._known.take(ids)
        return self._logits


class Pace:
    """Chooses how many tokens to draft so that the text grows fastest; none where drafts do not pay.

    It weighs what rounds of different lengths cost, and how often drafts come true, both as measured lately.
    Only speed depends on it.
    """

    RECENT = 0.9  # weight of the past in what is measured
    WARM_UP = 3  # steps before the first draft; the very first one is slower
    OPTIMISM = 0.1  # of a step's time, for each further token of a round, until it is known

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.slope = self.OPTIMISM
        self.propose_seconds = 0.0  # for each token
        self._steps = 0
        self._hits, self._tries = 1.5, 2.0  # so that something is tried at first

    def drafts(self, pending: int, limit: int) -> int:
        """Say how many tokens to draft.

        Args:
            pending: tokens that have to be read in any case.
            limit: more are not wanted.
        """
        if self.step_seconds is None or self._steps < self.WARM_UP or pending > MAX_PENDING:
            return 0
        best, speed = 0, 1 / self._round(pending)
        hit = min(0.99, self._hits / self._tries)
        expected, certain = 1.0, 1.0
        for k in range(1, limit + 1):
            certain *= hit
            expected += certain  # tokens: the accepted drafts, and one of the model's own
            again = self.slope * expected * (1 - certain)  # after a wrong draft they are read again
            cost = self._round(pending + k) + (again + k * self.propose_seconds / self.step_seconds)
            if expected / cost > speed:
                best, speed = k, expected / cost
        return best

    def cheap(self) -> bool:
        """Whether drafts cost so little that one may ask for them only to see how good they are."""
        return self.step_seconds is not None and self.propose_seconds < 0.02 * self.step_seconds

    def measured(self, tokens: int, seconds: float) -> None:
        """Learn from a pass through the model.

        Args:
            tokens: that it read.
            seconds: that it took.
        """
        if tokens == 1:
            self._steps += 1
            past = self.step_seconds or seconds
            self.step_seconds = (past + seconds) / 2 if seconds < past else self._mean(past, seconds)
        elif self.step_seconds is not None:
            slope = (seconds / self.step_seconds - 1) / (tokens - 1)
            self.slope = self._mean(self.slope, min(max(slope, 0.0), 1.0))

    def proposed(self, tokens: int, seconds: float) -> None:
        """Learn what drafting so many tokens takes."""
        now, past = seconds / tokens, self.propose_seconds
        # the first time, all of a long prompt is taken in
        self.propose_seconds = now if not past or now < past else self._mean(past, now)

    def judged(self, tried: int, hits: int) -> None:
        """Learn how many of the drafts that were looked at came true."""
        for index in range(tried):
            self._hits = self.RECENT * self._hits + (index < hits)
            self._tries = self.RECENT * self._tries + 1

    def idle(self) -> None:
        """Forget a little of the bad news, so that drafts are tried again now and then."""
        self.slope += 0.02 * (self.OPTIMISM - self.slope)

    def _round(self, tokens: int) -> float:
        """Return the cost of reading so many tokens at once, in steps."""
        return 1 + self.slope * (tokens - 1)

    def _mean(self, past: float, now: float) -> float:
        return self.RECENT * past + (1 - self.RECENT) * now


@dataclass
class Text:
    """Where a text stands.

    Attributes:
        position: tokens that its state has read.
        pending: the tokens after them, at least one.
        ids: all tokens, for drafters; left empty where there is none.
    """

    position: int = 0
    pending: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class Speculator:
    """Continues one text at a time with drafts.

    Args:
        model: what writes.
        drafter: what guesses.

    Raises:
        LongscanError: they do not belong together.
    """

    PROBE, RARELY = 32, 1024  # tokens between two looks at what a drafter that is not cheap would say

    def __init__(self, model: LanguageModel, drafter: Drafter) -> None:
        if isinstance(drafter, DraftModel):
            drafter.check(model)
        self._model, self._drafter = model, drafter
        self._pace = Pace()
        self._mark: list[Tensor] = []
        self._ahead = True  # whether the state has gone on since the mark
        self._shadow: list[int] = []  # a draft that was not read: what comes shows whether it was good
        self._waits, self._gap = 0, self.PROBE  # tokens since the last look, and to the next
        self.drafted = self.accepted = 0

    @property
    def most(self) -> int:
        """Tokens that a round reads at most."""
        return MAX_PENDING + self._drafter.k + 1

    def moved(self) -> None:
        """Learn that the state goes on without this object, or is another."""
        self._ahead, self._shadow = True, []

    def round(
        self, state: State, text: Text, room: int, draw: Callable[[np.ndarray], tuple[int, bool]]
    ) -> None:
        """Write at least one token.

        Args:
            state: of one row, after `text.position` tokens; advanced in place, perhaps not by all of them.
            text: advanced likewise.
            room: tokens that may be written.
            draw: takes logits (padded_vocab_size,) and returns the next token, and whether the text ends.
        """
        drafts = self._drafts(text, room)
        begin = time.perf_counter()
        if drafts and self._ahead:
            self._mark = state.mark(self._mark)
        fed, new = [*text.pending, *drafts], list[int]()
        if len(fed) == 1:
            logits = self._model.step(_tensor(fed, self._model), state)[0]
        else:
            logits = self._model.advance(_tensor([fed], self._model), state)[0][0]
        table = to_array(logits)  # (1 or len(fed), padded_vocab_size)
        self._pace.measured(len(fed), time.perf_counter() - begin)
        self._ahead, right = True, not drafts
        for place, draft in enumerate([*drafts, None], len(fed) - len(drafts) - 1):
            token, ended = draw(table[place])
            new.append(token)
            if draft is None:
                right = True
            elif ended or token != draft:
                break
        text.ids += new
        if drafts:
            hits = sum(a == b for a, b in zip(new, drafts, strict=False))
            self._pace.judged(min(len(drafts), hits + 1), hits)
            self.drafted, self.accepted = self.drafted + len(drafts), self.accepted + hits
        else:
            self._learn(new[0])
        if right:
            text.position, text.pending = text.position + len(fed), new[-1:]
        else:
            state.rewind(self._mark)
            self._ahead, text.pending = False, text.pending + new

    def settle(self, state: State, text: Text) -> None:
        """Let a state read all tokens but the last, so that the text can go on without drafts."""
        waiting = text.pending[:-1]
        if waiting:
            self._model.advance(_tensor([waiting], self._model), state)
            text.position, text.pending = text.position + len(waiting), text.pending[-1:]
        self.moved()

    def _drafts(self, text: Text, room: int) -> list[int]:
        """Ask for as many drafts as pay."""
        pace, limit = self._pace, min(self._drafter.k, room - 1)
        k = pace.drafts(len(text.pending), limit)
        look = not k and limit > 0 and not self._shadow and self._may_look()
        if not k and not look:
            return []
        begin = time.perf_counter()
        drafts = self._drafter.propose(text.ids, k or limit)[: k or limit]
        size = self._model.config.vocab_size
        bad = next((i for i, token in enumerate(drafts) if not 0 <= token < size), len(drafts))
        drafts = drafts[:bad]
        if drafts:
            pace.proposed(len(drafts), time.perf_counter() - begin)
        if look:
            self._shadow, drafts = drafts, []
        else:
            self._gap = self.PROBE
        return drafts

    def _may_look(self) -> bool:
        """Whether it is time to see how good drafts would be."""
        self._waits += 1
        self._pace.idle()
        if self._pace.step_seconds is None or not (self._pace.cheap() or self._waits >= self._gap):
            return False
        self._waits, self._gap = 0, min(2 * self._gap, self.RARELY)
        return True

    def _learn(self, token: int) -> None:
        """Compare a token with the draft that was not read."""
        if self._shadow:
            hit = self._shadow[0] == token
            self._pace.judged(1, int(hit))
            self._shadow = self._shadow[1:] if hit else []


def _tensor(ids: list[int] | list[list[int]], model: LanguageModel) -> Tensor:
    return torch.tensor(ids, device=model.device)
