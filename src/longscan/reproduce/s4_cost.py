"""What a layer costs against the length of the text: S4, the LSSL it replaces, and attention.

One layer, forward and backward, one text at a time: S4 is to grow as L log L, its kernel alone as N L, and a
Transformer as L^2; LSSL as N^2 L in time and N L in memory for every channel, whether its powers of A are
computed one by one, which is naive, or by doubling, which makes large products of them. Beside that,
the kernel of S4D as it runs here and as a Vandermonde matrix in plain torch. Published (S4, tables 2 and 3)
are times on an A100, whose ratios are to be compared with those here, not the times.
"""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan import ops
from longscan.models import MODELS, LanguageModel
from longscan.models.common import state_space as ssm
from longscan.models.lssl import DenseSSM, LSSLConfig
from longscan.models.s4 import DPLR, S4Config
from longscan.models.s4d import DiagonalSSM, S4DConfig
from longscan.plotting.style import line_style, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.cost import time_and_memory
from longscan.reproduce.experiment import Plan

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
D_MODEL, N, REPEATS = 32, 64, 3
SECONDS = 30.0  # no length that would take longer, by the growth between the two before
GIGABYTES = 4.0
TAIL = 4096  # slopes are fitted from here on
LENGTHS, FULL_LENGTHS, QUICK_LENGTHS = range(10, 17), range(10, 21), range(5, 7)  # powers of two
LABELS = {
    "s4": "S4 layer",
    "s4-kernel": "S4 kernel",
    "lssl": "LSSL layer",
    "lssl-powers": "LSSL kernel, naive",
    "llama": "Transformer layer",
    "s4d-kernel": "S4D kernel",
    "s4d-plain": "S4D kernel, plain torch",
}
PUBLISHED = {
    "table 2, LSSL / S4, time at width 128, 256, 512": [1.95, 6.71, 29.6],
    "table 2, LSSL / S4, memory at width 128, 256, 512": [41.9, 133.7, 392.2],
    "table 3, Transformer / S4, time at 1024 and 4096": [1.58, 5.19],
    "table 3, Transformer / S4, memory at 1024 and 4096": [2.33, 10.99],
}


def run(plan: Plan) -> dict[str, Any]:
    """Return time and memory of every system at every feasible length.

    Args:
        plan: where, and how much.
    """
    if plan.threads:
        torch.set_num_threads(plan.threads)
    ops.keep_memory()  # or every large tensor is paid for in page faults
    powers = QUICK_LENGTHS if plan.quick else FULL_LENGTHS if plan.full else LENGTHS
    lengths = [1 << power for power in powers]
    rows = {name: _measure(plan, name, lengths) for name in LABELS}
    report: dict[str, Any] = {
        "experiment": plan.name,
        "reduced": "a few short texts: no result" if plan.quick else None,
        "d_model": D_MODEL,
        "d_state": N,
        "threads": torch.get_num_threads(),
        "published": PUBLISHED,
        "machine": f"{platform.machine()}, torch {torch.__version__}, {ops.backend()}",
        "rows": rows,
        "slopes": {name: _slope(lengths) for name, lengths in rows.items()},
    }
    plan.save(report, lambda path: _plot(report, path))
    return report


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    rows = report["rows"]
    lines = [
        f"one layer, forward and backward, width {report['d_model']}, N = {report['d_state']}, batch 1, "
        f"{report['threads']} threads: ms (MB), median of {REPEATS}",
        f"{'tokens':>9}" + "".join(f"{label:>24}" for label in LABELS.values()),
    ]
    for length in sorted({int(length) for row in rows.values() for length in row}):
        cells = (_cell(row.get(str(length))) for row in rows.values())
        lines.append(f"{length:9,}" + "".join(f"{cell:>24}" for cell in cells))
    slopes = ("-" if slope is None else f"{slope:.2f}" for slope in report["slopes"].values())
    lines.append(f"{'slope':>9}" + "".join(f"{slope:>24}" for slope in slopes))
    for other, base in (
        ("lssl-powers", "s4-kernel"),
        ("lssl", "s4"),
        ("llama", "s4"),
        ("s4d-plain", "s4d-kernel"),
    ):
        shared = sorted(set(rows[other]) & set(rows[base]), key=int)
        pairs = [
            f"{rows[other][length]['ms'] / rows[base][length]['ms']:.1f}× at {int(length):,}"
            for length in shared
        ]
        lines.append(f"{LABELS[other]} / {LABELS[base]}, time: {', '.join(pairs)}")
    lines += [f"published, {name}: {values}" for name, values in report["published"].items()]
    if report["reduced"]:
        lines.append(f"reduced: {report['reduced']}")
    return "\n".join([*lines, report["machine"]])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    memory = "" if row["mb"] is None else f" ({row['mb']:,.0f})"
    return f"{row['ms']:,.1f}{memory}"


