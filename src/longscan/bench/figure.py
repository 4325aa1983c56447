"""The figure of a benchmark: a panel per suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.bench.report import Report
from longscan.core.optional import installed, remedy
from longscan.errors import LongscanError
from longscan.plotting.style import CEILING, COLOURS, GREY, MARKERS, check_out, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check", "draw", "styles"]

OURS = "longscan"  # in the name of each contender of ours
_TIMES = ("seconds", "seconds_min", "seconds_max")


def check(path: Path) -> None:
    """Refuse a figure that could not be written, before anything is measured.

    Args:
        path: the figure's file.

    Raises:
        LongscanError: its directory or matplotlib is missing.
        UsageError: its suffix is no format.
    """
    check_out(path, "--figure")
    if not installed("matplotlib"):
        raise LongscanError(remedy("matplotlib", "figures"))


def draw(reports: Sequence[Report], title: str, path: Path) -> None:
    """Draw the reports that hold measurements.

    Args:
        reports: of the suites.
        title: the machine and the settings.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    panels = {
        "ops": _milliseconds,
        "train": _lengths,
        "train --long": _lengths,
        "finetune": _rates,
        "generate": _rates,
        "translate": _rates,
        "shipped": _milliseconds,
        "position": _positions,
        "stream": _quarters,
        "vision": _rates,
        "serve": _turns,
        "grammar": _costs,
        "evaluate": _rates,
    }
    heights = [
        1.2 + 0.24 * (len(report.rows) + len(_cases(report.rows)))
        if report.suite in ("ops", "finetune", "generate", "translate", "shipped", "vision", "evaluate")
        else 4.5
        for report in reports
    ]
    figure = new_figure(9.0, sum(heights) + 0.6)
    figure.suptitle(title, fontsize="small", color=GREY)
    axes = figure.subplots(len(reports), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, report in zip(axes, reports, strict=True):
        panels[report.suite](ax, report)
        ax.set_title(report.suite, loc="left", fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _milliseconds(ax: Axes, report: Report) -> None:
    """Draw the time of each case."""
    rows = [row for row in report.rows if row["seconds"]]
    _points(ax, rows, [tuple(1e3 * row[key] for key in _TIMES) for row in rows])
    ax.set_xlabel("milliseconds (left is better)")


def _rates(ax: Axes, report: Report) -> None:
    """Draw the speed in each case."""
    rows = [row for row in report.rows if row["rate"]]
    _points(ax, rows, [_range(row) for row in rows])
    units = dict.fromkeys(row["unit"] for row in rows)
    ax.set_xlabel(f"{' or '.join(units)} (right is better)")


def _points(ax: Axes, rows: list[dict[str, Any]], values: Sequence[tuple[float, ...]]) -> None:
    """Draw a line for each (median, lowest, highest) on a log scale, grouped by case.

    Points, not bars: a log scale has no zero for a bar to start from.
    """
    style, heights, height = styles(rows), list[int](), 0
    for case in _cases(rows):
        ax.text(0.01, height, case, transform=ax.get_yaxis_transform(), fontweight="bold", fontsize="small")
        for row, (middle, low, high) in zip(rows, values, strict=True):
            if row["case"] == case:
                height += 1
                heights.append(height)
                colour, marker = style[row["contender"]]
                ax.plot([low, high], [height, height], color=colour, linewidth=2)
                ax.plot([middle], [height], color=colour, marker=marker)
                ax.annotate(f" {middle:,.3g}", (high, height), va="center", fontsize="x-small")
        height += 1
    ax.set(xscale="log", yticks=heights)
    ax.set_yticklabels([row["contender"] for row in rows], fontsize="small")
    ax.grid(axis="x", alpha=0.25)
    ax.set_ylim(height, -1)
    ax.margins(x=0.1)


def _costs(ax: Axes, report: Report) -> None:
    """Draw what a grammar costs."""
    rows = [row for row in report.rows if row["case"] == "cost"]
    _points(ax, rows, [(row["median"], row["median"], row["p99"]) for row in rows])
    ax.set_xlabel("in the unit of each line, median to 99th percentile (left is better)")


def _lengths(ax: Axes, report: Report) -> None:
    """Draw the speed of training against seq_len."""
    _curves(ax, report, "sequence length (tokens)", "training speed (tokens/s)")


def _positions(ax: Axes, report: Report) -> None:
    """Draw the speed of decoding against the position."""
    _curves(ax, report, "position (tokens before)", "decoding speed (tokens/s)")


def _curves(ax: Axes, report: Report, x: str, y: str) -> None:
    """Draw tokens per second against seq_len, both on log scales."""
    rows = [row for row in report.rows if row["rate"]]
    for name, (colour, marker) in styles(rows).items():
        mine = [row for row in rows if row["contender"] == name]
        lengths = [row["seq_len"] for row in mine]
        middle, low, high = zip(*map(_range, mine), strict=True)
        guess = name.startswith("ceiling") or any(row.get("extrapolated") for row in mine)
        label = name + (" (extrapolated)" if any(row.get("extrapolated") for row in mine) else "")
        ax.plot(lengths, middle, color=colour, marker=marker, linestyle="--" if guess else "-", label=label)
        ax.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
    lengths = sorted({row["seq_len"] for row in rows})
    ax.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize="small")


def _quarters(ax: Axes, report: Report) -> None:
    """Draw speed and memory of each quarter of a stream, each over that of the first."""
    quarters = report.rows[0].get("quarters", [])
    for key, label, colour, marker in (
        ("rate", "speed", COLOURS[0], MARKERS[0]),
        ("resident_bytes", "resident memory", COLOURS[1], MARKERS[1]),
    ):
        relative = [quarter[key] / quarters[0][key] for quarter in quarters]
        ax.plot(
            [quarter["tokens"] for quarter in quarters], relative, color=colour, marker=marker, label=label
        )
    ax.set(xlabel="tokens", ylabel="relative to the first quarter", ylim=(0, 1.5))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize="small")


