"""Signals: WAV, CSV and npy files, a piece at a time; a few to try things on; other sampling rates."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from longscan.archives import map_npy
from longscan.config import nearest
from longscan.errors import LongscanError

__all__ = ["TESTS", "Signal", "make_signal", "open_signal", "read_wav", "resample", "white_noise"]

Array = NDArray[np.float32]
SUFFIXES = (".wav", ".csv", ".tsv", ".txt", ".npy")
HEADERS, MISSING = 2, ("", "na", "n/a", "nan", "null", "none")  # lines above the numbers; no number
MAX_LINE = 1 << 22  # characters of a line of a table
_PIECE = 1 << 18  # samples read at a time when a whole signal is looked at


@dataclass(frozen=True)
class Signal:
    """Samples of one channel that are read when they are needed.

    Attributes:
        name: what it is called.
        rate: samples per second.
        length: samples.
        read: from (begin, end) to those samples, float32.
    """

    name: str
    rate: float
    length: int
    read: Callable[[int, int], Array]

    def piece(self, begin: int, end: int) -> Tensor:
        """Return samples begin to end, (end - begin,) float32.

        Raises:
            LongscanError: they are not all finite numbers, or the file is cut short.
        """
        samples = torch.from_numpy(self.read(begin, end))
        wrong = (~samples.isfinite()).nonzero()
        if len(wrong):
            place = begin + int(wrong[0])
            raise LongscanError(
                f"{self.name}: sample {place:,} ({place / self.rate:.3f} s) is {float(samples[wrong[0]])}. "
                "Cut the signal there, or fill the gap."
            )
        return samples

    def pieces(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield where each piece begins, and its samples; there is never more than one in memory.

        Args:
            start: the first sample.
        """
        for begin in range(start, self.length, _PIECE):
            yield begin, self.piece(begin, min(begin + _PIECE, self.length))


