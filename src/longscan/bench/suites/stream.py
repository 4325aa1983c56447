"""`longscan bench stream`: one very long text, evaluated and read, quarter by quarter: flat or not?"""

from __future__ import annotations

import time
from typing import Any

from longscan.bench.measure import Contender, Measurement, Pace, race
from longscan.bench.report import Ratio, Report, table
from longscan.bench.suites.train import LLAMA, QUICK_SHAPE, SHAPE, describe
from longscan.bench.worker import Run, resident_memory

__all__ = ["read_prompt", "run"]

TOKENS, QUICK_TOKENS = 1_000_000, 20_000
OURS = "longscan"
EVALUATE, READ = "longscan.bench.contenders.longscan:stream", "longscan.bench.stream:read_prompt"
LLAMA_TOKENS, QUICK_LLAMA_TOKENS = 32_768, 4_096  # its time is quadratic in them


def run(pace: Pace, quick: bool) -> Report:
    """Let one run each evaluate a document and read a prompt, watched after every chunk.

    Args:
        pace: the threads.
        quick: a small model and a shorter text.

    Returns:
        The report.
    """
    report = Report(suite="stream")
    model, n_tokens = (QUICK_SHAPE, QUICK_TOKENS) if quick else (SHAPE, TOKENS)
    fewer = QUICK_LLAMA_TOKENS if quick else LLAMA_TOKENS
    llama = model | LLAMA | {"max_positions": fewer}
    cases: list[tuple[str, str, dict[str, Any], int]] = [
        ("evaluate", EVALUATE, model, n_tokens),
        ("read", READ, model, n_tokens),
        ("read by a Llama", READ, llama, fewer),
    ]
    for case, job, fields, total in cases:
        contender = Contender(
            name=OURS,
            job=job,
            arguments={"model": fields, "n_tokens": total},
            patience=0.0,  # the first run is the only one: it warms up by itself
        )
        constant = fields is model
        _watch(report, case, race(case, [contender], pace)[OURS], total, constant)
    report.notes.append(f"One text, one run of each, random weights; {describe(model)}.")
    return report


def _watch(report: Report, case: str, measured: Measurement, n_tokens: int, constant: bool) -> None:
    """Add what one run showed, if it got that far; `constant` is what time and memory are meant to be."""
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


def read_prompt(model: dict[str, Any], n_tokens: int) -> Run:
    """Prepare reading one prompt of n_tokens, with time and memory after every chunk. Runs in a worker."""
    from longscan.bench.contenders import longscan as ours
    from longscan.bench.contenders import workloads as tasks
    from longscan.inference.prefill import read

    reader = ours.fresh(model).eval()
    ids = tasks.random_ids(1, n_tokens, model["vocab_size"])[0]

    def run() -> dict[str, Any]:
        marks: list[tuple[int, float, int]] = []  # tokens read, seconds, resident bytes
        read(
            reader, ids, progress=lambda done, _: marks.append((done, time.perf_counter(), resident_memory()))
        )
        return {"marks": marks}

    return run


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
