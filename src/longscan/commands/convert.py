"""`longscan convert`: the same model in another layout or precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from longscan.checkpoints.gguf.model import GGUFType, usual_type
from longscan.checkpoints.save import Layout, convert
from longscan.errors import UsageError
from longscan.models.common.quantization import precision

__all__ = ["command"]


def command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory, a hub id, a .gguf file, or a shipped model.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A new or empty directory, or a new .gguf file.")
    ],
    to: Annotated[
        Layout | None, typer.Option(help="hf: safetensors. official: pytorch_model.bin.", show_default="hf")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; as in SRC if not given. Also undoes `quantize`."),
    ] = None,
    gguf_type: Annotated[
        GGUFType | None,
        typer.Option(
            case_sensitive=False, help="Of the matrices in a .gguf file; nearest to SRC if not given."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, a directory or a hub id, in place of what SRC has."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
) -> None:
    """Rewrite a model in another layout or precision.

    Both layouts are read: Hugging Face (safetensors) and official (pytorch_model.bin, unless it holds code),
    and GGUF files, as llama.cpp has them. A DST that ends in .gguf becomes such a file.
    The recurrence (A_log, D, the bias of dt_proj) stays float32 in every precision.

    Raises:
        UsageError: an option does not go with DST.
        LongscanError: the model can't be read, or can't be written so.
    """
    gguf = destination.suffix == ".gguf"
    if gguf and to:
        raise UsageError(f"--to is for directories, {destination} is to be a GGUF file: leave one out.")
    if gguf_type and not gguf:
        raise UsageError(f"--gguf-type is for files, {destination} does not end in .gguf.")
    model = convert(
        source,
        destination,
        layout=to or "hf",
        dtype=getattr(torch, dtype) if dtype else None,
        gguf_type=gguf_type,
        tokenizer=tokenizer,
        revision=revision,
        offline=offline,
    )
    if gguf:
        size = f"{model.num_parameters():,} parameters · {destination.stat().st_size:,} bytes"
        typer.echo(f"{destination} · GGUF · {gguf_type or usual_type(model)} · {size}")
        return
    weights = sum(
        file.stat().st_size for file in destination.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    beside = (
        "with tokenizer" if (destination / "tokenizer.json").exists() else "no tokenizer: see --tokenizer"
    )
    size = f"{model.num_parameters():,} parameters · {precision(model)} · {weights:,} bytes"
    typer.echo(f"{destination} · {to or 'hf'} layout · {size} · {beside}")
