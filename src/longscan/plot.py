"""Figures, as PNG or SVG files; matplotlib is an extra and is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.errors import LongscanError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_losses"]

# Two colours of the Okabe-Ito palette, which readers with any common colour blindness tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"


def plot_losses(metrics: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the loss curves of a training run.

    Args:
        metrics: the records of `metrics.jsonl`: those with `loss` make the upper panel, those with
            `valid_bits_per_byte` the lower one.
        path: the file to write; its suffix, .png or .svg, chooses the format.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    records = list(metrics)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    valid = [
        (record["step"], record["valid_bits_per_byte"])
        for record in records
        if "valid_bits_per_byte" in record
    ]
    figure = _figure(7.0, 6.0 if valid else 3.5)
    panels = figure.subplots(2 if valid else 1, 1, sharex=True, squeeze=False)[:, 0]
    panels[0].plot(*_columns(losses), color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
    panels[0].plot(*_columns(_smooth(losses)), color=BLUE, linewidth=1.6, label="smoothed")
    panels[0].set_ylabel("training loss (nats per token)")
    panels[0].legend(frameon=False)
    if valid:
        step, best = min(valid, key=lambda point: point[1])
        panels[1].plot(*_columns(valid), color=VERMILION, marker="o", markersize=3, linewidth=1.6)
        panels[1].set_ylabel("validation (bits per byte)")
        panels[1].set_title(f"lowest {best:.3f} at step {step:,}", fontsize="medium", loc="right")
    panels[-1].set_xlabel("step")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches, drawn without any display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LongscanError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return points as the two lists that plotting takes."""
    return [x for x, _ in points], [y for _, y in points]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the exponential moving average over a fiftieth of the points, fewer at the steep beginning."""
    smoothed: list[tuple[int, float]] = []
    for number, (step, value) in enumerate(points):
        new = 1 / max(1.0, min(len(points) / 50, number / 10))
        smoothed.append((step, (1 - new) * smoothed[-1][1] + new * value if smoothed else value))
    return smoothed
