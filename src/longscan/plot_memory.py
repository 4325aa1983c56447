"""Figures of memories: a signal beside what is remembered of it, what coefficients look at, kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from longscan.checkpoint import load
from longscan.config import nearest
from longscan.drawing import COLOURS, MARKERS, Out, check_out, new_figure, save_figure, tidy
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, LanguageModel, Model
from longscan.models.hippo import MEASURES, held, transition
from longscan.models.lti import System
from longscan.models.memory import basis
from longscan.sequence_checkpoint import is_sequence_model, load_sequence_model
from longscan.tasks import SequenceModel

__all__ = ["Trace", "commands", "plot_kernels", "plot_memory", "plot_responses"]

SHOWN = ("legs", "legt", "lagt", "fourier")
VIEWS = {"legt": 1.5, "lmu": 1.5, "fourier": 3.0, "foud": 5.0, "lagt": 20.0, "tlagt": 5.0}  # ages, of each
POINTS = 600


@dataclass
class Trace:
    """A long signal as wide as a figure: the lowest and the highest sample of each column.

    Attributes:
        seconds: (columns,) where each begins.
        low: (columns,), NaN where nothing is known.
        high: likewise.
    """

    seconds: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def empty(cls, length: int, rate: float, columns: int = 1200) -> Trace:
        """Make room for a signal.

        Args:
            length: its samples.
            rate: samples per second.
            columns: at most so many.
        """
        columns = min(columns, length)
        starts = np.arange(columns) * length / columns / rate
        return cls(starts, np.full(columns, np.nan), np.full(columns, np.nan))

    def add(self, begin: int, samples: Tensor, length: int) -> None:
        """Put samples in their columns.

        Args:
            begin: where they stand.
            samples: (n,).
            length: of the whole signal.
        """
        columns = len(self.low)
        place = np.arange(begin, begin + len(samples)) * columns // length
        values = samples.double().numpy()
        first, at = np.unique(place, return_index=True)
        self.low[first] = np.fmin(self.low[first], np.minimum.reduceat(values, at))
        self.high[first] = np.fmax(self.high[first], np.maximum.reduceat(values, at))


def plot_memory(
    signal: Trace, told: Mapping[str, Trace], coefficients: Mapping[str, Tensor], path: Path, title: str
) -> None:
    """Draw a signal, what memories tell of it, and what is in them.

    Args:
        signal: as it was.
        told: a name and the reconstruction of each memory.
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
    for place, (name, trace) in enumerate(told.items()):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        upper.plot(trace.seconds, (trace.low + trace.high) / 2, color=colour, linewidth=1.2, label=name)
        size = coefficients[name].abs().numpy()
        above = 2 + 1 / len(size)  # the first coefficients of all are about the same: the fewer lie on top
        lower.plot(size, color=colour, marker=marker, markersize=3, linewidth=0.5, label=name, zorder=above)
    upper.set(title=title, xlabel="seconds", ylabel="value")
    lower.set(xlabel="n", ylabel="size of coefficient n")
    if any(values.any() for values in coefficients.values()):  # not so of silence
        lower.set(yscale="log")
    lower.legend(frameon=False, loc="upper right", fontsize="small")
    upper.legend(frameon=False, loc="upper left", fontsize="small")
    for ax in (upper, lower):
        tidy(ax)
    save_figure(figure, path)


