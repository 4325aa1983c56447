"""Text files as documents, and documents split into training and validation text.

Files are plain text, Markdown or JSON lines, also compressed, and strictly UTF-8. They are read in pieces of
about a megabyte, so a corpus may be larger than the memory.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

from longscan.core.random import RandomStream
from longscan.data.archives import is_hidden
from longscan.data.text_files import iter_lines, read_text, text_kind
from longscan.errors import LongscanError, UsageError

__all__ = [
    "Corpus",
    "Paths",
    "Piece",
    "find_files",
    "iter_documents",
    "iter_pieces",
    "split",
    "training_text",
]

PIECE_SIZE = 2**20  # characters; a document longer than two comes in several pieces
JSONL = (".jsonl", ".json-lines", ".ndjson")
SUFFIXES = (".txt", ".md", ".text", *JSONL)

Paths: TypeAlias = str | Path | Iterable[str | Path]


class Piece(NamedTuple):
    """A document, or the next part of one."""

    text: str
    ends: bool  # the document ends here


def find_files(paths: Paths) -> list[Path]:
    """Return the text files that paths stand for.

    Args:
        paths: files, taken as they are, and folders, searched in depth and in the order of names for .txt,
            .md, .text and .jsonl, each also with .gz or .xz behind it; hidden entries are left out.

    Returns:
        The files.

    Raises:
        LongscanError: a path does not exist, or a folder holds no text.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.exists():
            raise LongscanError(f"no such file or folder: {path}")
        if not path.is_dir():
            files.append(path)
            continue
        visible = [file for file in sorted(path.rglob("*")) if not is_hidden(file.relative_to(path))]
        inside = [file for file in visible if file.is_file()]
        texts = [file for file in inside if text_kind(file) in SUFFIXES]
        if not texts:
            kinds = Counter(file.suffix or "without suffix" for file in inside).most_common(4)
            there = ", ".join(f"{count} {kind}" for kind, count in kinds) or "nothing"
            raise LongscanError(
                f"no text in {path}: found {there}. Expected .txt, .md, .text or .jsonl in UTF-8, "
                "also compressed as .gz or .xz; a file with another name can be given by itself."
            )
        files += texts
    if not files:
        raise UsageError("no text given: name at least one file or folder.")
    return files


def iter_pieces(
    paths: Paths, *, separator: str | None = None, field: str = "text", piece_size: int = PIECE_SIZE
) -> Iterator[Piece]:
    """Yield documents in pieces of bounded size, for texts larger than the memory.

    A text file is one document unless `separator` divides it; each line of a .jsonl file is one. Long
    documents are cut at word boundaries, preferably before a line break, so the pieces give the same tokens
    as the whole. Documents of only white space and byte order marks are dropped; everything else is
    unchanged.

    Args:
        paths: files and folders, see `find_files`.
        separator: what stands between the documents of a text file; it belongs to neither.
        field: where the objects of .jsonl lines hold their text.
        piece_size: characters of a piece, about, and bytes read at a time.

    Yields:
        The pieces in order.

    Raises:
        LongscanError: no text, not UTF-8, a bad line, or a damaged compressed file; the message says where.
        UsageError: an empty separator.
    """
    if separator == "":
        raise UsageError("separator: expected the text that stands between documents, got nothing.")
    files, empty = find_files(paths), True
    for file in files:
        for piece in _pieces(file, separator, field, piece_size):
            empty = False
            yield piece
    if empty:
        names = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        raise LongscanError(f"no text in {names}: empty, or only white space.")


def iter_documents(
    paths: Paths, *, separator: str | None = None, field: str = "text", piece_size: int = PIECE_SIZE
) -> Iterator[str]:
    """Yield whole documents, one in memory at a time; arguments and errors as `iter_pieces`."""
    parts = []
    for text, ends in iter_pieces(paths, separator=separator, field=field, piece_size=piece_size):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


