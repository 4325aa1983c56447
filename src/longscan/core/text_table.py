"""Tables of text: columns as wide as their widest cell."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

__all__ = ["lay_out"]


def lay_out(rows: Iterable[Sequence[str]], align: str = "<") -> list[str]:
    """Lay rows out in columns, two blanks apart.

    Args:
        rows: cells of text, as many in each; the first row is mostly the headings.
        align: "<" (left) or ">" (right) for each column; the last one stands for all that follow.

    Returns:
        A line for each row, without trailing blanks.
    """
    table = [list(row) for row in rows]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return ["  ".join(map(_pad, row, widths, sides)).rstrip() for row in table]


def _pad(cell: str, width: int, side: str) -> str:
    """Fill a cell with blanks on the other side."""
    blanks = " " * (width - _width(cell))
    return cell + blanks if side == "<" else blanks + cell


def _width(text: str) -> int:
    """Return the columns that a terminal gives a text: two for a Chinese character."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
