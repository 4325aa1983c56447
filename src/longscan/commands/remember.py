"""`longscan remember`: put a signal into a few coefficients, online, and tell it from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from longscan import ops
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

LOSS = 0.1  # share of the energy above which it is worth a word

LONGEST = 100_000_000  # samples of a test signal


def command(
    source: Annotated[
        str, typer.Argument(metavar="SIGNAL", help=f"A .wav, .csv or .npy file, or {', '.join(TESTS)}.")
    ],
    n: Annotated[
        list[int] | None, typer.Option(help="Coefficients, 64 if not given; several to compare.")
    ] = None,
    measure: Annotated[str, typer.Option(help=f"What of the past counts: {', '.join(MEASURES)}.")] = "legs",
    window: Annotated[
        float | None, typer.Option(help="Seconds that the others than legs look back; all if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="How legs takes a step: bilinear, zoh, ...")] = "bilinear",
    rate: Annotated[
        float | None, typer.Option(help="Samples per second, where the file does not say.")
    ] = None,
    channel: Annotated[int, typer.Option(help="Of a file of several, from 0; in tables the column.")] = 0,
    samples: Annotated[int, typer.Option(help="Length of a test signal.")] = 10_000,
    out: Annotated[Path, typer.Option(help="The figure to write: .png, .svg or .pdf.")] = Path(
        "remember.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Compress a signal into a few coefficients as it comes in, tell it from them, and draw both.

    The coefficients are those of the best approximation of the whole past (legs, lagt) or of a window (legt,
    fourier) that HiPPO keeps up to date sample by sample, in memory that does not grow.

    Raises:
        UsageError: a value makes no sense.
        LongscanError: the signal can't be read, is empty or not finite.
    """
    check_out(out)
    sizes = n or [64]
    _check(sizes, measure, method, samples)
    signal = open_signal(source, channel=channel, rate=rate, length=samples)
    reach = signal.length if window is None else window * signal.rate
    if not 1 <= reach < float("inf"):
        raise UsageError(f"--window: expected at least one sample, {1 / signal.rate:g} s, got {window} s.")
    found = {
        f"N = {size}": remember(
            signal, Memory(size, measure, window=reach, method=cast(ops.LegsMethod, method))
        )
        for size in dict.fromkeys(sizes)
    }
    rows = [_row(signal, each) for each in found.values()]
    for row in rows:
        _warn_of_loss(row, min(reach, signal.length) / signal.rate)
    if installed("matplotlib"):
        shown = Trace.empty(signal.length, signal.rate)
        for begin, piece in signal.pieces():
            shown.add(begin, piece, signal.length)
        traces = {name: each.trace for name, each in found.items()}
        coefficients = {name: each.memory.coefficients[0] for name, each in found.items()}
        name = signal.name.encode(errors="backslashreplace").decode()
        plot_memory(shown, traces, coefficients, out, f"{name} through {measure}")
        wrote = f"wrote {out}"
    else:
        wrote = f"no {out}: {remedy('matplotlib', 'figures')}"
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    seconds = signal.length / signal.rate
    typer.echo(
        f"{signal.name} · {count(signal.length, 'sample')}, {signal.rate:,g} a second, {seconds:,.2f} s"
    )
    for row in rows:
        typer.echo(
            f"{measure} N = {row['n']:<4}  MSE {row['mse']:.3g} of {row['energy']:.3g} "
            f"({brief(100 * row['mse'] / max(row['energy'], 1e-300), 2)} %)   "
            f"{row['samples_per_second']:,.0f} samples/s, {row['times_real_time']:,.0f} × real time"
        )
    typer.echo(wrote)


def _check(sizes: list[int], measure: str, method: str, samples: int) -> None:
    """Refuse values that make no sense."""
    if measure not in MEASURES:
        raise UsageError(f"--measure: there is no {measure!r}{nearest(measure, MEASURES)}")
    for size in sizes:
        if not 1 <= size <= MAX_N:
            raise UsageError(f"--n: expected 1 to {MAX_N:,} coefficients, got {size}.")
    if method not in get_args(ops.LegsMethod):
        raise UsageError(f"--method: expected one of {', '.join(get_args(ops.LegsMethod))}, got {method!r}.")
    if not 1 <= samples <= LONGEST:
        raise UsageError(
            f"--samples: expected 1 to {LONGEST:,}, as a test signal is made in memory, got {samples:,}."
        )


def _warn_of_loss(row: dict[str, Any], seconds: float) -> None:
    """Say on stderr how much so many coefficients can hold, if they lost a good part of the signal."""
    if row["mse"] <= LOSS * row["energy"] or row["measure"] == "lagt":
        return
    cycles = row["n"] / math.pi
    typer.echo(
        f"warning: {100 * row['mse'] / row['energy']:.0f} % of the energy is lost. N = {row['n']} resolves "
        f"about {cycles:.0f} cycles, here frequencies up to {cycles / seconds:,.3g} Hz in {seconds:,.3g} s: "
        "take a larger --n, or a shorter signal or --window.",
        err=True,
    )


def _row(signal: Signal, found: Remembered) -> dict[str, Any]:
    """Return what there is to say, for programs."""
    memory = found.memory
    if not memory.coefficients.isfinite().all():
        raise LongscanError(f"{signal.name}: the coefficients overflow; take another --method.")
    return {
        "signal": signal.name,
        "samples": signal.length,
        "rate": signal.rate,
        "measure": memory.measure,
        "n": memory.n,
        "told_from": memory.oldest / signal.rate,
        "mse": found.error,
        "energy": found.energy,
        "seconds": found.seconds,
        "samples_per_second": signal.length / found.seconds,
        "times_real_time": signal.length / signal.rate / found.seconds,
        "coefficients": memory.coefficients[0].tolist(),
    }
