"""Accuracies of several systems, in percent: means over seeds beside the published values, table and bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longscan.core.text_table import lay_out
from longscan.plotting.bars import plot_bars
from longscan.reproduce.experiment import NO_RESULT, Plan

__all__ = ["finish", "show", "summary"]

Results = Mapping[str, Sequence[dict[str, Any]]]  # system -> the measurements with each seed


def finish(
    plan: Plan,
    results: Results,
    measures: Mapping[str, str],
    published: Mapping[str, Mapping[str, float]],
    reduced: str | None,
    notes: Sequence[str],
    label: str = "accuracy (%)",
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Return the results, written with a figure.

    Args:
        plan: where to.
        results: system -> the measurements with each seed, in percent; a measure may be missing or None.
        measures: their names in `results` and in the table.
        published: measure -> system -> the published value.
        reduced: how the experiment is smaller than the published one.
        notes: lines below the table.
        label: of the figure's vertical axis.
        draw: saves another figure of the results; one of bars if None.
    """
    report = {
        "experiment": plan.name,
        "reduced": NO_RESULT if plan.quick else reduced,
        "measures": dict(measures),
        "published": {name: dict(rows) for name, rows in published.items()},
        "notes": list(notes),
        "machine": plan.machine,
        "systems": {name: summary(rows, measures) for name, rows in results.items()},
        "runs": {name: list(rows) for name, rows in results.items()},
    }
    plan.save(report, partial(draw, report) if draw else lambda path: plot_bars(report, path, label))
    return report


def summary(rows: Sequence[dict[str, Any]], measures: Mapping[str, str]) -> dict[str, Any]:
    """Return the mean and the range of each measure over the seeds.

    Args:
        rows: the measurements of one system, a row per seed.
        measures: their names; those that no row has are left out.
    """
    means: dict[str, Any] = {}
    for name in measures:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            means[name] = {"mean": sum(values) / len(values), "range": [min(values), max(values)]}
    return {
        **means,
        "parameters": rows[0]["parameters"],
        "minutes": round(sum(row["minutes"] for row in rows) / len(rows), 1),
        "seeds": [row["seed"] for row in rows],
    }


def show(report: Mapping[str, Any]) -> str:
    """Return the results as text: a row per system, the published value beside each measured one.

    Args:
        report: of `finish`.
    """
    measures, published = report["measures"], report["published"]
    head = ["system"]
    for name, label in measures.items():
        head += [*(["published"] if published.get(name) else []), label]
    rows = [[*head, "seeds", "parameters", "minutes"]]
    for system, result in report["systems"].items():
        row = [system]
        for name in measures:
            if published.get(name):
                value = published[name].get(system)
                row.append("-" if value is None else f"{value:g}")
            row.append(_cell(result.get(name)))
        rows.append(
            [*row, f"{len(result['seeds'])}", f"{result['parameters']:,}", f"{result['minutes']:.1f}"]
        )
    reduced = [f"reduced: {report['reduced']}"] if report["reduced"] else []
    return "\n".join([*lay_out(rows), *reduced, *report["notes"]])


def _cell(result: Mapping[str, Any] | None) -> str:
    """Return a mean, with the range if there is one."""
    if result is None:
        return "-"
    low, high = result["range"]
    return f"{result['mean']:.1f}" + (f" ({low:.1f}-{high:.1f})" if high > low else "")
