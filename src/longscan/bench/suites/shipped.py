"""`longscan bench shipped`: the model that ships with longscan, from its start to token 1,000,000."""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Measurement, Pace, faster, race
from longscan.bench.report import Ratio, Report, rate, rate_table, spread, table

__all__ = ["run"]

NAME, TOKENS, PROMPT = "longscan-tiny-en", 200, 16
NEAR, FAR, QUICK_FAR = 100, 1_000_000, 2_000
PRECISIONS = ("float32", "bf16", "int8", "int4")
START, WRITE, POSITION = "start to first output", f"write {TOKENS}", f"write {TOKENS} after"
FIRST, TORCH, PYTHON = "longscan generate, 1 token", "import torch", "python"


def run(pace: Pace, quick: bool) -> Report:
    """Measure the start, the speed of writing, and whether it depends on what was read.

    Args:
        pace: how thoroughly.
        quick: a shorter prompt, to see that it works.

    Returns:
        The report.
    """
    report = Report(suite="shipped")
    _start(report, pace)
    contenders = [_contender(f"longscan {p}", "write", PROMPT, precision=p) for p in PRECISIONS]
    report.add(WRITE, race(WRITE, contenders, pace).values(), TOKENS, "tokens/s")
    _positions(report, QUICK_FAR if quick else FAR, pace)
    starts, written, far = (
        [row for row in report.rows if row["case"] == case] for case in (START, WRITE, POSITION)
    )
    report.tables = [
        table(
            "seconds from the start of the process to its first output",
            ["", "seconds (min–max)"],
            ([row["contender"], spread(row, float, ".2f")] for row in starts),
        ),
        rate_table(f"{NAME}: tokens/s through generate_ids, of {TOKENS} (min–max)", written, rate),
        table(
            f"{NAME}: writing after a prompt",
            ["", "tokens/s (min–max)", "state, bytes", "resident MB after the prompt"],
            ([row["contender"], rate(row), *_sizes(row)] for row in far),
        ),
    ]
    return report


def _start(report: Report, pace: Pace) -> None:
    """Race what a process does before it can say anything."""
    generate = ["-m", "longscan.cli", "generate", "It was", "--max-new-tokens", "1", "--seed", "0", "--quiet"]
    argv = {
        FIRST: generate,
        TORCH: ["-c", "import torch; print(1)"],
        PYTHON: ["-c", "print(1)"],
    }
    contenders = [
        Contender(name=name, job="longscan.bench.contenders.longscan:first_output", arguments={"argv": line})
        for name, line in argv.items()
    ]
    found = race(START, contenders, pace)
    report.add(START, found.values(), 1, "starts/s")
    report.ratios += [
        Ratio(what="seconds to the first token", measured=found[FIRST].median, goal="< 1.5 s", unit="s"),
        Ratio(
            what="seconds to the first token, of them torch's import",
            measured=faster(found, FIRST, TORCH),
            percent=True,
        ),
    ]


def _positions(report: Report, far: int, pace: Pace) -> None:
    """Race writing after a short and after a very long prompt."""
    pace.tell(f"shipped: reading {far:,} tokens")
    names = {position: f"{position:,} tokens" for position in (NEAR, far)}
    contenders = [_contender(name, "far", position) for position, name in names.items()]
    found = race(POSITION, contenders, pace)
    report.add(POSITION, found.values(), TOKENS, "tokens/s")
    near, after = (found[name] for name in names.values())
    report.ratios += [
        Ratio(
            what=f"speed after {names[far]}, share of that after {names[NEAR]}",
            measured=faster(found, after.name, near.name),
            goal="95–105 %",
            percent=True,
        ),
        Ratio(
            what=f"resident set after {names[far]}, share of that after {names[NEAR]}",
            measured=_share(after, near, "resident_bytes"),
            goal="constant",
            percent=True,
        ),
    ]


def _contender(name: str, job: str, prompt: int, **more: Any) -> Contender:
    """Make the shipped model a contender."""
    arguments = {"model": NAME, "prompt": prompt, "n_tokens": TOKENS, **more}
    return Contender(name=name, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)


def _share(one: Measurement, other: Measurement, key: str) -> float:
    """Divide a detail of one measurement by that of another."""
    nan = float("nan")
    return float(one.details.get(key, nan)) / float(other.details.get(key, nan))


def _sizes(row: dict[str, Any]) -> list[str]:
    """Show the state and the memory of a row."""
    if row["rate"] is None:
        return ["–", "–"]
    return [f"{row['state_bytes']:,}", f"{row['resident_bytes'] / 1e6:,.0f}"]
