"""What a step costs: HiPPO-LegS discretised four ways, against the length of the signal.

Band-limited white noise of 50 cycles fits into 256 coefficients to 1e-9, so the error is that of the steps:
forward and backward Euler are of first order, the bilinear rule is of second, and the zero-order hold
projects the stairs of the samples exactly. Nothing is published to compare with.
"""

from __future__ import annotations

import platform
import statistics
from typing import Any, get_args

import torch

from longscan import ops
from longscan.data.signals import white_noise
from longscan.plotting.style import reduced_note
from longscan.reproduce.experiment import Plan
from longscan.reproduce.hippo import make_memory, mse, plot_lines

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)
CYCLES = 50
LENGTHS, FULL_LENGTHS, QUICK_LENGTHS = (3_000, 10_000, 30_000, 100_000), (300_000, 1_000_000), (1_000, 3_000)
N, QUICK_N = 256, 64
METHODS: tuple[ops.LegsMethod, ...] = get_args(ops.LegsMethod)


def run(plan: Plan) -> dict[str, Any]:
    """Return the errors.

    Args:
        plan: where, and how much.
    """
    lengths = QUICK_LENGTHS if plan.quick else LENGTHS + (FULL_LENGTHS if plan.full else ())
    n = QUICK_N if plan.quick else N
    rows = [_measure(plan, length, n) for length in lengths]
    report: dict[str, Any] = {
        "experiment": plan.name,
        "reduced": "short signals: no result" if plan.quick else None,
        "cycles": CYCLES,
        "n": n,
        "published": {},
        "machine": f"{platform.machine()}, torch {torch.__version__}, {ops.backend()}",
        "rows": rows,
    }
    x = torch.tensor([row["length"] for row in rows])
    lines = {str(method): (x, torch.tensor([row["mse"][method] for row in rows])) for method in METHODS}
    title = f"HiPPO-LegS, N = {n}, {CYCLES} cycles of noise"
    labels, note = (title, "samples", "mean square error"), reduced_note(report)
    plan.save(report, lambda path: plot_lines(path, lines, labels, log=True, note=note))
    return report


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    lines = [
        f"mean square error, N = {report['n']}, {report['cycles']} cycles, mean of {len(SEEDS)} signals",
        f"{'samples':>9}" + "".join(f"{method:>11}" for method in METHODS),
    ]
    for row in report["rows"]:
        lines.append(f"{row['length']:9,}" + "".join(f"{row['mse'][method]:11.1e}" for method in METHODS))
    if report["reduced"]:
        lines.append(f"reduced: {report['reduced']}")
    return "\n".join([*lines, "published: nothing to compare with", report["machine"]])


def _measure(plan: Plan, length: int, n: int) -> dict[str, Any]:
    """Return the errors at one length."""
    key = {"length": length, "cycles": CYCLES, "n": n, "seeds": list(SEEDS)}

    def measure() -> dict[str, Any]:
        plan.notify(f"── {plan.name}, {length:,} samples ──")
        return _errors(length, n)

    return plan.cached(plan.out / f"{plan.name}-{length}.json", key, measure)


def _errors(length: int, n: int) -> dict[str, Any]:
    """Measure at one length: the mean over the seeds, and the range."""
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in SEEDS:
        f = white_noise(length, CYCLES, generator=torch.Generator().manual_seed(seed)).double()
        for method in METHODS:
            memory = make_memory(n, length, method)
            memory.write(f)
            errors[method].append(mse(memory, f))
    return {
        "length": length,
        "mse": {method: statistics.mean(values) for method, values in errors.items()},
        "range": {method: [min(values), max(values)] for method, values in errors.items()},
    }
