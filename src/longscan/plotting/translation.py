"""BLEU against sentence length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.plotting.style import line_style, new_figure, save_figure, tidy

__all__ = ["plot_bleu"]


def plot_bleu(reports: Mapping[str, Mapping[str, Any]], path: Path, note: str = "") -> None:
    """Draw BLEU against the length of the source, a line for each system (Bahdanau et al., figure 2).

    Args:
        reports: a name and what `translate evaluate --json` says of each.
        path: the file to write.
        note: see `save_figure`.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(7.0, 4.5)
    ax = figure.subplots()
    ticks: dict[float, str] = {}
    for index, (name, report) in enumerate(reports.items()):
        points = report["by_length"]
        x = [point["mean_words"] for point in points]
        ticks |= {
            value: f"{point['words']}\nn={point['sentences']:,}"
            for value, point in zip(x, points, strict=True)
        }
        label, style = f"{name} ({report['bleu']:.1f} on all)", line_style(index)
        ax.plot(x, [point["bleu"] for point in points], label=label, **style)
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize="small")
    ax.set(xlabel="words in the source sentence", ylabel="BLEU")
    ax.set_ylim(bottom=0)
    tidy(ax)
    ax.legend(frameon=False)
    save_figure(figure, path, note)
