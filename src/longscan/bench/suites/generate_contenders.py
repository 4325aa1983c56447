"""The contenders of `longscan bench generate`, in prefill and decode, and the sizes of their models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longscan.bench.contenders import llama
from longscan.bench.measure import Contender
from longscan.bench.suites.train import matrices, matrix_parameters

__all__ = [
    "HF",
    "IN_BATCHES",
    "LLAMA_HF",
    "LLAMA_OURS",
    "LOOP",
    "PRECISIONS",
    "PRODUCTS",
    "QUICK",
    "READING",
    "SHAPES",
    "UPDATES",
    "Sizes",
    "decode_contenders",
    "prefill_contenders",
    "times",
]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a benchmark.

    Attributes:
        model: fields of MambaConfig.
        llama: those of a Llama of about as many parameters, see `contenders.longscan.fresh`.
        prompts: their lengths.
        batches: batch sizes of decode, beside 1.
        n_tokens: decoded per sequence.
        slack: the factor of every goal.
        probe: bytes read to measure the memory bandwidth: far more than any cache holds.
    """

    model: dict[str, int]
    llama: dict[str, Any]
    prompts: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (8, 32)
    n_tokens: int = 64
    slack: float = 1.0
    probe: int = 2**29


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
    probe=2**20,
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
PRECISIONS = ("float32", "bf16", "int8", "int4")
IN_BATCHES = {"int8": "q8_0", "float32": "f32"}  # our precision -> the peer's
LOOP = "longscan int4, generate_ids"


def prefill_contenders(sizes: Sizes, seq_len: int, files: Mapping[str, Path]) -> list[Contender]:
    """Return the contenders of the prefill of a prompt.

    Args:
        sizes: of the models.
        seq_len: tokens of the prompt.
        files: of llama.cpp, format -> file.
    """
    model = sizes.model
    here = {"model": model, "seq_len": seq_len}
    body = matrix_parameters(**model) - model["vocab_size"] * model["d_model"]  # the head sees one token
    shapes = matrices(model["d_model"])
    products = {"n_rows": seq_len, "shapes": shapes, "backward": False, "operations": 2 * body * seq_len}
    updates = {"n_states": seq_len * model["n_layers"] * 2 * model["d_model"] * D_STATE}
    return [
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


def decode_contenders(sizes: Sizes, files: Mapping[str, Path]) -> list[Contender]:
    """Return the contenders of decode, at all batch sizes: all ratios are of the same minutes.

    Args:
        sizes: of the models.
        files: of llama.cpp, format -> file.
    """
    here = {"model": sizes.model, "prompt": sizes.prompts[0], "n_tokens": sizes.n_tokens}
    weights = 4 * matrix_parameters(**sizes.model) * sizes.n_tokens
    rest = {"prompt": sizes.prompts[0], "n_tokens": sizes.n_tokens}
    contenders = [
        *(_ours(precision, "decode", here | {"precision": precision}) for precision in PRECISIONS),
        *(_llama(name, path, "decode", sizes, **rest) for name, path in files.items()),
        _transformers("decode", here),
        *_llamas("decode", here, sizes),
        Contender(
            name=READING,
            job="longscan.bench.contenders.ceilings:read_memory",
            arguments={"n_bytes": weights, "probe": sizes.probe},
        ),
        Contender(
            name=LOOP,
            job="longscan.bench.contenders.longscan:generate",
            arguments=here | {"precision": "int4"},
        ),
    ]
    for precision, peer in IN_BATCHES.items():
        for batch in sizes.batches:
            more = here | {"precision": precision, "batch": batch}
            contenders.append(_ours(precision, "decode", more))
            if peer in files:
                contenders.append(_llama(peer, files[peer], "decode", sizes, **rest, batch=batch))
    return contenders


def _ours(precision: str, job: str, arguments: dict[str, Any]) -> Contender:
    """Return longscan as a contender."""
    name = f"longscan {precision}{times(arguments.get('batch', 1))}"
    return Contender(name=name, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)


def _llama(name: str, path: Path, job: str, sizes: Sizes, **arguments: int) -> Contender:
    """Return llama.cpp as a contender."""
    return Contender(
        name=f"llama.cpp {name}{times(arguments.get('batch', 1))}",
        job=f"longscan.bench.contenders.llama:{job}",
        arguments={"path": str(path), "vocab_size": sizes.model["vocab_size"], **arguments},
        packages=(llama.PACKAGE,),
        peer=True,
        patience=60.0,
    )


def _transformers(job: str, arguments: dict[str, Any], name: str = HF) -> Contender:
    """Return transformers as a contender."""
    job = f"longscan.bench.contenders.peers:{job}_transformers"
    return Contender(
        name=name, job=job, arguments=arguments, packages=("transformers",), peer=True, patience=30.0
    )


def _llamas(job: str, arguments: dict[str, Any], sizes: Sizes) -> list[Contender]:
    """Return two Llamas as contenders, ours and that of transformers."""
    arguments = arguments | {"model": sizes.model | sizes.llama}
    ours = Contender(name=LLAMA_OURS, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)
    return [ours, _transformers(job, arguments, LLAMA_HF)]


def times(batch: int) -> str:
    """Return the suffix of a contender's name for a batch size, "" for 1."""
    return f" × {batch}" if batch > 1 else ""
