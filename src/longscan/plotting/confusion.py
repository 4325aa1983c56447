"""Confusion matrices of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longscan.plotting.style import SEQUENTIAL, new_figure, save_figure

__all__ = ["plot_confusion"]

MAX_NUMBERS, MAX_NAMES = 20, 60  # classes of which counts and names can be read


def plot_confusion(confusion: Tensor, labels: Sequence[str], path: Path) -> None:
    """Draw how often each class is taken for which; a row sums to one, its counts are written in it.

    Args:
        confusion: (n_classes, n_classes) counts by true and predicted class.
        labels: names of the classes.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    n = len(labels)
    side = min(16.0, max(4.0, 1.6 + 0.45 * min(n, MAX_NAMES)))
    figure = new_figure(side + 1.0, side)
    ax = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(shares.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    if n <= MAX_NUMBERS:
        for row, column in confusion.nonzero().tolist():
            colour = "black" if shares[row, column] > 0.6 else "white"
            ax.text(
                column,
                row,
                str(int(confusion[row, column])),
                ha="center",
                va="center",
                color=colour,
                size="small",
            )
    if n <= MAX_NAMES:
        ax.set_xticks(range(n), labels, rotation=60, ha="right", fontsize="small")
        ax.set_yticks(range(n), labels, fontsize="small")
    ax.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=ax, label="fraction of the true class", shrink=0.8)
    save_figure(figure, path)
