"""A million samples in 256 numbers: the approximation of HiPPO (Gu et al. 2020), section 4.3.

Band-limited white noise, 100 cycles of its highest frequency, is taken in online and told from the last state
alone. A polynomial needs about pi coefficients for a cycle, so 256 of them resolve some 80: the error that is
left, which the exact projection has as well, is no error of the recurrence. The LSTM's 0.25 is the square of
the signal's size, 0.5: what somebody gets who always tells the mean.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from longscan import ops
from longscan.core.files import read_json, write_json
from longscan.data.signals import white_noise
from longscan.errors import LongscanError
from longscan.models.hippo import SPANS, held
from longscan.models.hippo_memory import Memory
from longscan.plotting.style import reduced_note
from longscan.reproduce.experiment import Plan

__all__ = ["FILES", "SOURCE", "make_memory", "mse", "plot_lines", "run", "show"]

FILES, SOURCE = (), ""
SEEDS, FULL_SEEDS, QUICK_SEEDS = range(5), range(20), range(2)
LENGTH, CYCLES, N = 1_000_000, 100, 256
QUICK = (10_000, 10, 32)
REPEATS = 5
PUBLISHED = {"legs": (0.02, 470_000), "lmu": (0.05, 41_000), "lstm": (0.25, 35_000)}
NOTES = (
    "published: HiPPO, section 4.3; elements/s of their C++ (LegS) and PyTorch, their machine",
    "measured:  rates per second of processor time, one thread; LMU step by step, LSTM torch's, untrained",
    "floor:     the exact projection of the same samples on as many polynomials (zero-order hold)",
    "mean:      what telling the mean, always, would give",
)


def mse(memory: Memory, f: Tensor) -> float:
    """Return the mean square error of what a memory tells of the signal it has read.

    Args:
        memory: of one channel, its window as long as the signal.
        f: (length,).
    """
    return float((memory.reconstruct(torch.arange(len(f)))[0] - f).square().mean())


def make_memory(n: int, length: int, method: ops.LegsMethod = "bilinear", measure: str = "legs") -> Memory:
    """Return an empty memory for a signal.

    Args:
        n: coefficients.
        length: samples of the signal.
        method: see `Memory`.
        measure: likewise.
    """
    return Memory(n, measure, window=float(length), method=method)


def run(plan: Plan) -> dict[str, Any]:
    """Measure errors and rates.

    Args:
        plan: where, and how much.

    Returns:
        The results.
    """
    length, cycles, n = QUICK if plan.quick else (LENGTH, CYCLES, N)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seeds = FULL_SEEDS if plan.full else QUICK_SEEDS if plan.quick else SEEDS
        rows = [_measure(plan, seed, length, cycles, n) for seed in seeds]
    finally:
        torch.set_num_threads(threads)
    report = {
        "experiment": plan.name,
        "reduced": "a short signal: no result" if plan.quick else None,
        "length": length,
        "cycles": cycles,
        "n": n,
        "published": PUBLISHED,
        "notes": list(NOTES),
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, {ops.backend()}",
        "runs": rows,
    }
    write_json(plan.out / f"{plan.name}.json", report)
    _plot(plan, length, cycles, n, reduced_note(report))
    return report


def show(report: dict[str, Any]) -> str:
    """Return the results for a reader.

    Args:
        report: of `run`.
    """
    lines = [
        f"{report['length']:,} samples, {report['cycles']} cycles, N = {report['n']}; "
        f"mean of {len(report['runs'])} signals",
        f"{'system':8}{'published':>10}{'MSE':>10}  {'range':17}{'published el/s':>16}{'elements/s':>12}",
    ]
    for name in ("legs", "floor", "lmu", "lstm", "mean"):
        error, rate = PUBLISHED.get(name, ("", ""))
        errors = [row["mse"][name] for row in report["runs"] if name in row["mse"]]
        rates = [row["rate"][name] for row in report["runs"] if name in row["rate"]]
        mean = f"{statistics.mean(errors):.4f}" if errors else "-"
        spread = f"{min(errors):.4f}-{max(errors):.4f}" if errors else ""
        speed = f"{statistics.median(rates):,.0f}" if rates else ""
        published = f"{rate:,}" if rate else ""
        lines.append(f"{name:8}{error or '-':>10}{mean:>10}  {spread:17}{published:>16}{speed:>12}".rstrip())
    if report["reduced"]:
        lines.append(f"reduced: {report['reduced']}")
    return "\n".join([*lines, *NOTES, report["machine"]])


def _measure(plan: Plan, seed: int, length: int, cycles: int, n: int) -> dict[str, Any]:
    """Measure with one signal, unless that is done."""
    kept = plan.out / f"{plan.name}-seed{seed}.json"
    key = {"seed": seed, "length": length, "cycles": cycles, "n": n, "backend": ops.backend()}
    if kept.is_file() and (found := read_json(kept)).get("key") == key:
        return found
    typer.echo(f"── {plan.name}, seed {seed} ──", err=True)
    f = white_noise(length, cycles, generator=torch.Generator().manual_seed(seed)).double()
    errors, rates = {"mean": float(f.var())}, {}
    for name, measure, method in (
        ("legs", "legs", "bilinear"), ("floor", "legs", "zoh"), ("lmu", "lmu", "zoh"),
    ):  # fmt: skip
        memory = make_memory(n, length, method, measure)  # type: ignore[arg-type]
        memory.write(f)
        errors[name] = mse(memory, f)
    rates["legs"] = _rate(length, lambda: make_memory(n, length).write(f))
    few = f[: min(length, 10_000)].float()
    rates["lmu"] = _rate(len(few), lambda: _dense_steps(few, n, length))
    lstm = torch.nn.LSTM(1, n)
    with torch.no_grad():
        rates["lstm"] = _rate(len(few), lambda: lstm(few[:, None]))
    found = {"key": key, "mse": errors, "rate": rates}
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found


def _rate(elements: int, work: Callable[[], object]) -> float:
    """Return elements per second of this thread's processor time, the median of a few tries."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return elements / statistics.median(seconds)


