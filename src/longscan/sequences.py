"""Labelled sequences: signals, rows of pixels and texts as bytes, read from files and put into batches."""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from longscan.errors import LongscanError, UsageError
from longscan.examples import Example, divide, number_labels, read_examples
from longscan.files import atomic_file
from longscan.signals import read_wav

__all__ = ["BYTES", "Sequences", "read_sequences"]

BYTES = 256  # tokens of a text that is read byte by byte
TARS, SOUND = (".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2"), ".wav"
LENGTHS = ("lengths", "len")  # what files call them


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of any lengths, and what is true of each.

    Attributes:
        values: (total, d_input) float32 of signals or (total,) int64 of tokens, one behind the other.
        lengths: (n,) int64.
        truth: (n,) int64 numbers of classes, or (n, n_outputs) float32.
        labels: names of the classes; none if numbers are to be told.
        names: (n,) what messages call each.
        rate: samples per second, if the files say so.
        times: (total,) float64 seconds, for series that are not sampled evenly.
    """

    values: np.ndarray
    lengths: np.ndarray
    truth: np.ndarray
    labels: tuple[str, ...]
    names: tuple[str, ...]
    rate: float | None = None
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def d_input(self) -> int:
        """Channels of a signal; 0 for tokens."""
        return 0 if self.values.ndim == 1 else int(self.values.shape[1])

    @property
    def n_outputs(self) -> int:
        """Classes, or numbers to be told."""
        return len(self.labels) or int(self.truth.shape[1])

    @property
    def rows(self) -> list[np.ndarray]:
        """Each sequence, (length, d_input) or (length,)."""
        return self._split(self.values)

    @property
    def gap(self) -> float | None:
        """Mean seconds from one step to the next, if there are times."""
        if self.times is None or not (gaps := int((self.lengths - 1).sum())):
            return None
        return float(sum(row[-1] - row[0] for row in self._split(self.times))) / gaps

    def changed(self, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Self:
        """Return sequences of other steps.

        Args:
            change: chooses among the rows of the values, and alike among those of the times.
        """

        def of(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[:0], *change(self._split(array))])

        times = None if self.times is None else of(self.times)
        return replace(self, values=of(self.values), lengths=_lengths(change(self.rows)), times=times)

    def select(self, numbers: Iterable[int]) -> Self:
        """Return some of them.

        Args:
            numbers: which, in the order they are to have.
        """
        numbers = list(numbers)
        return replace(
            self.changed(lambda rows: [rows[n] for n in numbers]),
            truth=self.truth[numbers],
            names=tuple(self.names[n] for n in numbers),
        )

    def divide(self, share: float) -> tuple[Self, Self]:
        """Hold some out, of each class the same share; see `examples.divide`.

        Args:
            share: of each class, rounded down.

        Returns:
            Those to train on and those held out.
        """
        kept, held = divide([Example(self._label(n), "", None, str(n)) for n in range(len(self))], share)
        return self.select(int(e.where) for e in kept), self.select(int(e.where) for e in held)

    def labelled(self, labels: Sequence[str]) -> Self:
        """Number the classes as a model does.

        Args:
            labels: what the model knows; none if it tells numbers.

        Raises:
            LongscanError: a label was not in the training data.
        """
        if bool(labels) != bool(self.labels):
            expected, got = ("labels", "numbers") if labels else ("numbers", "labels")
            raise LongscanError(f"{self.names[0]}: expected {expected} to tell, got {got}.")
        if not labels:
            return self
        examples = [Example(self._label(n), "", None, name) for n, name in enumerate(self.names)]
        return replace(self, truth=np.array(number_labels(examples, labels)), labels=tuple(labels))

    def thinned(self, factor: int) -> Self:
        """Return the same signals at a lower rate: of so many samples the first.

        Args:
            factor: old rate / new rate.
        """
        rate = None if self.rate is None else self.rate / factor
        return replace(self.changed(lambda rows: [row[::factor] for row in rows]), rate=rate)

    def low_passed(self, factor: int) -> Self:
        """Return the same signals without the frequencies that a lower rate has no room for.

        Args:
            factor: old rate / new rate.
        """
        reach = 16 * factor
        lags = np.arange(-reach, reach + 1)
        window = np.sinc(lags / factor) * np.hamming(len(lags))
        window /= window.sum()

        def smooth(row: np.ndarray) -> np.ndarray:
            channels = [np.convolve(channel, window)[reach : reach + len(row)] for channel in row.T]
            return np.stack(channels, 1).astype(row.dtype)

        return replace(self, values=np.concatenate([self.values[:0], *map(smooth, self.rows)]))

    def cut(self, room: int | None) -> Self:
        """Return the beginnings.

        Args:
            room: the most samples that stay; all if None.
        """
        if room is None or int(self.lengths.max(initial=0)) <= room:
            return self
        return self.changed(lambda rows: [row[:room] for row in rows])

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Put some into a batch.

        Args:
            numbers: which.

        Returns:
            x: (batch, longest, d_input) or (batch, longest), zero behind the shorter ones.
            lengths: (batch,).
            truth: (batch,) or (batch, n_outputs).
            times: (batch, longest) float64, if there are any.
        """
        ends = np.cumsum(self.lengths)
        lengths = self.lengths[list(numbers)]

        def pad(array: np.ndarray) -> Tensor:
            padded = np.zeros((len(lengths), lengths.max(), *array.shape[1:]), array.dtype)
            for row, number in zip(padded, numbers, strict=True):
                row[: self.lengths[number]] = array[ends[number] - self.lengths[number] : ends[number]]
            return torch.from_numpy(padded)

        truth = torch.from_numpy(self.truth[list(numbers)])
        times = None if self.times is None else pad(self.times)
        return pad(self.values), torch.from_numpy(lengths), truth, times

    def save(self, path: Path) -> None:
        """Write a .npz file, which `read_sequences` reads.

        Args:
            path: of the file.
        """
        arrays: dict[str, Any] = {
            "values": self.values,
            "lengths": self.lengths,
            "y": self.truth,
            "rate": self.rate or 0.0,
        } | ({} if self.times is None else {"times": self.times})
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, labels=np.array(self.labels, str), names=np.array(self.names, str), **arrays)

    def _split(self, array: np.ndarray) -> list[np.ndarray]:
        """Take apart what stands one behind the other."""
        return np.split(array, np.cumsum(self.lengths)[:-1])

    def _label(self, number: int) -> str:
        """Name what one of them is."""
        return self.labels[int(self.truth[number])] if self.labels else ""


