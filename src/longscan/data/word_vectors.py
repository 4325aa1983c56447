"""Pretrained word vectors: word2vec in its two formats, and GloVe."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from longscan.data.text_files import open_binary
from longscan.errors import LongscanError

__all__ = ["WordVectors", "read_vectors"]

MAX_WORD = 4096  # bytes
MAX_WIDTH = 2**16
MAX_LINE = 2**22  # bytes
BLOCK = 2**20  # bytes read at a time

Row = tuple[str, "bytes | list[bytes]"]  # a word and its numbers, as they stand in the file


class WordVectors(NamedTuple):
    """Words and their vectors.

    Attributes:
        words: each once, in the order of the file.
        vectors: (n_words, width) float32.
        total: rows in the file.
        format: "word2vec text", "word2vec binary" or "GloVe".
    """

    words: list[str]
    vectors: npt.NDArray[np.float32]
    total: int
    format: str


def read_vectors(path: str | Path, wanted: Collection[str] | None = None) -> WordVectors:
    """Read word vectors; which of the three formats it is the content says.

    word2vec files begin with a line "words width". Then come rows: the word, a space, and the numbers, as
    text or, in binary files, as little-endian float32. GloVe files are rows of text alone. Of a word that
    occurs twice the first row counts.

    Args:
        path: the file, also .gz or .xz.
        wanted: keep these words only; all if None. The rows of the others are counted, not looked into.

    Returns:
        The vectors.

    Raises:
        LongscanError: the file is empty, cut short or something else, a row has more or less numbers than it
            should, or one that is not finite. The message names the row.
        OSError: it can't be read.
    """
    path = Path(path)
    try:
        with open_binary(path) as file:
            return _read(path, file, wanted)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise LongscanError(f"{path} is damaged or cut short ({error}). Fetch it again.") from error


def _read(path: Path, file: IO[bytes], wanted: Collection[str] | None) -> WordVectors:
    """Find out the format, then read the rows."""
    first = file.readline(MAX_LINE).split()
    if not first:
        raise LongscanError(f"{path} is empty: expected word vectors.")
    total: int | None = None
    if len(first) == 2 and all(part.isdigit() and len(part) < 12 for part in first):
        total, width = map(int, first)
        if total < 1 or not 1 <= width <= MAX_WIDTH:
            raise LongscanError(
                f"{path}: expected at least one word of 1 to {MAX_WIDTH:,} numbers, but its first line says "
                f"{total:,} of {width:,}."
            )
        begin = file.tell()
        sample = file.read(MAX_WORD + 4 * width)
        file.seek(begin)
        name = "word2vec text" if _is_text(sample) else "word2vec binary"
    else:
        width, name = len(first) - 1, "GloVe"
        file.seek(0)
        if not 1 <= width <= MAX_WIDTH or _numbers(first[1:]) is None:
            raise LongscanError(
                f'{path} holds no word vectors: expected the first line of word2vec, "words width", or a '
                f"word and its numbers as in GloVe, found {b' '.join(first)[:40]!r}."
            )
    binary = name == "word2vec binary"
    table = _binary(path, file, total or 0, width) if binary else _text(path, file, width, total is not None)
    words, vectors, count = list[str](), list[npt.NDArray[np.float32]](), 0
    keep, seen = None if wanted is None else frozenset(wanted), set[str]()
    for count, (word, raw) in enumerate(table, 1):
        if word in seen or (keep is not None and word not in keep):
            continue
        vector = np.frombuffer(raw, "<f4") if isinstance(raw, bytes) else _numbers(raw)
        if vector is None or not np.isfinite(vector).all():
            raise LongscanError(f"{path}, word {count:,} ({word!r}): expected {width} finite numbers.")
        seen.add(word)
        words.append(word)
        vectors.append(vector)
    if total is not None and count != total:
        raise LongscanError(
            f"{path} says it has {total:,} words, found {count:,}. It was probably cut short: fetch it again."
        )
    empty = np.empty((0, width), np.float32)
    return WordVectors(words, np.stack(vectors) if vectors else empty, count, name)


def _text(path: Path, file: IO[bytes], width: int, header: bool) -> Iterator[Row]:
    """Yield the rows of a text file. A word may hold spaces, as some of GloVe's do, if it isn't numbers."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1 + header):
        fields = line.rstrip().split(b" ")
        split = len(fields) - width
        surplus = fields[1:split]
        if split < 1 or any(_numbers([field]) is not None for field in surplus):
            raise LongscanError(
                f"{path}, line {number:,}: expected a word and {width} numbers as before, found "
                f"{len(fields) - 1}. Was the file cut short?"
            )
        yield b" ".join(fields[:split]).decode(errors="replace"), fields[split:]


def _binary(path: Path, file: IO[bytes], total: int, width: int) -> Iterator[Row]:
    """Yield the rows of a binary file, in some of which a line break follows each."""
    buffer, place = b"", 0
    for number in range(1, total + 1):
        if len(buffer) - place < MAX_WORD + 1 + 4 * width:
            buffer, place = buffer[place:] + file.read(BLOCK + 4 * width), 0
        space = buffer.find(b" ", place, place + MAX_WORD)
        end = space + 1 + 4 * width
        if space < 0 or end > len(buffer):
            raise LongscanError(
                f"{path} is cut short or damaged at word {number:,}: expected {total:,} words of {width} "
                "numbers. Fetch it again."
            )
        yield buffer[place:space].lstrip(b"\n").decode(errors="replace"), buffer[space + 1 : end]
        place = end
    if (buffer[place:] + file.read(BLOCK)).strip(b"\n"):
        raise LongscanError(
            f"{path} goes on after its {total:,} words: are there really {width} numbers each?"
        )


def _numbers(fields: list[bytes]) -> npt.NDArray[np.float32] | None:
    """Parse numbers; None if one of them is none."""
    try:
        return np.array([float(field) for field in fields], np.float32)
    except ValueError:
        return None


def _is_text(sample: bytes) -> bool:
    """Return whether bytes are text, not float32 numbers, which soon contain control characters."""
    return not any(byte < 9 or 13 < byte < 32 for byte in sample)
