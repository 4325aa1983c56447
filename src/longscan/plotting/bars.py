"""Bars for systems and measures, the published value as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.plotting.style import COLOURS, GREY, new_figure, reduced_note, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_bars", "plot_bars"]


def plot_bars(report: Mapping[str, Any], path: Path, label: str = "accuracy (%)") -> None:
    """Draw a bar for each system and measure, the range over the seeds, and what was published as a line.

    Args:
        report: of `reproduce.accuracy_table.finish`.
        path: the file to write.
        label: of the vertical axis.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(max(6.0, 1.0 + 1.2 * len(report["systems"])), 4.0)
    draw_bars(figure.subplots(), report, label)
    save_figure(figure, path, reduced_note(report))


def draw_bars(ax: Axes, report: Mapping[str, Any], label: str = "accuracy (%)") -> None:
    """Draw the bars of `plot_bars` into a part of a figure.

    Args:
        ax: to draw on.
        report: see `plot_bars`.
        label: likewise.
    """
    systems, measures = report["systems"], report["measures"]
    width = 0.8 / len(measures)
    for index, (name, title) in enumerate(measures.items()):
        shift = (index - (len(measures) - 1) / 2) * width
        here = [(x + shift, result[name]) for x, result in enumerate(systems.values()) if name in result]
        means = [result["mean"] for _, result in here]
        below = [result["mean"] - result["range"][0] for _, result in here]
        above = [result["range"][1] - result["mean"] for _, result in here]
        spread = [below, above] if any(above) else None
        colour = COLOURS[index % len(COLOURS)]
        ax.bar([x for x, _ in here], means, 0.9 * width, yerr=spread, color=colour, label=title, capsize=2)
        for x, bar in here:
            if round(bar["mean"], 1) == 0:  # an invisible bar was measured all the same
                ax.annotate("0.0", (x, 0), (0, 2), textcoords="offset points", ha="center", fontsize="small")
        for x, system in enumerate(systems):
            if name not in systems[system]:
                position = (x + shift, 1.5)
                ax.annotate(
                    "not measured", position, rotation=90, ha="center", color=GREY, fontsize="x-small"
                )
            if (value := report["published"].get(name, {}).get(system)) is not None:
                ends = (x + shift - width / 2, x + shift + width / 2)
                once = "published" if "published" not in ax.get_legend_handles_labels()[1] else None
                ax.plot(ends, (value, value), color="black", linewidth=2, label=once)
    ax.set_xticks(range(len(systems)), list(systems))
    ax.set(ylabel=label, xlim=(-0.6, len(systems) - 0.4), ylim=(0, 105))
    tidy(ax)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(measures) + 1)