def read_sequences(
    paths: Sequence[str | Path], *, split: str = "train", pattern: str | None = None, columns: str = "1,2"
) -> Sequences:
    """Read labelled sequences.

    Args:
        paths: any of
            .npz files of x, y and perhaps lengths and times: x is (n, seq_len, d_input) or (n, seq_len)
            floats, (n, seq_len) whole numbers for tokens, or (n, height, width) bytes for images; y is (n,)
            whole numbers or texts for classes, floats for numbers; times is (n, seq_len) seconds, for series
            that are not sampled evenly. With several parts: x_train, y_train, ...;
            folders or tars of .wav files, in a folder for each class or named LABEL_....wav; or one;
            tables or .jsonl of labelled texts, see `read_examples`, read as bytes.
        split: which part of a file is meant, if it has parts.
        pattern: a regular expression whose first group is the label in the path of a .wav file.
        columns: of a table of texts.

    Returns:
        The sequences, in order.

    Raises:
        LongscanError: a file is something else, or damaged, or holds NaN; files don't go together.
        UsageError: the pattern is no regular expression with a group.
        OSError: a file can't be read.
    """
    found = [_read(Path(path), split, pattern, columns) for path in paths]
    if not found:
        raise UsageError("nothing to read: name files of labelled sequences.")
    first = found[0]
    for other, path in zip(found, paths, strict=True):
        kinds = [
            (one.d_input, one.rate, one.times is None, bool(one.labels), one.truth.shape[1:])
            for one in (first, other)
        ]
        if kinds[0] != kinds[1]:
            raise LongscanError(
                f"{path}: expected {_kind(first)} as in {paths[0]}, got {_kind(other)}. Read them separately."
            )
    names = {label for one in found for label in one.labels}
    labels = tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))
    found = [one.labelled(labels) for one in found]
    times = [one.times for one in found if one.times is not None]
    return Sequences(
        values=np.concatenate([one.values for one in found]),
        lengths=np.concatenate([one.lengths for one in found]),
        truth=np.concatenate([one.truth for one in found]),
        labels=labels,
        names=tuple(name for one in found for name in one.names),
        rate=first.rate,
        times=np.concatenate(times) if times else None,
    )


