"""`longscan remember`: compress a signal online into a few coefficients, and reconstruct it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from longscan import ops
from longscan.commands._options import Json
from longscan.core.checks import check_whole
from longscan.core.config import brief, count, nearest
from longscan.core.optional import installed, remedy
from longscan.data.signals import TESTS, Signal, Trace, open_signal
from longscan.errors import LongscanError, UsageError
from longscan.inference.remember import Remembered, remember
from longscan.models.hippo import MEASURES
from longscan.models.hippo_memory import Memory
from longscan.plotting.memory import plot_memory
from longscan.plotting.style import check_out

__all__ = ["command"]


MAX_N = 1024

LOSS = 0.1  # fraction of the energy whose loss deserves a warning

MAX_SAMPLES = 100_000_000  # of a test signal, which is held in memory


def command(
    source: Annotated[
        str, typer.Argument(metavar="SIGNAL", help=f"A .wav, .csv or .npy file, or {', '.join(TESTS)}.")
    ],
    n: Annotated[
        list[int] | None, typer.Option(help="Number of coefficients; repeatable. [default: 64]")
    ] = None,
    measure: Annotated[str, typer.Option(help=f"HiPPO measure: {', '.join(MEASURES)}.")] = "legs",
    window: Annotated[
        float | None, typer.Option(help="Time scale of any measure but legs, in seconds.")
    ] = None,
    method: Annotated[str, typer.Option(help="Discretisation of legs: bilinear, zoh, ...")] = "bilinear",
    rate: Annotated[
        float | None, typer.Option(help="Samples per second, for files that do not state it.")
    ] = None,
    channel: Annotated[int, typer.Option(help="Channel of the file, or column of the table, from 0.")] = 0,
    samples: Annotated[int, typer.Option(help="Length of a test signal.")] = 10_000,
    out: Annotated[Path, typer.Option(help="The figure to write: .png, .svg or .pdf.")] = Path(
        "remember.png"
    ),
    as_json: Json = False,
) -> None:
    """Compress a signal online into a few coefficients, reconstruct it from them, and draw both.

    The coefficients are those of the best approximation of the whole past (legs, lagt) or of a window (legt,
    fourier). HiPPO updates them sample by sample, in memory that does not grow.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the signal can't be read, is empty or not finite.
    """
    check_out(out)
    sizes = n or [64]
    _check(sizes, measure, method, samples)
    signal = open_signal(source, channel=channel, rate=rate, length=samples)
    span = signal.length if window is None else window * signal.rate
    if not 1 <= span < float("inf"):
        raise UsageError(f"--window: expected at least one sample, {1 / signal.rate:g} s, got {window} s.")
    results = {
        f"N = {size}": remember(
            signal, Memory(size, measure, window=span, method=cast(ops.LegsMethod, method))
        )
        for size in dict.fromkeys(sizes)
    }
    rows = [_row(signal, result) for result in results.values()]
    for row in rows:
        _warn_of_loss(row, min(span, signal.length) / signal.rate)
    drawn = _draw(signal, results, out, measure)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    seconds = signal.length / signal.rate
    typer.echo(
        f"{signal.name} · {count(signal.length, 'sample')}, {signal.rate:,g} per second, {seconds:,.2f} s"
    )
    for row in rows:
        typer.echo(
            f"{measure} N = {row['n']:<4}  MSE {row['mse']:.3g} of {row['energy']:.3g} "
            f"({brief(100 * row['mse'] / max(row['energy'], 1e-300), 2)} %)   "
            f"{row['samples_per_second']:,.0f} samples/s, {row['times_real_time']:,.0f} × real time"
        )
    typer.echo(drawn)


def _draw(signal: Signal, results: Mapping[str, Remembered], out: Path, measure: str) -> str:
    """Draw the signal and its reconstructions if matplotlib is installed; return a line about it."""
    if not installed("matplotlib"):
        return f"no {out}: {remedy('matplotlib', 'figures')}"
    original = Trace.empty(signal.length, signal.rate)
    for begin, piece in signal.pieces():
        original.add(begin, piece, signal.length)
    traces = {name: result.trace for name, result in results.items()}
    coefficients = {name: result.memory.coefficients[0] for name, result in results.items()}
    name = signal.name.encode(errors="backslashreplace").decode()
    plot_memory(original, traces, coefficients, out, f"{name} through {measure}")
    return f"wrote {out}"


def _check(sizes: list[int], measure: str, method: str, samples: int) -> None:
    """Raise UsageError if a value is out of range."""
    if measure not in MEASURES:
        raise UsageError(f"--measure: there is no {measure!r}{nearest(measure, MEASURES)}")
    for size in sizes:
        check_whole("--n", size, 1, MAX_N)
    if method not in get_args(ops.LegsMethod):
        raise UsageError(f"--method: expected one of {', '.join(get_args(ops.LegsMethod))}, got {method!r}.")
    check_whole("--samples", samples, 1, MAX_SAMPLES)


def _warn_of_loss(row: dict[str, Any], seconds: float) -> None:
    """Warn on stderr if a large part of the energy is lost, with the frequencies that N can resolve."""
    if row["mse"] <= LOSS * row["energy"] or row["measure"] == "lagt":
        return
    cycles = row["n"] / math.pi
    typer.echo(
        f"warning: {100 * row['mse'] / row['energy']:.0f} % of the energy is lost. N = {row['n']} resolves "
        f"about {cycles:.0f} cycles, here frequencies up to {cycles / seconds:,.3g} Hz in {seconds:,.3g} s: "
        "use a larger --n, or a shorter signal or --window.",
        err=True,
    )


def _row(signal: Signal, result: Remembered) -> dict[str, Any]:
    """Return the results as JSON values."""
    memory = result.memory
    if not memory.coefficients.isfinite().all():
        raise LongscanError(f"{signal.name}: the coefficients overflow; use another --method.")
    return {
        "signal": signal.name,
        "samples": signal.length,
        "rate": signal.rate,
        "measure": memory.measure,
        "n": memory.n,
        "told_from": memory.oldest / signal.rate,
        "mse": result.error,
        "energy": result.energy,
        "seconds": result.seconds,
        "samples_per_second": signal.length / result.seconds,
        "times_real_time": signal.length / signal.rate / result.seconds,
        "coefficients": memory.coefficients[0].tolist(),
    }
