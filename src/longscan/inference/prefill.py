"""Prefill: process a prompt of any length in constant memory, always cut into the same chunks.

A matrix product of 100 rows need not round like the same rows in a product of 256. All prefill here cuts at
the multiples of CHUNK, counted from the start of the text. So resuming from a state that was stored at such
a position is bit-exact: the result is that of prefilling everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_texts
from longscan.data.documents import PIECE_SIZE, split
from longscan.errors import LongscanError
from longscan.models import LanguageModel, State
from longscan.models.common.language_model import CHUNK
from longscan.tokenizers.base import Tokenizer

__all__ = ["CHUNK", "Ids", "Progress", "as_tensor", "encode", "read"]


Ids = Sequence[int] | np.ndarray | Tensor  # one text: a list, an array (of a mapped file, say) or a tensor
Progress = Callable[[int, int], None]  # called with the tokens processed so far and their total


def read(
    model: LanguageModel,
    ids: Ids,
    state: State | None = None,
    position: int = 0,
    *,
    progress: Progress | None = None,
    boundary: Callable[[int, State], None] | None = None,
) -> tuple[Tensor, State]:
    """Prefill one text.

    Args:
        model: any causal model.
        ids: (seq_len,) token ids, processed in chunks: a mapped file is never in memory as a whole.
        state: of one row, after the tokens before, not modified; None at the start of a text.
        position: the number of tokens before. If it is a multiple of CHUNK, the result is bit-exactly that
            of prefilling them and `ids` at once.
        progress: called after each chunk.
        boundary: called at each multiple of CHUNK with the position and the state there, which the next
            chunk may overwrite: clone it to store it.

    Returns:
        logits: (padded_vocab_size,) after the last token.
        state: after it; shares no memory with the one given.

    Raises:
        LongscanError: there are no tokens, or an id is not in the vocabulary.
        ValueError: the state has more than one row, or the position is negative.
    """
    total, done = len(ids), 0
    if not total:
        raise LongscanError("no tokens to process: expected at least one.")
    if position < 0 or (state is not None and state.batch_size != 1):
        rows = 1 if state is None else state.batch_size
        raise ValueError(
            f"expected a state of 1 row and a position of 0 or more, got {rows} rows at {position}"
        )
    device, logits = model.device, torch.empty(0)
    while done < total:
        end = min(total, done + CHUNK - (position + done) % CHUNK)
        chunk = as_tensor(ids[done:end])  # (at most CHUNK,)
        _check(chunk, model.config.vocab_size)
        logits, state = model.prefill(chunk[None].to(device), state)
        done = end
        if boundary and (position + done) % CHUNK == 0:
            boundary(position + done, state)
        if progress:
            progress(done, total)
    assert state is not None  # there was a token
    return logits[0], state


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, begins: bool = True, piece_size: int = PIECE_SIZE
) -> list[np.ndarray]:
    """Return the ids of prompts of any length, 8 bytes each.

    A tokenizer needs some 500 bytes of memory per token while it works, so long texts are tokenised in
    pieces, cut before white space. Byte-level BPE gives the same tokens for the pieces as for the whole; a
    tokenizer that merges across words may differ by a token per piece.

    Args:
        tokenizer: any.
        texts: the prompts.
        begins: whether they start a text, with the special tokens that the tokenizer puts there.
        piece_size: characters up to which texts are encoded in one batch, on all cores, and of the pieces.

    Returns:
        (seq_len,) int64 for each text.
    """
    check_texts("texts", texts)
    prefix = np.array(tokenizer.prefix if begins else (), np.int64)
    ids: list[list[np.ndarray]] = [[prefix] for _ in texts]
    short = [index for index, text in enumerate(texts) if len(text) <= piece_size]
    for index, encoded in zip(short, tokenizer.encode_batch([texts[index] for index in short]), strict=True):
        ids[index].append(np.array(encoded, np.int64))
    for index, text in enumerate(texts):
        if len(text) > piece_size:
            pieces = split(text, piece_size)
            ids[index] += [np.array(tokenizer.encode(piece), np.int64) for piece in pieces]
    return [np.concatenate(parts) for parts in ids]


def as_tensor(ids: Ids) -> Tensor:
    """Return token ids as an int64 tensor on the CPU.

    Args:
        ids: (n,) whole numbers.

    Raises:
        LongscanError: they are something else.
    """
    try:
        tensor = torch.as_tensor(ids) if len(ids) else torch.empty(0, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError) as error:  # beyond 64 bits, text, rows of unequal length
        raise LongscanError(f"token ids: expected whole numbers ({error}).") from error
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LongscanError(f"token ids: expected a row of whole numbers, got {kind} {tuple(tensor.shape)}.")
    return tensor.to("cpu", torch.int64)


def _check(ids: Tensor, vocab_size: int) -> None:
    """Raise unless all ids are in the vocabulary, as the embedding does not check them."""
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise LongscanError(f"token id: expected 0 to {vocab_size - 1:,}, got {wrong:,}.")