def _read(path: Path, split: str, pattern: str | None, columns: str) -> Sequences:
    """Read one file or folder."""
    if path.is_dir() or path.name.endswith((*TARS, SOUND)):
        return _sounds(path, pattern)
    if path.suffix == ".npz":
        return _npz(path, split)
    examples = read_examples([path], columns)
    texts = [
        example.text if example.pair is None else f"{example.text}\t{example.pair}" for example in examples
    ]
    rows = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
    return _labelled(rows, [example.label for example in examples], [example.where for example in examples])


def _labelled(
    rows: Sequence[np.ndarray], labels: Sequence[str], names: Sequence[str], rate: float | None = None
) -> Sequences:
    """Put sequences with the names of their classes together."""
    known = tuple(sorted(set(labels)))
    truth = np.array([known.index(label) for label in labels])
    return Sequences(np.concatenate(rows), _lengths(rows), truth, known, tuple(names), rate)


def _lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the length of each sequence."""
    return np.array([len(row) for row in rows], np.int64)


def _kind(some: Sequences) -> str:
    """Say what kind of sequences they are."""
    what = f"signals of {some.d_input} channels" if some.d_input else "tokens"
    rate = f" at {some.rate:g} samples per second" if some.rate else ""
    times = ", each with its time," if some.times is not None else ""
    return f"{what}{rate}{times} with {'labels' if some.labels else f'{some.n_outputs} numbers'}"


# .npz


def _npz(path: Path, split: str) -> Sequences:
    """Read arrays."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise LongscanError(f"{path} is no .npz file of plain arrays ({error}).") from error
    if "values" in arrays:
        return _own(path, arrays)
    tail = "" if "x" in arrays else f"_{split}"
    if f"x{tail}" not in arrays or f"y{tail}" not in arrays:
        raise LongscanError(
            f"{path}: expected arrays x and y, or x_{split} and y_{split}; got {', '.join(sorted(arrays))}."
        )
    x, y = _steps(path, arrays[f"x{tail}"]), arrays[f"y{tail}"]
    lengths = next((arrays[f"{name}{tail}"] for name in LENGTHS if f"{name}{tail}" in arrays), None)
    if lengths is None:
        lengths = np.full(len(x), x.shape[1])
    if len(y) != len(x) or lengths.shape != (len(x),):
        raise LongscanError(f"{path}: expected as many y and lengths as x ({len(x):,}), got {len(y):,}.")
    wrong = (lengths < 1) | (lengths > x.shape[1])
    if lengths.dtype.kind not in "iu" or wrong.any():
        raise LongscanError(f"{path}: expected lengths from 1 to {x.shape[1]:,}, got {lengths[wrong][:1]}.")
    rows = [row[:length] for row, length in zip(x, lengths, strict=True)]
    names = [f"{path}:{number}" for number in range(len(x))]
    if y.dtype.kind in "iub" or y.dtype.kind in "US":
        found = _labelled(rows, [str(label) for label in y.tolist()], names)
    else:
        truth = y.reshape(len(y), -1).astype(np.float32)
        found = Sequences(np.concatenate(rows), _lengths(rows), truth, (), tuple(names))
    if f"times{tail}" in arrays:
        times = arrays[f"times{tail}"]
        if times.shape != x.shape[:2] or times.dtype.kind not in "fiu":
            got = f"{times.dtype} {times.shape}"
            raise LongscanError(f"{path}: expected a time of each step, {x.shape[:2]}, got {got}.")
        rows = [row[:length] for row, length in zip(times, lengths, strict=True)]
        found = replace(found, times=np.concatenate(rows).astype(np.float64))
    return _passing(_finite(found))


def _steps(path: Path, x: np.ndarray) -> np.ndarray:
    """Turn what a file calls x into (n, seq_len, d_input) float32 or (n, seq_len) int64."""
    if 0 in x.shape or x.ndim < 2 or x.dtype.kind not in "fiu":
        raise LongscanError(f"{path}: expected numbers x (n, seq_len, ...), got {x.dtype} {x.shape}.")
    if x.dtype == np.uint8 and x.ndim in (3, 4):  # images: pixel by pixel
        return x.reshape(len(x), x.shape[1] * x.shape[2], -1).astype(np.float32) / 255
    if x.ndim == 2 and x.dtype.kind in "iu":
        if x.min() < 0:
            raise LongscanError(f"{path}: expected tokens from 0 on, got {x.min()}.")
        return x.astype(np.int64)
    if x.ndim > 3:
        raise LongscanError(f"{path}: expected x (n, seq_len, d_input), got {x.shape}.")
    return x.reshape(len(x), x.shape[1], -1).astype(np.float32)


