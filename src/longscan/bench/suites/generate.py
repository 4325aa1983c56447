"""`longscan bench generate`: reading a prompt and writing after it, at every precision of the weights.

Beside longscan stand llama.cpp on GGUF files of the same weights, transformers in float32, and the ceilings:
the matrix products and state updates of a prompt, the reading of the weights for a token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longscan.bench.contenders import llama
from longscan.bench.machine import installed
from longscan.bench.measure import Contender, Measurement, Pace, faster, race
from longscan.bench.report import Ratio, Report, rate, rate_table, table
from longscan.bench.suites.train import describe, matrices, matrix_parameters

__all__ = ["SHAPES", "run"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured on a model.

    Attributes:
        model: fields of MambaConfig.
        llama: those of a Llama of about as many parameters, see `ours.fresh`.
        prompts: lengths read.
        batches: sequences that write together, beside 1.
        n_tokens: each of them writes.
        slack: the share of every goal that is asked for.
    """

    model: dict[str, int]
    llama: dict[str, Any]
    prompts: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (8, 32)
    n_tokens: int = 64
    slack: float = 1.0


LLAMA: dict[str, Any] = {"model": "llama", "max_positions": 4096}
# the presets, padded
SHAPES = {
    "130m": Sizes(
        model={"d_model": 768, "n_layers": 24, "vocab_size": 50280},
        llama=LLAMA | {"n_layers": 12, "n_heads": 12},
    ),
    "370m": Sizes(
        model={"d_model": 1024, "n_layers": 48, "vocab_size": 50280},
        llama=LLAMA | {"n_layers": 24, "n_heads": 16},
        prompts=(512,),
        batches=(),
        slack=0.9,
    ),
}
QUICK = Sizes(
    model={"d_model": 64, "n_layers": 2, "vocab_size": 512},
    llama=LLAMA | {"n_layers": 1, "n_heads": 4},
    prompts=(32,),
    batches=(2,),
    n_tokens=8,
)
D_STATE = 16

HF, LLAMA_OURS, LLAMA_HF, PRODUCTS, UPDATES, READING = (
    "transformers float32",
    "no Mamba: Llama float32, longscan",
    "no Mamba: Llama float32, transformers",
    "ceiling: matrix products alone",
    "ceiling: state updates alone",
    "ceiling: reading the float32 weights",
)
# ours -> whom to beat and by how much (0: no goal), reading and writing; of several the fastest counts
READ: dict[str, tuple[tuple[str, ...], float]] = {
    "float32": (("f32",), 2.2),
    "bf16": (("bf16",), 0.0),
    "int8": (("q8_0",), 2.5),
    "int4": (("q4_0",), 2.5),
}
WRITE: dict[str, tuple[tuple[str, ...], float]] = {
    "float32": (("f32",), 1.05),
    "bf16": (("bf16",), 1.2),
    "int8": (("q8_0",), 1.4),
    "int4": (("q4_0", "q4_K"), 1.6),
}
PRECISIONS = tuple(READ)
SHARES = {"float32": 90, "bf16": 90, "int8": 70, "int4": 70}  # percent of the speed of reading the weights
GROWTH = {8: 4, 32: 8}  # how many times faster so many sequences are than one, in int8
IN_BATCHES = {"int8": "q8_0", "float32": "f32"}
LOOP = "longscan int4, generate_ids"


