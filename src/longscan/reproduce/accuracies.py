"""Results that are shares of right answers: their means, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from longscan.errors import LongscanError
from longscan.files import write_json
from longscan.reproduce.systems import Plan, reduced_note
from longscan.text_table import lay_out

__all__ = ["finish", "plot_bars", "show"]

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


def plot_bars(report: Mapping[str, Any], path: Path) -> None:
    """Draw a bar for each system and measure, the range over the seeds, and what was published as a line.

    Args:
        report: of `finish`.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    from longscan.drawing import COLOURS, GREY, new_figure, save_figure, tidy

    systems, measures = report["systems"], report["measures"]
    figure = new_figure(max(6.0, 1.0 + 1.2 * len(systems)), 4.0)
    ax = figure.subplots()
    width = 0.8 / len(measures)
    for place, (name, words) in enumerate(measures.items()):
        shift = (place - (len(measures) - 1) / 2) * width
        here = [(x + shift, found[name]) for x, found in enumerate(systems.values()) if name in found]
        means = [found["mean"] for _, found in here]
        below = [found["mean"] - found["range"][0] for _, found in here]
        above = [found["range"][1] - found["mean"] for _, found in here]
        spread = [below, above] if any(above) else None
        colour = COLOURS[place % len(COLOURS)]
        ax.bar([x for x, _ in here], means, 0.9 * width, yerr=spread, color=colour, label=words, capsize=2)
        for x, bar in here:
            if round(bar["mean"], 1) == 0:  # a bar that nobody sees was measured all the same
                ax.annotate("0.0", (x, 0), (0, 2), textcoords="offset points", ha="center", fontsize="small")
        for x, system in enumerate(systems):
            if name not in systems[system]:
                place_of = (x + shift, 1.5)
                ax.annotate(
                    "not measured", place_of, rotation=90, ha="center", color=GREY, fontsize="x-small"
                )
            if (value := report["published"].get(name, {}).get(system)) is not None:
                ends = (x + shift - width / 2, x + shift + width / 2)
                label = "published" if "published" not in ax.get_legend_handles_labels()[1] else None
                ax.plot(ends, (value, value), color="black", linewidth=2, label=label)
    ax.set_xticks(range(len(systems)), list(systems))
    ax.set(ylabel="right answers (%)", xlim=(-0.6, len(systems) - 0.4), ylim=(0, 105))
    tidy(ax)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(measures) + 1)
    save_figure(figure, path, reduced_note(report))