def _own(path: Path, arrays: dict[str, np.ndarray]) -> Sequences:
    """Read what `Sequences.save` wrote."""
    try:
        found = Sequences(
            values=arrays["values"],
            lengths=arrays["lengths"],
            truth=arrays["y"],
            labels=tuple(arrays["labels"].tolist()),
            names=tuple(arrays["names"].tolist()),
            rate=float(arrays["rate"]) or None,
            times=arrays.get("times"),
        )
    except KeyError as error:
        raise LongscanError(f"{path}: expected an array {error} beside the others.") from error
    if len(found.values) != found.lengths.sum() or not len(found) == len(found.truth) == len(found.names):
        raise LongscanError(f"{path}: the lengths are not those of the values. Make the file again.")
    if found.times is not None and found.times.shape != found.values.shape[:1]:
        raise LongscanError(f"{path}: the times are not those of the values. Make the file again.")
    return _passing(_finite(found))


def _finite(found: Sequences) -> Sequences:
    """Refuse NaN and infinities."""
    if found.d_input:
        bad = ~np.isfinite(found.values).all(1)
        if bad.any():
            number = int(np.searchsorted(np.cumsum(found.lengths), int(bad.argmax()), side="right"))
            raise LongscanError(
                f"{found.names[number]}: the signal has NaN or infinite numbers, {int(bad.sum()):,} samples "
                "in all. Fill the gaps or leave these sequences out."
            )
    return found


def _passing(found: Sequences) -> Sequences:
    """Refuse times that stand still, go back or are no numbers."""
    times, ends = found.times, np.cumsum(found.lengths)
    if times is None:
        return found
    with np.errstate(invalid="ignore"):  # inf - inf
        passes = np.diff(times, prepend=-np.inf) > 0
    passes[ends[:-1]] = True  # where another sequence starts
    bad = ~(passes & np.isfinite(times))
    if bad.any():
        place = int(bad.argmax())
        number = int(np.searchsorted(ends, place, side="right"))
        step = place - int(ends[number] - found.lengths[number])
        before = f" after {times[place - 1]:g}" if step else ""
        raise LongscanError(
            f"{found.names[number]}: expected seconds that increase, got {times[place]:g}{before} at step "
            f"{step}. Sort the steps, and keep one of those at the same time."
        )
    return found


# sounds


def _sounds(path: Path, pattern: str | None) -> Sequences:
    """Read the .wav files of a folder or a tar, or one."""
    try:
        expression = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UsageError(f"pattern: {pattern!r} is no regular expression ({error}).") from error
    if expression is not None and not expression.groups:
        raise UsageError(f"pattern: expected a group (...) that is the label, got {pattern!r}.")
    rows, names, kinds, rate = [], [], [], 0
    for name, file in _files(path):
        row, rate = read_wav(file, f"{path}: {name}")
        rows.append(row)
        names.append(name)
        kinds.append(f"{row.shape[1]} channels at {rate:,} samples per second")
        if kinds[0] != kinds[-1]:
            raise LongscanError(
                f"{path}: expected sounds of one rate and one number of channels, got {kinds[0]} in "
                f"{names[0]} and {kinds[-1]} in {name}. Convert them."
            )
    if not rows:
        raise LongscanError(f"{path}: expected .wav files there, found none.")
    labels = _labels(path, names, expression)
    return _labelled(rows, labels, [f"{path}: {name}" for name in names], float(rate))


def _files(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the names and contents of .wav files, in order of the names, or that of the tar."""
    if path.is_dir() or path.suffix == SOUND:
        for place in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if place.suffix.lower() == SOUND:
                with open(place, "rb") as file:
                    yield str(place.relative_to(path)) if path.is_dir() else path.name, file
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(SOUND):
                    inside = tar.extractfile(member)
                    assert inside is not None  # it is a file
                    yield member.name, io.BytesIO(inside.read())  # whole: compressed tars have no way back
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise LongscanError(f"{path} is no tar, or is cut short ({error}).") from error


def _labels(path: Path, names: Sequence[str], expression: re.Pattern[str] | None) -> list[str]:
    """Find the labels in the paths of sounds."""
    folders = [Path(name).parent.name for name in names]
    labels = []
    for name, folder in zip(names, folders, strict=True):
        if expression is None:
            labels.append(folder if len(set(folders)) > 1 else Path(name).stem.split("_")[0])
            continue
        found = expression.search(name)
        if found is None or not found[1]:
            raise LongscanError(f"{path}: {name} has no label: it does not match {expression.pattern!r}.")
        labels.append(found[1])
    return labels
