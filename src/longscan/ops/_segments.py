"""The meaning of ``seq_idx``: where sequences start inside a packed row, and which positions are padding."""

import torch
from torch import Tensor


def segments(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return the starts of packed sequences, and the padding.

    Args:
        seq_idx: (batch, seq_len) integers; a change of value starts a new sequence, negative means padding.

    Returns:
        starts: (batch, seq_len) bool, True at a token whose predecessor in the row belongs to another
            sequence. The first token of a row is no start: it continues the initial state.
        padding: (batch, seq_len) bool.
    """
    padding = seq_idx < 0
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    latest = torch.where(padding, -1, position).cummax(dim=1).values
    previous = torch.nn.functional.pad(
        latest[:, :-1], (1, 0), value=-1
    )  # the last token before each position
    changed = seq_idx.gather(1, previous.clamp(min=0)) != seq_idx
    return changed & ~padding & (previous >= 0), padding


def check_seq_idx(seq_idx: Tensor | None, batch: int, seq_len: int) -> Tensor | None:
    """Return seq_idx as contiguous int32; raise ValueError for a wrong shape, TypeError for a wrong dtype."""
    if seq_idx is None:
        return None
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seq_idx: expected int32 or int64, got {seq_idx.dtype}")
    if seq_idx.shape != (batch, seq_len):
        raise ValueError(f"seq_idx: expected shape {(batch, seq_len)}, got {tuple(seq_idx.shape)}")
    return seq_idx.to(torch.int32).contiguous()
