"""Loss curves of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longscan.plotting.style import (
    BLUE,
    COLOURS,
    MARKERS,
    VERMILION,
    columns_of,
    new_figure,
    points_of,
    save_figure,
    tidy,
)

__all__ = ["plot_losses"]


def plot_losses(
    metrics: Iterable[Mapping[str, Any]],
    path: str | Path,
    unit: str = "nats per token",
    score: str = "",
    scores: Mapping[str, str] | None = None,
) -> None:
    """Draw the curves of a training run.

    Args:
        metrics: the records of `metrics.jsonl`: `loss` and `valid_loss` make the upper panel.
        path: the file to write; its suffix, .png, .svg or .pdf, chooses the format.
        unit: of both losses.
        score: label of the axis of the lower panel.
        scores: other keys with a name for each, which make the lower panel; without them there is none.

    Raises:
        LongscanError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    records = list(metrics)
    lines = {name: line for key, name in (scores or {}).items() if (line := points_of(records, key))}
    figure = new_figure(7.0, 6.0 if lines else 3.5)
    panels = figure.subplots(2 if lines else 1, 1, sharex=True, squeeze=False)[:, 0]
    losses, valid = points_of(records, "loss"), points_of(records, "valid_loss")
    if len(losses) > 50:
        panels[0].plot(*columns_of(losses), color=BLUE, alpha=0.3, linewidth=0.8, label="training, each step")
        panels[0].plot(*columns_of(_smooth(losses)), color=BLUE, linewidth=1.6, label="training, smoothed")
    else:  # too few to smooth; a single one is a dot
        dot = "." if len(losses) == 1 else ""
        panels[0].plot(*columns_of(losses), color=BLUE, linewidth=1.6, marker=dot, label="training")
    panels[0].set_ylabel(f"loss ({unit})")
    if valid:
        step, best = min(valid, key=lambda point: point[1])
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6}
        panels[0].plot(*columns_of(valid), color=VERMILION, label="validation", **style)
        title = f"lowest validation loss {best:.3f} at step {step:,}"
        panels[0].set_title(title, fontsize="medium", loc="right")
    for number, (name, line) in enumerate(lines.items()):
        style = {"color": COLOURS[(number + 1) % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        panels[1].plot(*columns_of(line), label=name, markersize=3, linewidth=1.6, **style)
        panels[1].set_ylabel(f"validation {score}")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        tidy(panel)
        if len(panel.lines) > 1:
            panel.legend(frameon=False)
    save_figure(figure, Path(path))


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the exponential moving average over a fiftieth of the points, fewer at the steep start."""
    smoothed: list[tuple[int, float]] = []
    for number, (step, value) in enumerate(points):
        new = 1 / max(1.0, min(len(points) / 50, number / 10))
        smoothed.append((step, (1 - new) * smoothed[-1][1] + new * value if smoothed else value))
    return smoothed
