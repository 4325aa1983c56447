"""A million samples in 256 numbers: the approximation of HiPPO (Gu et al. 2020), section 4.3.

Band-limited white noise, 100 cycles of its highest frequency, is compressed online and reconstructed from the
last state alone. A polynomial needs about pi coefficients for a cycle, so 256 of them resolve some 80: the
error that is left, which the exact projection has as well, is no error of the recurrence. The LSTM's 0.25 is
the square of the signal's size, 0.5: what the mean alone gives.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan import ops
from longscan.data.signals import white_noise
from longscan.models.hippo import SPANS, held
from longscan.models.hippo_memory import Memory
from longscan.plotting.style import line_style, new_figure, reduced_note, save_figure, tidy
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
    "mean:      the reconstruction that is the mean everywhere",
)


def mse(memory: Memory, f: Tensor) -> float:
    """Return the mean square error of a memory's reconstruction of its signal.

    Args:
        memory: of one channel, its window as long as the signal.
        f: (length,) the signal.
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
    """Return errors and rates.

    Args:
        plan: where, and how much.
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
    plan.save(report, lambda path: _plot(path, length, cycles, n, reduced_note(report)))
    return report


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

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
    """Return errors and rates of one signal."""
    key = {"seed": seed, "length": length, "cycles": cycles, "n": n, "backend": ops.backend()}

    def measure() -> dict[str, Any]:
        plan.notify(f"── {plan.name}, seed {seed} ──")
        return _errors_and_rates(seed, length, cycles, n)

    return plan.cached(plan.out / f"{plan.name}-seed{seed}.json", key, measure)


def _errors_and_rates(seed: int, length: int, cycles: int, n: int) -> dict[str, Any]:
    """Measure with one signal."""
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
    return {"mse": errors, "rate": rates}


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


def _plot(path: Path, length: int, cycles: int, n: int, note: str) -> None:
    """Draw the start of the signal, the longest ago, beside its reconstructions."""
    f = white_noise(length, cycles, generator=torch.Generator().manual_seed(SEEDS[0])).double()
    positions = torch.linspace(0, length / 5, 1500).floor()
    curves = {"signal": f[positions.long()]}
    for measure in ("legs", "lmu"):
        memory = make_memory(n, length, measure=measure)
        memory.write(f)
        curves[measure] = memory.reconstruct(positions)[0]
    labels = (f"the first fifth of {length:,} samples, reconstructed from {n} numbers", "sample", "value")
    plot_lines(path, {name: (positions, values) for name, values in curves.items()}, labels, note=note)


def plot_lines(
    path: Path,
    lines: dict[str, tuple[Tensor, Tensor]],
    labels: tuple[str, str, str],
    log: bool = False,
    note: str = "",
) -> None:
    """Draw curves.

    Args:
        path: the figure to write.
        lines: name -> x and y of each.
        labels: the title and those of the axes.
        log: whether the axes are logarithmic, with a marker at each point.
        note: see `save_figure`.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(9.0, 4.5)
    ax = figure.subplots()
    for index, (name, (x, y)) in enumerate(lines.items()):
        style = line_style(index) if log else {"color": line_style(index)["color"]}
        ax.plot(x, y, linewidth=1.3, label=name, **style)
    title, xlabel, ylabel = labels
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.set(xscale="log", yscale="log")
    tidy(ax)
    ax.legend(frameon=False)
    save_figure(figure, path, note)
