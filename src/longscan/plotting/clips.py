"""Results on clips: bars of accuracy, and the frames of example clips below them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longscan.plotting.bars import draw_bars
from longscan.plotting.style import new_figure, reduced_note, save_figure

__all__ = ["plot_clips"]

GAP = 2  # pixels between frames


def plot_clips(report: Mapping[str, Any], clips: Mapping[str, npt.NDArray[np.uint8]], path: Path) -> None:
    """Draw a bar for each system and task, and below them the frames of clips, in rows.

    Args:
        report: see `plot_bars`.
        clips: title -> (n_frames, height, width) grey values.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(7.0, 3.2 + 0.95 * len(clips))
    grid = figure.add_gridspec(2, height_ratios=(3.2, 0.95 * len(clips)))
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    draw_bars(above.subplots(), report)
    for ax, (title, frames) in zip(np.ravel(below.subplots(len(clips), 1)), clips.items(), strict=True):
        padded = np.pad(frames, ((0, 0), (0, 0), (0, GAP)), constant_values=255)
        strip = np.concatenate(list(padded), 1)[:, :-GAP]
        ax.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(f"{title}, {len(frames)} frames", fontsize="small", loc="left", pad=3)
        ax.set_axis_off()
    save_figure(figure, path, reduced_note(report))
