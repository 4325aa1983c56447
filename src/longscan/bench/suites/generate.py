"""`longscan bench generate`: prefill and decode, at every precision of the weights.

The peers are llama.cpp, transformers and OpenVINO with the same weights; the ceilings are the matrix
products, scans and attention of a prompt, and reading weights and states for a token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from longscan.bench.contenders import hugging_face, llama
from longscan.bench.machine import multiplies_bf16
from longscan.bench.measure import Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table, table
from longscan.bench.suites.generate_contenders import (
    HF,
    IN_BATCHES,
    LLAMA_HF,
    LLAMA_OURS,
    LOOP,
    MIXING,
    OPENVINO,
    PRECISIONS,
    PREFILLED,
    PRODUCTS,
    READING,
    SHAPES,
    Files,
    Sizes,
    decode_contenders,
    prefill_contenders,
    times,
    tiny,
)
from longscan.bench.suites.work import work_of
from longscan.models.common.quantization import ROUNDED
from longscan.ops import native_info

__all__ = ["SHAPES", "Files", "distance", "export_files", "run", "tiny"]

Export: TypeAlias = Callable[[dict[str, Any], Path, Settings], Files]

# our precision -> formats of llama.cpp, of which the fastest counts
FORMATS: dict[str, tuple[str, ...]] = {
    "float32": ("f32",),
    "bf16": ("bf16",),
    "int8": ("q8_0",),
    "int4": ("q4_0", "q4_K"),
    "w8a8": ("q8_0",),
    "w4a8": ("q4_0",),
}
INTEGERS = ("int8", "int4", "w8a8", "w4a8")
# of Mamba: the goal over llama.cpp (0: none); of the others: over the best peer
PREFILL = {"float32": 2.2, "bf16": 0.0} | dict.fromkeys(INTEGERS, 3.0)
DECODE = {"float32": 1.05, "bf16": 1.2, "int8": 1.4, "int4": 1.6}
BEST = {"prefill": 2.0, "decode": 1.2}
VNNI, AVX2 = 1.6, 1.3  # integers over float32, by instruction set
SHARES = {"float32": 90, "bf16": 90, "int8": 70, "int4": 70}  # percent of the memory bandwidth
GROWTH = {8: 4, 32: 8}  # batch size -> throughput over that of one sequence, in int8


def run(settings: Settings, quick: bool, shape: str = "130m", export: Export | None = None) -> Report:
    """Return a report of prefill and decode.

    Args:
        settings: of the benchmark.
        quick: a small model and a short prompt, to see that it works.
        shape: of SHAPES.
        export: writes the weights for the peers; `export_files` if None.
    """
    report = Report(suite="generate")
    sizes = tiny(shape) if quick else SHAPES[shape]
    with tempfile.TemporaryDirectory(prefix="longscan-bench-") as folder:
        write = export_files if export is None else export
        files = write(sizes.model, Path(folder), settings) if settings.peers else Files()
        for seq_len in sizes.prompts:
            _prefill(report, sizes, seq_len, files, settings)
        _decode(report, sizes, files, settings)
    prefill, decode = (
        [row for row in report.rows if row["case"].startswith(phase)] for phase in ("prefill", "decode")
    )
    report.tables = [
        rate_table("prefill: tokens/s (min–max)", prefill, rate),
        rate_table("decode, by batch size: tokens/s of the batch (min–max)", decode, rate),
        _costs([row for row in decode if row["case"] == "decode 1"]),
    ]
    millions = work_of(sizes.model).parameters / 1e6
    report.notes += [
        f"{sizes.title}, {millions:,.1f} million parameters in matrices, random weights, the same for all "
        "but the Llamas. Prefill computes the last logits only, except in OpenVINO; decode is greedy, after "
        "a prompt.",
        "Prefill is bound by matrix products, in the fastest type that weights are unpacked to, and by scans "
        "and attention; decode of one sequence by reading the weights, of a batch also by the states. Every "
        "process holds Python and torch too.",
    ]
    if settings.peers and not multiplies_bf16():
        report.notes.append("transformers runs in float32 only: this processor does not multiply bfloat16.")
    if settings.peers and not sizes.openvino:
        report.notes.append(f"{OPENVINO}'s exporter does not know this model.")
    return report


def export_files(model: dict[str, Any], folder: Path, settings: Settings) -> Files:
    """Write the weights for the peers that are installed.

    Args:
        model: see `contenders.longscan.fresh`.
        folder: for the files.
        settings: of the benchmark.
    """
    gguf = settings.installed(llama.PACKAGE) and settings.installed("gguf")
    directory = settings.installed("transformers")
    if gguf or directory:
        settings.notify("generate: writing the weights for the peers")
    return Files(
        gguf=llama.export(model, folder) if gguf else {},
        directory=hugging_face.export(model, folder / "model") if directory else None,
    )


def _prefill(report: Report, sizes: Sizes, seq_len: int, files: Files, settings: Settings) -> None:
    """Add the rows and ratios of prefill."""
    case = f"prefill {seq_len}"
    results = settings.compare(case, prefill_contenders(sizes, seq_len, files), settings)
    report.add(case, results.values(), seq_len, "tokens/s")
    ratios = list(_over_peers(results, sizes, "prefill"))
    slowest = max((f"longscan {p}" for p in PREFILLED), key=lambda name: _seconds(results, name))
    peers = [f"llama.cpp {name}" for name in files.gguf]
    ratios.append(("our slowest over the fastest llama.cpp", faster(results, slowest, *peers), 0.0))
    report.ratios += [_ratio(f"{case}: {what}", value, goal, sizes) for what, value, goal in ratios]
    over = {p: faster(results, f"longscan {p}", "longscan float32") for p in INTEGERS}
    goal = VNNI if "vnni" in (native_info().isa or "") else AVX2
    report.ratios += [_ratio(f"{case}: {p} over float32", over[p], goal, sizes) for p in INTEGERS]
    for precision in PREFILLED:
        floor = _seconds(results, f"{PRODUCTS}, {precision}") + _seconds(results, MIXING)
        share = floor / _seconds(results, f"longscan {precision}")
        what = f"{case}: {precision}, share of both ceilings in turn"
        report.ratios.append(Ratio(what=what, measured=share, percent=True))


def _decode(report: Report, sizes: Sizes, files: Files, settings: Settings) -> None:
    """Add the rows and ratios of decode, by batch size."""
    n_tokens, results = sizes.n_tokens, settings.compare("decode", decode_contenders(sizes, files), settings)
    excerpts = {name: m.details.pop("excerpt", None) for name, m in results.items()}
    excerpts[LLAMA_OURS] = excerpts[LLAMA_HF] = None  # other models: there is nothing to compare
    for name, m in results.items():
        m.details["logits_error"] = distance(excerpts["longscan float32"], excerpts[name])
    for batch in (1, *sizes.batches):
        suffix = times(batch)
        here = [
            replace(m, name=name.removesuffix(suffix))
            for name, m in results.items()
            if (" × " not in name if batch == 1 else name.endswith(suffix))
        ]
        report.add(f"decode {batch}", here, batch * n_tokens, "tokens/s", batch=batch)
    ratios = _over_peers(results, sizes, "decode")
    report.ratios += [_ratio(f"decode 1: {what}", value, goal, sizes) for what, value, goal in ratios]
    _shares(report, sizes, results)
    for precision, peer in IN_BATCHES.items():
        one = _seconds(results, f"longscan {precision}")
        for batch in sizes.batches:
            name = f"longscan {precision}{times(batch)}"
            goal = GROWTH.get(batch, 0) if precision == "int8" else 0
            growth = batch * one / _seconds(results, name)
            what = f"decode {batch}: {precision} over one sequence"
            report.ratios.append(_ratio(what, growth, goal, sizes))
            over = faster(results, name, f"llama.cpp {peer}{times(batch)}")
            report.ratios.append(_ratio(f"decode {batch}: {precision} over llama.cpp {peer}", over, 0, sizes))


def _shares(report: Report, sizes: Sizes, results: Mapping[str, Measurement]) -> None:
    """Add the ratios of decode to memory bandwidth, and the share of Python."""
    bandwidth = 4 * work_of(sizes.model).parameters * sizes.n_tokens / _seconds(results, READING)
    for batch in (1, *sizes.batches):
        for precision in PRECISIONS if batch == 1 else IN_BATCHES:
            m = results[f"longscan {precision}{times(batch)}"]
            weights = m.details.get("weight_bytes", math.nan)
            states = 2 * batch * m.details.get("state_bytes", 0)  # read and written
            needs = {"weights and states": weights + states}
            if batch == 1:
                needs = {"the weights": weights, **needs}
            for what, n_bytes in needs.items():
                goal = f"≥ {SHARES[precision]} %" if what == "the weights" else ""
                share = n_bytes * sizes.n_tokens / bandwidth / m.median
                what = f"decode {batch}: {precision}, share of reading {what}"
                report.ratios.append(Ratio(what=what, measured=share, goal=goal, percent=True))
    if not math.isnan(bandwidth):
        report.notes.append(f"Memory is read at {bandwidth / 1e9:.1f} GB/s.")
    python = results[LOOP].details.get("python_share", math.nan)
    what = "decode 1: int4, share of Python in generate_ids"
    report.ratios.append(Ratio(what=what, measured=python, goal="≤ 5 %", percent=True))


def _costs(rows: list[dict[str, Any]]) -> str:
    """Return the table of memory, and of the error of each contender's logits against ours in float32."""
    body = [
        [
            row["contender"],
            f"{row['weight_bytes'] / 1e6:,.1f}" if "weight_bytes" in row else "–",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            "–" if row.get("logits_error") is None else f"{row['logits_error']:.1e}",
        ]
        for row in rows
        if row["rate"] and row["contender"] not in (READING, LOOP)
    ]
    columns = ["", "weights, MB", "peak resident set, MB", "error of the logits, rms over spread"]
    return table("memory during decode, and exactness after prefill", columns, body)


