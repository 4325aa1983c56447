"""Results that are shares of right answers: their means, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from longscan.core.files import write_json
from longscan.core.text_table import lay_out
from longscan.errors import LongscanError
from longscan.plotting.bars import plot_bars
from longscan.reproduce.experiment import Plan

__all__ = ["finish", "show"]


Found = Mapping[str, Sequence[dict[str, Any]]]  # system -> what was measured with each seed


def finish(
    plan: Plan,
    found: Found,
    measures: Mapping[str, str],
    published: Mapping[str, Mapping[str, float]],
    reduced: str | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write the results and a figure of bars.

    Args:
        plan: where.
        found: system -> what was measured with each seed, in percent; a measure may be missing or None.
        measures: of them, and what a reader calls each.
        published: measure -> system -> what was published.
        reduced: in what the experiment is smaller than what was published.
        notes: what else is to be said.

    Returns:
        The results.
    """
    report = {
        "experiment": plan.name,
        "reduced": "a few steps only: no result" if plan.quick else reduced,
        "measures": dict(measures),
        "published": {name: dict(rows) for name, rows in published.items()},
        "notes": list(notes),
        "machine": plan.machine,
        "systems": {name: _summary(rows, measures) for name, rows in found.items()},
        "runs": {name: list(rows) for name, rows in found.items()},
    }
    write_json(plan.out / f"{plan.name}.json", report)
    try:
        plot_bars(report, plan.out / f"{plan.name}.png")
    except LongscanError as error:
        typer.echo(f"no {plan.name}.png: {error}", err=True)
    return report


def _summary(rows: Sequence[dict[str, Any]], measures: Mapping[str, str]) -> dict[str, Any]:
    """Return the mean and the range over the seeds."""
    found: dict[str, Any] = {}
    for name in measures:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = {"mean": sum(values) / len(values), "range": [min(values), max(values)]}
    return {
        **found,
        "parameters": rows[0]["parameters"],
        "minutes": round(sum(row["minutes"] for row in rows) / len(rows), 1),
        "seeds": [row["seed"] for row in rows],
    }


def show(report: Mapping[str, Any]) -> str:
    """Return the results for a reader: what was published beside what was measured.

    Args:
        report: of `finish`.
    """
    measures, published = report["measures"], report["published"]
    head = ["system"]
    for name, words in measures.items():
        head += [*(["published"] if published.get(name) else []), words]
    rows = [[*head, "seeds", "parameters", "minutes"]]
    for system, found in report["systems"].items():
        row = [system]
        for name in measures:
            if published.get(name):
                value = published[name].get(system)
                row.append("-" if value is None else f"{value:g}")
            row.append(_cell(found.get(name)))
        rows.append([*row, f"{len(found['seeds'])}", f"{found['parameters']:,}", f"{found['minutes']:.1f}"])
    lines = lay_out(rows)
    reduced = [f"reduced: {report['reduced']}"] if report["reduced"] else []
    return "\n".join([*lines, *reduced, *report["notes"]])


def _cell(found: Mapping[str, Any] | None) -> str:
    """Show a mean, and the range if there is one."""
    if found is None:
        return "-"
    low, high = found["range"]
    return f"{found['mean']:.1f}" + (f" ({low:.1f}-{high:.1f})" if high > low else "")
