"""Packed and padded rows separated into sequences, so that a mixer need only handle right-padded rows."""

import warnings
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from longscan.models.common.mixer import Mixer
from longscan.models.common.state import over
from longscan.ops._segments import check_seq_idx, segments

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])


class Sections(NamedTuple):
    """The sequences of packed and padded rows, each as a right-padded row of its own.

    Each row of the batch has at least one sequence, which is empty if the row is all padding.

    Attributes:
        position: (n, longest) int64 index of each token in the flattened batch; arbitrary in padding.
        inside: (n, longest) bool, False in padding.
        length: (n,) int64 tokens of each sequence.
        row: (n,) int64 the row it comes from.
        first: (n,) bool, whether it continues the state of its row.
        last: (batch,) int64 the last sequence of each row.
        seq_len: tokens and padding of a row.
    """

    position: Tensor
    inside: Tensor
    length: Tensor
    row: Tensor
    first: Tensor
    last: Tensor
    seq_len: int

    @classmethod
    def of(cls, seq_idx: Tensor) -> Self:
        """Return the sequences of packed rows.

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
        offset = torch.arange(len(tokens), device=owner.device) - (length.cumsum(0) - length)[owner]
        position = length.new_zeros(len(length), max(1, int(length.max())))
        position[owner, offset] = tokens
        inside = torch.arange(position.shape[1], device=owner.device) < length[:, None]
        row = torch.arange(batch, device=owner.device).repeat_interleave(counts)
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        return cls(position, inside, length, row, first, last, seq_len)

    def take(self, x: Tensor) -> Tensor:
        """Return x (batch, seq_len, ...) as (n, longest, ...), with zeros in padding."""
        inside = self.inside.view(*self.inside.shape, *(1 for _ in x.shape[2:]))
        return torch.where(inside, x.flatten(0, 1)[self.position], 0)

    def give(self, y: Tensor) -> Tensor:
        """Return y (n, longest, ...) as (batch, seq_len, ...), with zeros in padding."""
        flat = y.new_zeros(len(self.last) * self.seq_len, *y.shape[2:])
        flat = flat.index_put((self.position[self.inside],), y[self.inside])
        return flat.view(len(self.last), self.seq_len, *y.shape[2:])

    def begin(self, state: StateT) -> StateT:
        """Return the initial state of each sequence: that of its row, or zeros where it continues nothing."""

        def pick(tensor: Tensor) -> Tensor:
            picked = tensor[self.row]
            return torch.where(over(self.first, picked), picked, 0)

        return type(state)(*map(pick, state))

    def end(self, state: StateT) -> StateT:
        """Return the final state of each row: that of its last sequence."""
        return type(state)(*(tensor[self.last] for tensor in state))


class SectionMixer(Mixer[StateT]):
    """A mixer over right-padded rows; packed rows and padding are handled here.

    Its initial state is all zeros.
    """

    def plan(self, ids: Tensor, state: StateT | None, seq_idx: Tensor | None) -> Sections | None:
        """Return the sequences of the rows, separated once for all layers; see `Mixer.plan`."""
        if ids.dim() == 1 or seq_idx is None:
            return None
        checked = check_seq_idx(seq_idx, *ids.shape)
        assert checked is not None
        return Sections.of(checked)

    def forward(self, x: Tensor, state: StateT | None, sections: Sections | None, /) -> tuple[Tensor, StateT]:
        """Mix along time; see `Mixer.forward`."""
        if state is not None and len(state[0]) != len(x):
            raise ValueError(f"state: expected {len(x)} rows, got {len(state[0])}")
        if sections is None:
            return self.mix(x, state, None)
        before = None if state is None else sections.begin(state)
        y, after = self.mix(sections.take(x), before, sections.length)
        return sections.give(y), sections.end(after)

    def mix(self, x: Tensor, state: StateT | None, length: Tensor | None) -> tuple[Tensor, StateT]:
        """Mix along time; each row is one sequence.

        Args:
            x: (rows, seq_len, d_model).
            state: before the first token; the initial state if None.
            length: (rows,) int64 tokens of each row, left-aligned; seq_len if None.

        Returns:
            y: (rows, seq_len, d_model), finite in padding.
            state: after the last token; unchanged for an empty row.
        """
        raise NotImplementedError


def latest(previous: Tensor | None, values: Tensor, seq_idx: Tensor) -> Tensor:
    """Return the values (batch, seq_len, ...) at each row's last token; previous where a row has none."""
    time = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last = torch.where(seq_idx < 0, -1, time).amax(1)  # (batch,)
    result = values[torch.arange(len(last), device=last.device), last]
    return result if previous is None else torch.where(over(last < 0, result), previous, result)


def restarts(last_idx: Tensor, seq_idx: Tensor) -> Tensor:
    """Return which rows start another sequence with a chunk: their state is to be reset.

    Ops see it only within a chunk.

    Args:
        last_idx: (batch,) the sequence of the last token before the chunk, negative if there is none.
        seq_idx: (batch, seq_len) of the chunk, see `Mixer.plan`.

    Returns:
        (batch,) bool.
    """
    first = seq_idx.gather(1, (seq_idx >= 0).int().argmax(1, keepdim=True))[:, 0]  # (batch,), < 0 if none
    return (first >= 0) & (last_idx >= 0) & (first != last_idx)


def warn_beyond(length: int, max_positions: int) -> None:
    """Warn if a sequence is longer than the model was trained for.

    Args:
        length: tokens of the sequence.
        max_positions: the context length of the model.
    """
    if length > max_positions:
        warnings.warn(
            f"the sequence is longer than the {max_positions:,} positions of the model's context: "
            "it is processed in full, but expect worse predictions beyond them.",
            stacklevel=2,
        )
