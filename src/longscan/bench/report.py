"""What a suite found, as text for people and as plain values for programs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from longscan.bench.measure import Measurement

__all__ = ["Ratio", "Report", "rate", "rate_table", "render", "spread", "table"]

COLD, EXTRAPOLATED = "¹", "²"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A measured ratio beside the goal the project sets itself.

    Attributes:
        what: is divided by what.
        measured: the ratio; NaN if one side was not measured.
        goal: in words, "" if there is none.
        percent: whether to show it as a percentage.
        unit: of what is no ratio.
    """

    what: str
    measured: float
    goal: str = ""
    percent: bool = False
    unit: str = "×"

    def text(self) -> str:
        """Return the ratio as the table shows it."""
        if math.isnan(self.measured):
            return "–"
        if self.percent:
            return f"{100 * self.measured:.0f} %"
        digits = ",.0f" if self.measured >= 100 else ".3g"
        return f"{self.measured:{digits}} {self.unit}"


@dataclass(kw_only=True)
class Report:
    """The result of a suite.

    Attributes:
        suite: its name.
        rows: one per measurement, plain values: those of `Measurement.as_row`, "case", "rate", "unit".
        tables: for people.
        ratios: ours against others, beside the goals.
        notes: lines to print below.
        others: the share of the machine that other processes took meanwhile, if known.
    """

    suite: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: float | None = None

    def add(
        self, case: str, measurements: Iterable[Measurement], work: float, unit: str, **more: Any
    ) -> None:
        """Record measurements of the same amount of work.

        Args:
            case: what was measured.
            measurements: of each contender.
            work: how much one run does, so that work / seconds is the rate.
            unit: of the rate.
            more: plain values for every row.
        """
        for m in measurements:
            rate = work / m.median if m.seconds else None
            self.rows.append({"case": case, **m.as_row(), "rate": rate, "unit": unit, **more})
            if m.note:
                self.notes.append(f"{case}: {m.name}: {m.note}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; ratios that were not measured are None."""
        ratios = [
            {"what": r.what, "measured": None if math.isnan(r.measured) else r.measured, "goal": r.goal}
            for r in self.ratios
        ]
        return {
            "suite": self.suite,
            "rows": self.rows,
            "ratios": ratios,
            "notes": self.notes,
            "others_share": self.others,
        }

    def text(self, width: int) -> str:
        """Lay out tables, ratios and notes.

        Args:
            width: columns to fill at most.

        Returns:
            Lines of text.
        """
        tables = list(self.tables)
        if self.ratios:
            tables.append(
                table(
                    f"{self.suite}: ratios",
                    ["", "measured", "goal"],
                    ([r.what, r.text(), r.goal] for r in self.ratios),
                )
            )
        marks = "".join(cell for t in tables for column in t.columns for cell in map(str, column.cells))
        notes = list(self.notes)
        if COLD in marks:
            notes.insert(0, f"{COLD} a single first run, too slow to repeat")
        if EXTRAPOLATED in marks:
            notes.insert(0, f"{EXTRAPOLATED} extrapolated from one layer and none, each measured")
        return "\n".join([*(render(t, width) for t in tables), *notes])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Build a table: the first column to the left, the others to the right.

    Args:
        title: above it.
        columns: headings.
        rows: cells.

    Returns:
        The table.
    """
    built = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for number, heading in enumerate(columns):
        built.add_column(
            heading, justify="right" if number else "left", header_style="dim", no_wrap=not number
        )
    for row in rows:
        built.add_row(*row)
    return built


def rate_table(title: str, rows: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> Table:
    """Build a table of contenders by cases.

    Args:
        title: above it.
        rows: of a report.
        cell: what to show of a row.

    Returns:
        The table; "–" where a contender did not take part.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(row["contender"], row["case"]): cell(row) for row in rows}
    body = ([name, *(cells.get((name, case), "–") for case in cases)] for name in names)
    return table(title, ["", *cases], body)


def spread(row: dict[str, Any], value: Callable[[float], float], digits: str = ",.0f") -> str:
    """Show the median of a row and in brackets its range, with the marks of `Report.text`.

    Args:
        row: of a report.
        value: from seconds to what is shown.
        digits: format of a number.

    Returns:
        "2,680 (2,492–3,075)".
    """
    if row["seconds"] is None:
        return "failed" if row["note"].startswith("failed") else "–"
    marks = (EXTRAPOLATED if row.get("extrapolated") else "") + ("" if row["warm"] else COLD)
    middle = f"{value(row['seconds']):{digits}}"
    if row["repeats"] == 1:
        return middle + marks
    low, high = sorted((value(row["seconds_min"]), value(row["seconds_max"])))
    return f"{middle} ({low:{digits}}–{high:{digits}}){marks}"


def rate(row: dict[str, Any]) -> str:
    """Show the rate of a row and in brackets its range.

    Args:
        row: of a report.

    Returns:
        As `spread`.
    """
    if row["seconds"] is None:
        return spread(row, float)
    work = row["rate"] * row["seconds"]
    return spread(row, lambda seconds: work / seconds, ",.0f" if row["rate"] >= 20 else ",.1f")


def render(what: Table, width: int) -> str:
    """Return a table as plain text with an empty line below.

    Args:
        what: the table.
        width: columns to fill at most.

    Returns:
        Lines without trailing blanks.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
