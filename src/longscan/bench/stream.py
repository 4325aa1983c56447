"""`longscan bench stream`: one very long document through `evaluate`, quarter by quarter: flat or not?"""

from __future__ import annotations

from typing import Any

from longscan.bench.race import Contender, Pace, race
from longscan.bench.report import Ratio, Report, table
from longscan.bench.train import QUICK_SHAPE, SHAPE, describe

__all__ = ["run"]

TOKENS, QUICK_TOKENS = 200_000, 20_000
OURS = "longscan"


def run(pace: Pace, quick: bool) -> Report:
    """Evaluate one document in one run, watched after every chunk.

    Args:
        pace: the threads.
        quick: a small model and a shorter document.

    Returns:
        The report.
    """
    report = Report(suite="stream")
    model, n_tokens = (QUICK_SHAPE, QUICK_TOKENS) if quick else (SHAPE, TOKENS)
    contender = Contender(
        name=OURS,
        job="longscan.bench.ours:stream",
        arguments={"model": model, "n_tokens": n_tokens},
        patience=0.0,  # the first run is the only one: it warms up by itself
    )
    found = race("stream", [contender], pace)
    report.add("stream", found.values(), n_tokens, "tokens/s", n_tokens=n_tokens)
    row = report.rows[0]
    marks = row.pop("marks", None)
    if marks is None:
        return report
    row["quarters"] = quarters = _quarters(marks)
    start = marks[0][2]
    body = [[f"{q['tokens']:,}", f"{q['rate']:,.0f}", f"{q['resident_bytes'] / 1e6:,.1f}"] for q in quarters]
    report.tables.append(
        table(
            f"{n_tokens:,} tokens through evaluate",
            ["up to token", "tokens/s in this quarter", "resident MB at its end"],
            [[f"{marks[0][0]:,}", "", f"{start / 1e6:,.1f}"], *body],
        )
    )
    rates = [q["rate"] for q in quarters]
    report.ratios = [
        Ratio(
            what="last quarter's speed over the first's",
            measured=rates[-1] / rates[0],
            goal="flat",
            percent=True,
        ),
        Ratio(
            what="resident set at the end over that after the first chunk",
            measured=quarters[-1]["resident_bytes"] / start,
            goal="constant",
            percent=True,
        ),
    ]
    report.notes.append(f"One document, one run, random weights; {describe(model)}.")
    return report


def _quarters(marks: list[list[Any]]) -> list[dict[str, Any]]:
    """Cut (tokens read, seconds, resident bytes) marks into four parts of about as many tokens each."""
    total = marks[-1][0]
    ends = [next(mark for mark in marks if mark[0] >= total * part / 4) for part in range(1, 5)]
    parts = []
    before = marks[0]
    for end in ends:
        tokens, seconds = end[0] - before[0], end[1] - before[1]
        parts.append({"tokens": end[0], "rate": tokens / max(seconds, 1e-9), "resident_bytes": end[2]})
        before = end
    return parts
