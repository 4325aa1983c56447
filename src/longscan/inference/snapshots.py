"""A text that can be rewound: snapshots of the state every few tokens, and replay from the nearest one.

Rewinding is bit-exact: prefilled tokens are prefilled again in the same chunks, and decoded tokens step by
step, because the two ways of computing round differently.
"""

from __future__ import annotations

import bisect
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError
from longscan.inference.prefill import CHUNK, Ids, Progress, as_tensor, read
from longscan.models import LanguageModel, State

__all__ = ["Snapshots"]


@dataclass
class _Stretch:
    """Tokens that were processed in one way: by one `read`, or by steps."""

    begin: int
    steps: bool
    ids: array[int]  # 8 bytes per token

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.begin + len(self.ids)


class Snapshots:
    """One text and the states along it.

    Args:
        model: any causal model.
        every: tokens between snapshots, about; during prefill they are at multiples of CHUNK.
        max_bytes: of all snapshots together; above it some are dropped, mostly old ones, so that the cost of
            going back n tokens stays proportional to n. None retains all.
        state: of one row, to start with, not modified; None at the start of a text.
        position: the number of tokens that the state includes, and the first one to go back to.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        every: int = CHUNK,
        max_bytes: int | None = None,
        *,
        state: State | None = None,
        position: int = 0,
    ) -> None:
        check_whole("every", every, 1)
        check_whole("position", position, 0)
        if max_bytes is not None:
            check_whole("max_bytes", max_bytes, 0)
        self._model, self._every, self._max_bytes = model, every, max_bytes
        self._start, self._position = position, position
        self._state = model.init_state(1) if state is None else state.clone()
        self._first = self._state.clone()
        self._logits: Tensor | None = None
        self._stretches: list[_Stretch] = []
        self._positions: list[int] = []  # of the snapshots, ascending
        self._states: list[State] = []
        self._nbytes = 0

    @property
    def position(self) -> int:
        """The number of tokens so far."""
        return self._position

    @property
    def logits(self) -> Tensor | None:
        """The logits after the last token, (padded_vocab_size,); None before the first."""
        return self._logits

    @property
    def state(self) -> State:
        """The current state; clone it before you advance it."""
        return self._state

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the snapshots, ascending."""
        return tuple(self._positions)

    @property
    def nbytes(self) -> int:
        """Size of all snapshots in bytes."""
        return self._nbytes

    def read(self, ids: Ids, progress: Progress | None = None) -> Tensor:
        """Prefill a prompt, or a part of one.

        Args:
            ids: (seq_len,) token ids.
            progress: see `prefill.read`.

        Returns:
            (padded_vocab_size,) the logits after it.

        Raises:
            LongscanError: as `prefill.read`; then nothing has changed.
        """
        try:
            logits, state = read(
                self._model, ids, self._state, self._position, progress=progress, boundary=self._add
            )
        except BaseException:
            self._drop_after(self._position)
            raise
        self._stretches.append(_Stretch(self._position, False, _array(ids)))
        self._logits, self._state, self._position = logits, state, self._position + len(ids)
        return logits

    def step(self, token: int) -> Tensor:
        """Decode one token, as generation does.

        Args:
            token: its id.

        Returns:
            (padded_vocab_size,) the logits after it.

        Raises:
            LongscanError: the token is not in the vocabulary.
        """
        size = self._model.config.vocab_size
        if not 0 <= token < size:
            raise LongscanError(f"token id: expected 0 to {size - 1:,}, got {token:,}.")
        if not self._stretches or not self._stretches[-1].steps:
            self._stretches.append(_Stretch(self._position, True, array("q")))
        self._stretches[-1].ids.append(token)
        self._step(token)
        self._add(self._position, self._state)
        assert self._logits is not None
        return self._logits

    def back(self, position: int) -> Tensor | None:
        """Go back, as if the text had ended at a position.

        Args:
            position: at most the current one.

        Returns:
            The logits there, see `logits`.

        Raises:
            LongscanError: the position is out of range.
        """
        if not self._start <= position <= self._position:
            raise LongscanError(
                f"position: expected {self._start:,} to {self._position:,}, got {position:,}: "
                "the text can only go back."
            )
        if position == self._position:
            return self._logits
        self._truncate(position)
        # strictly before the position, as the replay computes the logits
        nearest = bisect.bisect_left(self._positions, position) - 1
        if nearest >= 0:
            self._position, self._state = self._positions[nearest], self._states[nearest].clone()
        else:
            self._position, self._state = self._start, self._first.clone()
        self._logits = None
        for stretch in self._stretches:
            if stretch.end > self._position:
                self._replay(stretch)
        return self._logits

    def _replay(self, stretch: _Stretch) -> None:
        """Process a stretch from the current position on, in the same way as before."""
        ids = stretch.ids[self._position - stretch.begin :]
        if stretch.steps:
            for token in ids:
                self._step(token)
        else:
            self._logits, self._state = read(self._model, ids, self._state, self._position)
            self._position = stretch.end

    def _step(self, token: int) -> None:
        """Decode one token."""
        ids = torch.tensor([token], device=self._model.device)
        logits, self._state = self._model.step(ids, self._state)
        self._logits, self._position = logits[0], self._position + 1

    def _truncate(self, position: int) -> None:
        """Drop the tokens and the snapshots after a position."""
        self._stretches = [stretch for stretch in self._stretches if stretch.begin < position]
        if self._stretches:
            last = self._stretches[-1]
            del last.ids[position - last.begin :]
        self._drop_after(position)

    def _drop_after(self, position: int) -> None:
        """Drop the snapshots after a position."""
        n = bisect.bisect_right(self._positions, position)
        self._nbytes -= sum(state.nbytes for state in self._states[n:])
        del self._positions[n:], self._states[n:]

    def _add(self, position: int, state: State) -> None:
        """Take a snapshot if one is due."""
        if position - (self._positions[-1] if self._positions else self._start) < self._every:
            return
        self._positions.append(position)
        self._states.append(state.clone())
        self._nbytes += self._states[-1].nbytes
        while self._max_bytes is not None and self.nbytes > self._max_bytes:
            self._drop()

    def _drop(self) -> None:
        """Drop the snapshot whose gap is smallest relative to its distance from the end."""
        positions, end = self._positions, self._positions[-1] + self._every
        gaps = zip([self._start, *positions], positions, [*positions[1:], end], strict=False)
        costs = [(after - before) / (end - position) for before, position, after in gaps]
        index = costs.index(min(costs))
        self._nbytes -= self._states[index].nbytes
        del self._positions[index], self._states[index]


def _array(ids: Ids) -> array[int]:
    """Return a copy of token ids, 8 bytes each."""
    copy = array("q")
    copy.frombytes(as_tensor(ids).numpy().tobytes())
    return copy
