"""Validation and conversion of the arrays in an .npz file of labelled sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from longscan.errors import LongscanError

__all__ = ["parse_labels", "parse_lengths", "parse_steps", "parse_times"]

Array = npt.NDArray[np.generic]
MAX_CHANNELS = 4  # of images: red, green, blue, alpha
VOCAB = 2**20  # tokens that a file may have: the embedding gets a row for each


def parse_steps(path: Path, x: npt.NDArray[np.generic]) -> npt.NDArray[np.float32] | npt.NDArray[np.int64]:
    """Return the steps of sequences, from the array x of a file.

    Args:
        path: of the file, for messages.
        x: (n, seq_len, d_input) or (n, seq_len) floats, (n, seq_len) tokens, or bytes of
            images (n, height, width) or (n, height, width, channels).

    Returns:
        (n, seq_len, d_input) float32 or (n, seq_len) int64.

    Raises:
        LongscanError: it is something else.
    """
    if 0 in x.shape or x.ndim < 2 or x.dtype.kind not in "fiu":
        raise LongscanError(f"{path}: expected numbers x (n, seq_len, ...), got {x.dtype} {x.shape}.")
    if x.dtype == np.uint8 and x.ndim in (3, 4):  # images: pixel by pixel
        if x.shape[3:] > (MAX_CHANNELS,):
            raise LongscanError(
                f"{path}: expected images (n, height, width, channels) of up to {MAX_CHANNELS} channels, got "
                f"{x.shape}. If the channels come first: x.transpose(0, 2, 3, 1)."
            )
        return x.reshape(len(x), x.shape[1] * x.shape[2], -1).astype(np.float32) / np.float32(255)
    if x.ndim == 2 and x.dtype.kind in "iu":
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= VOCAB:
            wrong = low if low < 0 else high
            bound = "tokens from 0 on" if low < 0 else f"tokens below {VOCAB:,}"
            raise LongscanError(
                f"{path}: expected {bound}, got {wrong:,}. Save the samples of a signal as floats."
            )
        return x.astype(np.int64)
    if x.ndim > 3:
        raise LongscanError(f"{path}: expected x (n, seq_len, d_input), got {x.shape}.")
    with np.errstate(over="ignore"):  # infinities are refused by their place
        return x.reshape(len(x), x.shape[1], -1).astype(np.float32)


def parse_labels(path: Path, y: Array, n: int) -> list[str] | npt.NDArray[np.float32]:
    """Return names of classes, or target numbers, from the array y of a file.

    Integers, booleans and texts are classes, one per sequence; floats are target numbers, possibly several
    per sequence. A column (n, 1) is the same as (n,).

    Args:
        path: of the file, for messages.
        y: (n,) or (n, 1), of floats also (n, n_outputs).
        n: sequences.

    Returns:
        The names (n,), or the numbers (n, n_outputs).

    Raises:
        LongscanError: it is something else, such as classes as rows of zeros and a one; a name is empty; a
            number is NaN or infinite.
    """
    if y.dtype.kind not in "iubfUS":
        raise LongscanError(f"{path}: expected y of labels or numbers, got {y.dtype} {y.shape}.")
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise LongscanError(
            f"{path}: expected y ({n:,},), a label or number for each x, got {y.dtype} {y.shape}."
        )
    if len(y) != n:
        raise LongscanError(f"{path}: expected as many y and lengths as x ({n:,}), got {len(y):,} y.")
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "iubf" and _is_one_hot(y):
        raise LongscanError(f"{path}: y {y.shape} has a 1 in each row: save the classes as y.argmax(1).")
    if y.dtype.kind == "f":
        with np.errstate(over="ignore"):
            numbers = y.reshape(n, -1).astype(np.float32)
        if not (finite := np.isfinite(numbers).all(1)).all():
            row = int((~finite).argmax())
            raise LongscanError(
                f"{path}:{row}: expected finite numbers y, got {numbers[row].tolist()}. Leave such rows out."
            )
        return numbers
    if y.ndim == 2 and y.shape[1] > 1:
        raise LongscanError(
            f"{path}: expected y ({n:,},) of labels, got {y.dtype} {y.shape}. Numbers are floats."
        )
    names = [_name(path, row, label) for row, label in enumerate(y.reshape(n).tolist())]
    return names


def parse_lengths(path: Path, lengths: Array | None, n: int, longest: int) -> npt.NDArray[np.int64]:
    """Return the length of each sequence.

    Args:
        path: of the file, for messages.
        lengths: (n,) or (n, 1) whole numbers; all are as long as can be if None.
        n: sequences.
        longest: the most steps.

    Returns:
        (n,) int64.

    Raises:
        LongscanError: it is something else, or beyond what x holds.
    """
    if lengths is None:
        return np.full(n, longest, np.int64)
    if lengths.shape not in ((n,), (n, 1)) or lengths.dtype.kind not in "iu":
        raise LongscanError(
            f"{path}: expected as many y and lengths as x ({n:,}), "
            f"got lengths {lengths.dtype} {lengths.shape}. They are whole numbers."
        )
    flat = lengths.reshape(n).astype(np.int64)
    if (wrong := (flat < 1) | (flat > longest)).any():
        row = int(wrong.argmax())
        raise LongscanError(
            f"{path}:{row}: expected lengths from 1 to {longest:,}, got {lengths.reshape(n)[row]}."
        )
    return flat


def parse_times(path: Path, times: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Return the time of each step.

    Args:
        path: of the file, for messages.
        times: what the file calls so.
        shape: (n, seq_len).

    Returns:
        (n, seq_len) float64.

    Raises:
        LongscanError: it is something else.
    """
    if times.shape != shape or times.dtype.kind not in "fiu":
        raise LongscanError(
            f"{path}: expected a time of each step, {shape}, got {times.dtype} {times.shape}."
        )
    return times.astype(np.float64)


def _is_one_hot(y: Array) -> bool:
    """Return whether each row is one-hot."""
    return bool(((y == 0) | (y == 1)).all() and (np.count_nonzero(y, 1) == 1).all())


def _name(path: Path, row: int, label: object) -> str:
    """Return the name of a class."""
    try:
        name = (label.decode() if isinstance(label, bytes) else str(label)).strip()
        name.encode()
    except UnicodeError as error:
        raise LongscanError(f"{path}:{row}: the label {label!r} is not UTF-8.") from error
    if not name:
        raise LongscanError(f"{path}:{row}: expected a label, got an empty one.")
    return name
