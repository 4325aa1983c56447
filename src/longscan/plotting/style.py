"""What all figures share: PNG, SVG or PDF files, in colours and markers that everybody tells apart.

matplotlib is an extra and is imported only when something is drawn.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longscan.core.files import atomic_file
from longscan.core.optional import require
from longscan.errors import LongscanError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLOURS",
    "DIVERGING",
    "GREY",
    "MARKERS",
    "SEQUENTIAL",
    "VERMILION",
    "Out",
    "check_out",
    "columns_of",
    "new_figure",
    "points_of",
    "reduced_note",
    "save_figure",
    "tidy",
]


# the Okabe-Ito palette, which readers with any common colour blindness tell apart; in print, markers do
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"

COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

MARKERS = ("o", "s", "^", "D", "v", "P")

SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # of matplotlib's maps, two that are safe in the same sense

FONTS = (  # with Chinese characters, on Linux, Windows and macOS
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Serif CJK SC", "Noto Sans SC"),
    *("Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB"),
)

CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")

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


def save_figure(figure: Figure, path: Path, note: str = "", fonts: Sequence[str] = FONTS) -> None:
    """Write a figure, whole or not at all, in a font that has the characters if there is one.

    Args:
        figure: what `new_figure` gave.
        path: the file; its suffix chooses the format.
        note: what a reader of the figure has to know, in small letters below it.
        fonts: families with Chinese characters, the best first.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import font_manager, get_cachedir, rc_context
    from matplotlib.text import Text

    if note:
        figure.supxlabel(textwrap.fill(note, int(14 * figure.get_figwidth())), fontsize="x-small", color=GREY)
    known = set(font_manager.fontManager.get_font_names())
    found = [name for name in fonts if name in known]
    family = ["DejaVu Sans", *found]
    with warnings.catch_warnings(), rc_context({"font.family": family, "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph")  # SVG files leave the font to the reader
        texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
        for text in texts:
            text.set_fontfamily(family)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    if not found and path.suffix != ".svg" and any(CJK.search(text.get_text()) for text in texts):
        typer.echo(
            f"{path}: no font here has Chinese characters, they are drawn as boxes. Install one (Debian and "
            f"Ubuntu: apt install fonts-noto-cjk), remove {get_cachedir()}, and draw again; or take .svg.",
            err=True,
        )


def points_of(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return step and value of the records that have a key."""
    return [(record["step"], record[key]) for record in records if key in record]


def columns_of(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return points as the two lists that plotting takes."""
    return [x for x, _ in points], [y for _, y in points]


def reduced_note(report: Mapping[str, Any]) -> str:
    """Return what the figure of an experiment says below if it is smaller than the published one.

    Args:
        report: its results; "reduced" says in what, if it is.
    """
    return f"reduced: {report['reduced']}" if report.get("reduced") else ""
