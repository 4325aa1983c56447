"""Text tables whose columns are as wide as their widest cell."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

__all__ = ["lay_out"]


def lay_out(rows: Iterable[Sequence[str]], align: str = "<") -> list[str]:
    """Return rows laid out in columns, two spaces apart.

    Args:
        rows: of cells, equally many in each; the first row usually holds the headings.
        align: "<" (left) or ">" (right) for each column; the last one also applies to all further columns.

    Returns:
        One line for each row, without trailing spaces.
    """
    table = [list(row) for row in rows]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return ["  ".join(map(_pad, row, widths, sides)).rstrip() for row in table]


def _pad(cell: str, width: int, side: str) -> str:
    """Return a cell padded with spaces on the other side."""
    blanks = " " * (width - _width(cell))
    return cell + blanks if side == "<" else blanks + cell


def _width(text: str) -> int:
    """Return the width of a text in a terminal, where a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
