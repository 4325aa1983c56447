"""The report of a suite, as text for people and as plain values for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longscan.bench.measure import Measurement
from longscan.core.text_table import lay_out

__all__ = ["Ratio", "Report", "rate", "rate_table", "spread", "table"]

COLD, EXTRAPOLATED = "¹", "²"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A measured ratio and the project's goal for it.

    Attributes:
        what: the ratio is of.
        measured: the ratio; NaN if one side was not measured.
        goal: as text, "" if there is none.
        percent: whether to print it as a percentage.
        unit: printed behind it otherwise.
    """

    what: str
    measured: float
    goal: str = ""
    percent: bool = False
    unit: str = "×"

    def text(self) -> str:
        """Return the ratio as a cell."""
        if math.isnan(self.measured):
            return "–"
        if self.percent:
            return f"{100 * self.measured:.0f} %"
        digits = ",.0f" if self.measured >= 100 else ".3g"
        return f"{self.measured:{digits}} {self.unit}".rstrip()


@dataclass(kw_only=True)
class Report:
    """The results of a suite.

    Attributes:
        suite: its name.
        rows: one per measurement, plain values: those of `Measurement.as_row`, "case", "rate", "unit".
        tables: of `table`, for people.
        ratios: of ours to others, with the goals.
        notes: lines below the tables.
        others: the share of the machine that other processes took, if known.
    """

    suite: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: float | None = None

    def add(
        self, case: str, measurements: Iterable[Measurement], work: float, unit: str, **more: Any
    ) -> None:
        """Add the rows of measurements of the same amount of work.

        Args:
            case: what was measured.
            measurements: of each contender.
            work: of one run; work / seconds is the rate.
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

    def text(self) -> str:
        """Return tables, ratios and notes as lines."""
        tables, notes = list(self.tables), list(self.notes)
        if self.ratios:
            body = ([r.what, r.text(), r.goal] for r in self.ratios)
            tables.append(table(f"{self.suite}: ratios", ["", "measured", "goal"], body))
        if any(COLD in one for one in tables):
            notes.insert(0, f"{COLD} a single first run, too slow to repeat")
        if any(EXTRAPOLATED in one for one in tables):
            notes.insert(0, f"{EXTRAPOLATED} extrapolated from one layer and none, each measured")
        return "\n".join([*tables, *notes])


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as lines: the first column to the left, the others to the right, an empty line below.

    Args:
        title: above it.
        columns: headings.
        rows: cells.
    """
    return "\n".join([title, *lay_out([columns, *rows], "<>"), ""])


def rate_table(title: str, rows: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table of contenders by cases; "–" where a contender did not take part.

    Args:
        title: above it.
        rows: of a report.
        cell: makes a cell from a row.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(row["contender"], row["case"]): cell(row) for row in rows}
    body = ([name, *(cells.get((name, case), "–") for case in cases)] for name in names)
    return table(title, ["", *cases], body)


def spread(row: dict[str, Any], value: Callable[[float], float], digits: str = ",.0f") -> str:
    """Return the median of a row and in brackets its range, with the marks of `Report.text`.

    Args:
        row: of a report.
        value: from seconds to the number in the cell.
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
    """Return the rate of a row and in brackets its range, as `spread`.

    Args:
        row: of a report.
    """
    if row["seconds"] is None:
        return spread(row, float)
    work = row["rate"] * row["seconds"]
    return spread(row, lambda seconds: work / seconds, ",.0f" if row["rate"] >= 20 else ",.1f")
