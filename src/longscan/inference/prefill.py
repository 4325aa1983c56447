"""Reading a text of any length into a state, in constant memory and always cut at the same places.

A matrix product of 100 rows need not give the bits of the same rows in a product of 256. Every reader here
cuts at the multiples of CHUNK, counted from the start of the text, so that whoever goes on from a state that
was stored at such a place computes exactly what reading everything at once gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longscan.core.checks import check_texts
from longscan.data.documents import split
from longscan.errors import LongscanError
from longscan.models import LanguageModel, State
from longscan.tokenizers.base import Tokenizer

__all__ = ["CHUNK", "Ids", "Progress", "as_tensor", "encode", "read"]

CHUNK = 512  # tokens read at a time: at 130m, 256 cost 9 to 18 % of the speed of 1,024, 512 3 to 8 %
WHOLE = 2**20  # characters up to which texts are encoded together, on all cores

Ids = Sequence[int] | np.ndarray | Tensor  # one text; a list, an array (of a mapped file, say) or a tensor
Progress = Callable[[int, int], None]  # called with the tokens read so far and those of the whole work


def read(
    model: LanguageModel,
    ids: Ids,
    state: State | None = None,
    position: int = 0,
    *,
    progress: Progress | None = None,
    boundary: Callable[[int, State], None] | None = None,
) -> tuple[Tensor, State]:
    """Read one text.

    Args:
        model: whatever reads by `prefill`.
        ids: (seq_len,) token ids, taken in pieces: a mapped file is never in memory as a whole.
        state: of one row, after the tokens before; left as it is. The start of a text if None.
        position: how many tokens came before. Where it is a multiple of CHUNK, the result is bit for bit
            that of reading them and `ids` at once.
        progress: called after each chunk.
        boundary: called at each multiple of CHUNK with the position and the state there, which is the
            reader's: clone it to keep it.

    Returns:
        logits: (padded_vocab_size,) after the last token.
        state: after it; shares no memory with what was given.

    Raises:
        LongscanError: there are no tokens, or one is not of this model.
        ValueError: the state has not one row, or the position is negative.
    """
    total, done = len(ids), 0
    if not total:
        raise LongscanError("nothing to read: expected at least one token.")
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


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, begins: bool = True) -> list[np.ndarray]:
    """Turn prompts of any length into ids, 8 bytes each.

    A tokenizer takes some 500 bytes of memory for each token of what it works on, so a text of more than two
    million characters comes to it in pieces, cut before white space. Byte-level BPE gives the same tokens for
    the pieces as for the whole; a tokenizer that joins words may differ by a token per piece.

    Args:
        tokenizer: any.
        texts: any.
        begins: whether they begin a text, with the special tokens that the tokenizer puts there.

    Returns:
        (seq_len,) int64 for each text.
    """
    check_texts("texts", texts)
    prefix = np.array(tokenizer.prefix if begins else (), np.int64)
    ids: list[list[np.ndarray]] = [[prefix] for _ in texts]
    short = [index for index, text in enumerate(texts) if len(text) <= WHOLE]
    for index, found in zip(short, tokenizer.encode_batch([texts[index] for index in short]), strict=True):
        ids[index].append(np.array(found, np.int64))
    for index, text in enumerate(texts):
        if len(text) > WHOLE:
            ids[index] += [np.array(tokenizer.encode(piece), np.int64) for piece in split(text)]
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
    except (ValueError, TypeError, RuntimeError) as error:  # beyond 64 bits, words, rows of unequal length
        raise LongscanError(f"token ids: expected whole numbers ({error}).") from error
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LongscanError(f"token ids: expected a row of whole numbers, got {kind} {tuple(tensor.shape)}.")
    return tensor.to("cpu", torch.int64)


def _check(ids: Tensor, vocab_size: int) -> None:
    """Insist on ids of the vocabulary: an embedding is looked up without asking."""
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise LongscanError(f"token id: expected 0 to {vocab_size - 1:,}, got {wrong:,}.")
