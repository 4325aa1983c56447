"""Rows taken apart where sequences start: a mixer then need only read rows with room behind their tokens."""

import warnings
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from longscan.models.common.mixer import Mixer
from longscan.models.common.state import over
from longscan.ops._segments import check_seq_idx, segments

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])


class Sections(NamedTuple):
    """The sequences of packed and padded rows, each by itself: its tokens in front, room behind them.

    Each row has at least one, of no tokens if the row is nothing but padding.

    Attributes:
        place: (n, longest) int64 where each token stands in the flattened batch; anything in the room.
        inside: (n, longest) bool, False in the room.
        length: (n,) int64 tokens of each sequence.
        row: (n,) int64 the row it is from.
        first: (n,) bool, whether it continues the state of its row.
        last: (batch,) int64 the sequence each row ends in.
        seq_len: tokens and padding of a row.
    """

    place: Tensor
    inside: Tensor
    length: Tensor
    row: Tensor
    first: Tensor
    last: Tensor
    seq_len: int

    @classmethod
    def of(cls, seq_idx: Tensor) -> Self:
        """Find the sequences.

        Args:
            seq_idx: (batch, seq_len), see `Mixer.plan`.
        """
        batch, seq_len = seq_idx.shape
        starts, padding = segments(seq_idx)
        number = starts.cumsum(1)  # (batch, seq_len) in the row, from 0
        counts = number[:, -1] + 1
        last = counts.cumsum(0) - 1
        number = number + (last - counts + 1)[:, None]
        tokens = (~padding).flatten().nonzero()[:, 0]  # (all tokens,)
        owner = number.flatten()[tokens]
        length = torch.bincount(owner, minlength=int(counts.sum()))
        position = torch.arange(len(tokens), device=owner.device) - (length.cumsum(0) - length)[owner]
        place = length.new_zeros(len(length), max(1, int(length.max())))
        place[owner, position] = tokens
        inside = torch.arange(place.shape[1], device=owner.device) < length[:, None]
        row = torch.arange(batch, device=owner.device).repeat_interleave(counts)
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        return cls(place, inside, length, row, first, last, seq_len)

    def take(self, x: Tensor) -> Tensor:
        """Turn (batch, seq_len, ...) into (n, longest, ...), with zeros in the room."""
        return x.flatten(0, 1)[self.place] * self.inside.view(*self.inside.shape, *(1 for _ in x.shape[2:]))

    def give(self, y: Tensor) -> Tensor:
        """Turn (n, longest, ...) back into (batch, seq_len, ...), with zeros in padding."""
        flat = y.new_zeros(len(self.last) * self.seq_len, *y.shape[2:])
        flat = flat.index_put((self.place[self.inside],), y[self.inside])
        return flat.view(len(self.last), self.seq_len, *y.shape[2:])

    def begin(self, state: StateT) -> StateT:
        """Turn the state of each row into that of each sequence: zeros where it continues nothing."""

        def pick(tensor: Tensor) -> Tensor:
            picked = tensor[self.row]
            return torch.where(over(self.first, picked), picked, 0)

        return type(state)(*map(pick, state))

    def end(self, state: StateT) -> StateT:
        """Turn the state after each sequence into that of each row."""
        return type(state)(*(tensor[self.last] for tensor in state))


class SectionMixer(Mixer[StateT]):
    """A mixer that reads rows of whole sequences; packing and padding are dealt with here.

    Its state before any token is all zeros.
    """

    def plan(self, ids: Tensor, state: StateT | None, seq_idx: Tensor | None) -> Sections | None:
        """Take the rows apart once for all layers; see `Mixer.plan`."""
        if ids.dim() == 1 or seq_idx is None:
            return None
        checked = check_seq_idx(seq_idx, *ids.shape)
        assert checked is not None
        return Sections.of(checked)

    def forward(self, x: Tensor, state: StateT | None, sections: Sections | None, /) -> tuple[Tensor, StateT]:
        """Mix along time; see `Mixer.forward`."""
        if state is not None and len(state[0]) != len(x):
            raise ValueError(f"initial_state: expected {len(x)} rows, got {len(state[0])}")
        if sections is None:
            return self.read(x, state, None)
        before = None if state is None else sections.begin(state)
        y, after = self.read(sections.take(x), before, sections.length)
        return sections.give(y), sections.end(after)

    def read(self, x: Tensor, state: StateT | None, length: Tensor | None) -> tuple[Tensor, StateT]:
        """Mix along time, each row a sequence.

        Args:
            x: (rows, seq_len, d_model).
            state: what came before the first token; nothing if None.
            length: (rows,) int64 tokens of each row, which stand in front; all of seq_len if None.

        Returns:
            y: (rows, seq_len, d_model), finite behind the tokens.
            state: after the last token, that before it where there is none.
        """
        raise NotImplementedError


def warn_beyond(length: int, max_positions: int) -> None:
    """Warn of texts of another length than a model was made for.

    Args:
        length: tokens of the text.
        max_positions: tokens of the longest one that is not remarkable.
    """
    if length > max_positions:
        warnings.warn(
            f"a text is longer than the {max_positions:,} positions this model was made for: "
            "it is read all the same, but expect worse predictions there.",
            stacklevel=2,
        )
