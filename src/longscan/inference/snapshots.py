"""A text one can go back in: snapshots of the state every few tokens, and replaying from the nearest.

Going back is exact, bit for bit: what was read as a prompt is read again in the same chunks, what was taken
token by token is taken token by token, because these two ways of computing differ in the last bits.
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
    """Tokens that came in one way: by one `read`, or by steps."""

    begin: int
    steps: bool
    ids: array[int]  # 8 bytes a token, however long the text

    @property
    def end(self) -> int:
        """The position after it."""
        return self.begin + len(self.ids)


class Snapshots:
    """One text and the states along it.

    Args:
        model: what reads.
        every: tokens between snapshots, about; while reading they are at multiples of CHUNK.
        max_bytes: of all snapshots together; above it they thin out, most where the text is oldest, so that
            going back n tokens costs in proportion to n. None keeps all.
        state: of one row, to begin with; the start of a text if None. It is left as it is.
        position: how many tokens that state has read; the text cannot go back behind it.

    Raises:
        UsageError: a number makes no sense.
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
        self._places: list[int] = []  # positions of the snapshots, ascending
        self._states: list[State] = []
        self._nbytes = 0

    @property
    def position(self) -> int:
        """How many tokens have been read."""
        return self._position

    @property
    def logits(self) -> Tensor | None:
        """What follows, (padded_vocab_size,); None where nothing has been read yet."""
        return self._logits

    @property
    def state(self) -> State:
        """The state here, to look at or to clone: steps on it would not be known here."""
        return self._state

    @property
    def places(self) -> tuple[int, ...]:
        """The positions of the snapshots, ascending."""
        return tuple(self._places)

    @property
    def nbytes(self) -> int:
        """Size of all snapshots in bytes."""
        return self._nbytes

    def read(self, ids: Ids, progress: Progress | None = None) -> Tensor:
        """Read a prompt, or a part of one.

        Args:
            ids: (seq_len,) token ids.
            progress: see `reading.read`.

        Returns:
            (padded_vocab_size,) the logits after it.

        Raises:
            LongscanError: as `reading.read`; nothing has changed then.
        """
        try:
            logits, state = read(
                self._model, ids, self._state, self._position, progress=progress, boundary=self._keep
            )
        except BaseException:
            self._forget(self._position)
            raise
        self._stretches.append(_Stretch(self._position, False, _array(ids)))
        self._logits, self._state, self._position = logits, state, self._position + len(ids)
        return logits

    def step(self, token: int) -> Tensor:
        """Take one token, as generating does.

        Args:
            token: its id.

        Returns:
            (padded_vocab_size,) the logits after it.

        Raises:
            LongscanError: the token is not of this model.
        """
        size = self._model.config.vocab_size
        if not 0 <= token < size:
            raise LongscanError(f"token id: expected 0 to {size - 1:,}, got {token:,}.")
        if not self._stretches or not self._stretches[-1].steps:
            self._stretches.append(_Stretch(self._position, True, array("q")))
        self._stretches[-1].ids.append(token)
        self._step(token)
        self._keep(self._position, self._state)
        assert self._logits is not None
        return self._logits

    def back(self, position: int) -> Tensor | None:
        """Go back: afterwards everything is as if the text had ended there.

        Args:
            position: at most the present one.

        Returns:
            The logits there, see `logits`.

        Raises:
            LongscanError: the text was never there.
        """
        if not self._start <= position <= self._position:
            raise LongscanError(
                f"position: expected {self._start:,} to {self._position:,}, got {position:,}: "
                "one can go back to where the text has been."
            )
        if position == self._position:
            return self._logits
        self._truncate(position)
        nearest = bisect.bisect_left(self._places, position)  # strictly before: replaying gives the logits
        begin, state = (
            (self._places[nearest - 1], self._states[nearest - 1]) if nearest else (self._start, self._first)
        )
        self._position, self._state, self._logits = begin, state.clone(), None
        for stretch in self._stretches:
            if stretch.end > self._position:
                self._replay(stretch)
        return self._logits

    def _replay(self, stretch: _Stretch) -> None:
        """Read again what lies behind the present position, in the way it was read."""
        ids = stretch.ids[self._position - stretch.begin :]
        if stretch.steps:
            for token in ids:
                self._step(token)
        else:
            self._logits, self._state = read(self._model, ids, self._state, self._position)
            self._position = stretch.end

    def _step(self, token: int) -> None:
        """Take one token."""
        ids = torch.tensor([token], device=self._model.device)
        logits, self._state = self._model.step(ids, self._state)
        self._logits, self._position = logits[0], self._position + 1

    def _truncate(self, position: int) -> None:
        """Forget the tokens and the snapshots after a position."""
        self._stretches = [stretch for stretch in self._stretches if stretch.begin < position]
        if self._stretches:
            last = self._stretches[-1]
            del last.ids[position - last.begin :]
        self._forget(position)

    def _forget(self, position: int) -> None:
        """Drop the snapshots after a position."""
        n = bisect.bisect_right(self._places, position)
        self._nbytes -= sum(state.nbytes for state in self._states[n:])
        del self._places[n:], self._states[n:]

    def _keep(self, position: int, state: State) -> None:
        """Take a snapshot if it is time."""
        if position - (self._places[-1] if self._places else self._start) < self._every:
            return
        self._places.append(position)
        self._states.append(state.clone())
        self._nbytes += self._states[-1].nbytes
        while self._max_bytes is not None and self.nbytes > self._max_bytes:
            self._drop()

    def _drop(self) -> None:
        """Drop the snapshot that is missed least: its gap is smallest for how far back it lies."""
        places, now = self._places, self._places[-1] + self._every
        before = [self._start, *places]
        behind = [*places[1:], now]
        gaps = zip(before, places, behind, strict=False)
        costs = [(after - left) / (now - place) for left, place, after in gaps]
        index = costs.index(min(costs))
        self._nbytes -= self._states[index].nbytes
        del self._places[index], self._states[index]


def _array(ids: Ids) -> array[int]:
    """Copy tokens into 8 bytes each."""
    copy = array("q")
    copy.frombytes(as_tensor(ids).numpy().tobytes())
    return copy
