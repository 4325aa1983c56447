"""Figures of a language model at a text: time steps, states, and matrices of attention by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longscan.plotting.style import BLUE, DEEP, DIVERGING, SEQUENTIAL, new_figure, save_figure, tidy
from longscan.plotting.tokens import draw_text, explained, label_tokens, text_height, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_matrices", "plot_states", "plot_steps"]

MARGIN = 0.3  # inches
DECADES = 3  # of a logarithmic colour scale, at most


def plot_steps(
    steps: Tensor,
    layers: Sequence[int],
    tokens: Sequence[str],
    shown: int | None,
    mean: str,
    path: Path,
    title: str,
) -> None:
    """Draw a text on colours of its time steps, and below it the time steps of each layer and token.

    Args:
        steps: (n_layers, n) time steps.
        layers: numbers of the layers.
        tokens: (n) as `visible` returns them.
        shown: index of the layer that colours the text; None: the mean over all.
        mean: over what the time steps are one already.
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    values = steps.mean(0) if shown is None else steps[shown]
    label = f"Δ, {mean} and layers" if shown is None else f"Δ of layer {layers[shown]}, {mean}"
    upper, map_height = text_height(tokens), 1.1 + _rows(layers)
    width, top = text_width() + 2 * MARGIN + 0.4, upper + 1.15
    height = top + map_height
    figure = new_figure(width, height)
    from matplotlib.colors import LinearSegmentedColormap

    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.0, 0.0, 1.0, map_height / height))  # the text has letters of a fixed size
    figure.text(MARGIN / width, 1 - 0.15 / height, title, va="top")
    text = figure.add_axes((MARGIN / width, 1 - (0.5 + upper) / height, text_width() / width, upper / height))
    shades = draw_text(text, tokens, values)
    bar = figure.add_axes((MARGIN / width, 1 - (0.7 + upper) / height, 2.5 / width, 0.1 / height))
    figure.colorbar(shades, cax=bar, orientation="horizontal").ax.locator_params(nbins=5)
    figure.text((MARGIN + 2.7) / width, 1 - (0.65 + upper) / height, label, va="center", fontsize="small")
    ax, deep = figure.subplots(), LinearSegmentedColormap.from_list("deep", DEEP)
    _draw_layers(ax, steps, layers, tokens, f"Δ, {mean}", deep)
    save_figure(figure, path, explained(tokens))


def plot_states(
    norms: Tensor,
    half_lives: Tensor,
    layers: Sequence[int],
    tokens: Sequence[str],
    path: Path,
    title: str,
    note: str,
) -> None:
    """Draw the norm of the state of each layer after each token, and its half-lives.

    Args:
        norms: (n_layers, n).
        half_lives: (n_layers, 3) quartiles, in tokens.
        layers: numbers of the layers.
        tokens: (n) as `visible` returns them.
        path: the file to write.
        title: of the figure.
        note: a caption.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(11.0, 1.7 + _rows(layers))
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1), sharey=True)
    _draw_layers(left, norms, layers, tokens, "norm of the state after each token")
    low, middle, high = half_lives.clamp(max=1e7).T.tolist()
    rows = range(len(layers))
    right.hlines(rows, low, high, color=BLUE, linewidth=3, alpha=0.4)
    right.plot(middle, rows, color=BLUE, marker="o", linestyle="none")
    right.set_xscale("log")
    _plain(right.xaxis)
    right.set_xlabel("tokens")
    right.set_title("half-life: median and quartiles", fontsize="medium")
    right.tick_params(labelleft=False)
    tidy(right)
    save_figure(figure, path, " ".join(filter(None, (note, explained(tokens)))))


def plot_matrices(
    panels: Mapping[str, tuple[Tensor, str]], tokens: Sequence[str], path: Path, title: str, note: str = ""
) -> None:
    """Draw matrices between the tokens of a text, each with its own scale of colours.

    Args:
        panels: a title, the matrix (n, n) of queries and keys, and the label of its colours. Without negative
            entries these are logarithmic.
        tokens: (n) as `visible` returns them.
        path: the file to write.
        title: of the figure.
        note: a caption.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    side = min(8.0, max(2.5, 0.2 * len(tokens)))
    figure = new_figure((side + 2.4) * len(panels), side + 1.6)
    figure.suptitle(title, fontsize="medium")
    for ax, (name, (matrix, label)) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        causal = torch.ones_like(matrix, dtype=torch.bool).tril()
        drawn = torch.where(causal, matrix, torch.nan).float().numpy()
        signed, most = bool((matrix < 0).any()), float(matrix.abs().max())
        scale = {"cmap": DIVERGING, "vmin": -most, "vmax": most} if signed else _logarithmic(matrix)
        bar = figure.colorbar(
            ax.imshow(drawn, interpolation="nearest", **scale), ax=ax, label=label, shrink=0.8
        )
        if "norm" in scale:
            _plain(bar.ax.yaxis)
        ax.set_title(name, fontsize="small")
        label_tokens(ax, "x", tokens, "keys: tokens attended to")
        label_tokens(ax, "y", tokens, "queries: tokens that attend")
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, " ".join(filter(None, (note, explained(tokens)))))


def _rows(layers: Sequence[int]) -> float:
    """Return the height of a map with a row for each layer, in inches."""
    return max(1.2, min(8.0, 0.24 * len(layers)))


def _draw_layers(
    ax: Axes,
    values: Tensor,
    layers: Sequence[int],
    tokens: Sequence[str],
    label: str,
    colours: Any = SEQUENTIAL,
) -> None:
    """Draw positive values (n_layers, n) by layer and token, on a logarithmic scale of colours."""
    figure: Any = ax.figure
    scale = {**_logarithmic(values), "cmap": colours}
    image = ax.imshow(values.float().numpy(), aspect="auto", origin="lower", interpolation="nearest", **scale)
    bar = figure.colorbar(image, ax=ax, location="top", label=label, shrink=0.5, aspect=40, pad=0.02)
    _plain(bar.ax.xaxis)
    every = -(-len(layers) // 24)
    ax.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize="small")
    ax.set_ylabel("layer")
    label_tokens(ax, "x", tokens, "token")


def _plain(axis: Any) -> None:
    """Give a logarithmic axis ticks at 1, 2 and 5 times the powers of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    digits: tuple[float, ...] = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    if high < 10 * low:
        digits = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _logarithmic(values: Tensor) -> dict[str, Any]:
    """Return colours and their scale for positive values: three decades at most."""
    from matplotlib.colors import LogNorm

    most = float(values.max())
    if not 0 < most < math.inf:
        return {"cmap": SEQUENTIAL}
    least = max(float(values[values > 0].min()), most / 10**DECADES)
    return {"cmap": SEQUENTIAL, "norm": LogNorm(min(least, 0.99 * most), most, clip=True)}
