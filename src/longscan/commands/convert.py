"""`longscan convert`: the same model in another layout, format or precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from longscan.checkpoints.gguf.model import GGUFType, usual_type
from longscan.checkpoints.save import Layout, convert
from longscan.commands._options import Architecture, ImageSize, Offline, Revision
from longscan.errors import UsageError
from longscan.models import LanguageModel
from longscan.models.common.quantization import precision
from longscan.models.common.vision import VisionModel

__all__ = ["command"]


def command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A directory, a hub id, a .gguf file, or a shipped model.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A new or empty directory, or a new .gguf or .onnx file.")
    ],
    to: Annotated[
        Layout | None, typer.Option(help="hf: safetensors. official: pytorch_model.bin.", show_default="hf")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision of the weights; default: that of SRC. Also undoes `quantize`."),
    ] = None,
    gguf_type: Annotated[
        GGUFType | None,
        typer.Option(
            case_sensitive=False, help="Type of the matrices in a .gguf file; default: nearest to SRC."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, a directory or a hub id; replaces that of SRC."),
    ] = None,
    architecture: Architecture = None,
    image_size: ImageSize = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Rewrite a model in another layout, format or precision.

    SRC may have the Hugging Face layout (safetensors) or the official one (pytorch_model.bin, unless it holds
    code), be a GGUF file of llama.cpp, or the weights of an image model alone (.pth, .safetensors). A DST
    that ends in .gguf becomes a GGUF file. One that ends in .onnx becomes an ONNX file of an image model:
    float32, any batch size, one image size; it is compared with the model before it gets its name.
    The recurrence (A_log, D, the bias of dt_proj) stays float32 in every precision.

    Raises:
        UsageError: an option does not apply to DST.
        LongscanError: the model can't be read, or not be written in this form.
    """
    gguf = destination.suffix == ".gguf"
    if to and destination.suffix in (".gguf", ".onnx"):
        raise UsageError(f"--to is for directories, but {destination} is a file: leave one of them out.")
    if gguf_type and not gguf:
        raise UsageError(f"--gguf-type is for GGUF files, but {destination} does not end in .gguf.")
    if destination.suffix == ".onnx" and sys.stderr.isatty():
        typer.echo("exporting, which takes some minutes for a large model", err=True)
    model = convert(
        source,
        destination,
        layout=to or "hf",
        dtype=getattr(torch, dtype) if dtype else None,
        gguf_type=gguf_type,
        tokenizer=tokenizer,
        revision=revision,
        offline=offline,
        model=architecture,
        image_size=image_size,
    )
    if isinstance(model, LanguageModel) and gguf:
        size = f"{model.num_parameters():,} parameters · {destination.stat().st_size:,} bytes"
        typer.echo(f"{destination} · GGUF · {gguf_type or usual_type(model)} · {size}")
        return
    if isinstance(model, VisionModel) and destination.suffix == ".onnx":
        size = f"{model.num_parameters():,} parameters · {destination.stat().st_size:,} bytes"
        shape = ", ".join(map(str, model.input_shape))
        typer.echo(f"{destination} · ONNX · {size} · pixel_values (batch, {shape}) → logits")
        return
    weights = sum(
        file.stat().st_size for file in destination.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    notes = ["longscan layout" if isinstance(model, VisionModel) else f"{to or 'hf'} layout"]
    notes += [f"{model.num_parameters():,} parameters", precision(model), f"{weights:,} bytes"]
    if (destination / "tokenizer.json").exists():
        notes.append("with tokenizer")
    elif isinstance(model, LanguageModel):
        notes.append("no tokenizer: see --tokenizer")
    typer.echo(" · ".join([str(destination), *notes]))
