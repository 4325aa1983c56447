"""Labelled sequences in .csv tables: one step per row (long form), or one sequence per row (wide form)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longscan.data.text_files import iter_lines
from longscan.errors import LongscanError

__all__ = ["SequenceTable", "read_sequence_table"]

FORMS = (
    "expected a header with id, label, perhaps time, and the channels, a step a row; or a sequence a row, "
    "the label in a column called label or else in the first, and numbers"
)


class SequenceTable(NamedTuple):
    """Sequences out of a table.

    Attributes:
        rows: (length, d_input) float32 each.
        labels: the class of each.
        names: what messages call each.
        times: (length,) float64 seconds of each, if there is a column of them.
    """

    rows: list[npt.NDArray[np.float32]]
    labels: list[str]
    names: list[str]
    times: list[npt.NDArray[np.float64]] | None


def read_sequence_table(path: Path) -> SequenceTable:
    """Return the sequences of a table of comma-separated values.

    Long form: a header names the columns id, label and perhaps time (seconds); all others are channels. The
    rows of a sequence have the same id and label and stand together. Wide form: a row is a sequence of one
    channel; the label is in the column that a header calls label, or in the first; empty cells behind the
    last number make a sequence shorter.

    Args:
        path: UTF-8, also .gz or .xz.

    Returns:
        The sequences in order.

    Raises:
        LongscanError: it is something else; a cell that should hold a number holds none.
        OSError: it can't be read.
    """
    table = _cells(path)
    number, first = next(table, (1, [""]))
    names = [cell.strip().lower() for cell in first]
    if names.count("label") == 1 and names.count("id") == 1:
        return _long(path, names, table)
    if names.count("label") == 1:
        found = [_wide(path, row, names.index("label"), len(names)) for row in table]
    else:
        found = [_wide(path, row, 0, len(names)) for row in ((number, first), *table)]
    if not found:
        raise LongscanError(f"{path} holds no sequence: {FORMS}.")
    labels, rows, where = zip(*found, strict=True)
    return SequenceTable(list(rows), list(labels), list(where), None)


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that aren't blank, with their line numbers."""
    table = csv.reader(iter_lines(path), strict=True)
    try:
        for row in table:
            if any(cell.strip() for cell in row):
                yield table.line_num, row
    except csv.Error as error:
        raise LongscanError(f"{path}:{table.line_num}: no row of a table ({error}).") from error


def _long(path: Path, names: list[str], table: Iterator[tuple[int, list[str]]]) -> SequenceTable:
    """Return the sequences of a table in long form."""
    key, label = names.index("id"), names.index("label")
    time = names.index("time") if "time" in names else None
    channels = [column for column in range(len(names)) if column not in (key, label, time)]
    if not channels:
        raise LongscanError(f"{path}: no channel in the columns {', '.join(names)}: {FORMS}.")
    steps: dict[str, list[list[float]]] = {}
    labels: dict[str, str] = {}
    last = None
    for number, row in table:
        if len(row) != len(names):
            raise LongscanError(f"{path}:{number}: expected {len(names)} columns, got {len(row)}.")
        name, said = row[key].strip(), _label(path, number, row[label])
        if name != last and name in steps:
            raise LongscanError(f"{path}:{number}: id {name!r} occurred before: sort the rows by id.")
        if labels.setdefault(name, said) != said:
            raise LongscanError(f"{path}:{number}: id {name!r} was {labels[name]!r} before, now {said!r}.")
        columns = channels if time is None else [*channels, time]
        steps.setdefault(name, []).append([_number(path, number, row[column]) for column in columns])
        last = name
    if not steps:
        raise LongscanError(f"{path} holds no sequence: {FORMS}.")
    arrays = [np.array(rows, np.float64) for rows in steps.values()]
    return SequenceTable(
        rows=[array[:, : len(channels)].astype(np.float32) for array in arrays],
        labels=list(labels.values()),
        names=[f"{path}: id {name}" for name in steps],
        times=None if time is None else [array[:, -1] for array in arrays],
    )


def _wide(
    path: Path, numbered: tuple[int, list[str]], label: int, width: int
) -> tuple[str, npt.NDArray[np.float32], str]:
    """Return the label, the samples (length, 1) and the location of a row."""
    number, row = numbered
    if len(row) > width:
        raise LongscanError(f"{path}:{number}: expected at most {width} columns, got {len(row)}.")
    cells = [cell for column, cell in enumerate(row) if column != label]
    while cells and not cells[-1].strip():
        cells.pop()
    if not cells or len(row) <= label:
        raise LongscanError(f"{path}:{number}: no numbers behind a label: {FORMS}.")
    samples = [_number(path, number, cell) for cell in cells]
    return _label(path, number, row[label]), np.array(samples, np.float32)[:, None], f"{path}:{number}"


def _label(path: Path, number: int, cell: str) -> str:
    """Return the name of a class."""
    if not (label := cell.strip()):
        raise LongscanError(f"{path}:{number}: expected a label, got an empty one.")
    return label


def _number(path: Path, number: int, cell: str) -> float:
    """Return a finite number that float32 holds."""
    try:
        value = float(cell)
    except ValueError as error:
        raise LongscanError(f"{path}:{number}: not a number: {cell[:40]!r}; {FORMS}.") from error
    if not math.isfinite(value) or abs(value) > np.finfo(np.float32).max:
        raise LongscanError(f"{path}:{number}: expected a finite number, got {cell[:40]!r}.")
    return value
