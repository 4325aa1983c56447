"""The contenders of `longscan bench generate`, in prefill and decode, and the sizes of their models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longscan.bench.contenders import llama, openvino
from longscan.bench.machine import multiplies_bf16
from longscan.bench.measure import Contender
from longscan.bench.suites.work import probe, work_of
from longscan.models import MODELS

__all__ = [
    "HF",
    "IN_BATCHES",
    "LLAMA_HF",
    "LLAMA_OURS",
    "LOOP",
    "MIXING",
    "OPENVINO",
    "PRECISIONS",
    "PREFILLED",
    "PRODUCTS",
    "READING",
    "SHAPES",
    "Files",
    "Sizes",
    "decode_contenders",
    "prefill_contenders",
    "times",
    "tiny",
]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a benchmark.

    Attributes:
        model: see `contenders.longscan.fresh`.
        title: what it is called.
        llama: fields of a Llama of about as many parameters; none: no such contender.
        prompts: their lengths.
        batches: batch sizes of decode, beside 1.
        n_tokens: decoded per sequence.
        slack: the factor of every goal.
        bandwidth: bytes read to measure the memory bandwidth: far more than any cache holds.
        openvino: whether OpenVINO's exporter knows the model.
    """

    model: dict[str, Any]
    title: str
    llama: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[int, ...] = (512, 2048)
    batches: tuple[int, ...] = (8, 32)
    n_tokens: int = 64
    slack: float = 1.0
    bandwidth: int = 2**29
    openvino: bool = False


@dataclass(frozen=True, kw_only=True)
class Files:
    """The same weights in the layouts of other programs, as far as these are installed.

    Attributes:
        gguf: format -> file for llama.cpp.
        directory: a model directory for transformers and OpenVINO.
    """

    gguf: Mapping[str, Path] = field(default_factory=dict)
    directory: Path | None = None


def _preset(model: str, preset: str) -> dict[str, Any]:
    """Return a preset as `contenders.longscan.fresh` takes it."""
    return {"model": model, **MODELS[model].presets[preset]}


LLAMA: dict[str, Any] = {"model": "llama", "max_positions": 4096}
LLAMA_130M = LLAMA | {"n_layers": 12, "n_heads": 12, "d_model": 768, "vocab_size": 50280}
SHAPES = {  # as published, vocabularies padded
    "130m": Sizes(
        model={"model": "mamba", "d_model": 768, "n_layers": 24, "vocab_size": 50280},
        title="Mamba 130m",
        llama=LLAMA_130M,
        openvino=True,
    ),
    "370m": Sizes(
        model={"model": "mamba", "d_model": 1024, "n_layers": 48, "vocab_size": 50280},
        title="Mamba 370m",
        llama=LLAMA | {"n_layers": 24, "n_heads": 16, "d_model": 1024, "vocab_size": 50280},
        prompts=(512,),
        batches=(),
        slack=0.9,
        openvino=True,
    ),
    "mamba2": Sizes(model=_preset("mamba2", "130m"), title="Mamba-2 130m", llama=LLAMA_130M, batches=(8,)),
    "falcon-h1": Sizes(model=_preset("hybrid", "falcon-h1-90m"), title="Falcon-H1 90m", batches=(8,)),
    "granite-h": Sizes(
        model=_preset("hybrid", "granite-4.0-h-350m"),
        title="Granite 4.0-H 350m",
        prompts=(512,),
        batches=(8,),
        openvino=True,
    ),
}
SMALL: dict[str, Any] = {"d_model": 64, "vocab_size": 512}
HEADS: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "d_ssm_head": 16, "d_state": 16}
QUICK = {  # shape -> what is smaller
    "130m": SMALL | {"n_layers": 2},
    "370m": SMALL | {"n_layers": 2},
    "mamba2": SMALL | {"n_layers": 2, "d_head": 16, "d_state": 16},
    "falcon-h1": SMALL | HEADS | {"pattern": "P-", "d_ssm": 96},
    "granite-h": SMALL | HEADS | {"pattern": "M-*-"},
}


def tiny(shape: str) -> Sizes:
    """Return small sizes of a model, to see that its benchmark works.

    Args:
        shape: of SHAPES.
    """
    full = SHAPES[shape]
    return replace(
        full,
        model=full.model | QUICK[shape],
        title=f"{full.title}, made tiny",
        llama=full.llama and LLAMA | SMALL | {"n_layers": 1, "n_heads": 4},
        prompts=(32,),
        batches=(2,),
        n_tokens=8,
        bandwidth=2**20,
    )


