"""The header of a GGUF file, of which every number is compared with the file before it is used.

The layout: magic, version, counts; metadata, which are keys with typed values; a name, shape, type and offset
per tensor; the tensors, aligned. A file may come from anywhere, so no length is used before it is known to
lie inside the file, nothing is allocated by what a length says, and the products are Python's, which do not
wrap.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from longscan.errors import LongscanError

__all__ = ["TYPES", "Header", "TensorInfo", "Value", "check", "short"]

Value: TypeAlias = "bool | int | float | str | list[str] | array[Any]"

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 2**26  # bytes of metadata and tensor descriptions; large vocabularies take 2**24
MAX_KEYS = MAX_TENSORS = 2**16
MAX_ARRAY = 2**21  # elements; a list of merges has one per token
MAX_NAME = 2**16 - 1  # bytes, as the format says for keys
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16
AGAIN = "delete the file and fetch it again."

# number in the file -> name, weights per block, bytes per block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

# number in the file -> how struct and array call a scalar
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, BOOL = 8, 9, 7


@dataclass(frozen=True)
class TensorInfo:
    """The type, shape and bytes of a tensor.

    Attributes:
        type: a name of `TYPES`.
        shape: rows first, as torch has it; the file has it the other way round.
        begin: bytes from the start of the file.
        n_bytes: its size.
    """

    type: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensor descriptions of a GGUF file.

    Attributes:
        metadata: by key; arrays of text are lists, others are of the standard library's type.
        tensors: by name, each inside the file, none over another.
    """

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def check(path: str | Path) -> Header:
    """Return the header of a GGUF file that may be truncated, damaged or hostile.

    Args:
        path: the file.

    Returns:
        The header, consistent with the file.

    Raises:
        LongscanError: the file is not GGUF, or contradicts itself.
        OSError: it cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        if start == b"version ":
            raise LongscanError(f"{path} is a Git LFS pointer, not a model: run `git lfs pull` beside it.")
        if start[:4] != MAGIC:
            raise LongscanError(f"{path} is not a GGUF file (it begins with {start[:4]!r}): {AGAIN}")
        if size < 24:
            raise LongscanError(f"{path} is shorter than any GGUF file ({size} bytes): {AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data, size).parse()


class _Parser:
    """Walks through the header once; `at` never passes `size`."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at = 4

    def parse(self) -> Header:
        version = self.scalar("I", "the version")
        if version not in VERSIONS:
            big_endian = version & 0xFFFF == 0 and version != 0
            reason = "is of a big-endian machine" if big_endian else f"has version {version}"
            raise LongscanError(
                f"{self.path} {reason}, expected version 2 or 3, little-endian: convert the model again."
            )
        n_tensors = self.count("tensors", MAX_TENSORS, 24)
        n_keys = self.count("keys", MAX_KEYS, 13)
        metadata: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self.text("a key", MAX_NAME)
            if key in metadata:
                self.refuse(f"the key {short(key)} is there twice")
            metadata[key] = self.value(short(key))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.refuse(f"general.alignment is {short(alignment)}, expected a power of two")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            name = self.text("the name of a tensor", MAX_NAME)
            if name in tensors:
                self.refuse(f"the tensor {short(name)} is there twice")
            tensors[name] = self.tensor(name, alignment)
        begin = -(-self.at // alignment) * alignment
        tensors = {
            name: TensorInfo(info.type, info.shape, begin + info.begin, info.n_bytes)
            for name, info in tensors.items()
        }
        self.check_places(tensors)
        return Header(metadata, tensors)

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """Read how many of something follow, each of which takes some bytes at least."""
        count: int = self.scalar("Q", f"the number of {what}")
        if count > most:
            self.refuse(f"it claims {count:,} {what}, expected at most {most:,}")
        if count * least_bytes > self.size - self.at:
            self.cut(f"{count:,} {what}", self.at + count * least_bytes)
        return count

    def value(self, key: str) -> Value:
        """Read one value of the metadata; the key is for the error."""
        kind = self.scalar("I", f"the type of {key}")
        if kind == STRING:
            return self.text(key, MAX_HEADER)
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], key)  # type: ignore[no-any-return]
        if kind != ARRAY:
            self.refuse(f"{key} has the unknown type {kind}")
        item = self.scalar("I", f"the type of {key}")
        if item != STRING and item not in SCALARS:
            what = "an array of arrays" if item == ARRAY else f"an array of the unknown type {item}"
            self.refuse(f"{key} is {what}")
        if item == STRING:
            return [self.text(key, MAX_HEADER) for _ in range(self.count(f"elements in {key}", MAX_ARRAY, 8))]
        code = SCALARS[item]
        width = struct.calcsize(code)
        n_bytes = self.count(f"elements in {key}", MAX_ARRAY, width) * width
        if item == BOOL and self.data[self.at : self.at + n_bytes].translate(None, b"\0\1"):
            self.refuse(f"{key} holds bytes that are neither true nor false")
        values = array("B" if item == BOOL else code, self.take(n_bytes, key))
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """Read the description of a tensor; its place is still relative to the first one's."""
        n_dims = self.scalar("I", f"the dimensions of {name}")
        if not 1 <= n_dims <= MAX_DIMS:
            self.refuse(f"{short(name)} has {n_dims:,} dimensions, expected 1 to {MAX_DIMS}")
        dims = [self.scalar("Q", f"the shape of {name}") for _ in range(n_dims)]
        kind, begin = self.scalar("I", f"the type of {name}"), self.scalar("Q", f"the place of {name}")
        if kind not in TYPES:
            self.refuse(f"{short(name)} has the unknown type {kind}", "It may be newer than this longscan.")
        type_name, block, block_bytes = TYPES[kind]
        if 0 in dims:
            self.refuse(f"{short(name)} is empty: its shape is {dims}")
        if dims[0] % block:
            self.refuse(f"{short(name)} has rows of {dims[0]:,}, expected a multiple of {block}: {type_name}")
        if begin % alignment:
            self.refuse(f"{short(name)} begins at {begin:,}, expected a multiple of {alignment}")
        n_bytes = math.prod(dims) // block * block_bytes
        return TensorInfo(type_name, tuple(reversed(dims)), begin, n_bytes)

    def check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Raise unless the tensors lie inside the file, side by side."""
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
            if info.begin < end:
                self.refuse(f"{short(name)} begins inside another tensor")
            end = info.begin + info.n_bytes
        if end > self.size:
            self.cut("the last tensor", end)

    def text(self, what: str, most: int) -> str:
        """Read a string."""
        length = self.scalar("Q", what)
        if length > most:
            self.refuse(f"{short(what)} is {length:,} bytes long, expected at most {most:,}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            self.refuse(f"{short(what)} is not UTF-8")

    def scalar(self, code: str, what: str) -> Any:
        """Read a number."""
        data = self.take(struct.calcsize(code), what)
        if code == "?" and data[0] > 1:
            self.refuse(f"{short(what)} is {data[0]}, expected 0 or 1")
        return struct.unpack("<" + code, data)[0]

    def take(self, n_bytes: int, what: str) -> bytes:
        """Move on by some bytes that must be there."""
        end = self.at + n_bytes
        if end > self.size:
            self.cut(what, end)
        if end > MAX_HEADER:
            self.refuse(f"its header is longer than {MAX_HEADER:,} bytes")
        data = self.data[self.at : end]
        self.at = end
        return data

    def cut(self, what: str, expected: int) -> NoReturn:
        raise LongscanError(
            f"{self.path} is shorter than its header says: {short(what)} would end at byte {expected:,}, "
            f"the file has {self.size:,}.\nThe download was probably cut, or the file is damaged: {AGAIN}"
        )

    def refuse(self, reason: str, remedy: str = "") -> NoReturn:
        raise LongscanError(
            f"{self.path} is damaged or not meant well: {reason}. {remedy or AGAIN.capitalize()}"
        )


def short(value: object) -> str:
    """Return a short printable quotation of a value from a file.

    Args:
        value: of any type.

    Returns:
        At most 80 characters.
    """
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
