"""Signals: WAV, CSV and npy files, a piece at a time, and a few synthetic ones to test with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longscan.core.config import nearest
from longscan.data.archives import map_npy
from longscan.data.wav import Array, wav_layout, wav_reader
from longscan.errors import LongscanError

__all__ = ["TESTS", "Signal", "Trace", "make_signal", "open_signal", "white_noise"]


@dataclass
class Trace:
    """A long signal as wide as a figure: the lowest and the highest sample of each column.

    Attributes:
        seconds: (columns,) where each begins.
        low: (columns,), NaN where nothing is known.
        high: likewise.
    """

    seconds: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def empty(cls, length: int, rate: float, columns: int = 1200) -> Trace:
        """Return an empty trace for a signal.

        Args:
            length: its samples.
            rate: samples per second.
            columns: the most columns.
        """
        columns = min(columns, length)
        starts = np.arange(columns) * length / columns / rate
        return cls(starts, np.full(columns, np.nan), np.full(columns, np.nan))

    def add(self, begin: int, samples: Tensor, length: int) -> None:
        """Update the columns with samples.

        Args:
            begin: index of the first one in the signal.
            samples: (n,).
            length: of the whole signal.
        """
        columns = len(self.low)
        column = np.arange(begin, begin + len(samples)) * columns // length
        values = samples.double().numpy()
        first, at = np.unique(column, return_index=True)
        self.low[first] = np.fmin(self.low[first], np.minimum.reduceat(values, at))
        self.high[first] = np.fmax(self.high[first], np.maximum.reduceat(values, at))


SUFFIXES = (".wav", ".csv", ".tsv", ".txt", ".npy")

HEADERS, MISSING = 2, ("", "na", "n/a", "nan", "null", "none")  # lines above the numbers; no number

MAX_LINE = 1 << 22  # characters of a line of a table


@dataclass(frozen=True)
class Signal:
    """Samples of one channel, read on demand.

    Attributes:
        name: what it is called.
        rate: samples per second.
        length: samples.
        read: from (begin, end) to those samples, float32.
        piece_size: samples in memory at a time when the whole signal is read.
    """

    name: str
    rate: float
    length: int
    read: Callable[[int, int], Array]
    piece_size: int = 1 << 18

    def piece(self, begin: int, end: int) -> Tensor:
        """Return samples begin to end, (end - begin,) float32.

        Raises:
            LongscanError: they are not all finite numbers, or the file is cut short.
        """
        samples = torch.from_numpy(self.read(begin, end))
        wrong = (~samples.isfinite()).nonzero()
        if len(wrong):
            index = begin + int(wrong[0])
            raise LongscanError(
                f"{self.name}: sample {index:,} ({index / self.rate:.3f} s) is {float(samples[wrong[0]])}. "
                "Cut the signal there, or fill the gap."
            )
        return samples

    def pieces(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield the start and the samples of each piece; only one is in memory at a time.

        Args:
            start: the first sample.
        """
        for begin in range(start, self.length, self.piece_size):
            yield begin, self.piece(begin, min(begin + self.piece_size, self.length))


def open_signal(
    source: str | Path,
    *,
    channel: int = 0,
    rate: float | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Signal:
    """Return the signal of a file, or a test signal.

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
            layout = wav_layout(file, name)
        if rate not in (None, layout.rate):
            raise LongscanError(f"{name}: the file says {layout.rate:,} samples per second, not {rate:g}.")
        _check_channel(name, channel, layout.channels)
        return Signal(name, float(layout.rate), layout.frames, wav_reader(path, layout, channel))
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
    """Return band-limited white noise that starts at 0.

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
            math.sin(9 * centre) * torch.exp(-(((t - centre) / 0.02) ** 2))
            for centre in (0.1, 0.35, 0.6, 0.62, 0.9)
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
    """Return a test signal: band-limited white noise, a chirp, steps, bursts.

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
