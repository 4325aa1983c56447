"""Documents tokenized into files, and batches from these files.

A directory of tokens holds `train.bin`, perhaps `valid.bin` (little-endian ids, each document ended by the
end-of-text id) and `meta.json`, with their counts and hashes of the inputs: the same text, options and
tokenizer reuse the files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longscan.core.files import atomic_directory, read_json, write_json
from longscan.core.random import EpochOrder, RandomStream
from longscan.data.documents import Corpus, Paths, Piece
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import Tokenizer

__all__ = ["Split", "TokenDataset", "TokenFiles", "gather", "open_tokens", "prepare", "windows"]

META = "meta.json"
BATCH = 4 * 2**20  # characters tokenized at a time: enough pieces for every core


@dataclass(frozen=True, kw_only=True)
class Split:
    """One file of tokens: the training text or the held-out text."""

    path: Path
    tokens: int  # with one end-of-text id for each document
    bytes: int  # of the text in UTF-8
    documents: int

    def bits_per_byte(self, loss: float) -> float:
        """Turn a mean loss in nats per token into bits per byte of text, which no tokenizer can flatter.

        Args:
            loss: nats per token, over this split or over evenly spaced windows of it.

        Returns:
            Bits per byte; the end-of-text ids are charged to the text.
        """
        return loss * self.tokens / (math.log(2) * self.bytes)


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """What `prepare` wrote, or found."""

    directory: Path
    train: Split
    valid: Split | None

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read the counts of a token directory.

        Args:
            directory: as given to `prepare`.

        Returns:
            The splits.

        Raises:
            LongscanError: `meta.json` is damaged.
            OSError: there is none.
        """
        directory = Path(directory)
        meta = read_json(directory / META)
        try:
            splits = {
                name: Split(path=directory / f"{name}.bin", **counts)
                for name, counts in meta["splits"].items()
            }
            return cls(directory=directory, train=splits["train"], valid=splits.get("valid"))
        except (KeyError, TypeError, AttributeError) as error:
            raise LongscanError(f"{directory / META} is not of this format: delete {directory}.") from error


