"""Labelled sequences of any length in memory: select, split, resample, batch and save them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from longscan.core.files import atomic_file
from longscan.data.labeled_texts import Example, divide, number_labels
from longscan.errors import LongscanError

__all__ = ["Sequences", "lengths_of"]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Labelled sequences of any lengths.

    Attributes:
        values: (total, d_input) float32 signals or (total,) int64 tokens, concatenated.
        lengths: (n,) int64.
        truth: (n,) int64 class indices, or (n, n_outputs) float32 target numbers.
        labels: names of the classes; empty for regression.
        names: (n,) of each sequence, for messages.
        rate: samples per second, if known.
        times: (total,) float64 seconds, for irregularly sampled series.
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
        """Number of classes, or of target numbers."""
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
        """Return the sequences with changed steps.

        Args:
            change: from the rows of the values, and alike from those of the times, to the new ones.
        """

        def of(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[:0], *change(self._split(array))])

        times = None if self.times is None else of(self.times)
        return replace(self, values=of(self.values), lengths=lengths_of(change(self.rows)), times=times)

    def select(self, numbers: Iterable[int]) -> Self:
        """Return some of the sequences.

        Args:
            numbers: their indices, in order.
        """
        numbers = list(numbers)
        return replace(
            self.changed(lambda rows: [rows[n] for n in numbers]),
            truth=self.truth[numbers],
            names=tuple(self.names[n] for n in numbers),
        )

    def divide(self, share: float) -> tuple[Self, Self]:
        """Return training and validation sequences, stratified by class; see `labeled_texts.divide`.

        Args:
            share: fraction of each class to hold out, rounded down.
        """
        examples = [Example(self._label(n), "", None, str(n)) for n in range(len(self))]
        train, valid = divide(examples, share)
        return self.select(int(e.where) for e in train), self.select(int(e.where) for e in valid)

    def labelled(self, labels: Sequence[str]) -> Self:
        """Return the sequences with the class indices of a model.

        Args:
            labels: of the model; empty for regression.

        Raises:
            LongscanError: a label was not in the training data.
        """
        if bool(labels) != bool(self.labels):
            expected, got = ("labels", "numbers") if labels else ("numbers", "labels")
            raise LongscanError(f"{self.names[0]}: expected {expected} to predict, got {got}.")
        if not labels:
            return self
        examples = [Example(self._label(n), "", None, name) for n, name in enumerate(self.names)]
        return replace(self, truth=np.array(number_labels(examples, labels)), labels=tuple(labels))

    def thinned(self, factor: int) -> Self:
        """Return the signals subsampled: the first of every `factor` samples.

        Args:
            factor: old rate / new rate.
        """
        rate = None if self.rate is None else self.rate / factor
        return replace(self.changed(lambda rows: [row[::factor] for row in rows]), rate=rate)

    def low_passed(self, factor: int) -> Self:
        """Return the signals low-pass filtered, without the frequencies that would alias at a lower rate.

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

    def cut(self, max_length: int | None) -> Self:
        """Return the sequences truncated to a length.

        Args:
            max_length: the most steps to keep; all if None.
        """
        if max_length is None or int(self.lengths.max(initial=0)) <= max_length:
            return self
        return self.changed(lambda rows: [row[:max_length] for row in rows])

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return a batch of some sequences.

        Args:
            numbers: their indices.

        Returns:
            x: (batch, longest, d_input) or (batch, longest), padded with zeros on the right.
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
        """Return the parts of a concatenated array."""
        return np.split(array, np.cumsum(self.lengths)[:-1])

    def _label(self, number: int) -> str:
        """Return the label of a sequence; "" for regression."""
        return self.labels[int(self.truth[number])] if self.labels else ""


def lengths_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the length of each sequence."""
    return np.array([len(row) for row in rows], np.int64)
