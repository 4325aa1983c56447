"""The tokens of a text in a figure: as labels of an axis, and as the text itself, coloured."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from longscan.plotting.style import HIGHLIGHT, MONOSPACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Cell", "cells", "draw_text", "explained", "label_tokens", "text_height", "text_width"]

LABEL = 16  # characters of a token on an axis, at most
LABELS = 64  # labels of an axis, at most
COLUMNS = 96  # characters of a line of the coloured text
SIZE = 9.5  # of its letters, in points
LINE = 0.22  # height of a line, in inches
BREAK = "↵"
SPECIAL = re.compile(r"#\d+")
MEANINGS = {BREAK: "line break", "⇥": "tab", "␣": "space", "·": "part of a character"}


class Cell(NamedTuple):
    """A piece of coloured text.

    Attributes:
        token: its index.
        line: from 0, downwards.
        column: from 0; wide characters take two.
        width: columns.
        text: what stands there.
    """

    token: int
    line: int
    column: int
    width: int
    text: str


def label_tokens(ax: Axes, axis: str, tokens: Sequence[str], name: str) -> None:
    """Label an axis whose ticks are tokens; of a long text one of several, with its index.

    Args:
        ax: to label.
        axis: "x" or "y".
        tokens: as `visible` returns them.
        name: of the axis.
    """
    every = -(-len(tokens) // LABELS)
    ax.set(**{f"{axis}label": name if every == 1 else f"{name} (1 of {every}, with its index)"})
    at = range(0, len(tokens), every)
    texts = [_label(tokens[index]) if every == 1 else f"{_label(tokens[index])}  {index}" for index in at]
    style: dict[str, Any] = {"fontsize": "x-small" if len(texts) > 40 else "small", "parse_math": False}
    if axis == "x":
        ax.set_xticks(at, texts, rotation=90, **style)
        for label, text in zip(ax.get_xticklabels(), texts, strict=True):
            label.set_rotation(90 if len(text) > 1 else 0)  # or a comma looks like an apostrophe
    else:
        ax.set_yticks(at, texts, **style)


def cells(tokens: Sequence[str], columns: int = COLUMNS) -> Iterator[Cell]:
    """Yield the pieces of a text that is broken into lines: after ↵, and between tokens where it is too long.

    Args:
        tokens: as `visible` returns them. What is longer than a line is cut.
        columns: of a line.
    """
    line = column = 0
    for token, text in enumerate(tokens):
        for piece in text.replace(BREAK, f"{BREAK}\n").splitlines():
            piece = _cut(piece, columns)
            width = _width(piece)
            if column + width > columns:
                line, column = line + 1, 0
            yield Cell(token, line, column, width, piece)
            column += width
            if piece.endswith(BREAK):
                line, column = line + 1, 0


def explained(tokens: Sequence[str]) -> str:
    """Return what the signs in the labels of tokens mean, "" if there are none.

    Args:
        tokens: as `visible` returns them.
    """
    texts = "".join(_label(token) for token in tokens)
    found = [f"{sign} {meaning}" for sign, meaning in MEANINGS.items() if sign in texts]
    found += [f"{token} special token" for token in dict.fromkeys(tokens) if SPECIAL.fullmatch(token)]
    return ", ".join(each.replace(" ", "\u00a0") for each in found)  # no line of a caption ends inside


def text_height(tokens: Sequence[str]) -> float:
    """Return the height of the coloured text, in inches."""
    return LINE * (1 + max(cell.line for cell in cells(tokens)))


def text_width() -> float:
    """Return the width of the coloured text, in inches."""
    return COLUMNS * 0.602 * SIZE / 72  # the letters are 0.602 of their size wide


def draw_text(ax: Axes, tokens: Sequence[str], values: Tensor) -> Any:
    """Draw a text whose tokens stand on their colours; return what a colour bar needs.

    Args:
        ax: of the size `text_width` by `text_height`.
        tokens: as `visible` returns them.
        values: (n,) of each token.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap

    pieces = list(cells(tokens))
    boxes = PolyCollection(
        [_corners(cell) for cell in pieces],
        array=values[[cell.token for cell in pieces]].float().numpy(),
        cmap=LinearSegmentedColormap.from_list("highlight", HIGHLIGHT),
        linewidths=0,
    )
    ax.add_collection(boxes)
    for run in _runs(pieces):
        shown = run.text.replace(" ", "\u00a0")  # readers of SVG files collapse others
        ax.text(
            run.column, run.line + 0.46, shown, fontsize=SIZE, family=MONOSPACE, va="center_baseline",
            color="black", parse_math=False, in_layout=False,
        )  # fmt: skip
    ax.set(xlim=(0, COLUMNS), ylim=(1 + pieces[-1].line, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return boxes


def _corners(cell: Cell) -> list[tuple[float, float]]:
    """Return the corners of the box of a piece."""
    left, right, top, bottom = cell.column, cell.column + cell.width, cell.line, cell.line + 0.92
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _runs(pieces: Sequence[Cell]) -> list[Cell]:
    """Return the pieces, joined where letters of one width keep their columns: far fewer to draw."""
    runs: list[Cell] = []
    for cell in pieces:
        if runs and runs[-1].line == cell.line and len(runs[-1].text) == runs[-1].width:
            before = runs.pop()
            cell = before._replace(width=before.width + cell.width, text=before.text + cell.text)
        runs.append(cell)
    return runs


def _label(token: str) -> str:
    """Return a token as an axis shows it: spaces around it are left out, those alone are visible."""
    text = token.strip(" ") or "␣" * len(token)
    return _cut(text, LABEL)


def _cut(text: str, columns: int) -> str:
    """Return a text, cut if it is wider than some columns."""
    if _width(text) <= columns:
        return text
    while _width(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def _width(text: str) -> int:
    """Return the columns that a text takes."""
    wide = ("W", "F")
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in wide)
        for letter in text
    )