def prepare(
    paths: Paths,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    valid_paths: Paths | None = None,
    valid_fraction: float = 0.05,
    separator: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenFiles:
    """Return token files of a corpus, which training maps into memory; existing ones are reused.

    Args:
        paths: files and folders of text; for this and the rest see `Corpus`.
        tokenizer: turns the text into ids.
        directory: where to; appears when it is complete, and replaces only what this function wrote.
        valid_paths: files to hold out.
        valid_fraction: the share of the text to hold out if there are no such files.
        separator: what stands between the documents of a text file.
        progress: called with the bytes of text done and their total.

    Returns:
        The token files and their counts.

    Raises:
        LongscanError: the text cannot be read, found before anything is written; or the directory holds
            something else.
        UsageError: an impossible fraction or separator.
        OSError: the disk is full, or writing is not permitted.
    """
    corpus = Corpus(paths, valid_paths, valid_fraction, separator)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    recipe = {
        "format": 1,
        "dtype": dtype,
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "valid_fraction": corpus.valid_fraction,
        "separator": separator,
        "sources": {
            "train": [_source(file) for file in corpus.train],
            "valid": [_source(file) for file in corpus.valid],
        },
    }
    if found := _reuse(Path(directory), recipe):
        return found
    total = sum(map(sum, corpus.sizes))
    with atomic_directory(directory, marker=META) as folder:
        writers: dict[str, _Writer] = {}
        with ExitStack() as files:
            for batch in _batches(corpus.pieces()):
                encoded = tokenizer.encode_batch([piece.text for _, piece in batch])
                for (name, piece), ids in zip(batch, encoded, strict=True):
                    if name not in writers:
                        file = files.enter_context(open(folder / f"{name}.bin", "wb"))
                        writers[name] = _Writer(file, _little(dtype), tokenizer)
                    writers[name].write(piece, ids)
                if progress:
                    progress(sum(writer.counts["bytes"] for writer in writers.values()), total)
        splits = {name: writer.counts for name, writer in writers.items()}
        write_json(folder / META, {**recipe, "splits": splits})
    return TokenFiles.open(directory)


def open_tokens(path: str | Path) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Map a token file into memory.

    Args:
        path: `train.bin` or `valid.bin`, with `meta.json` beside it.

    Returns:
        The ids, read-only (tokens,).

    Raises:
        LongscanError: the file has not the length that `meta.json` says.
    """
    path = Path(path)
    meta = read_json(path.parent / META)
    try:
        dtype, tokens = _little(meta["dtype"]), int(meta["splits"][path.stem]["tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise LongscanError(f"{path.parent / META} does not describe {path.name}: delete both.") from error
    expected, got = tokens * dtype.itemsize, path.stat().st_size
    if got != expected:
        raise LongscanError(f"{path}: expected {expected:,} bytes, got {got:,}: delete {path.parent}.")
    return np.memmap(path, dtype=dtype, mode="r") if tokens else np.empty(0, dtype)


class TokenDataset:
    """Shuffled windows of a token file: batch number -> batch, a pure function of the seed.

    The tokens are taken as a ring (the end-of-text id leads from the last document to the first). Each epoch
    turns it by a random angle, cuts it into windows that touch, and shuffles them: a token is predicted once
    per epoch, and the few left over are others each time. To resume is to know the seed and the number of the
    next batch; see `order`.

    Args:
        path: the token file.
        seq_len: tokens predicted in a window.
        batch_size: windows in a batch.
        seed: of the shuffling, 0 to 2**64 - 1.

    Raises:
        LongscanError: the file is damaged, or shorter than one window.
    """

    def __init__(self, path: str | Path, seq_len: int, batch_size: int, seed: int = 0) -> None:
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name}: expected 1 or more, got {value}.")
        RandomStream(seed, 0)  # refuses a seed that is out of range before anything is read
        self._tokens = open_tokens(path)
        if len(self._tokens) <= seq_len:
            raise LongscanError(
                f"{path} has {len(self._tokens):,} tokens, one sequence needs seq_len + 1 = {seq_len + 1:,}. "
                f"Give more text, or a seq_len of at most {max(len(self._tokens) - 1, 0):,}."
            )
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.windows_per_epoch = len(self._tokens) // seq_len
        self._starts = EpochOrder(seed, self._shuffle)

    @property
    def tokens_per_epoch(self) -> int:
        """The predictions in an epoch: all tokens but an incomplete window."""
        return self.windows_per_epoch * self.seq_len

    @property
    def steps_per_epoch(self) -> int:
        """The batches that an epoch takes, rounded up: epochs follow each other without a gap."""
        return math.ceil(self.windows_per_epoch / self.batch_size)

    def batch(self, step: int) -> Tensor:
        """Return a batch.

        Args:
            step: its number, from 0, without end.

        Returns:
            Ids (batch_size, seq_len + 1), int64; the last of a window is the first of its neighbour.
        """
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        positions = (divmod(number, self.windows_per_epoch) for number in numbers)
        starts = [self._starts[epoch][index] for epoch, index in positions]
        return gather(self._tokens, np.array(starts), self.seq_len)

    def _shuffle(self, stream: RandomStream) -> npt.NDArray[np.int64]:
        """Return where the windows of an epoch start, in order (windows_per_epoch,)."""
        angle = int(stream.raw(1)[0]) % len(self._tokens)
        order = stream.permutation(self.windows_per_epoch)
        return (angle + order * self.seq_len) % len(self._tokens)


def windows(
    path: str | Path, seq_len: int, *, batch_size: int = 1, limit: int | None = None
) -> Iterator[Tensor]:
    """Yield a token file in windows, from the first id to the last, for evaluation.

    Args:
        path: the token file.
        seq_len: tokens predicted in a window.
        batch_size: windows in a batch, at most.
        limit: take only this many windows, evenly spaced.

    Yields:
        Ids (at most batch_size, seq_len + 1), int64. Each window begins with the last id of the one before,
        so every id but the first is predicted once; the rest of the file comes last, shorter and alone.

    Raises:
        LongscanError: the file is damaged or has less than two tokens.
    """
    tokens = open_tokens(path)
    if len(tokens) < 2:
        raise LongscanError(
            f"{path} has fewer than 2 tokens ({len(tokens)}): none to predict. Hold out more text."
        )
    count, rest = divmod(len(tokens) - 1, seq_len)
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen, rest = np.arange(limit) * count // limit, 0
    for first in range(0, len(chosen), batch_size):
        yield gather(tokens, chosen[first : first + batch_size] * seq_len, seq_len)
    if rest:
        yield gather(tokens, np.array([count * seq_len]), rest)


def gather(
    tokens: npt.NDArray[np.unsignedinteger[Any]], starts: npt.NDArray[np.int64], seq_len: int
) -> Tensor:
    """Return the windows at `starts` of the ring of tokens, (len(starts), seq_len + 1)."""
    ids = np.empty((len(starts), seq_len + 1), np.int64)
    for row, start in zip(ids, starts, strict=True):  # no indices: they would take as much memory again
        n = min(len(row), len(tokens) - start)
        row[:n], row[n:] = tokens[start : start + n], tokens[: len(row) - n]
    return torch.from_numpy(ids)


class _Writer:
    """Writes and counts the tokens of one split."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], tokenizer: Tokenizer) -> None:
        self._file, self._dtype, self._tokenizer = file, dtype, tokenizer
        self._begins = True  # whether the next piece is the first of a document
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0}

    def write(self, piece: Piece, ids: list[int]) -> None:
        if self._begins:
            ids = [*self._tokenizer.prefix, *ids]
        if piece.ends:
            ids = [*ids, self._tokenizer.eos_id]
        self._begins = piece.ends
        self._file.write(np.array(ids, dtype=self._dtype).tobytes())
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += len(piece.text.encode())
        self.counts["documents"] += piece.ends


def _batches(pieces: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Collect pieces up to BATCH characters."""
    batch, size = [], 0
    for name, piece in pieces:
        batch.append((name, piece))
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reuse(directory: Path, recipe: dict[str, Any]) -> TokenFiles | None:
    """Return the token files in a directory if this recipe made them and they are whole."""
    try:
        meta = read_json(directory / META)
        if {**recipe, "splits": meta.get("splits")} != meta:
            return None
        found = TokenFiles.open(directory)
        for split in (found.train, found.valid):
            if split:
                open_tokens(split.path)
    except (OSError, LongscanError):
        return None
    return found


def _source(file: Path) -> dict[str, Any]:
    """Identify a file by its content; the name is for the reader of meta.json."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
