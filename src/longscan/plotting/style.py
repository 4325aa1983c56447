"""The style of every figure: its palette and markers, its file formats, and how it is saved.

matplotlib is an extra and is imported only when something is drawn.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.core.files import atomic_file
from longscan.core.optional import require
from longscan.errors import LongscanError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CEILING",
    "COLOURS",
    "DEEP",
    "DIVERGING",
    "GREY",
    "HIGHLIGHT",
    "MARKERS",
    "MONOSPACE",
    "SEQUENTIAL",
    "VERMILION",
    "check_out",
    "columns_of",
    "line_style",
    "new_figure",
    "points_of",
    "reduced_note",
    "save_figure",
    "tidy",
]


# the Okabe-Ito palette, distinguishable with any common colour blindness; in print, markers are
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
CEILING = (GREY, "x")  # colour and marker of what the hardware allows
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # colour maps, safe in the same sense
HIGHLIGHT = ("#FFFBF2", "#E69F00")  # ends of a colour map on all of which black text is legible
DEEP = (*HIGHLIGHT, "#4A2400")  # the same, and further, where nothing stands on the colours
MONOSPACE = "DejaVu Sans Mono"  # comes with matplotlib, like the other one

FONTS = (  # with Chinese characters, on Linux, Windows and macOS
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Serif CJK SC", "Noto Sans SC"),
    *("Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB"),
)

CJK = re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")

SUFFIXES = (".png", ".svg", ".pdf")


def check_out(path: Path, option: str = "--out") -> None:
    """Refuse a figure that could not be written.

    Args:
        path: the figure's file.
        option: the flag that named it, for the error.

    Raises:
        UsageError: its suffix is no format.
        LongscanError: there is no such directory, or a directory has this name.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{option}: expected a name that ends in .png, .svg or .pdf, got {path}.")
    if path.is_dir():
        raise LongscanError(f"{option}: expected the name of a file, got the directory {path}.")
    if not path.absolute().parent.is_dir():
        raise LongscanError(f"{option}: there is no directory {path.absolute().parent}.")


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


def line_style(index: int) -> dict[str, Any]:
    """Return colour and marker of a line by its index: a pair that none of the first 36 shares.

    Args:
        index: of the line in its figure, from 0.
    """
    turn, position = divmod(index, len(COLOURS))
    return {"color": COLOURS[position], "marker": MARKERS[(position + turn) % len(MARKERS)]}


def tidy(ax: Axes) -> None:
    """Add a faint grid and remove the upper and right spines."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path, note: str = "", fonts: Sequence[str] = FONTS) -> None:
    """Save a figure atomically, in a font that has its characters if one is installed.

    A UserWarning says so where Chinese characters are drawn as boxes for want of a font.

    Args:
        figure: what `new_figure` gave.
        path: the file; its suffix chooses the format.
        note: a caption in small letters below it.
        fonts: families with Chinese characters, the best first.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import font_manager, get_cachedir, rc_context
    from matplotlib.text import Text

    if note:
        figure.supxlabel(textwrap.fill(note, int(14 * figure.get_figwidth())), fontsize="x-small", color=GREY)
    known = set(font_manager.fontManager.get_font_names())
    chinese = [name for name in fonts if name in known]
    family = ["DejaVu Sans", *chinese]
    with warnings.catch_warnings(), rc_context({"font.family": family, "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph")  # SVG files leave the font to the reader
        texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
        for text in texts:
            fixed = text.get_fontfamily() == [MONOSPACE]
            text.set_fontfamily([MONOSPACE, *chinese, "monospace"] if fixed else family)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    if not chinese and path.suffix != ".svg" and any(CJK.search(text.get_text()) for text in texts):
        warnings.warn(
            f"{path}: no installed font has Chinese characters, they are drawn as boxes. Install one (Debian "
            f"and Ubuntu: apt install fonts-noto-cjk), remove {get_cachedir()}, and draw again; or use .svg.",
            stacklevel=2,
        )


def points_of(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each record that has a key."""
    return [(record["step"], record[key]) for record in records if key in record]


def columns_of(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return the x and the y of points."""
    return [x for x, _ in points], [y for _, y in points]


def reduced_note(report: Mapping[str, Any]) -> str:
    """Return the caption of an experiment smaller than the published one, "" for one of full size.

    Args:
        report: its results; "reduced" says how it differs.
    """
    return f"reduced: {report['reduced']}" if report.get("reduced") else ""
