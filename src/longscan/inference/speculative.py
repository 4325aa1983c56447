"""Speculative decoding: one pass verifies a draft of the next tokens, and its matching part is accepted.

The model samples its own token at each drafted position, with the text's random number for that position, and
accepts the draft up to the first difference. So the text is token for token the one without drafts, greedy or
sampled; rejection sampling would only preserve the distribution.

A recurrent state cannot drop tokens from its end, so the state is copied before a draft (of a KV cache only
its length), and restored if the draft was wrong. The tokens accepted in that round are then `pending`: the
next pass decodes them together with the next draft, as a pass loads the weights once for all its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from longscan.inference.drafters import Drafter, DraftModel, to_ids
from longscan.inference.row import MAX_PENDING, RowProgress
from longscan.inference.sampling import to_array
from longscan.models import LanguageModel, State

__all__ = ["Pace", "Speculator"]


class Pace:
    """Chooses the draft length that maximises throughput; 0 where drafts do not pay.

    It compares the cost of passes of different lengths with the acceptance rate, both as measured recently.
    Only speed depends on it.
    """

    RECENT = 0.9  # weight of the past in running means
    WARM_UP = 3  # steps before the first draft; the very first one is slower
    OPTIMISM = 0.1  # cost of each further token of a pass in steps, until it is measured

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.slope = self.OPTIMISM
        self.propose_seconds = 0.0  # for each token
        self._steps = 0
        self._hits, self._tries = 1.5, 2.0  # optimistic, so that drafts are tried at first

    def drafts(self, pending: int, limit: int) -> int:
        """Return how many tokens to draft.

        Args:
            pending: tokens that have to be decoded in any case.
            limit: the most tokens to draft.
        """
        if self.step_seconds is None or self._steps < self.WARM_UP or pending > MAX_PENDING:
            return 0
        best, speed = 0, 1 / self._round(pending)
        hit = min(0.99, self._hits / self._tries)
        expected, certain = 1.0, 1.0
        for k in range(1, limit + 1):
            certain *= hit
            expected += certain  # tokens: the accepted drafts, and one of the model's own
            again = self.slope * expected * (1 - certain)  # after a wrong draft they are decoded again
            cost = self._round(pending + k) + (again + k * self.propose_seconds / self.step_seconds)
            if expected / cost > speed:
                best, speed = k, expected / cost
        return best

    def cheap(self) -> bool:
        """Whether drafts cost so little that they can be requested just to measure the acceptance rate."""
        return self.step_seconds is not None and self.propose_seconds < 0.02 * self.step_seconds

    def measured(self, tokens: int, seconds: float) -> None:
        """Update the cost model with a pass.

        Args:
            tokens: of the pass.
            seconds: of the pass.
        """
        if tokens == 1:
            self._steps += 1
            past = self.step_seconds or seconds
            self.step_seconds = (past + seconds) / 2 if seconds < past else self._mean(past, seconds)
        elif self.step_seconds is not None:
            slope = (seconds / self.step_seconds - 1) / (tokens - 1)
            self.slope = self._mean(self.slope, min(max(slope, 0.0), 1.0))

    def proposed(self, tokens: int, seconds: float) -> None:
        """Update the cost of a draft token."""
        now, past = seconds / tokens, self.propose_seconds
        # the first draft includes the prefill of the draft model
        self.propose_seconds = now if not past or now < past else self._mean(past, now)

    def judged(self, tried: int, hits: int) -> None:
        """Update the acceptance rate with the verified draft tokens."""
        for index in range(tried):
            self._hits = self.RECENT * self._hits + (index < hits)
            self._tries = self.RECENT * self._tries + 1

    def idle(self) -> None:
        """Let the slope decay to its initial value, so that drafts are tried again now and then."""
        self.slope += 0.02 * (self.OPTIMISM - self.slope)

    def _round(self, tokens: int) -> float:
        """Return the cost of a pass over so many tokens, in steps."""
        return 1 + self.slope * (tokens - 1)

    def _mean(self, past: float, now: float) -> float:
        return self.RECENT * past + (1 - self.RECENT) * now


class Speculator:
    """Continues one text at a time with drafts.

    Args:
        model: the target model.
        drafter: proposes the drafts.
        pace: chooses their lengths; a new `Pace` if None.

    Raises:
        LongscanError: they do not belong together.
    """

    PROBE, MAX_PROBE = (
        32,
        1024,
    )  # tokens between two probes of a slow drafter, at first and at most

    def __init__(self, model: LanguageModel, drafter: Drafter, pace: Pace | None = None) -> None:
        if isinstance(drafter, DraftModel):
            drafter.check(model)
        self.model, self._drafter = model, drafter
        self._pace = Pace() if pace is None else pace
        self._mark: list[Tensor] = []
        self._ahead = True  # whether the state has advanced since the mark
        self._shadow: list[int] = []  # a probe: a draft that is only compared with the tokens to come
        self._waits, self._gap = 0, self.PROBE  # tokens since the last probe, and until the next
        self.drafted = self.accepted = 0

    @property
    def max_tokens(self) -> int:
        """The most tokens of one pass."""
        return MAX_PENDING + self._drafter.k + 1

    def moved(self) -> None:
        """Note that the state was advanced or replaced from outside."""
        self._ahead, self._shadow = True, []

    def round(
        self, state: State, row: RowProgress, limit: int, draw: Callable[[np.ndarray], tuple[int, bool]]
    ) -> None:
        """Decode at least one token.

        Args:
            state: of one row, after `row.position` tokens; advanced in place, perhaps not by all of them.
            row: advanced likewise.
            limit: tokens that may be generated.
            draw: takes logits (padded_vocab_size,) and returns the next token, and whether the text ends.
        """
        drafts = self._drafts(row, limit)
        begin = time.perf_counter()
        if drafts and self._ahead:
            self._mark = state.mark(self._mark)
        fed, new = [*row.pending, *drafts], list[int]()
        if len(fed) == 1:
            logits = self.model.step(to_ids(fed, self.model), state)[0]
        else:
            logits = self.model.advance(to_ids([fed], self.model), state)[0][0]
        table = to_array(logits)  # (1 or len(fed), padded_vocab_size)
        self._pace.measured(len(fed), time.perf_counter() - begin)
        self._ahead, right = True, not drafts
        for index, draft in enumerate([*drafts, None], len(fed) - len(drafts) - 1):
            token, ended = draw(table[index])
            new.append(token)
            if draft is None:
                right = True
            elif ended or token != draft:
                break
        row.ids += new
        if drafts:
            hits = sum(a == b for a, b in zip(new, drafts, strict=False))
            self._pace.judged(min(len(drafts), hits + 1), hits)
            self.drafted, self.accepted = self.drafted + len(drafts), self.accepted + hits
        else:
            self._learn(new[0])
        if right:
            row.position, row.pending = row.position + len(fed), new[-1:]
        else:
            state.rewind(self._mark)
            self._ahead, row.pending = False, row.pending + new

    def settle(self, state: State, row: RowProgress) -> None:
        """Decode all pending tokens but the last, so that the row can continue without drafts."""
        ids = row.pending[:-1]
        if ids:
            self.model.advance(to_ids([ids], self.model), state)
            row.position, row.pending = row.position + len(ids), row.pending[-1:]
        self.moved()

    def _drafts(self, row: RowProgress, limit: int) -> list[int]:
        """Return as many draft tokens as pay; of a probe, none."""
        pace, limit = self._pace, min(self._drafter.k, limit - 1)
        k = pace.drafts(len(row.pending), limit)
        probe = not k and limit > 0 and not self._shadow and self._may_probe()
        if not k and not probe:
            return []
        begin = time.perf_counter()
        drafts = self._drafter.propose(row.ids, k or limit)[: k or limit]
        size = self.model.config.vocab_size
        bad = next((i for i, token in enumerate(drafts) if not 0 <= token < size), len(drafts))
        drafts = drafts[:bad]
        if drafts:
            pace.proposed(len(drafts), time.perf_counter() - begin)
        if probe:
            self._shadow, drafts = drafts, []
        else:
            self._gap = self.PROBE
        return drafts

    def _may_probe(self) -> bool:
        """Whether a probe of the acceptance rate is due."""
        self._waits += 1
        self._pace.idle()
        if self._pace.step_seconds is None or not (self._pace.cheap() or self._waits >= self._gap):
            return False
        self._waits, self._gap = 0, min(2 * self._gap, self.MAX_PROBE)
        return True

    def _learn(self, token: int) -> None:
        """Compare a token with the probe."""
        if self._shadow:
            hit = self._shadow[0] == token
            self._pace.judged(1, int(hit))
            self._shadow = self._shadow[1:] if hit else []
