"""Continuous batching: texts decode together, join and leave at any step, and do not affect each other.

One state has a row for every slot. The rows in use come first, so that a step is one call on a view of them,
and the last row replaces one that leaves. A prompt is prefilled alone, then its state is copied into a free
row. A row generates bit-exactly what it generates alone: `prefill.read` always cuts a prompt into the same
chunks, `step` computes rows independently, and each row samples with its own generator. (This holds for the
native decoder. Without it torch rounds the rows of a batch slightly differently.)
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import is_not
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import Drafter
from longscan.inference.prefill import Progress
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.request import Request, tokens_of
from longscan.inference.row import Prompt, Row
from longscan.inference.sampling import (
    Event,
    Sampler,
    check_fit,
    log_probabilities,
    to_array,
)
from longscan.inference.speculative import Speculator
from longscan.inference.text_writer import CONTEXT, TextWriter
from longscan.models import LanguageModel, State
from longscan.models.common.state import SavedState
from longscan.tokenizers.base import Tokenizer

__all__ = ["MAX_SLOTS", "Engine"]


CHECK_EVERY = 64  # steps between checks whether somebody has changed the model meanwhile

MAX_SLOTS = 32  # of generate_ids; a larger batch adds little throughput


P = ParamSpec("P")

R = TypeVar("R")


def _alone(
    method: Callable[Concatenate[Engine, P], R],
) -> Callable[Concatenate[Engine, P], R]:
    """Return a method that raises if another thread is inside the engine."""

    @functools.wraps(method)
    def guarded(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        mine = threading.get_ident()
        if engine._owner == mine:  # a call from within, by `progress` for example
            return method(engine, *args, **kwargs)
        if not engine._lock.acquire(blocking=False):
            raise LongscanError(
                "this Engine is in use by another thread and is not thread-safe: expected one thread at a "
                "time. Let one thread call step, and pass it the requests of the others."
            )
        engine._owner = mine
        try:
            return method(engine, *args, **kwargs)
        finally:
            engine._owner = 0
            engine._lock.release()

    return guarded


class Engine:
    """Continues many texts with one model.

    Not thread-safe: a call raises while another thread is inside one. Different threads may take turns.

    Args:
        model: any causal model.
        tokenizer: decodes the events' text and finds stop strings; without one there is no text.
        slots: texts that decode at a time; others wait.
        prefix_cache: looks up and stores the states of prompts.
        drafter: proposes draft tokens while there is only one text, which is the same with and without; a
            Speculator of this model brings its own pace.
        read_tokens: prompt tokens that a step prefills, about, so that running texts do not stall; None for
            all prompts that have a slot, so that they start together.
        max_tokens: of a text, prompt and new ones together; None for no bound.
        progress: called during prefill with the prompt tokens prefilled and submitted so far.

    Raises:
        LongscanError: the tokenizer, the cache or the drafter is not for this model.
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        prefix_cache: PrefixCache | None = None,
        drafter: Drafter | Speculator | None = None,
        read_tokens: int | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("read_tokens", read_tokens), ("max_tokens", max_tokens)):
            if value is not None:
                check_whole(name, value, 1)
        if tokenizer is not None:
            check_fit(model, tokenizer)
        if prefix_cache is not None and prefix_cache.model is not model:
            raise LongscanError("the prefix cache holds the states of another model: make one for this one.")
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self._cache, self._read_tokens, self._max_tokens = prefix_cache, read_tokens, max_tokens
        if isinstance(drafter, Speculator) and drafter.model is not model:
            raise LongscanError("the Speculator decodes with another model: make one for this one.")
        if drafter is not None and not isinstance(drafter, Speculator):
            drafter = Speculator(model, drafter)
        self._speculator = drafter
        self._progress, self._prefilled, self._submitted = progress, 0, 0
        self._vocab_size = min([model.config.vocab_size, *([tokenizer.vocab_size] if tokenizer else [])])
        self._device = model.device
        self._number = self._rounds = 0
        self._waiting: deque[Row] = deque()  # some of them may be partly prefilled
        self._rows: list[Row] = []  # row i has slot i
        self._state: State | None = None
        self._grows = False  # whether the state grows with each token
        self._views: list[tuple[State, Tensor]] = []  # of the first 1, 2, ... rows, and their next ids
        self._ids = torch.zeros(slots, dtype=torch.int64)
        self._next = self._ids.numpy()  # the same memory, but assigning a number takes only 0.1 µs
        self._saved: dict[int, SavedState] = {}
        self._owner = 0  # the thread inside a call
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """The number of texts that are decoding."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """The number of texts that wait for a slot or for the end of their prefill."""
        return len(self._waiting)

    @property
    def prefilled(self) -> int:
        """The number of prompt tokens prefilled so far, without those of cancelled requests."""
        return self._prefilled

    @property
    def drafted(self) -> int:
        """The number of draft tokens verified so far."""
        return self._speculator.drafted if self._speculator else 0

    @property
    def accepted(self) -> int:
        """The number of draft tokens accepted so far."""
        return self._speculator.accepted if self._speculator else 0

    def submit(self, request: Request) -> int:
        """Return the number of a new request, from 0: the `row` of its events.

        An invalid one raises here and affects no other.

        Args:
            request: what to generate.

        Raises:
            LongscanError: it has no tokens or too many, an id is not of this model, or the state is not.
            UsageError: stop strings without a tokenizer.
        """
        return self.submit_copies(request, 1)[0]

    @_alone
    def submit_copies(self, request: Request, n: int) -> list[int]:
        """Return the numbers of n continuations of a prompt, which is prefilled once; number i uses seed + i.

        Args:
            request: what to generate.
            n: continuations.

        Raises:
            LongscanError: see `submit`.
            UsageError: stop strings without a tokenizer, or n is less than 1.
        """
        check_whole("n", n, 1)
        ids = tokens_of(request, self.model, self._max_tokens)
        config = request.config
        if config.stop and self.tokenizer is None:
            raise UsageError("stop: stop strings are text, so the engine needs a tokenizer to find them.")
        prompt = Prompt(request, ids, n)
        rows = [Row(self._number + i, request, prompt) for i in range(n)]
        for i, row in enumerate(rows):
            seed = config.seed if config.seed is None else (config.seed + i) % 2**64
            row.sampler = Sampler(replace(config, seed=seed), self._vocab_size, ids, request.logit_bias)
            row.writer = TextWriter(self.tokenizer, ids[-CONTEXT:].tolist(), config.stop, request.shown)
        self._number, self._submitted = self._number + n, self._submitted + len(ids)
        self._waiting.extend(rows)
        return [row.number for row in rows]

    @_alone
    def cancel(self, number: int) -> bool:
        """Drop a request, which then has no more events.

        Args:
            number: what `submit` returned.

        Returns:
            Whether it was waiting or running.
        """
        for row in self._waiting:
            if row.number == number:
                self._waiting.remove(row)
                if row.prompt.leave():
                    self._submitted -= len(row.prompt.ids)
                    self._prefilled -= row.prompt.done
                return True
        for slot, row in enumerate(self._rows):
            if row.number == number:
                self._settle()
                self._leave(slot)
                return True
        return False

    @_alone
    def saved(self, number: int) -> SavedState:
        """Return a copy of the state of a text, to continue from later: see `Request`.

        Args:
            number: of a request that is running, or has ended and has `keep`; the latter only once.

        Returns:
            The state; the number of tokens it includes; and the pending tokens after them.

        Raises:
            LongscanError: there is no such text.
        """
        if number in self._saved:
            return self._saved.pop(number)
        for slot, row in enumerate(self._rows):
            if row.number == number and row.logits is None:
                return self._copy(slot)
        raise LongscanError(f"request {number} is not running, and its state is not saved: see Request.keep.")

    def run(self) -> Iterator[Event]:
        """Yield events until all requests have ended; more may be submitted or cancelled meanwhile."""
        while self._rows or self._waiting:
            yield from self.step()

    @_alone
    def step(self) -> list[Event]:
        """Decode one token of every running text, or several of a single one, and let others join.

        Returns:
            An event for each token, rows in no particular order; [] while a long prompt is prefilled.
        """
        events: list[Event] = []
        if self._rows and all(row.logits is None for row in self._rows):  # else a step was interrupted
            alone = len(self._rows) == 1 and (self.slots == 1 or not self._waiting)
            if alone and self._speculator:
                self._speculate(self._speculator, events)
                return events
            self._decode()
        self._admit(events)
        for slot, row in enumerate(self._rows):
            if row.logits is not None:
                self._draw(slot, row, row.logits, events)
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].finish is not None:
                self._leave(slot)
        return events

    def _decode(self) -> None:
        """Compute the logits after the last token of each row."""
        self._settle()
        if self._grows:
            self._reserve(1)
        state, ids = self._views[len(self._rows) - 1]
        assume_unchanged = bool(self._rounds % CHECK_EVERY)
        self._rounds += 1
        logits, _ = self.model.step(
            ids if ids.device == self._device else ids.to(self._device), state, assume_unchanged
        )
        for row, values in zip(self._rows, to_array(logits), strict=True):
            row.logits = values
            row.progress.position += 1

    def _draw(self, slot: int, row: Row, logits: np.ndarray, events: list[Event]) -> None:
        """Draw the next token of a row from logits (padded_vocab_size,)."""
        held = row.writer.holds
        token = self._draw_token(row, logits, events)
        if row.request.before_stop and not held and (row.writer.holds or row.finish == "stop"):
            memory = row.mark and row.mark[1]
            row.mark = row.progress.position, self._row(slot).mark(memory)  # the state before this token
        row.logits, row.progress.pending = None, [token]
        self._next[slot] = token
        if self._speculator:
            row.progress.ids.append(token)

    def _draw_token(self, row: Row, logits: np.ndarray, events: list[Event]) -> int:
        """Return the next token of a row and append its event; -1 if the logits are invalid."""
        try:
            token = row.draw(logits)
        except LongscanError as error:
            row.finish = "error"
            events.append(Event(row.number, -1, "", "error", error))
            return -1
        row.left -= 1
        text, row.finish = row.writer.push(token, is_eos=token in row.ends, is_last=not row.left)
        event = Event(row.number, token, text, row.finish, settled=row.writer.settled)
        if (n := row.request.config.logprobs) is not None:
            logprob, top = log_probabilities(logits[: self._vocab_size], token, n)
            event = event._replace(logprob=logprob, top=top)
        events.append(event)
        return token

    def _speculate(self, speculator: Speculator, events: list[Event]) -> None:
        """Decode a few tokens of the only row, with drafts."""
        row = self._rows[0]

        def draw(logits: np.ndarray) -> tuple[int, bool]:
            token = self._draw_token(row, logits, events)
            return token, row.finish is not None

        if self._grows:
            self._reserve(speculator.max_tokens)
        speculator.round(self._views[0][0], row.progress, row.left, draw)
        self._next[0] = row.progress.pending[-1]
        if row.finish is not None:
            self._leave(0)

    def _settle(self) -> None:
        """Complete the state, so that rows can decode without drafts."""
        if self._speculator and self._rows:
            for slot, row in enumerate(self._rows):
                if len(row.progress.pending) > 1:
                    assert slot == 0
                    self._speculator.settle(self._views[0][0], row.progress)
            self._speculator.moved()

    def _admit(self, events: list[Event]) -> None:
        """Prefill prompts for the free slots, within the budget of a step."""
        budget = self._read_tokens
        while self._waiting and len(self._rows) < self.slots and (budget is None or budget > 0):
            row = self._waiting[0]
            prompt, before = row.prompt, row.prompt.done
            if not prompt.complete:
                try:
                    prompt.prefill(self.model, budget, self._cache, self._show_progress(before))
                except LongscanError as error:
                    prompt.leave()
                    self._waiting.remove(row)
                    events.append(Event(row.number, -1, "", "error", error))
                    continue
                finally:
                    self._prefilled += prompt.done - before
                if row not in self._waiting:  # `progress` has cancelled it
                    continue
            self._waiting.remove(row)
            budget = None if budget is None else budget - (prompt.done - before)
            if prompt.complete:
                self._join(row)
            else:  # a long prompt takes turns with those behind it, as many as there are slots
                self._waiting.insert(min(len(self._waiting), self.slots - 1), row)

    def _show_progress(self, before: int) -> Callable[[int], None] | None:
        """Return what to call during the prefill of a row whose first `before` tokens are counted already."""
        progress, prefilled = self._progress, self._prefilled - before
        return progress and (lambda done: progress(prefilled + done, self._submitted))

    def _join(self, row: Row) -> None:
        """Give a prefilled row a slot."""
        prompt = row.prompt
        assert prompt.state is not None
        assert prompt.logits is not None
        self._settle()
        if self._state is None:
            self._state = self.model.init_state(self.slots)
            self._grows = bool(self._state.growth)
            self._make_views()
        layers = list(self._state.layers)
        self._state.copy_row_(len(self._rows), prompt.state, 0)
        if self._grows and any(map(is_not, self._state.layers, layers)):
            self._make_views()
        row.logits = to_array(prompt.logits)
        row.progress.position = row.request.position + len(prompt.ids)
        if self._speculator:
            row.progress.ids = prompt.ids.tolist()
        prompt.leave()
        self._rows.append(row)

    def _reserve(self, n: int) -> None:
        """Reserve capacity for n more tokens in the rows in use."""
        assert self._state is not None
        if self._state.reserve(n, len(self._rows)):
            self._make_views()

    def _make_views(self) -> None:
        """Make the views of the first 1, 2, ... rows."""
        assert self._state is not None
        self._views = [(self._state.rows(n), self._ids[:n]) for n in range(1, self.slots + 1)]

    def _leave(self, slot: int) -> None:
        """Free a slot, into which the last row moves."""
        row, last = self._rows[slot], self._rows[-1]
        if row.request.keep and row.finish not in (None, "error"):
            self._saved[row.number] = self._copy(slot)
        if row is not last:
            assert self._state is not None
            self._state.copy_row_(slot, self._state, len(self._rows) - 1)
            self._next[slot] = self._next[len(self._rows) - 1]
            self._rows[slot] = last
        self._rows.pop()
        if self._speculator:
            self._speculator.moved()

    def _copy(self, slot: int) -> SavedState:
        """Return a copy of a row's state."""
        row = self._rows[slot]
        if row.finish == "stop" and row.mark:
            position, mark = row.mark
            state = self._row(slot).clone()
            state.rewind(mark)
            return SavedState(state.clone(), position, [])  # a growing state is shorter now
        progress = row.progress
        return SavedState(self._row(slot).clone(), progress.position, list(progress.pending))

    def _row(self, slot: int) -> State:
        """Return a view of a row's state."""
        assert self._state is not None
        return self._state.map(lambda tensor: tensor[slot : slot + 1])
