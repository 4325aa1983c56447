"""Figures of images: the paths of a scan, effective receptive fields, maps of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longscan.ops import ScanPattern
from longscan.plotting.style import GREY, SEQUENTIAL, VERMILION, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_fields", "plot_maps", "plot_paths"]

GAP = 0.25  # between frames, in patches
FADED = 0.4  # opacity of an image below a path


def plot_paths(frames: Sequence[Tensor], pattern: ScanPattern, path: Path, title: str) -> None:
    """Draw the paths of a scan on an image, or on the frames of a video side by side.

    Args:
        frames: (height, width, 3) bytes each; a single one for an image.
        pattern: of a grid (rows, columns), or (n_frames, rows, columns).
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    rows, columns = pattern.shape[-2:]
    total = len(frames) * (columns + GAP) - GAP
    n_paths = len(pattern.order)
    across = min(n_paths, 4 if len(frames) == 1 else 2)
    lines = -(-n_paths // across)
    width = min(3.0, 11 / across) if len(frames) == 1 else 11 / across
    figure = new_figure(width * across + 0.9, (width * rows / total + 0.3) * lines + 0.35)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(lines, across, squeeze=False)
    for ax in axes.flat[n_paths:]:
        ax.set_visible(False)
    shades: Any = None
    for number, (ax, order) in enumerate(zip(axes.flat, pattern.order, strict=False)):
        for frame, pixels in enumerate(frames):
            left = frame * (columns + GAP)
            extent = (left - 0.5, left + columns - 0.5, rows - 0.5, -0.5)
            ax.imshow(pixels.numpy(), extent=extent, alpha=FADED)
        points = _points(order, rows, columns)
        if len(frames) > 1:  # where lines from frame to frame would hide each other
            size = min(9.0, 30 * width / total)
            for step, (x, y) in enumerate(points.tolist()):
                ax.text(x, y - 0.3, str(step), ha="center", va="center", fontsize=size)
        lines_of = None if pattern.seq_idx is None else pattern.seq_idx[number]
        shades = _draw_path(ax, points, lines_of, jumps=len(frames) == 1)
        ax.set(xlim=(-0.5, total - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
        ax.set_title(f"path {number}", fontsize="small")
        ax.spines[:].set_visible(False)
    figure.colorbar(shades, ax=axes, label="step", shrink=0.8, pad=0.01)
    save_figure(figure, path)


def _points(order: Tensor, rows: int, columns: int) -> Tensor:
    """Return (n, 2) x and y of each step; frames stand side by side."""
    frame, rest = order // (rows * columns), order % (rows * columns)
    return torch.stack([frame * (columns + GAP) + rest % columns, (rest // columns).float()], 1)


def _draw_path(ax: Axes, points: Tensor, lines: Tensor | None, jumps: bool) -> Any:
    """Draw arrows between neighbours and thin lines where the path jumps; return what a colour bar needs.

    Args:
        ax: to draw on.
        points: (n, 2) x and y of each step.
        lines: (n,) the sequence of each step, if there are several; nothing is drawn between two.
        jumps: whether to draw the thin lines.
    """
    start, move, steps = points[:-1], points.diff(dim=0), torch.arange(len(points) - 1)
    if lines is not None:
        inside = lines.diff() == 0
        start, move, steps = start[inside], move[inside], steps[inside]
    near = move.norm(dim=1) <= 1
    far = ~near if jumps else torch.zeros_like(near)
    for (x, y), (dx, dy) in zip(start[far].tolist(), move[far].tolist(), strict=True):
        ax.plot([x, x + dx], [y, y + dy], color=GREY, linewidth=0.4, linestyle=":")
    head: dict[str, Any] = {"headwidth": 4.5, "headlength": 4.5, "headaxislength": 4}
    shades = ax.quiver(
        *start[near].numpy().T, *move[near].numpy().T, steps[near].numpy(), cmap=SEQUENTIAL,
        angles="xy", scale_units="xy", scale=1.0, width=0.08, units="xy", **head,
    )  # fmt: skip
    shades.set_clim(0, len(points) - 1)
    ax.plot(*points[0].tolist(), marker="o", color=VERMILION, markersize=4)  # the start
    return shades


def plot_fields(fields: Mapping[str, Tensor], path: Path, note: str = "") -> None:
    """Draw effective receptive fields beside each other.

    Args:
        fields: a title and the field (height, width) of each panel, at most 1.
        path: the file to write.
        note: a caption.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(2.9 * min(len(fields), 4) + 1.0, 3.2 * -(-len(fields) // 4) + 0.3)
    across = min(len(fields), 4)
    axes = figure.subplots(-(-len(fields) // across), across, squeeze=False)
    for ax in axes.flat[len(fields) :]:
        ax.set_visible(False)
    image: Any = None
    for ax, (name, field) in zip(axes.flat, fields.items(), strict=False):
        image = ax.imshow(
            field.clamp_min(1e-4).log10().numpy(), cmap=SEQUENTIAL, vmin=-4, vmax=0, interpolation="nearest"
        )
        ax.set_title(name, fontsize="small")
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=axes, label="gradient; the largest is 1", shrink=0.8)
    bar.set_ticks([-4, -3, -2, -1, 0], labels=["≤ 10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"])
    save_figure(figure, path, note)


def plot_maps(
    image: Tensor,
    rows: Mapping[str, Mapping[str, Tensor]],
    path: Path,
    title: str,
    label: str,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draw maps of patches, row by row, each row beside the image.

    Args:
        image: (height, width, 3) bytes.
        rows: a name and the maps of each row: a title and (grid rows, grid columns).
        path: the file to write.
        title: of the figure.
        label: of the colours.
        marks: None for a colour scale of each map; else maps are at least 0, a row shares a scale, and some
            rows have a mark: x and y, as fractions of width and height.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    across = 1 + max(map(len, rows.values()))
    size, tall = 2.1 if across < 6 else 1.8, image.shape[0] / image.shape[1]
    extra = 0.4 if marks is None else 0.0
    figure = new_figure((size + extra) * across + 1.0, (size * tall + 0.35) * len(rows) + 0.35)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    square: dict[str, Any] = {"marker": "s", "markersize": 7, "markerfacecolor": "none", "color": VERMILION}
    view: dict[str, Any] = {"extent": (0, 1, 1, 0), "aspect": tall}
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        line[0].imshow(image.numpy(), **view)
        line[0].set_title(name, fontsize="small")
        top = max(float(values.max()) for values in maps.values())
        limits = {} if marks is None else {"vmin": 0.0, "vmax": top}
        drawn: Any = None
        for ax, (part, values) in zip(line[1:], maps.items(), strict=False):
            drawn = ax.imshow(values.numpy(), cmap=SEQUENTIAL, interpolation="nearest", **limits, **view)
            ax.set_title(part, fontsize="small")
            if marks is None:
                ends = [float(values.min()), float(values.max())]
                bar = figure.colorbar(drawn, ax=ax, shrink=0.8)
                bar.set_ticks(ends, labels=[f"{end:.4g}" for end in ends], fontsize="x-small")
        for ax in line if marks is not None and name in marks else ():
            ax.plot(*(marks or {})[name], **square)
        if marks is not None:
            figure.colorbar(drawn, ax=line, label=label, shrink=0.8, pad=0.01)
    save_figure(figure, path, label if marks is None else "")
