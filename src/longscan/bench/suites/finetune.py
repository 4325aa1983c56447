"""`longscan bench finetune`: a step of fine-tuning the 130m shape, beside transformers with PEFT."""

from __future__ import annotations

import math
from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.bench.suites.train import describe

__all__ = ["run"]

SHAPE = {"d_model": 768, "n_layers": 24, "vocab_size": 50277}
LENGTHS = (128, 512, 1024)
QUICK_SHAPE, QUICK_LENGTHS = {"d_model": 64, "n_layers": 2, "vocab_size": 512}, (32,)
LORA, LORA_INT8, FULL = "LoRA, longscan", "LoRA on int8, longscan", "all weights, longscan"
PEFT, PEFT_MAMBAPY, HF, HF_MAMBAPY = (
    "LoRA, transformers and PEFT",
    "LoRA, transformers and PEFT, use_mambapy",
    "all weights, transformers",
    "all weights, transformers, use_mambapy",
)
# beyond, a step of transformers' default path, whose time is quadratic in seq_len, takes many minutes
QUADRATIC_UP_TO = 128
# of every token, layer, channel and state, what transformers retains for the backward pass: measured
STATE_BYTES = 24


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of fine-tuning steps.

    Args:
        settings: of the benchmark.
        quick: a small model and short sequences, to see that it works.
    """
    report = Report(suite="finetune")
    model, lengths = (QUICK_SHAPE, QUICK_LENGTHS) if quick else (SHAPE, LENGTHS)
    for seq_len in lengths:
        results = settings.compare(f"finetune {seq_len}", _contenders(model, seq_len), settings)
        report.add(f"{seq_len}", results.values(), seq_len, "tokens/s", seq_len=seq_len)
        report.ratios += _ratios(seq_len, results)
    report.tables = [
        rate_table("fine-tuning: tokens/s (min–max), by seq_len", report.rows, rate),
        rate_table("fine-tuning: peak resident set of the process, MB, by seq_len", report.rows, _memory),
    ]
    report.notes.append(
        f"A step: forward, backward and AdamW in float32 on one sequence; {describe(model)}. LoRA has rank "
        "16: ours on all four projections, PEFT's on in_proj and x_proj, as it refuses out_proj and "
        "transformers ignores adapters on dt_proj."
    )
    return report


def _contenders(model: dict[str, int], seq_len: int) -> list[Contender]:
    """Return the contenders of a step."""
    here: dict[str, Any] = {"model": model, "seq_len": seq_len}
    needs = STATE_BYTES * seq_len * model["n_layers"] * 2 * model["d_model"] * 16
    job = "longscan.bench.contenders.finetune"

    def ours(name: str, **more: Any) -> Contender:
        return Contender(name=name, job=f"{job}:longscan", arguments=here | more)

    def peer(name: str, packages: tuple[str, ...], **more: Any) -> Contender:
        return Contender(
            name=name,
            job=f"{job}:peft",
            arguments=here | more,
            packages=packages,
            peer=True,
            patience=20.0,
            needs_bytes=needs,
        )

    contenders = [
        ours(LORA, lora=True),
        ours(LORA_INT8, lora=True, precision="int8"),
        ours(FULL, lora=False),
        peer(PEFT_MAMBAPY, ("transformers", "peft", "mambapy"), lora=True, use_mambapy=True),
        peer(HF_MAMBAPY, ("transformers", "mambapy"), lora=False, use_mambapy=True),
    ]
    if seq_len <= QUADRATIC_UP_TO:
        contenders += [
            peer(PEFT, ("transformers", "peft"), lora=True),
            peer(HF, ("transformers",), lora=False),
        ]
    return contenders


def _memory(row: dict[str, Any]) -> str:
    """Return the peak of the process as a cell."""
    return "–" if row["rate"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"


def _ratios(seq_len: int, results: dict[str, Measurement]) -> list[Ratio]:
    """Return the ratios at one length."""
    found = []
    for ours, theirs in ((LORA, (PEFT, PEFT_MAMBAPY)), (FULL, (HF, HF_MAMBAPY))):
        what = ours.partition(",")[0]
        speed, memory = faster(results, ours, *theirs), _memory_share(results, ours, theirs)
        found.append(Ratio(what=f"{seq_len}: {what}, faster than transformers", measured=speed, goal="≥ 5 ×"))
        found.append(
            Ratio(
                what=f"{seq_len}: {what}, share of transformers' peak memory",
                measured=memory,
                goal="≤ 50 %",
                percent=True,
            )
        )
    found.append(
        Ratio(
            what=f"{seq_len}: LoRA, speed beside all weights", measured=faster(results, LORA, FULL), goal=""
        )
    )
    return found


def _memory_share(results: dict[str, Measurement], ours: str, theirs: tuple[str, ...]) -> float:
    """Return our peak over the lowest of others, NaN if none ran."""
    peaks = [
        results[name].peak_bytes or math.nan for name in theirs if name in results and results[name].seconds
    ]
    return (results[ours].peak_bytes or math.nan) / min(peaks) if peaks else math.nan