def run(pace: Pace, quick: bool, shape: str = "130m") -> Report:
    """Race reading and writing.

    Args:
        pace: how thoroughly.
        quick: a small model and a short prompt, to see that it works.
        shape: of SHAPES.

    Returns:
        The report.
    """
    report = Report(suite="generate")
    sizes = QUICK if quick else SHAPES[shape]
    with _files(sizes, pace) as files:
        for seq_len in sizes.prompts:
            _read(report, sizes, seq_len, files, pace)
        _write(report, sizes, files, pace)
    read, written = (
        [row for row in report.rows if row["case"].startswith(job)] for job in ("prefill", "decode")
    )
    report.tables = [
        rate_table("reading a prompt: tokens/s (min–max)", read, rate),
        rate_table("writing, by sequences at once: tokens/s of all (min–max)", written, rate),
        _costs([row for row in written if row["case"] == "decode 1"]),
    ]
    report.notes += [
        f"Random weights, the same for longscan and llama.cpp; {describe(sizes.model)}. Reading computes the "
        "last logits only; writing is greedy, after a prompt.",
        "A prompt is bound by matrix products, in the fastest type that weights are unpacked to, and by the "
        "exponentials of the state updates; a token of one sequence by reading the weights, one of many "
        "sequences also by their states. Every process holds Python and torch too.",
    ]
    return report


@contextmanager
def _files(sizes: Sizes, pace: Pace) -> Iterator[Mapping[str, Path]]:
    """Write what llama.cpp reads, format -> file, for as long as it is needed; nothing if it does not run."""
    if not (pace.peers and installed(llama.PACKAGE) and installed("gguf")):
        yield {}
        return
    pace.tell("generate: writing the weights for llama.cpp")
    with tempfile.TemporaryDirectory(prefix="longscan-bench-") as folder:
        yield llama.export(sizes.model, Path(folder))


# --- reading ------------------------------------------------------------------------------------------------


def _read(report: Report, sizes: Sizes, seq_len: int, files: Mapping[str, Path], pace: Pace) -> None:
    """Race the reading of a prompt and record it."""
    model, case = sizes.model, f"prefill {seq_len}"
    here = {"model": model, "seq_len": seq_len}
    body = matrix_parameters(**model) - model["vocab_size"] * model["d_model"]  # the head sees one token
    shapes = matrices(model["d_model"])
    products = {"n_rows": seq_len, "shapes": shapes, "backward": False, "operations": 2 * body * seq_len}
    updates = {"n_states": seq_len * model["n_layers"] * 2 * model["d_model"] * D_STATE}
    contenders = [
        *(_ours(precision, "prefill", here | {"precision": precision}) for precision in PRECISIONS),
        *(_llama(name, path, "prefill", sizes, seq_len=seq_len) for name, path in files.items()),
        _transformers("prefill", here),
        *_llamas("prefill", here, sizes),
        *(
            Contender(
                name=f"{PRODUCTS}, {precision}",
                job="longscan.bench.contenders.ceilings:matmul",
                arguments=products | {"precision": precision},
            )
            for precision in PRECISIONS
        ),
        Contender(name=UPDATES, job="longscan.bench.contenders.ceilings:exp_fma", arguments=updates),
    ]
    found = race(case, contenders, pace)
    report.add(case, found.values(), seq_len, "tokens/s")
    ratios = [
        (f"float32 over {HF}", faster(found, "longscan float32", HF), 5.0),
        *_beside_llamas(found),
        *(_over(found, precision, *READ[precision]) for precision in PRECISIONS),
    ]
    slowest = max((f"longscan {p}" for p in PRECISIONS), key=lambda name: _seconds(found, name))
    everyone = [f"llama.cpp {name}" for name in files]
    ratios.append(("our slowest over the fastest llama.cpp", faster(found, slowest, *everyone), 0.0))
    report.ratios += [_ratio(f"{case}: {what}", value, goal, sizes) for what, value, goal in ratios]
    for precision in PRECISIONS:
        floor = _seconds(found, f"{PRODUCTS}, {precision}") + _seconds(found, UPDATES)
        share = floor / _seconds(found, f"longscan {precision}")
        what = f"{case}: {precision}, share of both ceilings in turn"
        report.ratios.append(Ratio(what=what, measured=share, percent=True))


# --- writing ------------------------------------------------------------------------------------------------


