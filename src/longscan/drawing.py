"""What all figures share: PNG, SVG or PDF files, in colours and markers that everybody tells apart.

matplotlib is an extra and is imported only when something is drawn.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longscan.errors import LongscanError, UsageError
from longscan.files import atomic_file
from longscan.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLOURS",
    "DIVERGING",
    "MARKERS",
    "SEQUENTIAL",
    "VERMILION",
    "Out",
    "check_out",
    "new_figure",
    "save_figure",
    "tidy",
]

# the Okabe-Ito palette, which readers with any common colour blindness tell apart; in print, markers do
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # of matplotlib's maps, two that are safe in the same sense
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback")  # for Chinese
SUFFIXES = (".png", ".svg", ".pdf")

Out = Annotated[Path, typer.Option(help="The figure to write: .png, .svg or .pdf.")]


def check_out(path: Path) -> None:
    """Refuse a figure that could not be written.

    Args:
        path: the file to be.

    Raises:
        UsageError: its suffix is no format.
        LongscanError: there is no such directory.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--out: expected a name that ends in {', '.join(SUFFIXES)}, got {path}.")
    if not path.absolute().parent.is_dir():
        raise LongscanError(f"--out: there is no directory {path.absolute().parent}.")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, drawn without any display.

    Args:
        width: in inches.
        height: likewise.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    module = require("matplotlib", "figures", "matplotlib.figure")
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def tidy(ax: Axes) -> None:
    """Take away what says nothing."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in a font that has the characters if there is one.

    Args:
        figure: what `new_figure` gave.
        path: the file; its suffix chooses the format.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import font_manager, rc_context

    known = set(font_manager.fontManager.get_font_names())
    family = ["DejaVu Sans", *(name for name in FONTS if name in known)]
    with warnings.catch_warnings(), rc_context({"font.family": family, "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph")  # SVG files leave the font to the reader
        for text in figure.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
            text.set_fontfamily(family)  # type: ignore[attr-defined]
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
