"""Bars for systems and measures, the published value as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.plotting.style import reduced_note

__all__ = ["plot_bars"]


def plot_bars(report: Mapping[str, Any], path: Path) -> None:
    """Draw a bar for each system and measure, the range over the seeds, and what was published as a line.

    Args:
        report: of `finish`.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    from longscan.plotting.style import COLOURS, GREY, new_figure, save_figure, tidy

    systems, measures = report["systems"], report["measures"]
    figure = new_figure(max(6.0, 1.0 + 1.2 * len(systems)), 4.0)
    ax = figure.subplots()
    width = 0.8 / len(measures)
    for place, (name, words) in enumerate(measures.items()):
        shift = (place - (len(measures) - 1) / 2) * width
        here = [(x + shift, found[name]) for x, found in enumerate(systems.values()) if name in found]
        means = [found["mean"] for _, found in here]
        below = [found["mean"] - found["range"][0] for _, found in here]
        above = [found["range"][1] - found["mean"] for _, found in here]
        spread = [below, above] if any(above) else None
        colour = COLOURS[place % len(COLOURS)]
        ax.bar([x for x, _ in here], means, 0.9 * width, yerr=spread, color=colour, label=words, capsize=2)
        for x, bar in here:
            if round(bar["mean"], 1) == 0:  # a bar that nobody sees was measured all the same
                ax.annotate("0.0", (x, 0), (0, 2), textcoords="offset points", ha="center", fontsize="small")
        for x, system in enumerate(systems):
            if name not in systems[system]:
                place_of = (x + shift, 1.5)
                ax.annotate(
                    "not measured", place_of, rotation=90, ha="center", color=GREY, fontsize="x-small"
                )
            if (value := report["published"].get(name, {}).get(system)) is not None:
                ends = (x + shift - width / 2, x + shift + width / 2)
                label = "published" if "published" not in ax.get_legend_handles_labels()[1] else None
                ax.plot(ends, (value, value), color="black", linewidth=2, label=label)
    ax.set_xticks(range(len(systems)), list(systems))
    ax.set(ylabel="right answers (%)", xlim=(-0.6, len(systems) - 0.4), ylim=(0, 105))
    tidy(ax)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(measures) + 1)
    save_figure(figure, path, reduced_note(report))
