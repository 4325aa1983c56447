"""`longscan bench train`: tokens per second and memory of a training step, by length of the sequences."""

from __future__ import annotations

import math
from typing import Any

from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table
from longscan.bench.suites.work import work_of

__all__ = ["LLAMA", "LSTM", "MAMBA2", "MAMBA3", "SHAPE", "TRANSFORMER", "describe", "run"]

SHAPE = {"d_model": 256, "n_layers": 8, "vocab_size": 4096}
LENGTHS, TOKENS = (128, 512, 2048, 8192), 4096
QUICK_SHAPE = {"d_model": 64, "n_layers": 2, "vocab_size": 512}
QUICK_LENGTHS, QUICK_TOKENS = (32, 128), 128
# as many parameters as the Mamba of SHAPE
TRANSFORMER = {"n_layers": 4, "n_heads": 4, "d_ff": 1200}
LLAMA: dict[str, Any] = {"model": "llama", "n_layers": 4, "n_heads": 4, "d_ff": 800}
LSTM = {"n_layers": 2, "d_hidden": 488}
MAMBA2: dict[str, Any] = {"model": "mamba2", "d_state": 64}
MAMBA3: dict[str, Any] = {"model": "mamba3", "d_state": 64}

OURS, SECOND, THIRD, LLAMA_OURS, LLAMA_HF, MAMBAPY, HF_MAMBAPY, HF, GPT, RNN, CEILING = (
    "longscan",
    "Mamba-2, longscan",
    "Mamba-3, longscan",
    "no Mamba: Llama, longscan",
    "no Mamba: Llama, transformers",
    "mambapy",
    "transformers, use_mambapy",
    "transformers, default",
    "no Mamba: Transformer, SDPA",
    "no Mamba: LSTM",
    "ceiling: matrix products alone",
)
QUADRATIC_UP_TO = (
    512  # transformers' default path takes time quadratic in seq_len; beyond this it takes many minutes
)
PSCAN_BYTES = 24  # what pscan saves for the backward pass, per token, layer, channel and state: measured