def _write(report: Report, sizes: Sizes, files: Mapping[str, Path], pace: Pace) -> None:
    """Race decoding, one sequence and several, and record it."""
    n_tokens, found = sizes.n_tokens, race("decode", _writers(sizes, files), pace)
    excerpts = {name: m.details.pop("excerpt", None) for name, m in found.items()}
    excerpts[LLAMA_OURS] = None  # another model: there is nothing to compare
    for name, m in found.items():
        m.details["logits_error"] = _distance(excerpts["longscan float32"], excerpts[name])
    for batch in (1, *sizes.batches):
        suffix = _times(batch)
        here = [
            replace(m, name=name.removesuffix(suffix))
            for name, m in found.items()
            if (" × " not in name if batch == 1 else name.endswith(suffix))
        ]
        report.add(f"decode {batch}", here, batch * n_tokens, "tokens/s", batch=batch)
    ratios = [
        (f"float32 over {HF}", faster(found, "longscan float32", HF), 2.5),
        *_beside_llamas(found),
        *(_over(found, precision, *WRITE[precision]) for precision in PRECISIONS),
    ]
    report.ratios += [_ratio(f"decode 1: {what}", value, goal, sizes) for what, value, goal in ratios]
    _shares(report, sizes, found)
    for precision, rival in IN_BATCHES.items():
        one = _seconds(found, f"longscan {precision}")
        for batch in sizes.batches:
            name = f"longscan {precision}{_times(batch)}"
            goal = GROWTH.get(batch, 0) if precision == "int8" else 0
            growth = batch * one / _seconds(found, name)
            what = f"decode {batch}: {precision} over one sequence"
            report.ratios.append(_ratio(what, growth, goal, sizes))
            over = faster(found, name, f"llama.cpp {rival}{_times(batch)}")
            report.ratios.append(
                _ratio(f"decode {batch}: {precision} over llama.cpp {rival}", over, 0, sizes)
            )


def _writers(sizes: Sizes, files: Mapping[str, Path]) -> list[Contender]:
    """List who decodes: everyone in one race, so that all ratios are of the same minutes."""
    here = {"model": sizes.model, "prompt": sizes.prompts[0], "n_tokens": sizes.n_tokens}
    weights = 4 * matrix_parameters(**sizes.model) * sizes.n_tokens
    rest = {"prompt": sizes.prompts[0], "n_tokens": sizes.n_tokens}
    contenders = [
        *(_ours(precision, "decode", here | {"precision": precision}) for precision in PRECISIONS),
        *(_llama(name, path, "decode", sizes, **rest) for name, path in files.items()),
        _transformers("decode", here),
        *_llamas("decode", here, sizes),
        Contender(
            name=READING, job="longscan.bench.contenders.ceilings:read", arguments={"n_bytes": weights}
        ),
        Contender(
            name=LOOP, job="longscan.bench.contenders.longscan:write", arguments=here | {"precision": "int4"}
        ),
    ]
    for precision, rival in IN_BATCHES.items():
        for batch in sizes.batches:
            more = here | {"precision": precision, "batch": batch}
            contenders.append(_ours(precision, "decode", more))
            if rival in files:
                contenders.append(_llama(rival, files[rival], "decode", sizes, **rest, batch=batch))
    return contenders


def _shares(report: Report, sizes: Sizes, found: Mapping[str, Measurement]) -> None:
    """Set decoding beside the reading of what it has to read, and Python beside the native call."""
    bandwidth = 4 * matrix_parameters(**sizes.model) * sizes.n_tokens / _seconds(found, READING)
    for batch in (1, *sizes.batches):
        for precision in PRECISIONS if batch == 1 else IN_BATCHES:
            m = found[f"longscan {precision}{_times(batch)}"]
            states = 0 if batch == 1 else 2 * batch * m.details.get("state_bytes", 0)  # read and written
            needs = (m.details.get("weight_bytes", math.nan) + states) * sizes.n_tokens
            what = f"decode {batch}: {precision}, share of reading " + (
                "the weights" if batch == 1 else "weights and states"
            )
            goal = f"≥ {SHARES[precision]} %" if batch == 1 else ""
            share = needs / bandwidth / m.median
            report.ratios.append(Ratio(what=what, measured=share, goal=goal, percent=True))
    if not math.isnan(bandwidth):
        report.notes.append(f"Memory is read at {bandwidth / 1e9:.1f} GB/s.")
    python = found[LOOP].details.get("python_share", math.nan)
    what = "decode 1: int4, share of Python in generate_ids"
    report.ratios.append(Ratio(what=what, measured=python, goal="≤ 5 %", percent=True))


