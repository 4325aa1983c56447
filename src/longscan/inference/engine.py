"""The slot table: texts that are written together, join and leave, and do not notice each other.

One state has a row for every slot; the rows in use stand at its front, so that a step is one call on a view
of them, and a row that leaves is overwritten by the last. A prompt is read alone, then its state is copied
into a free row. What a row writes is bit for bit what it writes alone: `reading.read` cuts a prompt at the
same places in any company, `step` computes rows independently, and a row draws with its own generator. (The
native decoder does. Without it torch multiplies, and rounds rows of a batch a little differently.)
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError, UsageError
from longscan.inference.prefill import CHUNK, Progress, read
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.request import Request, tokens_of
from longscan.inference.sampling import (
    CONTEXT,
    Event,
    Finish,
    Sampler,
    TextWriter,
    check_fit,
    to_array,
)
from longscan.inference.speculative import MAX_PENDING, Drafter, Speculator, Text
from longscan.models import LanguageModel, State
from longscan.models.common.state import SavedState
from longscan.tokenizers.base import Tokenizer

__all__ = ["MAX_SLOTS", "Engine"]


LOOK = 64  # rounds after which the engine looks whether somebody changed the model meanwhile

MAX_SLOTS = 32  # of generate_ids; more rows at a time gain little more


P = ParamSpec("P")

R = TypeVar("R")


class _Row:
    """A request on its way through the engine."""

    def __init__(self, number: int, request: Request, ids: np.ndarray) -> None:
        self.number, self.request, self.ids = number, request, ids  # pending ones included
        self.state: State | None = request.state  # while the prompt is read
        self.ends = request.ends
        self.done = 0  # tokens of the prompt that are read
        self.left = request.config.max_new_tokens
        self.logits: np.ndarray | None = None  # (padded_vocab_size,) what to draw the next token from
        self.text = Text()
        self.finish: Finish | None = None

    sampler: Sampler
    writer: TextWriter
    keep: Callable[[int, State], None] | None = None  # for the prefix cache


def _alone(
    method: Callable[Concatenate[Engine, P], R],
) -> Callable[Concatenate[Engine, P], R]:
    """Let a method of the engine run in one thread at a time, and refuse a second one."""

    @functools.wraps(method)
    def guarded(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        mine = threading.get_ident()
        if engine._owner == mine:  # called back from within, by `progress` for one
            return method(engine, *args, **kwargs)
        if not engine._lock.acquire(blocking=False):
            raise LongscanError(
                "this Engine is at work in another thread and is not thread-safe: expected one thread at a "
                "time. Let one thread call step and the others hand their requests to it."
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

    Not thread-safe: one thread at a time, the others submit through it. A call that comes while another
    thread is inside one is refused; between calls the engine may change hands.

    Args:
        model: any causal model: its state is its own affair.
        tokenizer: writes the text of the events and finds stop strings; without one there is no text.
        slots: texts that are written at a time; others wait.
        prefix_cache: where states of prompts are found and kept.
        drafter: guesses tokens while there is just one text; the text is the same with and without.
        read_tokens: of prompts that a step reads at most, about, so that running texts do not stall; None
            lets it read all prompts that have a slot, so that they begin together.
        max_tokens: that a text may have, prompt and new ones together; None for no bound.
        progress: called while prompts are read, with the tokens read so far and those submitted so far.

    Raises:
        LongscanError: the tokenizer, the cache or the drafter is not for this model.
        UsageError: a number makes no sense.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        prefix_cache: PrefixCache | None = None,
        drafter: Drafter | None = None,
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
        self._speculator = Speculator(model, drafter) if drafter else None
        self._progress, self._read, self._submitted = progress, 0, 0
        self._vocab_size = min([model.config.vocab_size, *([tokenizer.vocab_size] if tokenizer else [])])
        self._device = model.device
        self._number = self._rounds = 0
        self._waiting: deque[_Row] = deque()  # the first of them may be partly read
        self._rows: list[_Row] = []  # row i has slot i
        self._state: State | None = None
        self._grows = False  # whether the state needs room for each token
        self._heads: list[tuple[State, Tensor]] = []  # views of the first 1, 2, ... rows, and their next ids
        self._ids = torch.zeros(slots, dtype=torch.int64)
        self._next = self._ids.numpy()  # the same memory; writing a number takes 0.1 µs this way
        self._kept: dict[int, SavedState] = {}
        self._owner = 0  # the thread that is inside a call
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """How many texts are being written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """How many wait for a slot or for the end of their prompt."""
        return len(self._waiting)

    @property
    def drafted(self) -> int:
        """Tokens that were drafted and checked so far."""
        return self._speculator.drafted if self._speculator else 0

    @property
    def accepted(self) -> int:
        """How many of them came true."""
        return self._speculator.accepted if self._speculator else 0

    @_alone
    def submit(self, request: Request) -> int:
        """Put a request in line; one that is impossible is refused here and touches no other.

        Args:
            request: what to write.

        Returns:
            Its number, counted from 0: the `row` of its events.

        Raises:
            LongscanError: it has no tokens or too many, an id is not of this model, or the state is not.
            UsageError: stop strings without a tokenizer.
        """
        ids = tokens_of(request, self.model, self._max_tokens)
        if request.config.stop and self.tokenizer is None:
            raise UsageError("stop: stop strings are text, a tokenizer is needed to find them.")
        row = _Row(self._number, request, ids)
        row.sampler = Sampler(request.config, self._vocab_size, ids)
        row.writer = TextWriter(self.tokenizer, ids[-CONTEXT:].tolist(), request.config.stop)
        self._number, self._submitted = self._number + 1, self._submitted + len(ids)
        self._waiting.append(row)
        return row.number

    @_alone
    def cancel(self, number: int) -> bool:
        """Drop a request, wherever it is; it has no more events.

        Args:
            number: what `submit` returned.

        Returns:
            Whether it was still waiting or running.
        """
        for row in self._waiting:
            if row.number == number:
                self._submitted -= len(row.ids)
                self._read -= row.done
                self._waiting.remove(row)
                return True
        for slot, row in enumerate(self._rows):
            if row.number == number:
                self._settle()
                self._leave(slot)
                return True
        return False

    @_alone
    def saved(self, number: int) -> SavedState:
        """Copy the state of a text, to go on from later: see `Request`.

        Args:
            number: of a request that is running, or has ended and wanted to be kept; that one is given away.

        Returns:
            The state; how many tokens it has read; and those after them up to the last one written, which
            have to be read next.

        Raises:
            LongscanError: there is no such text.
        """
        if number in self._kept:
            return self._kept.pop(number)
        for slot, row in enumerate(self._rows):
            if row.number == number and row.logits is None:
                return self._copy(slot)
        raise LongscanError(f"request {number} is not running, and was not kept: see Request.keep.")

    def run(self) -> Iterator[Event]:
        """Yield events until nothing is left to do; requests may be submitted and cancelled meanwhile."""
        while self._rows or self._waiting:
            yield from self.step()

    @_alone
    def step(self) -> list[Event]:
        """Write one token of every running text, or a few of a single one, and let others join.

        Returns:
            An event for each token; rows in no particular order. None while a long prompt is being read.
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
        """Read the last token of each row."""
        self._settle()
        if self._grows:
            self._reserve(1)
        state, ids = self._heads[len(self._rows) - 1]
        unchanged = bool(self._rounds % LOOK)
        self._rounds += 1
        logits, _ = self.model.step(
            ids if ids.device == self._device else ids.to(self._device), state, unchanged
        )
        for row, values in zip(self._rows, to_array(logits), strict=True):
            row.logits = values
            row.text.position += 1

    def _draw(self, slot: int, row: _Row, logits: np.ndarray, events: list[Event]) -> None:
        """Draw the next token of a row from logits (padded_vocab_size,)."""
        token = self._write(row, logits, events)
        row.logits, row.text.pending = None, [token]
        self._next[slot] = token
        if self._speculator:
            row.text.ids.append(token)

    def _write(self, row: _Row, logits: np.ndarray, events: list[Event]) -> int:
        """Draw a token and tell; -1 if that is impossible."""
        try:
            token = row.sampler.draw(logits)
        except LongscanError as error:
            row.finish = "error"
            events.append(Event(row.number, -1, "", "error", error))
            return -1
        row.left -= 1
        text, row.finish = row.writer.push(token, is_eos=token in row.ends, is_last=not row.left)
        events.append(Event(row.number, token, text, row.finish))
        return token

    def _speculate(self, speculator: Speculator, events: list[Event]) -> None:
        """Write a few tokens of the only row."""
        row = self._rows[0]

        def draw(logits: np.ndarray) -> tuple[int, bool]:
            token = self._write(row, logits, events)
            return token, row.finish is not None

        if self._grows:
            self._reserve(speculator.most)
        speculator.round(self._heads[0][0], row.text, row.left, draw)
        self._next[0] = row.text.pending[-1]
        if row.finish is not None:
            self._leave(0)

    def _settle(self) -> None:
        """Go on without drafts."""
        if self._speculator and self._rows:
            for slot, row in enumerate(self._rows):
                if len(row.text.pending) > 1:
                    assert slot == 0
                    self._speculator.settle(self._heads[0][0], row.text)
            self._speculator.moved()

    def _admit(self, events: list[Event]) -> None:
        """Read prompts for the free slots, within the bounds of a step."""
        budget = self._read_tokens
        while self._waiting and len(self._rows) < self.slots and (budget is None or budget > 0):
            row = self._waiting[0]
            before = row.done
            try:
                logits = self._read_prompt(row, budget)
            except LongscanError as error:
                self._waiting.popleft()
                events.append(Event(row.number, -1, "", "error", error))
                continue
            budget = None if budget is None else budget - (row.done - before)
            if row.done == len(row.ids):
                self._waiting.popleft()
                self._join(row, logits)

    def _read_prompt(self, row: _Row, budget: int | None) -> Tensor:
        """Read a part of a prompt, or all that is left; return the logits (padded_vocab_size,) after it."""
        ids, start, n_pending = row.ids, row.request.position, len(row.request.pending)
        if row.done < n_pending:
            logits = self._read_pending(row)
            if n_pending == len(ids):
                return logits
        if self._cache and not row.done and row.request.state is None:
            row.done, row.state, row.keep = self._cache.begin(ids)
            self._read += row.done
        begin = row.done
        end = len(ids)
        if budget is not None:  # cut where reading.read cuts, or the bits would be others
            end = min(end, max(1, (start + begin + budget) // CHUNK) * CHUNK - start)
            end = end if end > begin else min(len(ids), begin + CHUNK - (start + begin) % CHUNK)

        def shown(done: int, _: int) -> None:
            if self._progress:
                self._progress(self._read + done, self._submitted)

        logits, row.state = read(
            self.model, ids[begin:end], row.state, start + begin, progress=shown, boundary=row.keep
        )
        row.done = end
        self._read += end - begin
        return logits

    def _read_pending(self, row: _Row) -> Tensor:
        """Read the tokens that a saved text waits for; return the logits (padded_vocab_size,) after them."""
        state, n_pending = row.request.state, len(row.request.pending)
        row.state = self.model.init_state(1) if state is None else state.clone()
        for begin in range(0, n_pending, MAX_PENDING):
            part = row.ids[begin : min(begin + MAX_PENDING, n_pending)]
            logits, _ = self.model.advance(torch.from_numpy(part)[None].to(self._device), row.state)
        row.done = n_pending
        self._read += n_pending
        return logits[0, -1]

    def _join(self, row: _Row, logits: Tensor) -> None:
        """Give a row that has read its prompt a slot."""
        assert row.state is not None
        self._settle()
        if self._state is None:
            self._state = self.model.init_state(self.slots)
            self._grows = bool(self._state.growth)
            self._look()
        layers = list(self._state.layers)
        self._state.copy_row_(len(self._rows), row.state, 0)
        if self._grows and self._state.layers[0] is not layers[0]:
            self._look()
        row.state, row.keep = None, None
        row.logits = to_array(logits)
        row.text.position = row.request.position + len(row.ids)
        if self._speculator:
            row.text.ids = row.ids.tolist()
        self._rows.append(row)

    def _reserve(self, n: int) -> None:
        """Make room for n tokens in the rows that are in use."""
        assert self._state is not None
        if self._state.reserve(n, len(self._rows)):
            self._look()

    def _look(self) -> None:
        """Make the views of the first rows."""
        assert self._state is not None
        self._heads = [(self._state.rows(n), self._ids[:n]) for n in range(1, self.slots + 1)]

    def _leave(self, slot: int) -> None:
        """Free a slot; the last row moves there."""
        row, last = self._rows[slot], self._rows[-1]
        if row.request.keep and row.finish not in (None, "error"):
            self._kept[row.number] = self._copy(slot)
        if row is not last:
            assert self._state is not None
            self._state.copy_row_(slot, self._state, len(self._rows) - 1)
            self._next[slot] = self._next[len(self._rows) - 1]
            self._rows[slot] = last
        self._rows.pop()
        if self._speculator:
            self._speculator.moved()

    def _copy(self, slot: int) -> SavedState:
        """Copy where a row stands."""
        assert self._state is not None
        text = self._rows[slot].text
        row = self._state.map(lambda tensor: tensor[slot : slot + 1])
        return SavedState(row.clone(), text.position, list(text.pending))
