"""Readers of labelled sequences: signals, rows of pixels, and texts as bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longscan.core.config import count
from longscan.core.files import utf8
from longscan.data.archives import has_suffix, is_hidden, iter_tar, read_npz
from longscan.data.labeled_arrays import parse_labels, parse_lengths, parse_steps, parse_times
from longscan.data.labeled_texts import read_examples
from longscan.data.sequence_tables import read_sequence_table
from longscan.data.sequences import Sequences, lengths_of
from longscan.data.wav import read_wav
from longscan.errors import LongscanError, UsageError

__all__ = ["BYTES", "Sequences", "is_sequence_file", "read_sequences"]

BYTES = 256  # tokens of a text that is read byte by byte
TARS, SOUND = (".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2"), ".wav"
LENGTHS = ("lengths", "len")  # what files call them
OWN = {"values", "lengths", "y", "labels", "names"}  # of a file that `Sequences.save` wrote


def is_sequence_file(path: str | Path) -> bool:
    """Return whether a file or folder can only hold sequences, not texts.

    Args:
        path: see `read_sequences`.
    """
    return has_suffix(path, *TARS, SOUND, ".npz") or Path(path).is_dir()


def read_sequences(
    paths: Sequence[str | Path], *, split: str = "train", pattern: str | None = None, columns: str = "1,2"
) -> Sequences:
    """Return the labelled sequences of files.

    Args:
        paths: any of
            .npz files of x, y and perhaps lengths and times: x is (n, seq_len, d_input) or (n, seq_len)
            floats, (n, seq_len) integers for tokens, or (n, height, width) bytes for images; y is (n,)
            integers or texts for classes, floats for target numbers; times is (n, seq_len) seconds, for
            irregularly sampled series. With several parts: x_train, y_train, ...;
            .csv tables of signals, see `read_sequence_table`;
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
    if path.is_dir() or has_suffix(path, *TARS, SOUND):
        return _sounds(path, pattern)
    if has_suffix(path, ".npz"):
        return _npz(path, split)
    if has_suffix(path, ".csv", ".csv.gz", ".csv.xz"):
        table = read_sequence_table(path)
        found = _labelled(table.rows, table.labels, table.names)
        return _passing(replace(found, times=None if table.times is None else np.concatenate(table.times)))
    examples = read_examples([path], columns)
    texts = [
        example.text if example.pair is None else f"{example.text}\t{example.pair}" for example in examples
    ]
    rows = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
    return _labelled(rows, [example.label for example in examples], [example.where for example in examples])


def _labelled(
    rows: Sequence[np.ndarray], labels: Sequence[str], names: Sequence[str], rate: float | None = None
) -> Sequences:
    """Return sequences, given the names of their classes."""
    known = tuple(sorted(set(labels)))
    truth = np.array([known.index(label) for label in labels])
    return Sequences(np.concatenate(rows), lengths_of(rows), truth, known, tuple(names), rate)


def _kind(some: Sequences) -> str:
    """Return a description of the kind of sequences."""
    what = f"signals of {some.d_input} channels" if some.d_input else "tokens"
    rate = f" at {some.rate:g} samples per second" if some.rate else ""
    times = ", each with its time," if some.times is not None else ""
    return f"{what}{rate}{times} with {'labels' if some.labels else f'{some.n_outputs} numbers'}"


# .npz


def _npz(path: Path, split: str) -> Sequences:
    """Read arrays."""
    arrays = read_npz(path)
    if arrays.keys() >= OWN:
        return _own(path, arrays)
    tail = "" if "x" in arrays else f"_{split}"
    if f"x{tail}" not in arrays or f"y{tail}" not in arrays:
        got = ", ".join(sorted(arrays)) or "nothing"
        raise LongscanError(f"{path}: expected arrays x and y, or x_{split} and y_{split}; got {got}.")
    x = parse_steps(path, arrays[f"x{tail}"])
    truth = parse_labels(path, arrays[f"y{tail}"], len(x))
    given = next((arrays[f"{name}{tail}"] for name in LENGTHS if f"{name}{tail}" in arrays), None)
    lengths = parse_lengths(path, given, len(x), x.shape[1])
    rows = [row[:length] for row, length in zip(x, lengths, strict=True)]
    names = [f"{path}:{number}" for number in range(len(x))]
    if isinstance(truth, list):
        found = _labelled(rows, truth, names)
    else:
        found = Sequences(np.concatenate(rows), lengths, truth, (), tuple(names))
    if f"times{tail}" in arrays:
        times = parse_times(path, arrays[f"times{tail}"], x.shape[:2])
        rows = [row[:length] for row, length in zip(times, lengths, strict=True)]
        found = replace(found, times=np.concatenate(rows))
    return _passing(_finite(found))


