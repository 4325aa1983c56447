"""WAV files, a piece at a time: integers of 8 to 32 bits and floats."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from longscan.errors import LongscanError

__all__ = ["Array", "read_wav", "wav_layout", "wav_reader"]


Array = NDArray[np.float32]


# --- WAV ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wav:
    """Where the samples of a WAV file are, and how they are written."""

    channels: int
    rate: int
    kind: str  # of NumPy, or "<i3"
    begin: int
    frames: int

    @property
    def width(self) -> int:
        """Bytes of a frame: a sample of each channel."""
        return self.channels * int(self.kind[-1])


_WAV_KINDS = {(1, 8): "<u1", (1, 16): "<i2", (1, 24): "<i3", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}


def read_wav(source: Path | BinaryIO, name: str) -> tuple[Array, int]:
    """Read all of a WAV file: 8, 16, 24 or 32 bit integers, 32 or 64 bit floats.

    Args:
        source: the file.
        name: what errors call it.

    Returns:
        samples: (n_samples, n_channels), integers scaled to [-1, 1).
        rate: samples per second.

    Raises:
        LongscanError: it is no such file, or it is cut short.
        OSError: it cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return read_wav(file, name)
    layout = wav_layout(source, name)
    return _wav_frames(source, layout, name, 0, layout.frames), layout.rate


def wav_layout(file: BinaryIO, name: str) -> _Wav:
    """Find the format and the samples among the chunks of a RIFF file."""
    head = file.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise LongscanError(
            f"{name}: expected a WAV file, found something else. Convert it to 16 bit PCM WAV."
        )
    fields: tuple[int, ...] = ()
    while len(head := file.read(8)) == 8:
        chunk, size = head[:4], struct.unpack("<I", head[4:])[0]
        if chunk == b"data":
            break
        body = file.read(size + size % 2) if chunk == b"fmt " else b""
        if not body:
            file.seek(size + size % 2, 1)
        elif len(body) >= 16:
            fields = struct.unpack("<HHIIHH", body[:16])
            if (
                fields[0] == 0xFFFE and len(body) >= 26
            ):  # extensible: the format is the start of a longer name
                fields = (struct.unpack("<H", body[24:26])[0], *fields[1:])
    else:
        raise LongscanError(f"{name}: the WAV file has no samples. Was it cut short?")
    if not fields:
        raise LongscanError(f"{name}: the WAV file does not say how its samples are written.")
    code, channels, rate, *_, bits = fields
    if (code, bits) not in _WAV_KINDS:
        raise LongscanError(
            f"{name}: expected PCM of 8, 16, 24 or 32 bits or floats, found format {code} of {bits} bits. "
            "Convert it to 16 bit PCM WAV."
        )
    if not channels or not rate:
        raise LongscanError(
            f"{name}: the WAV file is damaged: {channels} channels, {rate} samples per second."
        )
    begin, width = file.tell(), channels * bits // 8
    present = file.seek(0, 2) - begin
    if size in (0, 0xFFFFFFFF):  # what a program writes that streams and does not know the end
        size = present
    if present < size - size % width:
        raise LongscanError(
            f"{name} is shorter than its header says (expected {size:,} bytes of samples, found "
            f"{present:,}). It was probably cut: copy it again."
        )
    if size < width:
        raise LongscanError(f"{name}: the WAV file has no samples.")
    return _Wav(channels, rate, _WAV_KINDS[code, bits], begin, size // width)


def _wav_frames(file: BinaryIO, wav: _Wav, name: str, begin: int, end: int) -> Array:
    """Read frames (end - begin, channels)."""
    file.seek(wav.begin + begin * wav.width)
    data = file.read((end - begin) * wav.width)
    if len(data) != (end - begin) * wav.width:
        raise LongscanError(f"{name} got shorter while it was read.")
    if wav.kind == "<i3":  # three bytes become the upper three of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    else:
        samples = np.frombuffer(data, wav.kind).astype(np.float32)
        if wav.kind[1] == "u":
            samples = samples / 128 - 1
        elif wav.kind[1] == "i":
            samples /= 2.0 ** (8 * int(wav.kind[-1]) - 1)
    return samples.reshape(-1, wav.channels)


def wav_reader(path: Path, wav: _Wav, channel: int) -> Callable[[int, int], Array]:
    """Return what reads the frames begin to end of one channel, as (end - begin,) samples."""

    def read(begin: int, end: int) -> Array:
        with path.open("rb") as file:
            return np.ascontiguousarray(_wav_frames(file, wav, str(path), begin, end)[:, channel])

    return read
