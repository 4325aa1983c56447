"""`longscan bench generate`: reading a prompt and decoding with the smallest published shape, 130m."""

from __future__ import annotations

from typing import Any

from longscan.bench.race import Contender, Pace, faster, race
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.bench.train import describe, matrices, matrix_parameters

__all__ = ["run"]

SHAPE = {"d_model": 768, "n_layers": 24, "vocab_size": 50280}  # the preset 130m, padded
PROMPTS, TOKENS = (512, 2048), 64
QUICK_SHAPE, QUICK_PROMPTS, QUICK_TOKENS = {"d_model": 64, "n_layers": 2, "vocab_size": 256}, (32,), 8
OURS, HF, PRODUCTS, READING = (
    "longscan",
    "transformers",
    "ceiling: matrix products alone",
    "ceiling: reading the weights",
)


def run(pace: Pace, quick: bool) -> Report:
    """Race prefill and decoding.

    Args:
        pace: how thoroughly.
        quick: a small model and a short prompt, to see that it works.

    Returns:
        The report.
    """
    report = Report(suite="generate")
    model, prompts, n_tokens = (
        (QUICK_SHAPE, QUICK_PROMPTS, QUICK_TOKENS) if quick else (SHAPE, PROMPTS, TOKENS)
    )
    for seq_len in prompts:
        body = matrix_parameters(**model) - model["vocab_size"] * model["d_model"]  # the head sees one token
        products = {
            "n_rows": seq_len,
            "shapes": matrices(model["d_model"]),
            "backward": False,
            "operations": 2 * body * seq_len,
        }
        ceiling = Contender(name=PRODUCTS, job="longscan.bench.ceilings:matmul", arguments=products)
        _race(report, f"prefill {seq_len}", "prefill", {"model": model, "seq_len": seq_len}, ceiling, pace)
    here = {"model": model, "prompt": prompts[0], "n_tokens": n_tokens}
    weights = {"n_bytes": 4 * matrix_parameters(**model) * n_tokens}
    ceiling = Contender(name=READING, job="longscan.bench.ceilings:read", arguments=weights)
    _race(report, f"decode {n_tokens}", "decode", here, ceiling, pace)
    report.tables = [
        rate_table("generation: tokens/s (min–max)", report.rows, rate),
        rate_table("generation: peak resident set of the process, MB", report.rows, _memory),
    ]
    report.notes.append(
        f"One sequence, float32, random weights; {describe(model)}. Prefill computes the last logits only; "
        "decoding is greedy."
    )
    return report


def _race(report: Report, case: str, job: str, here: dict[str, Any], ceiling: Contender, pace: Pace) -> None:
    """Race one case and record it."""
    contenders = [
        Contender(name=OURS, job=f"longscan.bench.ours:{job}", arguments=here),
        ceiling,
        Contender(
            name=HF,
            job=f"longscan.bench.peers:{job}_transformers",
            arguments=here,
            packages=("transformers",),
            peer=True,
            patience=30.0,
        ),
    ]
    found = race(case, contenders, pace)
    report.add(case, found.values(), here["n_tokens" if job == "decode" else "seq_len"], "tokens/s")
    goal = "≥ 2.5 ×" if job == "decode" else "≥ 4 ×"
    report.ratios += [
        Ratio(what=f"{case}: faster than transformers", measured=faster(found, OURS, HF), goal=goal),
        Ratio(what=f"{case}: share of the ceiling", measured=faster(found, OURS, ceiling.name), percent=True),
    ]


def _memory(row: dict[str, Any]) -> str:
    """Show the peak of the process."""
    known = row["rate"] is not None and row["contender"] in (OURS, HF)
    return f"{row['peak_bytes'] / 1e6:,.0f}" if known else "–"