def distance(reference: list[float] | None, other: list[float] | None) -> float | None:
    """Return the root mean square of a difference over the standard deviation of the reference.

    Args:
        reference: logits.
        other: as many; None if either was not measured.
    """
    if reference is None or other is None:
        return None
    mean = math.fsum(reference) / len(reference)
    spread = math.fsum((value - mean) ** 2 for value in reference)
    error = math.fsum((a - b) ** 2 for a, b in zip(reference, other, strict=True))
    return math.sqrt(error / spread)


def _over_peers(
    results: Mapping[str, Measurement], sizes: Sizes, phase: str
) -> Iterable[tuple[str, float, float]]:
    """Yield the ratios of each precision of ours to the peers: what, the ratio, and its goal."""
    others: tuple[str, ...] = ()
    if sizes.model["model"] == "mamba":
        ours = "longscan float32"
        yield f"float32 over {HF}", faster(results, ours, HF), {"prefill": 5.0, "decode": 2.5}[phase]
        yield "float32 over our Llama", faster(results, ours, LLAMA_OURS), 0.0
        yield "our Llama over transformers'", faster(results, LLAMA_OURS, LLAMA_HF), 1.0
        goals = {"prefill": PREFILL, "decode": DECODE}[phase]
    else:
        goals, others = dict.fromkeys(PREFILLED, BEST[phase]), ("transformers", OPENVINO)
    for precision in PREFILLED if phase == "prefill" else PRECISIONS:
        formats = FORMATS[precision][: 1 if phase == "prefill" else None]
        same = ROUNDED.get(precision, precision)
        peers = [*(f"llama.cpp {name}" for name in formats), *(f"{name} {same}" for name in others)]
        what = "the best peer" if others else f"llama.cpp {' or '.join(formats)}"
        yield f"{precision} over {what}", faster(results, f"longscan {precision}", *peers), goals[precision]


def _seconds(results: Mapping[str, Measurement], name: str) -> float:
    """Return the median of a contender; NaN if it was not measured."""
    return results[name].median if name in results else math.nan


def _ratio(what: str, measured: float, goal: float, sizes: Sizes) -> Ratio:
    """Return a ratio with its goal, if it has one."""
    return Ratio(what=what, measured=measured, goal=f"≥ {goal * sizes.slack:.3g} ×" if goal else "")
