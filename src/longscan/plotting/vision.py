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

__all__ = ["path_titles", "plot_fields", "plot_maps", "plot_paths"]

GAP = 0.25  # between frames, in patches
FADED = 0.4  # opacity of an image below a path
LEAST_MARK = 0.04  # side of the mark of a patch, as a fraction of the image: smaller ones hide what they mark


def path_titles(order: Tensor, grid: Sequence[int]) -> list[str]:
    """Return what figures call the paths of a scan: a number, the lines that it follows, and "reversed".

    Args:
        order: (n_paths, n) the position at each step.
        grid: rows and columns, or frames, rows and columns; their product is n.

    Returns:
        Such as "path 3: columns reversed"; a path through a video is "spatial-first" if it goes along rows,
        "temporal-first" if it goes from frame to frame.
    """
    names = ("columns", "rows") if len(grid) == 2 else ("temporal-first", "columns", "spatial-first")
    titles = []
    for number, path in enumerate(order):
        moves = torch.stack(torch.unravel_index(path, tuple(grid)), 1).diff(dim=0).abs()
        along = moves[moves.sum(1) == 1].sum(0)  # steps between neighbours, on each axis
        backwards = " reversed" if path[0] > path[-1] else ""
        name = f": {names[int(along.argmax())]}{backwards}" if along.any() else ""
        titles.append(f"path {number}{name}")
    return titles


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
    titles = path_titles(pattern.order, pattern.shape)
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
        ax.set_title(titles[number], fontsize="small")
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
    marks: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Draw maps of patches, row by row, each row beside the image.

    Args:
        image: (height, width, 3) bytes.
        rows: a name and the maps of each row: a title and (grid rows, grid columns).
        path: the file to write.
        title: of the figure.
        label: of the colours.
        marks: None for a colour scale of each map, whose ends are in its title; else maps are at least 0, a
            row shares a scale, and some rows have a mark: the row and the column of a patch.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    across = 1 + max(map(len, rows.values()))
    size, tall = 2.1 if across < 6 else 1.8, image.shape[0] / image.shape[1]
    titled = 0.35 if marks is not None else 0.75
    figure = new_figure(size * across + 1.0, (size * tall + titled) * len(rows) + 0.35)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    view: dict[str, Any] = {"extent": (0, 1, 1, 0), "aspect": tall}
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        line[0].imshow(image.numpy(), **view)
        line[0].set_title(name, fontsize="small")
        limits = (
            {} if marks is None else {"vmin": 0.0, "vmax": max(float(each.max()) for each in maps.values())}
        )
        drawn: Any = None
        for ax, (part, values) in zip(line[1:], maps.items(), strict=False):
            drawn = ax.imshow(values.numpy(), cmap=SEQUENTIAL, interpolation="nearest", **limits, **view)
            ends = f"\n{float(values.min()):.4g} to {float(values.max()):.4g}" if marks is None else ""
            ax.set_title(f"{part}{ends}", fontsize="small")
        if marks is not None:
            figure.colorbar(drawn, ax=line, label=label, shrink=0.8, pad=0.01)
            if name in marks:
                _mark(line, marks[name], next(iter(maps.values())).shape)
    save_figure(
        figure,
        path,
        f"{label}; each map from dark, its least, to bright, its largest" if marks is None else "",
    )


def _mark(axes: Sequence[Axes], patch: tuple[int, int], grid: Sequence[int]) -> None:
    """Draw a frame around a patch (row, column) of a grid, on images whose sides are 1."""
    (row, column), (rows, columns) = patch, grid
    width, height = max(1 / columns, LEAST_MARK), max(1 / rows, LEAST_MARK)
    left, top = (column + 0.5) / columns - width / 2, (row + 0.5) / rows - height / 2
    x, y = [left, left + width, left + width, left, left], [top, top, top + height, top + height, top]
    for ax in axes:
        ax.plot(x, y, color=VERMILION, linewidth=1.2, clip_on=False)