def open_signal(
    source: str | Path,
    *,
    channel: int = 0,
    rate: float | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Signal:
    """Open a file, or make a test signal.

    Args:
        source: a .wav, .csv, .tsv, .txt or .npy file, or a key of TESTS. Above the numbers of a table
            may stand comments (#), blank lines, and a line each of names and of units.
        channel: which one of several, from 0; in tables a column.
        rate: samples per second where the file does not say, 1 if nobody does.
        length: samples of a test signal.
        seed: of a random one.

    Returns:
        The signal. A WAV or npy file is not read yet, whatever its size.

    Raises:
        LongscanError: the file is none of these, is damaged, or has no such channel.
        OSError: it cannot be read.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise LongscanError(f"{source}: expected a rate above 0 samples per second, got {rate:g}.")
    if str(source) in TESTS:
        return make_signal(str(source), length or 10_000, rate or 1000.0, seed)
    path, name = Path(source), str(source)
    if not path.exists() and not path.suffix:
        raise LongscanError(
            f"{name}: expected a {', '.join(SUFFIXES)} file, or one of {', '.join(TESTS)}"
            f"{nearest(name, TESTS)}"
        )
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise LongscanError(
            f"{name}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix!r}."
        )
    if kind == ".wav":
        with path.open("rb") as file:
            layout = _wav_layout(file, name)
        if rate not in (None, layout.rate):
            raise LongscanError(f"{name}: the file says {layout.rate:,} samples per second, not {rate:g}.")
        _check_channel(name, channel, layout.channels)
        return Signal(name, float(layout.rate), layout.frames, _wav_reader(path, layout, channel))
    table = _open_npy(path) if kind == ".npy" else _read_table(path)
    _check_channel(name, channel, table.shape[1])
    if not len(table):
        raise LongscanError(f"{name}: expected samples, found none.")
    return Signal(
        name,
        rate or 1.0,
        len(table),
        lambda begin, end: np.array(table[begin:end, channel], dtype=np.float32),
    )


def _check_channel(name: str, channel: int, channels: int) -> None:
    if not 0 <= channel < channels:
        raise LongscanError(f"{name}: expected a channel from 0 to {channels - 1}, got {channel}.")


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
    layout = _wav_layout(source, name)
    return _wav_frames(source, layout, name, 0, layout.frames), layout.rate


def _wav_layout(file: BinaryIO, name: str) -> _Wav:
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


def _wav_reader(path: Path, wav: _Wav, channel: int) -> Callable[[int, int], Array]:
    def read(begin: int, end: int) -> Array:
        with path.open("rb") as file:
            return np.ascontiguousarray(_wav_frames(file, wav, str(path), begin, end)[:, channel])

    return read


# --- tables -------------------------------------------------------------------------------------------------


def _open_npy(path: Path) -> NDArray[Any]:
    """Map an array (length,) or (length, channels) into memory."""
    table = map_npy(path)
    if table.dtype.kind not in "iuf" or table.ndim not in (1, 2):
        raise LongscanError(f"{path}: expected an array of numbers (length,) or (length, channels).")
    return table.reshape(len(table), -1) if table.size else table.reshape(0, 1)


def _read_table(path: Path) -> Array:
    """Read numbers in lines, below comments and up to two lines of names and units."""
    rows: list[list[float]] = []
    headers = 0
    for number, line in _table_lines(path):
        cells = [cell.strip() for cell in _cells(line, path.suffix.lower() == ".csv")]
        try:
            row = [math.nan if cell.lower() in MISSING else float(cell) for cell in cells]
        except ValueError as error:
            headers += 1
            if not rows and headers <= HEADERS:
                continue
            raise LongscanError(f"{path}, line {number}: expected numbers ({error}).") from error
        if not rows and not headers and cells[0] == "" and cells[1:] == [*map(str, range(len(cells) - 1))]:
            headers += 1  # ",0", as pandas calls the columns behind its index
            continue
        if rows and len(row) != len(rows[0]):
            raise LongscanError(f"{path}, line {number}: expected {len(rows[0])} columns, got {len(row)}.")
        rows.append(row)
    return np.array(rows, np.float32).reshape(len(rows), -1 if rows else 1)


def _table_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a table with their numbers, without blank ones and comments."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), 1):
            if len(line) == MAX_LINE:
                raise LongscanError(
                    f"{path}, line {number}: expected less than {MAX_LINE:,} characters, a step a line."
                )
            if line.strip() and not line.lstrip().startswith("#"):
                yield number, line.rstrip().lstrip(" ")


def _cells(line: str, commas: bool) -> list[str]:
    """Divide a line at commas; or at tabs if it has some, else at spaces."""
    return line.split("," if commas else "\t" if "\t" in line else None)


# --- signals to try things on -------------------------------------------------------------------------------


def white_noise(
    length: int, cycles: float, rms: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Make noise that is white up to a frequency and has nothing above, and starts at 0.

    Args:
        length: samples.
        cycles: of the highest frequency over the whole length.
        rms: root of the mean square.
        generator: randomness; torch's global one if None.

    Returns:
        (length,) float32.
    """
    spectrum = torch.zeros(length // 2 + 1, dtype=torch.complex128)
    highest = min(int(cycles), len(spectrum) - 1)
    spectrum[1 : highest + 1] = torch.randn(highest, dtype=torch.complex128, generator=generator)
    noise: Tensor = torch.fft.irfft(spectrum, length)
    noise *= rms / noise.square().mean().sqrt().clamp(min=1e-30)
    return (noise - noise[0]).float()


def _noise(t: Tensor, generator: torch.Generator) -> Tensor:
    return white_noise(len(t), 20, generator=generator)


def _chirp(t: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * math.pi * (t + 14 * t**2)).sin()


def _steps(t: Tensor, generator: torch.Generator) -> Tensor:
    levels = torch.rand(8, generator=generator, dtype=t.dtype) * 2 - 1
    return levels[(t * 8).long().clamp(max=7)]


def _bursts(t: Tensor, generator: torch.Generator) -> Tensor:
    return sum(
        (
            math.sin(9 * place) * torch.exp(-(((t - place) / 0.02) ** 2))
            for place in (0.1, 0.35, 0.6, 0.62, 0.9)
        ),
        start=torch.zeros_like(t),
    )


#: name -> from the times in [0, 1) and a generator to the samples
TESTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise,
    "chirp": _chirp,
    "steps": _steps,
    "bursts": _bursts,
}


def make_signal(name: str, length: int, rate: float, seed: int = 0) -> Signal:
    """Make a test signal: band-limited white noise, a chirp, steps, bursts.

    Args:
        name: a key of TESTS.
        length: samples; what is shown does not depend on it, only how finely.
        rate: samples per second.
        seed: of what is random.

    Returns:
        The signal.
    """
    t = torch.arange(length, dtype=torch.float64) / length
    samples = TESTS[name](t, torch.Generator().manual_seed(seed)).float().numpy()
    return Signal(name, rate, length, lambda begin, end: samples[begin:end].copy())


# --- other rates --------------------------------------------------------------------------------------------


def resample(x: Tensor, old: int, new: int, zeros: int = 16) -> Tensor:
    """Change the sampling rate of a signal; what the new rate cannot carry is taken out first.

    Each new sample is a sum of old ones under a sinc in a Hann window: J. O. Smith, Digital Audio Resampling.

    Args:
        x: (..., length) float.
        old: its samples per second.
        new: those wanted.
        zeros: half width of the window, in zeros of the sinc.

    Returns:
        (..., ceil(length new / old)), in x's type.

    Raises:
        ValueError: a rate is no positive whole number.
    """
    if min(old, new) < 1:
        raise ValueError(f"rates: expected at least 1, got {old} and {new}")
    common = math.gcd(old, new)
    down, up = old // common, new // common
    if down == up:
        return x.clone()
    cutoff = min(1.0, up / down)  # as a part of the old rate's
    half = math.ceil(zeros / cutoff)
    # phase p of up places a new sample p down / up old samples behind the one it starts from
    offset = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    distance = torch.arange(-half, half + down + 1, dtype=torch.float64) - offset  # (up, taps)
    window = torch.where(distance.abs() < half, (math.pi * distance / (2 * half)).cos().square(), 0.0)
    taps = (cutoff * torch.sinc(cutoff * distance) * window).to(x)
    length = -(-x.shape[-1] * up // down)
    flat = x.reshape(-1, 1, x.shape[-1])
    padded = F.pad(flat, (half, half + 2 * down))
    y: Tensor = F.conv1d(padded, taps[:, None], stride=down)  # (rows, up, periods)
    return y.transpose(1, 2).reshape(len(flat), -1)[:, :length].reshape(*x.shape[:-1], length)
