"""`longscan bench shipped`: the model that ships with longscan, from its start to token 1,000,000."""

from __future__ import annotations

from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table, spread, table

__all__ = ["run"]

NAME, TOKENS, PROMPT = "longscan-tiny-en", 200, 16
NEAR, FAR, QUICK_FAR = 100, 1_000_000, 200
PRECISIONS = ("float32", "bf16", "int8", "int4")
START, DECODE, POSITION = "start to first output", f"decode {TOKENS}", f"decode {TOKENS} after"
FIRST, TORCH, PYTHON = "longscan generate, 1 token", "import torch", "python"


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of latency, of decoding, and of how decoding depends on the prompt's length.

    Args:
        settings: of the benchmark.
        quick: a shorter prompt, to see that it works.
    """
    report = Report(suite="shipped")
    _start(report, settings)
    contenders = [_contender(f"longscan {p}", "generate", PROMPT, precision=p) for p in PRECISIONS]
    report.add(DECODE, settings.compare(DECODE, contenders, settings).values(), TOKENS, "tokens/s")
    _positions(report, QUICK_FAR if quick else FAR, settings)
    starts, decoded, far = (
        [row for row in report.rows if row["case"] == case] for case in (START, DECODE, POSITION)
    )
    report.tables = [
        table(
            "seconds from the start of the process to its first output",
            ["", "seconds (min–max)"],
            ([row["contender"], spread(row, float, ".2f")] for row in starts),
        ),
        rate_table(f"{NAME}: tokens/s through generate_ids, of {TOKENS} (min–max)", decoded, rate),
        table(
            f"{NAME}: decoding after a prompt",
            ["", "tokens/s (min–max)", "state, bytes", "resident MB after the prompt"],
            ([row["contender"], rate(row), *_sizes(row)] for row in far),
        ),
    ]
    return report


def _start(report: Report, settings: Settings) -> None:
    """Compare the start of a process up to its first output."""
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
    results = settings.compare(START, contenders, settings)
    report.add(START, results.values(), 1, "starts/s")
    report.ratios += [
        Ratio(what="seconds to the first token", measured=results[FIRST].median, goal="< 1.5 s", unit="s"),
        Ratio(
            what="seconds to the first token, of them torch's import",
            measured=faster(results, FIRST, TORCH),
            percent=True,
        ),
    ]


def _positions(report: Report, far: int, settings: Settings) -> None:
    """Compare decoding after a short and after a very long prompt."""
    settings.notify(f"shipped: prefill of {far:,} tokens")
    names = {position: f"{position:,} tokens" for position in (NEAR, far)}
    contenders = [_contender(name, "decode_far", position) for position, name in names.items()]
    results = settings.compare(POSITION, contenders, settings)
    report.add(POSITION, results.values(), TOKENS, "tokens/s")
    near, after = (results[name] for name in names.values())
    report.ratios += [
        Ratio(
            what=f"speed after {names[far]}, share of that after {names[NEAR]}",
            measured=faster(results, after.name, near.name),
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
    """Return the shipped model as a contender."""
    arguments = {"model": NAME, "prompt": prompt, "n_tokens": TOKENS, **more}
    return Contender(name=name, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)


def _share(one: Measurement, other: Measurement, key: str) -> float:
    """Return a detail of one measurement over that of another."""
    nan = float("nan")
    return float(one.details.get(key, nan)) / float(other.details.get(key, nan))


def _sizes(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row: state and memory."""
    if row["rate"] is None:
        return ["–", "–"]
    return [f"{row['state_bytes']:,}", f"{row['resident_bytes'] / 1e6:,.0f}"]