def run(settings: Settings, quick: bool) -> Report:
    """Return a report of training steps at several lengths.

    Args:
        settings: of the benchmark.
        quick: a small model and short sequences, to see that it works.
    """
    report = Report(suite="train")
    model, lengths, least = (QUICK_SHAPE, QUICK_LENGTHS, QUICK_TOKENS) if quick else (SHAPE, LENGTHS, TOKENS)
    base = 0.0  # our tokens per second at 512, or the longest length below
    for seq_len in lengths:
        batch = max(1, least // seq_len)
        results = settings.compare(f"train {seq_len}", _contenders(model, batch, seq_len), settings)
        report.add(f"{seq_len}", results.values(), batch * seq_len, "tokens/s", seq_len=seq_len, batch=batch)
        report.ratios += _ratios(seq_len, results)
        ours = batch * seq_len / results[OURS].median
        if seq_len <= 512:
            base = ours
        else:
            what = f"{seq_len}: speed, share of that at 512"
            report.ratios.append(Ratio(what=what, measured=ours / base, goal="90–110 %", percent=True))
    report.tables = [
        rate_table("training: tokens/s (min–max), by seq_len", report.rows, rate),
        rate_table("training: peak resident set of the process, MB, by seq_len", report.rows, _memory),
    ]
    report.notes.append(
        f"A step: forward, backward and AdamW in float32 on {least:,} tokens, or on one sequence if that is "
        f"longer; {describe(model)}" + ("." if quick else "; all models have as many parameters.")
    )
    return report


def describe(model: dict[str, int]) -> str:
    """Return the size of a model, as part of a sentence.

    Args:
        model: d_model, n_layers and vocab_size.
    """
    return f"d_model {model['d_model']}, {model['n_layers']} layers, vocabulary {model['vocab_size']:,}"


def _contenders(model: dict[str, int], batch: int, seq_len: int) -> list[Contender]:
    """Return the contenders of a training step."""
    here: dict[str, Any] = {"model": model, "batch": batch, "seq_len": seq_len}
    tokens, d_model = batch * seq_len, model["d_model"]
    pscan_bytes = PSCAN_BYTES * tokens * model["n_layers"] * 2 * d_model * 16

    def with_layers(n_layers: int) -> dict[str, Any]:
        return here | {"model": model | {"n_layers": n_layers}}

    def peer(
        name: str, job: str, packages: tuple[str, ...] = (), needs_bytes: int = 0, **more: Any
    ) -> Contender:
        return Contender(
            name=name,
            job=f"longscan.bench.contenders.peers:{job}",
            arguments=here | more,
            packages=packages,
            peer=True,
            patience=5.0 if packages else math.inf,
            needs_bytes=needs_bytes,
        )

    products = {
        "n_rows": tokens,
        "shapes": [*work_of(model).shapes, [d_model, model["vocab_size"], 1]],
        "backward": True,
    }
    gpt, rnn = with_layers(TRANSFORMER["n_layers"]), with_layers(LSTM["n_layers"])
    llama = here | {"model": model | LLAMA | {"max_positions": seq_len}}
    contenders = [
        Contender(name=OURS, job="longscan.bench.contenders.longscan:train", arguments=here),
        *(
            Contender(name=name, job="longscan.bench.contenders.longscan:train", arguments=arguments)
            for name, arguments in (
                (SECOND, here | {"model": model | MAMBA2}),
                (THIRD, here | {"model": model | MAMBA3}),
                (LLAMA_OURS, llama),
            )
        ),
        peer(LLAMA_HF, "train_transformers", ("transformers",), **llama),
        Contender(name=CEILING, job="longscan.bench.contenders.ceilings:matmul", arguments=products),
        peer(GPT, "train_transformer", **gpt, n_heads=TRANSFORMER["n_heads"], d_ff=TRANSFORMER["d_ff"]),
        peer(RNN, "train_lstm", **rnn, d_hidden=LSTM["d_hidden"]),
        peer(MAMBAPY, "train_mambapy", ("mambapy",), pscan_bytes),
        # without mambapy installed, transformers would silently take its default path
        peer(HF_MAMBAPY, "train_transformers", ("transformers", "mambapy"), pscan_bytes, use_mambapy=True),
    ]
    if seq_len <= QUADRATIC_UP_TO:
        contenders.append(peer(HF, "train_transformers", ("transformers",), one_layer=True))
    return contenders


def _memory(row: dict[str, Any]) -> str:
    """Return the peak of the process as a cell."""
    if row["rate"] is None or row["contender"] == CEILING:
        return "–"
    return f"{row['peak_bytes'] / 1e6:,.0f}" + (" (1 layer)" if row.get("extrapolated") else "")


def _ratios(seq_len: int, results: dict[str, Measurement]) -> list[Ratio]:
    """Return the ratios at one length."""
    gpt_goal = {512: "≥ 75 %", 2048: "> 100 %", 8192: "> 100 %"}.get(seq_len, "")
    ratios = (
        ("faster than mambapy", faster(results, OURS, MAMBAPY), "≥ 10 ×", False),
        (
            "faster than the faster path of transformers",
            faster(results, OURS, HF, HF_MAMBAPY),
            "≥ 10 ×",
            False,
        ),
        ("peak memory, share of mambapy's", _memory_share(results, MAMBAPY), "≤ 25 %", True),
        ("peak memory, share of transformers'", _memory_share(results, HF_MAMBAPY), "≤ 25 %", True),
        ("speed, share of the Transformer's", faster(results, OURS, GPT), gpt_goal, True),
        ("speed, share of our Llama's", faster(results, OURS, LLAMA_OURS), "", True),
        *(
            (f"{name}'s speed, share of {of}", faster(results, name, other), goal, True)
            for name in (SECOND, THIRD)
            for of, other, goal in (
                ("Mamba's", OURS, "≥ 100 %" if seq_len >= 512 else ""),
                ("the Transformer's", GPT, "> 100 %" if seq_len >= 2048 else ""),
            )
        ),
        ("our Llama faster than transformers'", faster(results, LLAMA_OURS, LLAMA_HF), "≥ 1 ×", False),
        (
            "speed, share of the ceiling",
            faster(results, OURS, CEILING),
            "≥ 60 %" if seq_len in (512, 2048) else "",
            True,
        ),
    )
    return [
        Ratio(what=f"{seq_len}: {what}", measured=measured, goal=goal, percent=percent)
        for what, measured, goal, percent in ratios
    ]


def _memory_share(results: dict[str, Measurement], name: str) -> float:
    """Return our peak over that of another contender, NaN if it did not run."""
    if name not in results or not results[name].seconds:
        return math.nan
    return (results[OURS].peak_bytes or math.nan) / (results[name].peak_bytes or math.nan)
