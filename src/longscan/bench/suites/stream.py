"""`longscan bench stream`: evaluation and prefill of one very long text, quarter by quarter: flat or not?"""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings
from longscan.bench.report import Ratio, Report, table
from longscan.bench.suites.train import LLAMA, QUICK_SHAPE, SHAPE, describe

__all__ = ["run"]

TOKENS, QUICK_TOKENS = 1_000_000, 20_000
OURS = "longscan"
JOBS = "longscan.bench.contenders.longscan"
EVALUATE, PREFILL = f"{JOBS}:evaluate_stream", f"{JOBS}:prefill_stream"
LLAMA_TOKENS, QUICK_LLAMA_TOKENS = 32_768, 4_096  # its time is quadratic in them


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of one evaluation and two prefills, with time and memory after every chunk.

    Args:
        settings: the threads.
        quick: a small model and a shorter text.
    """
    report = Report(suite="stream")
    model, n_tokens = (QUICK_SHAPE, QUICK_TOKENS) if quick else (SHAPE, TOKENS)
    fewer = QUICK_LLAMA_TOKENS if quick else LLAMA_TOKENS
    llama = model | LLAMA | {"max_positions": fewer}
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("evaluate", EVALUATE, model, n_tokens),
        ("prefill", PREFILL, model, n_tokens),
        ("prefill of a Llama", PREFILL, llama, fewer),
    ]
    for case, job, fields, total in cases:
        contender = Contender(
            name=OURS,
            job=job,
            arguments={"model": fields, "n_tokens": total},
            patience=0.0,  # the first run is the only one: it warms up by itself
        )
        constant = fields is model
        _add(report, case, settings.compare(case, [contender], settings)[OURS], total, constant)
    report.notes.append(f"One text, one run of each, random weights; {describe(model)}.")
    return report


def _add(report: Report, case: str, measured: Measurement, n_tokens: int, constant: bool) -> None:
    """Add the rows and the table of one run; `constant`: time and memory should not grow."""
    report.add(case, [measured], n_tokens, "tokens/s", n_tokens=n_tokens)
    row = report.rows[-1]
    marks = row.pop("marks", None)
    if marks is None:
        return
    row["quarters"] = quarters = _quarters(marks)
    start = marks[0][2]
    body = [[f"{q['tokens']:,}", f"{q['rate']:,.0f}", f"{q['resident_bytes'] / 1e6:,.1f}"] for q in quarters]
    report.tables.append(
        table(
            f"{case}: {n_tokens:,} tokens",
            ["up to token", "tokens/s in this quarter", "resident MB at its end"],
            [[f"{marks[0][0]:,}", "", f"{start / 1e6:,.1f}"], *body],
        )
    )
    rates = [q["rate"] for q in quarters]
    report.ratios += [
        Ratio(
            what=f"{case}: last quarter's speed over the first's",
            measured=rates[-1] / rates[0],
            goal="flat" if constant else "",
            percent=True,
        ),
        Ratio(
            what=f"{case}: resident set at the end over that after the first chunk",
            measured=quarters[-1]["resident_bytes"] / start,
            goal="constant" if constant else "",
            percent=True,
        ),
    ]


def _quarters(marks: list[list[Any]]) -> list[dict[str, Any]]:
    """Return speed and memory of each quarter, from marks of (tokens, seconds, resident bytes)."""
    total = marks[-1][0]
    ends = [next(mark for mark in marks if mark[0] >= total * part / 4) for part in range(1, 5)]
    parts = []
    before = marks[0]
    for end in ends:
        tokens, seconds = end[0] - before[0], end[1] - before[1]
        parts.append({"tokens": end[0], "rate": tokens / max(seconds, 1e-9), "resident_bytes": end[2]})
        before = end
    return parts