def plot_responses(measures: Sequence[str], n: int, shown: int, path: Path) -> None:
    """Draw how much each moment of the past counts in the first coefficients.

    Args:
        measures: keys of MEASURES, a panel for each.
        n: coefficients; the fewer, the less a window has sharp edges.
        shown: how many of them to draw.
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
            curves, unit = basis(measure, n, age), "age, as a part of all that passed"
        else:
            age = torch.arange(POINTS) * VIEWS[measure] / POINTS
            curves, unit = _responses(measure, n, VIEWS[measure] / POINTS), "age, in the measure's own time"
        for place in range(min(shown, n)):
            style: dict[str, Any] = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
            }
            style |= {"label": f"n = {place}"}
            ax.plot(age, curves[place], markevery=POINTS // 8, markersize=3.5, linewidth=1.2, **style)
        ax.set(title=measure, xlabel=unit, ylabel="weight in coefficient n")
        tidy(ax)
    axes[0].legend(frameon=False, fontsize="small")
    for ax in axes[len(measures) :]:
        ax.set_visible(False)
    save_figure(figure, path)


def plot_kernels(kernels: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw convolution kernels: how much the input so many steps ago counts.

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


def basis_command(
    measure: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(MEASURES)}; several, one after the other.")
    ] = None,
    n: Annotated[int, typer.Option(help="Coefficients.")] = 64,
    shown: Annotated[int, typer.Option(help="How many of them to draw.")] = 5,
    out: Out = Path("basis.png"),
) -> None:
    """How much each moment of the past counts in the coefficients of a memory.

    Raises:
        UsageError: there is no such measure, a number makes no sense, or the figure has no format.
    """
    check_out(out)
    for name in measure or ():
        if name not in MEASURES:
            raise UsageError(f"--measure: there is no {name!r}{nearest(name, MEASURES)}")
    if not 1 <= n <= 512:
        raise UsageError(f"--n: expected 1 to 512 coefficients, got {n}.")
    if not 1 <= shown <= 12:
        raise UsageError(f"--shown: expected 1 to 12, got {shown}.")
    plot_responses(measure or SHOWN, n, shown, out)
    typer.echo(f"wrote {out}")


def kernel(
    model: Annotated[str, typer.Argument(help="A directory, or the name of a model for a fresh one.")],
    length: Annotated[int, typer.Option(help="Steps.")] = 512,
    layer: Annotated[int, typer.Option(help="From 0; the last is -1.")] = 0,
    channels: Annotated[int, typer.Option(help="How many to draw, the first ones.")] = 4,
    seed: Annotated[int, typer.Option(help="Of a fresh model.")] = 0,
    out: Out = Path("kernel.png"),
) -> None:
    """The convolution kernels of a model of state spaces: how much the input so many steps ago counts.

    Raises:
        UsageError: a number makes no sense, there is no such layer, or the figure has no format.
        LongscanError: the model has no kernels, or can't be read.
    """
    check_out(out)
    if not 2 <= length <= 1 << 20:
        raise UsageError(f"--length: expected 2 to {1 << 20:,} steps, got {length:,}.")
    if not 1 <= channels <= 12:
        raise UsageError(f"--channels: expected 1 to 12, got {channels}.")
    loaded: Model
    if model in MODELS:
        entry = MODELS[model]
        config = entry.config.from_dict(entry.presets["tiny"])
        loaded = entry.cls(config, generator=torch.Generator().manual_seed(seed))
    else:
        loaded = load_sequence_model(model) if is_sequence_model(model) else load(model)[0]
    layers: Iterable[nn.Module] = []
    if isinstance(loaded, LanguageModel | SequenceModel):
        layers = loaded.backbone.layers if isinstance(loaded, LanguageModel) else loaded.layers
    kind = loaded.config.body if isinstance(loaded, SequenceModel) else type(loaded).__name__
    systems = [[part for part in block.modules() if isinstance(part, System)] for block in layers]
    if not any(systems):
        raise LongscanError(
            f"{model}: a model of kind {kind} has no convolution kernels. Expected one of time-invariant "
            "state spaces, such as s4, s4d, lssl or h3."
        )
    if not -len(systems) <= layer < len(systems) or not systems[layer]:
        raise UsageError(f"--layer: expected 0 to {len(systems) - 1} with a state space, got {layer}.")
    with torch.no_grad():
        drawn = systems[layer][0].kernel(length)[:channels].float()
    kernels = {f"channel {place}": values for place, values in enumerate(drawn)}
    plot_kernels(kernels, out, f"{kind}, layer {layer % len(systems)}")
    typer.echo(f"wrote {out}")


commands = {"basis": basis_command, "kernel": kernel}


def _responses(measure: str, n: int, dt: float) -> Tensor:
    """Return exp(t A) B at t = 0, dt, 2 dt, ..., (n, POINTS)."""
    A_bar = torch.from_numpy(held(measure, n, dt)[0])
    states = [transition(measure, n)[1]]
    for _ in range(POINTS - 1):
        states.append(A_bar @ states[-1])
    return torch.stack(states, 1)
