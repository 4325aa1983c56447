"""Text files, plain or compressed as .gz or .xz: strict UTF-8, read block by block or line by line."""

from __future__ import annotations

import codecs
import gzip
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from longscan.errors import LongscanError

__all__ = ["OPENERS", "iter_lines", "open_binary", "read_text", "text_kind"]

OPENERS = {".gz": cast(Callable[..., IO[bytes]], gzip.open), ".xz": cast(Callable[..., IO[bytes]], lzma.open)}
BLOCK = 2**20  # bytes read at a time
MAX_LINE = 2**26  # characters of the longest line, which is held in memory
MAX_RATIO = 200  # text bytes for one of a compressed file; real text has up to 20, the formats can do 1,000
FREE = 2**24  # bytes that a compressed file may hold in any case


def text_kind(file: Path) -> str:
    """Return the suffix that determines the format, without that of the compression.

    Args:
        file: its path.
    """
    return Path(file.stem if file.suffix.lower() in OPENERS else file.name).suffix.lower()


def open_binary(path: Path) -> IO[bytes]:
    """Return an open file, which is decompressed if its name ends in .gz or .xz.

    Args:
        path: of the file.
    """
    opener: Callable[..., IO[bytes]] = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rb")


def read_text(path: Path, block_size: int = BLOCK) -> Iterator[str]:
    """Yield the text of a file block by block, decompressed and strictly decoded, without byte order mark.

    Args:
        path: the file, also .gz or .xz.
        block_size: bytes read at a time.

    Yields:
        Text, a block at a time.

    Raises:
        LongscanError: not UTF-8, or a damaged compressed file; the message says where. Or it is larger than
            compressed text can be, and made to exhaust the memory.
        OSError: it can't be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started = 0, False
    compressed = path.suffix.lower() in OPENERS
    limit = max(FREE, MAX_RATIO * path.stat().st_size) if compressed else math.inf
    try:
        with open_binary(path) as file:
            while True:
                block = file.read(block_size)
                if b"\0" in block:
                    raise _not_text(path, offset + block.index(0), 0, "text has no NUL bytes")
                waiting = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
                yield text if started else text.removeprefix("\ufeff")
                started = started or bool(text)
                offset += len(block)
                if offset > limit:
                    raise LongscanError(
                        f"{path}: expected at most {limit:,} bytes of text in a compressed file of this "
                        "size, got more. If it is meant to be so, decompress it first."
                    )
                if not block:
                    return
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise _not_text(path, offset - waiting + error.start, byte, error.reason) from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise LongscanError(
            f"{path} is damaged or not a {path.suffix} file ({error}). Fetch it again."
        ) from error


def _not_text(path: Path, offset: int, byte: int, reason: str) -> LongscanError:
    return LongscanError(
        f"{path} is not UTF-8 text: byte 0x{byte:02X} at offset {offset:,} ({reason}). If it is text in "
        "another encoding: iconv -f CODE -t UTF-8, with CODE UTF-16, GB18030 (Chinese) or CP1252 (Europe)."
    )


def iter_lines(path: Path, block_size: int = BLOCK) -> Iterator[str]:
    r"""Yield the lines of a file.

    Args:
        path: see `read_text`; lines end with "\n" and nothing else.
        block_size: see `read_text`.

    Yields:
        The lines without their ends; the last one is the text after the last "\n", possibly empty.

    Raises:
        LongscanError: as `read_text`; or a line is too long.
        OSError: the file can't be read.
    """
    parts: list[str] = []
    number, size = 1, 0
    for chunk in read_text(path, block_size):
        first, *others = chunk.split("\n")
        parts.append(first)
        size += len(first)
        if size > MAX_LINE:
            raise LongscanError(
                f"{path}, line {number:,}: expected at most {MAX_LINE:,} characters, got more. "
                "Cut it into several lines, or give running text as .txt."
            )
        for line in others:
            yield "".join(parts)
            parts, size, number = [line], len(line), number + 1
    yield "".join(parts)
