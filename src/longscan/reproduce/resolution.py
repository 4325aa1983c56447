"""What larger images cost the models of `vision`, and what accuracy remains: from 64 to 1,024 pixels a side.

The models are those that `vision` trained on Omniglot at 64 pixels; nothing is trained on larger images. The
time of VMamba and Vim is to grow as the number of pixels, that of a Vision Transformer's attention as its
square (arXiv 2401.10166, 2401.09417). The drawings have 105 pixels: what is larger is interpolated, so there
is more to compute and nothing more to see.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longscan import ops
from longscan.checkpoints.load import load
from longscan.core.runtime import use_threads
from longscan.core.text_table import lay_out
from longscan.data.images import Images
from longscan.evaluation.images import match_labels, measure_images
from longscan.plotting.style import line_style, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.cost import time_and_memory
from longscan.reproduce.experiment import Plan
from longscan.reproduce.vision import FILES, LABELS, MODELS, SETS, SOURCE, images, trained

__all__ = ["FILES", "SOURCE", "exponent", "run", "show"]

TASK = "omniglot"
# pixels of a side -> test images; of --full all
SIZES = {64: 1210, 96: 1210, 128: 1210, 192: 484, 256: 484, 384: 242, 512: 121, 768: 48, 1024: 24}
QUICK_SIZES = (64, 96)
TAIL = 256  # exponents are fitted from this side on
BATCH = 64 * 64**2  # pixels of a forward pass
REPEATS = 5
TABLES = {"accuracy": "accuracy (%)", "ms": "ms per image, one at a time", "mb": "MB at the peak"}


def run(plan: Plan) -> dict[str, Any]:
    """Return accuracy, time and memory of every model at every size.

    Args:
        plan: where, and how much.
    """
    directories = {model: trained(plan, TASK, model) for model in MODELS}
    use_threads(plan.threads)
    ops.keep_memory()  # or every large tensor is paid for in page faults
    test = images(plan, TASK, "test")
    counts = {
        size: len(test) if plan.full else min(n, len(test))
        for size, n in SIZES.items()
        if size in QUICK_SIZES or not plan.quick
    }
    rows = {model: _measure(plan, directory, test, counts) for model, directory in directories.items()}
    side = SETS[TASK].size
    report: dict[str, Any] = {
        "experiment": plan.name,
        "reduced": "a few steps only: no result"
        if plan.quick
        else f"0.3 million parameters, trained at {side} pixels only, drawings of 105 pixels enlarged",
        "trained": side,
        "chance": 100 / len(test.labels),
        "images": {str(size): n for size, n in counts.items()},
        "machine": f"{plan.machine}, {ops.backend()}",
        "rows": rows,
        "exponents": {model: exponent(found) for model, found in rows.items()},
    }
    plan.save(report, lambda path: _plot(report, path))
    return report


def show(report: Mapping[str, Any]) -> str:
    """Return the results as text: a table each of accuracy, time and memory.

    Args:
        report: of `run`.
    """
    lines = []
    for field, title in TABLES.items():
        table = [
            [title, "images" if field == "accuracy" else "", *(LABELS[model] for model in report["rows"])]
        ]
        for size, n in report["images"].items():
            cells = (_cell(found[size][field]) for found in report["rows"].values())
            table.append([f"{size} x {size}", f"{n:,}" if field == "accuracy" else "", *cells])
        if field == "ms":
            exponents = ("-" if x is None else f"{x:.2f}" for x in report["exponents"].values())
            table.append([f"exponent from {TAIL}", "", *exponents])
        lines += [*lay_out(table, "<>"), ""]
    lines += [
        f"trained at {report['trained']} pixels; chance is {report['chance']:.1f} %",
        f"exponent: of the growth with the number of pixels, sides of {TAIL} and more, least squares",
        f"images: every so many of the test set, for all models the same; times: median of {REPEATS}",
        f"reduced: {report['reduced']}",
        report["machine"],
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _measure(plan: Plan, directory: Path, test: Images, counts: Mapping[int, int]) -> dict[str, Any]:
    """Return the results of a model, size -> row."""
    model = load(directory / "model", "image")
    key = {
        "model": model.fingerprint(),
        "images": {str(size): n for size, n in counts.items()},
        "threads": torch.get_num_threads(),
    }

    def measure() -> dict[str, Any]:
        plan.notify(f"── {plan.name}, {directory.name} ──")
        return {"rows": {str(size): _row(directory, test, size, n) for size, n in counts.items()}}

    rows: dict[str, Any] = plan.cached(directory / "resolution.json", key, measure)["rows"]
    return rows


def _row(directory: Path, test: Images, size: int, n: int) -> dict[str, Any]:
    """Return what a model does with n test images of a size."""
    model = load(directory / "model", "image")
    model.resize(size)
    image = torch.randn(1, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cost = time_and_memory(lambda: model(image), REPEATS)
    some = match_labels(test.select(np.linspace(0, len(test) - 1, n).round().astype(int)), model)
    scores = measure_images(model, some, max(1, BATCH // size**2))
    assert scores is not None  # nothing stops it
    return {"accuracy": 100 * scores.top1, "images": n, **cost}


def exponent(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the exponent of the time's growth with the number of pixels, by least squares of the logarithms.

    Args:
        rows: side of the images -> a row with "ms"; sides of less than `TAIL` do not count.

    Returns:
        The exponent; None of fewer than three sides.
    """
    points = [
        (2 * math.log(int(size)), math.log(row["ms"])) for size, row in rows.items() if int(size) >= TAIL
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy and time against the side of the images."""
    figure = new_figure(11.0, 4.5)
    accuracy, time = figure.subplots(1, 2)
    for index, (model, rows) in enumerate(report["rows"].items()):
        sizes, style = [int(size) for size in rows], {"linewidth": 1.3, **line_style(index)}
        accuracy.plot(sizes, [row["accuracy"] for row in rows.values()], label=LABELS[model], **style)
        power = report["exponents"][model]
        label = LABELS[model] + ("" if power is None else f", pixels^{power:.2f}")
        time.plot(sizes, [row["ms"] for row in rows.values()], label=label, **style)
    accuracy.axhline(report["chance"], color="black", linewidth=0.8, linestyle=":")
    accuracy.set(ylabel="accuracy (%)", ylim=(0, 100))
    accuracy.set_title(f"Omniglot, trained at {report['trained']} pixels")
    time.set(ylabel="ms per image", yscale="log")
    time.set_title("Forward pass, one image at a time")
    for ax in (accuracy, time):
        ax.set_xscale("log", base=2)
        ticks = [int(size) for size in report["images"]]
        ax.set_xticks(ticks, [str(size) for size in ticks], fontsize=8)
        ax.set(xlabel="pixels of a side")
        tidy(ax)
        ax.legend(frameon=False, fontsize=9)
    save_figure(figure, path, reduced_note(report))
