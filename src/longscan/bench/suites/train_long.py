"""`longscan bench train --long`: a training step on sequences of up to a million tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings
from longscan.bench.report import Ratio, Report, rate, rate_table, table
from longscan.bench.suites.train import describe

__all__ = ["run"]

SHAPE = {"d_model": 64, "n_layers": 4, "vocab_size": 512}
LENGTHS, CHUNK = (2048, 8192, 65_536, 524_288, 1_048_576), 2048
QUICK_SHAPE = {"d_model": 32, "n_layers": 2, "vocab_size": 256}
QUICK_LENGTHS, QUICK_CHUNK = (128, 256, 1024), 128
TRANSFORMER = {"n_layers": 2, "n_heads": 4, "d_ff": 376}  # as many parameters as the Mamba of SHAPE
RECOMPUTED = 4 / 3  # a forward pass more, where a step is one and a backward pass of two

CHUNKS, WHOLE, GPT = "Mamba in chunks", "Mamba, one pass", "no Mamba: Transformer, SDPA"
# beyond it one pass of the Mamba takes 15 GB and more, and a step of the Transformer hours
ONE_PASS_UP_TO = 65_536
# the gradient of one sequence in chunks and in one pass, which fits into memory in float64 too
GRADIENT: dict[str, Any] = {"d_model": 16, "n_layers": 2, "vocab_size": 64, "d_state": 8}
GRADIENT_OF: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"d_head": 8},
    "mamba3": {"d_head": 8},
}
GRADIENT_LENGTH, QUICK_GRADIENT_LENGTH = 65_536, 512
DIFFERENCES = {"float64": "1e-10", "float32": "1e-4"}  # largest relative ones allowed
PATIENCE = 20.0  # seconds of a run that is not repeated


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of exact training steps on long sequences, in chunks and in one pass.

    Args:
        settings: of the benchmark.
        quick: a small model and short sequences, to see that it works.
    """
    report = Report(suite="train --long")
    model, lengths, chunk = (QUICK_SHAPE, QUICK_LENGTHS, QUICK_CHUNK) if quick else (SHAPE, LENGTHS, CHUNK)
    results: dict[int, dict[str, Measurement]] = {}
    for seq_len in lengths:
        contenders = _contenders(model, seq_len, chunk)
        results[seq_len] = settings.compare(f"train on {seq_len:,} tokens", contenders, settings)
        report.add(f"{seq_len:,}", results[seq_len].values(), seq_len, "tokens/s", seq_len=seq_len)
    report.tables = [
        rate_table("training on one sequence: tokens/s (min–max), by seq_len", report.rows, rate),
        rate_table("peak resident set of the process, MB, by seq_len", report.rows, _memory),
    ]
    base, short, longest = (results[n][CHUNKS] for n in (lengths[0], lengths[1], lengths[-1]))
    for seq_len in lengths[1:]:
        share = _speed(results[seq_len][CHUNKS], seq_len) / _speed(base, lengths[0])
        what = f"{seq_len:,}: speed in chunks, recomputation counted (4/3), share of that at {lengths[0]:,}"
        report.ratios.append(Ratio(what=what, measured=RECOMPUTED * share, goal="85–115 %", percent=True))
    report.ratios.append(
        Ratio(
            what=f"peak memory at {lengths[-1]:,}, of that at {lengths[1]:,}",
            measured=(longest.peak_bytes or math.nan) / (short.peak_bytes or math.nan),
            goal="≤ 1.2 ×",
        )
    )
    length = QUICK_GRADIENT_LENGTH if quick else GRADIENT_LENGTH
    names = ("mamba",) if quick else tuple(GRADIENT_OF)
    _gradients(report, settings, names, length, QUICK_CHUNK if quick else CHUNK)
    others = "" if quick else "; the Transformer has 2 layers and as many parameters"
    report.notes.append(
        f"A step: forward, backward and AdamW in float32 on one sequence, in chunks of {chunk:,} tokens with "
        f"exact gradients, or in one pass; {describe(model)}{others}."
    )
    return report


def _gradients(report: Report, settings: Settings, names: Sequence[str], seq_len: int, chunk: int) -> None:
    """Add how far the gradient in chunks is from that of one pass, and the memory of both.

    Args:
        report: receives a row, a cell and a goal for each model and dtype.
        settings: of the benchmark.
        names: of the models.
        seq_len: tokens of the sequence.
        chunk: tokens per chunk.
    """
    cells = []
    for name in names:
        for dtype, goal in DIFFERENCES.items():
            arguments = {
                "model": GRADIENT | GRADIENT_OF[name] | {"model": name},
                "seq_len": seq_len,
                "chunk": chunk,
            }
            contender = Contender(
                name=f"{name}, {dtype}",
                job="longscan.bench.contenders.gradients:gradient",
                arguments=arguments | {"dtype": dtype},
                patience=0.0,  # the numbers are the same each time
            )
            result = settings.compare(f"gradient of {seq_len:,} tokens", [contender], settings)[
                contender.name
            ]
            row = {
                "case": f"gradient of {seq_len:,}",
                **result.as_row(),
                "rate": None,
                "unit": "",
                "seq_len": seq_len,
            }
            report.rows.append(row)
            report.notes += [f"{contender.name}: {result.note}"] if result.note else []
            found = result.details
            difference = found.get("difference", math.nan)
            what = f"{contender.name}: gradient of {seq_len:,} tokens in chunks, difference from one pass"
            report.ratios.append(Ratio(what=what, measured=difference, goal=f"≤ {goal}", unit=""))
            memory = [
                f"{found[key] / 1e6:,.0f}" if key in found else "–" for key in ("chunks_bytes", "whole_bytes")
            ]
            cells.append([contender.name, f"{difference:.1e}", *memory])
    columns = ["", "largest difference", "in chunks, MB", "one pass, MB"]
    report.tables.append(table(f"gradient of one sequence of {seq_len:,} tokens", columns, cells))
    sizes = ", ".join(f"{key} {value}" for key, value in GRADIENT.items())
    report.notes.append(
        f"Largest difference of the gradients: the largest, over all parameters, of max |difference| / max "
        f"|gradient of one pass|; {sizes}, weights as initialised."
    )


def _contenders(model: dict[str, int], seq_len: int, chunk: int) -> list[Contender]:
    """Return the contenders of a training step."""
    here: dict[str, Any] = {"model": model, "batch": 1, "seq_len": seq_len}
    job = "longscan.bench.contenders.longscan:train"
    chunks = Contender(name=CHUNKS, job=job, arguments=here | {"chunk": chunk}, patience=PATIENCE)
    if seq_len > ONE_PASS_UP_TO:
        return [chunks]
    arguments = here | {"model": model | {"n_layers": TRANSFORMER["n_layers"]}}
    arguments |= {name: TRANSFORMER[name] for name in ("n_heads", "d_ff")}
    gpt = Contender(
        name=GPT,
        job="longscan.bench.contenders.peers:train_transformer",
        arguments=arguments,
        peer=True,
        patience=PATIENCE,
    )
    return [chunks, Contender(name=WHOLE, job=job, arguments=here, patience=PATIENCE), gpt]


def _speed(measurement: Measurement, seq_len: int) -> float:
    """Return tokens per second; NaN if it was not measured."""
    return seq_len / measurement.median


def _memory(row: dict[str, Any]) -> str:
    """Return the peak of the process as a cell."""
    return "–" if row["rate"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