HF, LLAMA_OURS, LLAMA_HF, PRODUCTS, MIXING, READING = (
    "transformers float32",
    "no Mamba: Llama float32, longscan",
    "no Mamba: Llama float32, transformers",
    "ceiling: matrix products alone",
    "ceiling: scans and attention alone",
    "ceiling: reading the float32 weights",
)
OPENVINO = "OpenVINO"
PRECISIONS = ("float32", "bf16", "int8", "int4")
PREFILLED = (*PRECISIONS, "w8a8", "w4a8")  # decode does not distinguish the last two from int8 and int4
IN_BATCHES = {"int8": "q8_0", "float32": "f32"}  # our precision -> the peer's
LOOP = "longscan int4, generate_ids"


def prefill_contenders(sizes: Sizes, seq_len: int, files: Files) -> list[Contender]:
    """Return the contenders of the prefill of a prompt.

    Args:
        sizes: of the models.
        seq_len: tokens of the prompt.
        files: of the weights.
    """
    work = work_of(sizes.model)
    here = {"model": sizes.model, "seq_len": seq_len}
    products = {"n_rows": seq_len, "shapes": work.shapes, "backward": False}  # the head sees one token
    if work.updates:
        mixing: dict[str, Any] = {"n_states": seq_len * work.updates}
    else:
        mixing = probe(work.mixing(seq_len))
    return [
        *(_ours(precision, "prefill", here | {"precision": precision}) for precision in PREFILLED),
        *_peers("prefill", sizes, files, seq_len=seq_len),
        *_llamas("prefill", here, sizes),
        *(
            Contender(
                name=f"{PRODUCTS}, {precision}",
                job="longscan.bench.contenders.ceilings:matmul",
                arguments=products | {"precision": precision},
            )
            for precision in PREFILLED
        ),
        Contender(
            name=MIXING,
            job=f"longscan.bench.contenders.ceilings:{'exp_fma' if work.updates else 'matmul'}",
            arguments=mixing,
        ),
    ]


def decode_contenders(sizes: Sizes, files: Files) -> list[Contender]:
    """Return the contenders of decode, at all batch sizes: all ratios are of the same minutes.

    Args:
        sizes: of the models.
        files: of the weights.
    """
    rest = {"prompt": sizes.prompts[0], "n_tokens": sizes.n_tokens}
    here = {"model": sizes.model, **rest}
    contenders = [
        *(_ours(precision, "decode", here | {"precision": precision}) for precision in PRECISIONS),
        *_peers("decode", sizes, files, **rest),
        *_llamas("decode", here, sizes),
        Contender(
            name=READING,
            job="longscan.bench.contenders.ceilings:read_memory",
            arguments={
                "n_bytes": 4 * work_of(sizes.model).parameters * sizes.n_tokens,
                "probe": sizes.bandwidth,
            },
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
            if peer in files.gguf:
                contenders.append(_llama(peer, files.gguf[peer], "decode", sizes, **rest, batch=batch))
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


def _peers(job: str, sizes: Sizes, files: Files, **arguments: int) -> list[Contender]:
    """Return other programs with the same weights as contenders."""
    peers = [_llama(name, path, job, sizes, **arguments) for name, path in files.gguf.items()]
    if files.directory is None:
        return peers
    same = {"directory": str(files.directory), "vocab_size": sizes.model["vocab_size"], **arguments}
    for precision in ("float32", "bf16") if multiplies_bf16() else ("float32",):
        name = HF.replace("float32", precision)
        peers.append(_peer(name, f"hugging_face:{job}_transformers", same | {"precision": precision}))
    if sizes.openvino:
        peers += [
            _peer(f"{OPENVINO} {name}", f"openvino:{job}", same | {"precision": name}, openvino.PACKAGE)
            for name in openvino.PRECISIONS
        ]
    return peers


def _peer(name: str, job: str, arguments: dict[str, Any], package: str = "transformers") -> Contender:
    """Return another program as a contender."""
    job = f"longscan.bench.contenders.{job}"
    return Contender(name=name, job=job, arguments=arguments, packages=(package,), peer=True, patience=30.0)


def _llamas(job: str, arguments: dict[str, Any], sizes: Sizes) -> list[Contender]:
    """Return two Llamas as contenders, ours and that of transformers."""
    if not sizes.llama:
        return []
    arguments = arguments | {"model": sizes.llama}
    ours = Contender(name=LLAMA_OURS, job=f"longscan.bench.contenders.longscan:{job}", arguments=arguments)
    return [ours, _peer(LLAMA_HF, f"hugging_face:{job}_llama", arguments)]


def times(batch: int) -> str:
    """Return the suffix of a contender's name for a batch size, "" for 1."""
    return f" × {batch}" if batch > 1 else ""