def _turns(ax: Axes, report: Report) -> None:
    """Draw the time to the first token of each turn of a conversation, on a log scale."""
    rows = [row for row in report.rows if row.get("turn") and row["seconds"]]
    for name, (colour, marker) in styles(rows).items():
        mine = [row for row in rows if row["contender"] == name]
        turns = [row["turn"] for row in mine]
        middle, low, high = ([1e3 * row[key] for row in mine] for key in _TIMES)
        ax.plot(turns, middle, color=colour, marker=marker, markersize=4, label=name)
        ax.fill_between(turns, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.set(yscale="log", xlabel="turn of the conversation", ylabel="time to the first token (ms)")
    ax.set_xticks(range(2, 1 + max((row["turn"] for row in rows), default=2), 2))
    ax.grid(alpha=0.25)
    if rows:
        ax.legend(frameon=False, fontsize="small")


def _cases(rows: list[dict[str, Any]]) -> list[str]:
    """Return the cases in order, each once."""
    return list(dict.fromkeys(row["case"] for row in rows))


def styles(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of every contender; discs are ours alone, ceilings are grey crosses.

    Args:
        rows: of a report.
    """
    names = list(dict.fromkeys(row["contender"] for row in rows))
    chosen = dict.fromkeys(names, CEILING)
    real = [name for name in names if not name.startswith("ceiling")]
    for i, name in enumerate(name for name in real if OURS in name):
        chosen[name] = COLOURS[i % len(COLOURS)], MARKERS[0]
    for i, name in enumerate(name for name in real if OURS not in name):
        chosen[name] = COLOURS[(1 + i) % len(COLOURS)], MARKERS[1 + i % (len(MARKERS) - 1)]
    return chosen


def _range(row: dict[str, Any]) -> tuple[float, float, float]:
    """Return the median, lowest and highest rate of a row."""
    work = row["rate"] * row["seconds"]
    return row["rate"], work / row["seconds_max"], work / row["seconds_min"]
