"""`longscan convert`: the same model in another layout or precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from longscan.checkpoint import Layout, convert

__all__ = ["command"]


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, a hub id, or a shipped model.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty directory.")],
    to: Annotated[Layout, typer.Option(help="hf: safetensors. official: pytorch_model.bin.")] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; as in SRC if not given."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
) -> None:
    """Rewrite a model directory in another layout or precision.

    Both layouts are read: Hugging Face (safetensors) and official (pytorch_model.bin, unless it holds code).
    The recurrence (A_log, D, the bias of dt_proj) stays float32 in every precision.
    """
    model = convert(
        source,
        destination,
        layout=to,
        dtype=getattr(torch, dtype) if dtype else None,
        revision=revision,
        offline=offline,
    )
    weights = sum(
        file.stat().st_size for file in destination.iterdir() if file.suffix in (".safetensors", ".bin")
    )
    tokenizer = "with tokenizer" if (destination / "tokenizer.json").exists() else "no tokenizer"
    name = str(model.backbone.embedding.weight.dtype).removeprefix("torch.")
    size = f"{model.num_parameters():,} parameters · {name} · {weights:,} bytes"
    typer.echo(f"{destination} · {to} layout · {size} · {tokenizer}")