def _dense_steps(f: Tensor, n: int, length: int) -> Tensor:
    """Run the LMU as its recurrence is written, sample by sample: O(n^2) for each."""
    A_bar, B_bar = (torch.from_numpy(matrix).float() for matrix in held("lmu", n, SPANS["lmu"](n) / length))
    c = torch.zeros(n)
    for sample in f.tolist():
        c = torch.addmv(B_bar, A_bar, c, beta=sample)
    return c


def _plot(plan: Plan, length: int, cycles: int, n: int, note: str) -> None:
    """Draw the beginning of the signal, the longest ago, beside what is told of it."""
    f = white_noise(length, cycles, generator=torch.Generator().manual_seed(SEEDS[0])).double()
    places = torch.linspace(0, length / 5, 1500).floor()
    curves = {"signal": f[places.long()]}
    for measure in ("legs", "lmu"):
        memory = make_memory(n, length, measure=measure)
        memory.write(f)
        curves[measure] = memory.reconstruct(places)[0]
    labels = (f"the first fifth of {length:,} samples, told from {n} numbers", "sample", "value")
    plot_lines(plan, {name: (places, values) for name, values in curves.items()}, labels, note=note)


def plot_lines(
    plan: Plan,
    lines: dict[str, tuple[Tensor, Tensor]],
    labels: tuple[str, str, str],
    log: bool = False,
    note: str = "",
) -> None:
    """Draw curves into the experiment's figure, if matplotlib is there.

    Args:
        plan: where.
        lines: name -> x and y of each.
        labels: the title and those of the axes.
        log: whether the axes are logarithmic, with a marker at each point.
        note: see `save_figure`.
    """
    from longscan.plotting.style import COLOURS, MARKERS, new_figure, save_figure, tidy

    path = plan.out / f"{plan.name}.png"
    try:
        figure = new_figure(9.0, 4.5)
    except LongscanError as error:
        typer.echo(f"no {path.name}: {error}", err=True)
        return
    ax = figure.subplots()
    for place, (name, (x, y)) in enumerate(lines.items()):
        marker = MARKERS[place % len(MARKERS)] if log else ""
        ax.plot(x, y, color=COLOURS[place % len(COLOURS)], marker=marker, linewidth=1.3, label=name)
    title, xlabel, ylabel = labels
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.set(xscale="log", yscale="log")
    tidy(ax)
    ax.legend(frameon=False)
    save_figure(figure, path, note)