def _slope(rows: dict[str, dict[str, Any]]) -> float | None:
    """The exponent of the time's growth, fitted by least squares to the logarithms."""
    points = [
        (math.log(int(length)), math.log(row["ms"])) for length, row in rows.items() if int(length) >= TAIL
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None


def _system(name: str, length: int) -> Callable[[], Tensor]:
    """Return the forward pass to measure."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"d_model": D_MODEL, "n_layers": 1, "vocab_size": 8}
    if name == "s4-kernel":
        s4 = DPLR(S4Config(**sizes, d_state=N, l_max=length), D_MODEL, generator)
        return lambda: s4.kernel(length)
    if name == "lssl-powers":
        dense = DenseSSM(LSSLConfig(**sizes, d_state=N), D_MODEL, generator)
        return lambda: ssm.kernel_powers(*dense.discrete(), dense.C[:, 0], length)
    if name.startswith("s4d"):
        s4d = DiagonalSSM(S4DConfig(**sizes, d_state=N), D_MODEL, generator)
        product = ops.vandermonde if name == "s4d-kernel" else ops.vandermonde_ref

        def kernel() -> Tensor:
            z, C = s4d.discrete()
            return product(C, z, length)

        return kernel
    own = {"s4": {"d_state": N, "l_max": length}, "lssl": {"d_state": N}}
    entry = MODELS[name]
    fields = own.get(name, {"n_heads": 4, "max_positions": length})
    model = entry.cls(entry.config.from_dict({**sizes, **fields}), generator)
    assert isinstance(model, LanguageModel)
    x = torch.randn(1, length, D_MODEL, generator=generator)
    return lambda: model.backbone.mix(x)[0]


def _measure(plan: Plan, name: str, lengths: list[int]) -> dict[str, dict[str, Any]]:
    """Return time and memory of one system, length -> row."""
    key = {"lengths": lengths, "d_model": D_MODEL, "n": N, "threads": torch.get_num_threads()}

    def measure() -> dict[str, Any]:
        plan.notify(f"── {plan.name}, {LABELS[name]} ──")
        return {"rows": _rows(name, lengths, SECONDS * (10 if plan.full else 1))}

    rows: dict[str, dict[str, Any]] = plan.cached(plan.out / f"{plan.name}-{name}.json", key, measure)["rows"]
    return rows


def _rows(name: str, lengths: list[int], seconds: float) -> dict[str, dict[str, Any]]:
    """Measure one system, up to a length that would take more seconds, or too much memory."""
    rows: dict[str, dict[str, Any]] = {}
    growth = 2.0
    for length in lengths:
        last = rows.get(str(length // 2))
        if last is not None:
            before = rows.get(str(length // 4))
            growth = growth if before is None else max(2.0, last["ms"] / before["ms"])
            too_large = growth * (last["mb"] or 0.0) > 1024 * GIGABYTES
            if too_large or growth * last["ms"] * (REPEATS + 1) > 1000 * seconds:
                break
        rows[str(length)] = _row(_system(name, length))
    return rows


def _row(forward: Callable[[], Tensor]) -> dict[str, Any]:
    """Return time and peak memory of a forward and backward pass."""

    def step() -> None:
        forward().sum().backward()  # type: ignore[no-untyped-call]

    return time_and_memory(step, REPEATS)  # warm, and with gradients to add to: the peak


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draw time and memory against length."""
    figure = new_figure(11.0, 4.5)
    axes = figure.subplots(1, 2)
    for ax, field, label in zip(axes, ("ms", "mb"), ("time in ms", "memory in MB"), strict=True):
        for index, (name, lengths) in enumerate(report["rows"].items()):
            points = [(int(length), row[field]) for length, row in lengths.items() if row[field]]
            if not points:
                continue
            slope = report["slopes"][name]
            text = LABELS[name] + (f", L^{slope:.2f}" if field == "ms" and slope is not None else "")
            ax.plot(*zip(*points, strict=True), linewidth=1.3, label=text, **line_style(index))
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        tidy(ax)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_title(f"One layer, forward and backward, width {report['d_model']}, N = {report['d_state']}")
    save_figure(figure, path, reduced_note(report))
