"""Figures of memory: a signal beside its reconstruction, basis functions, convolution kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longscan.data.signals import Trace
from longscan.models import LanguageModel, Model
from longscan.models.common.lti import System
from longscan.models.hippo import held, transition
from longscan.models.hippo_memory import basis
from longscan.models.sequence_classifier import SequenceModel
from longscan.plotting.style import COLOURS, line_style, new_figure, save_figure, tidy

__all__ = ["SHOWN", "layer_systems", "plot_kernels", "plot_memory", "plot_responses"]


SHOWN = ("legs", "legt", "lagt", "fourier")

VIEWS = {"legt": 1.5, "lmu": 1.5, "fourier": 3.0, "foud": 5.0, "lagt": 20.0, "tlagt": 5.0}  # ages, of each

POINTS = 600


def plot_memory(
    signal: Trace,
    reconstructions: Mapping[str, Trace],
    coefficients: Mapping[str, Tensor],
    path: Path,
    title: str,
) -> None:
    """Draw a signal, its reconstruction from each memory, and the memories' coefficients.

    Args:
        signal: the original.
        reconstructions: a name and the reconstruction from each memory.
        coefficients: the same names and their coefficients (n,).
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(10.0, 6.0)
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
    upper.fill_between(
        signal.seconds, signal.low, signal.high, color="#BBBBBB", linewidth=0.8, label="signal"
    )
    for index, (name, trace) in enumerate(reconstructions.items()):
        style = line_style(index)
        middle = (trace.low + trace.high) / 2
        upper.plot(trace.seconds, middle, color=style["color"], linewidth=1.2, label=name)
        size = coefficients[name].abs().numpy()
        above = 2 + 1 / len(size)  # where lines coincide, the shorter one is on top
        lower.plot(size, markersize=3, linewidth=0.5, label=name, zorder=above, **style)
    upper.set(title=title, xlabel="seconds", ylabel="value")
    lower.set(xlabel="n", ylabel="size of coefficient n")
    if any(values.any() for values in coefficients.values()):  # silence has none to show
        lower.set(yscale="log")
    lower.legend(frameon=False, loc="upper right", fontsize="small")
    upper.legend(frameon=False, loc="upper left", fontsize="small")
    for ax in (upper, lower):
        tidy(ax)
    save_figure(figure, path)


def plot_responses(measures: Sequence[str], n: int, shown: int, path: Path) -> None:
    """Draw the weight of each age in the first coefficients.

    Args:
        measures: keys of MEASURES, a panel for each.
        n: coefficients; with fewer, the edges of a window are less sharp.
        shown: coefficients to draw.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed, or a measure has no such n.
    """
    columns = min(len(measures), 2)
    lines = -(-len(measures) // columns)
    figure = new_figure(5.0 * columns, 3.2 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, measure in zip(axes, measures, strict=False):
        if measure == "legs":
            age = (torch.arange(POINTS) + 0.5) / POINTS
            curves, unit = basis(measure, n, age), "age, as a fraction of the time so far"
        else:
            age = torch.arange(POINTS) * VIEWS[measure] / POINTS
            curves, unit = _responses(measure, n, VIEWS[measure] / POINTS), "age, in the measure's own time"
        for index in range(min(shown, n)):
            style: dict[str, Any] = {"markevery": POINTS // 8, "markersize": 3.5, "linewidth": 1.2}
            ax.plot(age, curves[index], label=f"n = {index}", **style, **line_style(index))
        ax.set(title=measure, xlabel=unit, ylabel="weight in coefficient n")
        tidy(ax)
    axes[0].legend(frameon=False, fontsize="small")
    for ax in axes[len(measures) :]:
        ax.set_visible(False)
    save_figure(figure, path)


def plot_kernels(kernels: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw convolution kernels: the weight of the input, by steps ago.

    Args:
        kernels: a name and the values (length,) of each.
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(8.0, 1.0 + 1.4 * len(kernels))
    axes = figure.subplots(len(kernels), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize="medium")
    for ax, (name, values) in zip(axes, kernels.items(), strict=True):
        ax.plot(values.numpy(), color=COLOURS[0], linewidth=1.2)
        ax.set_ylabel(name)
        tidy(ax)
    axes[-1].set_xlabel("steps ago")
    save_figure(figure, path)


def layer_systems(model: Model) -> list[list[System]]:
    """Return the time-invariant state spaces of each layer of a model; they have convolution kernels.

    Args:
        model: of any kind; only language models and sequence models have such layers.
    """
    layers: Iterable[nn.Module] = []
    if isinstance(model, LanguageModel):
        layers = model.backbone.layers
    elif isinstance(model, SequenceModel):
        layers = model.layers
    return [[part for part in layer.modules() if isinstance(part, System)] for layer in layers]


def _responses(measure: str, n: int, dt: float) -> Tensor:
    """Return exp(t A) B at t = 0, dt, 2 dt, ..., (n, POINTS)."""
    A_bar = torch.from_numpy(held(measure, n, dt)[0])
    states = [transition(measure, n)[1]]
    for _ in range(POINTS - 1):
        states.append(A_bar @ states[-1])
    return torch.stack(states, 1)
