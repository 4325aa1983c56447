"""`longscan merge`: an adapter becomes part of the weights of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.load import load
from longscan.checkpoints.save import check_new, save
from longscan.commands._options import ModelArgument, Offline, Revision
from longscan.errors import LongscanError
from longscan.models.common.quantization import precision

__all__ = ["command"]


def command(
    model: ModelArgument,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="PEFT's directory, or a run of `longscan finetune`.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty directory.")],
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Merge a LoRA adapter into the weights of its model: W + s B A, in float32.

    Every verb loads the result, and so does transformers; `longscan quantize` and `convert` take it further.

    Raises:
        LongscanError: the adapter is damaged or of another model, or OUT is not empty.
    """
    check_new(out)
    network, tokenizer = load(model, revision=revision, offline=offline, adapter=adapter)
    if (kind := precision(network)) != "float32":
        raise LongscanError(
            f"{model} is quantised ({kind}), and rounding it again would lose more than the adapter adds. "
            "Merge into the original model, then `longscan quantize` the result."
        )
    save(network, out, tokenizer)
    notes = [f"{network.num_parameters():,} parameters", kind, "with" if tokenizer else "no"]
    typer.echo(f"{out} · {' · '.join(notes)} tokenizer")