def _own(path: Path, arrays: dict[str, np.ndarray]) -> Sequences:
    """Read what `Sequences.save` wrote."""
    values, lengths, truth, names = (arrays[name] for name in ("values", "lengths", "y", "names"))
    labels, rate, times = arrays["labels"], arrays.get("rate", np.zeros(())), arrays.get("times")
    kinds = [(values, "fi", (1, 2)), (lengths, "i", (1,)), (truth, "fi", (1, 2)), (labels, "U", (1,))]
    kinds += [(names, "U", (1,)), (rate, "f", (0,)), *([] if times is None else [(times, "f", (1,))])]
    whole = all(array.dtype.kind in kind and array.ndim in axes for array, kind, axes in kinds)
    if not whole or len(truth) != len(lengths) or len(names) != len(lengths):
        raise LongscanError(f"{path} is not as longscan writes it. Make the file again.")
    if (lengths < 1).any() or len(values) != lengths.sum():
        raise LongscanError(f"{path}: the lengths are not those of the values. Make the file again.")
    if times is not None and times.shape != values.shape[:1]:
        raise LongscanError(f"{path}: the times are not those of the values. Make the file again.")
    classes, tokens = truth.ndim == 1, values.ndim == 1
    if (
        classes != (truth.dtype.kind == "i")
        or classes != bool(len(labels))
        or tokens != (values.dtype.kind == "i")
    ):
        raise LongscanError(f"{path} is not as longscan writes it. Make the file again.")
    if (classes and ((truth < 0) | (truth >= len(labels))).any()) or (tokens and (values < 0).any()):
        raise LongscanError(f"{path}: a label or a token is out of range. Make the file again.")
    found = Sequences(
        values=values,
        lengths=lengths,
        truth=truth,
        labels=tuple(labels.tolist()),
        names=tuple(names.tolist()),
        rate=float(rate) or None,
        times=times,
    )
    return _passing(_finite(found))


def _finite(found: Sequences) -> Sequences:
    """Return the sequences; raise LongscanError if there are NaN or infinities."""
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
    """Return the sequences; raise LongscanError unless times increase and are finite."""
    times, ends = found.times, np.cumsum(found.lengths)
    if times is None:
        return found
    with np.errstate(invalid="ignore"):  # inf - inf
        passes = np.diff(times, prepend=-np.inf) > 0
    passes[ends[:-1]] = True  # where another sequence starts
    bad = ~(passes & np.isfinite(times))
    if bad.any():
        index = int(bad.argmax())
        number = int(np.searchsorted(ends, index, side="right"))
        step = index - int(ends[number] - found.lengths[number])
        before = f" after {times[index - 1]:g}" if step else ""
        raise LongscanError(
            f"{found.names[number]}: expected seconds that increase, got {times[index]:g}{before} at step "
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
        kinds.append(f"{count(row.shape[1], 'channel')} at {rate:,} samples per second")
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
    if not path.is_dir() and not has_suffix(path, SOUND):
        for name, content in iter_tar(path, lambda name: has_suffix(name, SOUND)):
            yield name, io.BytesIO(content)
        return
    for entry in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = str(entry.relative_to(path)) if path.is_dir() else path.name
        if entry == path or (has_suffix(name, SOUND) and not is_hidden(name) and entry.is_file()):
            with open(entry, "rb") as file:
                yield name, file


def _labels(path: Path, names: Sequence[str], expression: re.Pattern[str] | None) -> list[str]:
    """Find the labels in the paths of sounds."""
    folders = [Path(name).parent.name for name in names]
    labels = []
    for name, folder in zip(names, folders, strict=True):
        if expression is None:
            label = folder if len(set(folders)) > 1 else Path(name).stem.split("_")[0]
            if not label:
                raise LongscanError(f"{path}: {name} has no label: it is in no folder, or begins with _.")
            labels.append(label)
            continue
        found = expression.search(name)
        if found is None or not found[1]:
            raise LongscanError(f"{path}: {name} has no label: it does not match {expression.pattern!r}.")
        labels.append(found[1])
    for name, label in zip(names, labels, strict=True):
        utf8(label.encode(errors="surrogateescape"), f"{path}: the label of {name!r}")
    return labels