def _costs(rows: list[dict[str, Any]]) -> Any:
    """Build the table of memory, and of how far each contender's logits are from ours in float32."""
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
    return table("memory while writing, and exactness after the prompt", columns, body)


def _distance(reference: list[float] | None, found: list[float] | None) -> float | None:
    """Return the root mean square of a difference over the standard deviation of the reference."""
    if reference is None or found is None:
        return None
    mean = math.fsum(reference) / len(reference)
    spread = math.fsum((value - mean) ** 2 for value in reference)
    error = math.fsum((a - b) ** 2 for a, b in zip(reference, found, strict=True))
    return math.sqrt(error / spread)


# --- contenders and ratios ----------------------------------------------------------------------------------


def _ours(precision: str, job: str, arguments: dict[str, Any]) -> Contender:
    """Make longscan a contender."""
    name = f"longscan {precision}{_times(arguments.get('batch', 1))}"
    return Contender(name=name, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)


def _llama(name: str, path: Path, job: str, sizes: Sizes, **arguments: int) -> Contender:
    """Make llama.cpp a contender."""
    return Contender(
        name=f"llama.cpp {name}{_times(arguments.get('batch', 1))}",
        job=f"longscan.bench.contenders.llama:{job}",
        arguments={"path": str(path), "vocab_size": sizes.model["vocab_size"], **arguments},
        packages=(llama.PACKAGE,),
        peer=True,
        patience=60.0,
    )


def _transformers(job: str, arguments: dict[str, Any], name: str = HF) -> Contender:
    """Make transformers a contender."""
    job = f"longscan.bench.contenders.peers:{job}_transformers"
    return Contender(
        name=name, job=job, arguments=arguments, packages=("transformers",), peer=True, patience=30.0
    )


def _llamas(job: str, arguments: dict[str, Any], sizes: Sizes) -> list[Contender]:
    """Make the Transformer of today a contender, ours and that of transformers."""
    arguments = arguments | {"model": sizes.model | sizes.llama}
    ours = Contender(name=LLAMA_OURS, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)
    return [ours, _transformers(job, arguments, LLAMA_HF)]


def _beside_llamas(found: Mapping[str, Measurement]) -> list[tuple[str, float, float]]:
    """Set Mamba beside Llama, and our Llama beside that of transformers."""
    return [
        ("float32 over our Llama", faster(found, "longscan float32", LLAMA_OURS), 0.0),
        ("our Llama over transformers'", faster(found, LLAMA_OURS, LLAMA_HF), 1.0),
    ]


def _times(batch: int) -> str:
    """Say of how many sequences a contender takes care; nothing of one."""
    return f" × {batch}" if batch > 1 else ""


def _seconds(found: Mapping[str, Measurement], name: str) -> float:
    """Return the median of a contender; NaN if it was not measured."""
    return found[name].median if name in found else math.nan


def _over(
    found: Mapping[str, Measurement], precision: str, formats: tuple[str, ...], goal: float
) -> tuple[str, float, float]:
    """Set a precision of ours beside llama.cpp at about as many bits."""
    rivals = [f"llama.cpp {name}" for name in formats]
    what = f"{precision} over llama.cpp {' or '.join(formats)}"
    return what, faster(found, f"longscan {precision}", *rivals), goal


def _ratio(what: str, measured: float, goal: float, sizes: Sizes) -> Ratio:
    """Put a ratio beside its goal, if it has one."""
    return Ratio(what=what, measured=measured, goal=f"≥ {goal * sizes.slack:.3g} ×" if goal else "")