class Corpus:
    """The training text and the validation text.

    Args:
        paths: files and folders, see `find_files`.
        valid_paths: validation files; those also found under `paths` are not trained on.
        valid_fraction: without validation files, the fraction of the text to hold out; may be 0.
        separator: what stands between the documents of a text file; None makes each file one document.
        piece_size: see `iter_pieces`.

    Raises:
        LongscanError: no text there, or none left to train on.
        UsageError: an impossible fraction.
    """

    def __init__(
        self,
        paths: Paths,
        valid_paths: Paths | None = None,
        valid_fraction: float = 0.05,
        separator: str | None = None,
        piece_size: int = PIECE_SIZE,
    ) -> None:
        if not 0 <= valid_fraction < 1:
            raise UsageError(f"valid_fraction: expected at least 0 and below 1, got {valid_fraction}.")
        self.valid = find_files(valid_paths) if valid_paths else []
        held_out = {file.resolve() for file in self.valid}
        self.train = [file for file in find_files(paths) if file.resolve() not in held_out]
        if not self.train:
            raise LongscanError("no text left to train on: every file is held out for validation.")
        self.valid_fraction = 0.0 if self.valid else valid_fraction
        self.separator, self.piece_size = separator, piece_size

    @cached_property
    def sizes(self) -> list[array[int]]:
        """The bytes of each document of `train` and of `valid`.

        This reads all text, which finds every error before a long computation begins.
        """
        sizes = []
        for files in (self.train, self.valid):
            sizes.append(array("q", [0]))
            for text, ends in self._pieces(files):
                sizes[-1][-1] += len(text.encode())
                if ends:
                    sizes[-1].append(0)
            sizes[-1].pop()
        return sizes

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield all pieces once, in order.

        To hold out a fraction, documents are drawn at random (always the same ones) until one does not fit;
        if less than half of the fraction is filled by then, the end of that document fills it.

        Yields:
            "train" or "valid", and a piece.
        """
        sizes, total = self.sizes[0], sum(self.sizes[0])
        share = max(0, min(math.ceil(self.valid_fraction * total), total - 1))
        left, held, torn = share, set(), -1
        for number in RandomStream(0, 0).permutation(len(sizes)).tolist():
            if sizes[number] > left:
                torn = number if left > share // 2 else -1
                break
            held.add(number)
            left -= sizes[number]
        number = done = 0
        for piece in self._pieces(self.train):
            size = len(piece.text.encode())
            cut = sizes[number] - left  # where the held-out end begins, in the document that is torn
            if number in held or (number == torn and done > cut):
                yield "valid", piece
            elif number == torn and done + size > cut:
                head, tail = _tear(piece.text, cut - done, left)
                yield "train", Piece(head, ends=True)
                yield "valid", Piece(tail, ends=piece.ends)
            else:
                yield "train", piece
            number, done = (number + 1, 0) if piece.ends else (number, done + size)
        for piece in self._pieces(self.valid):
            yield "valid", piece

    def _pieces(self, files: list[Path]) -> Iterator[Piece]:
        """Yield the pieces of files, of which there may be none."""
        if files:
            yield from iter_pieces(files, separator=self.separator, piece_size=self.piece_size)


def training_text(
    paths: Paths,
    *,
    valid_paths: Paths | None = None,
    valid_fraction: float = 0.05,
    separator: str | None = None,
) -> Iterator[str]:
    """Yield only the training text, to train a tokenizer on.

    Args:
        paths: files and folders; for this and the rest see `Corpus`.
        valid_paths: validation files.
        valid_fraction: without validation files, the fraction of the text to hold out.
        separator: what stands between the documents of a text file.

    Yields:
        Pieces of text, cut where words end.
    """
    corpus = Corpus(paths, valid_paths, valid_fraction, separator)
    yield from (piece.text for name, piece in corpus.pieces() if name == "train")


def _pieces(file: Path, separator: str | None, field: str, size: int) -> Iterator[Piece]:
    if text_kind(file) in JSONL:
        for text in _jsonl(file, field, size):
            yield from _cut([text], None, size)
    else:
        yield from _cut(read_text(file, size), separator, size)


def split(text: str, piece_size: int = PIECE_SIZE) -> Iterator[str]:
    """Yield a long text in pieces, cut at word boundaries as by `iter_pieces`.

    Args:
        text: of any length; up to twice the piece size it is one piece.
        piece_size: characters of a piece, about.

    Yields:
        Its pieces, which together are the text.
    """
    if len(text) <= 2 * piece_size:
        yield text
    else:
        yield from (piece.text for piece in _cut([text], None, piece_size))


def _cut(chunks: Iterable[str], separator: str | None, size: int) -> Iterator[Piece]:
    """Yield the documents of a stream of text, long ones in pieces."""
    buffer, opened = "", False
    for chunk in chunks:
        buffer += chunk
        if separator:
            *complete, buffer = buffer.split(separator)
            for text in complete:
                if opened or text.strip():
                    yield Piece(text, ends=True)
                opened = False
        start = 0
        while len(buffer) - start > 2 * size:  # keep a piece, which may hold half of a separator
            end = _break(buffer, start, start + size)
            yield Piece(buffer[start:end], ends=False)
            start, opened = end, True
        buffer = buffer[start:]
    if opened or buffer.strip():
        yield Piece(buffer, ends=True)


def _break(text: str, start: int, end: int) -> int:
    """Return the last index in text[start:end] at which a line, or else a word, ends."""
    for space in "\n ":
        index = text.rfind(space, start, end)
        if index > start and (line := text[start:index].rstrip()):
            return start + len(line)
    return end


def _jsonl(path: Path, field: str, block_size: int) -> Iterator[str]:
    """Yield the text of each line."""
    for number, line in enumerate(iter_lines(path, block_size), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = (
                f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise LongscanError(f"{path}:{number}: not JSON ({what}); expected an object a line.") from error
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            got = f"the fields {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
            raise LongscanError(f'{path}:{number}: expected {{"{field}": "..."}}, got {got[:200]}.')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LongscanError(
                f"{path}:{number}: half of a surrogate pair in {field!r} ({error})."
            ) from error
        yield text


def _tear(text: str, offset: int, reach: int) -> tuple[str, str]:
    """Return a text split at a byte offset, or at the start of that line if at most `reach` bytes before."""
    raw = text.encode()
    line = raw.rfind(b"\n", max(0, offset - reach), offset)
    offset = line + 1 if line >= 0 else offset
    while raw[offset] & 0xC0 == 0x80:  # inside a character
        offset -= 1
    return raw[:offset].decode(), raw[offset:].decode()
