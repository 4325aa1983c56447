"""`longscan quantize`: the same model with its matrices stored in fewer bits.

What is stored how, and what it costs, stands in docs/quantization.md.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.hub import resolve, shipped
from longscan.checkpoints.save import quantize
from longscan.checkpoints.weights import find_weights
from longscan.models.common.quantization import precision
from longscan.ops import Kind

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model, a directory, or a hub id.")],
    to: Annotated[Kind, typer.Option(help="bf16: 16 bits a weight. int8: about 8. int4: about 4.5.")],
    out: Annotated[
        Path | None, typer.Option(help="A new or empty directory; MODEL-int8 and the like if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
) -> None:
    """Store a model's weights in fewer bits: smaller files, less memory, faster writing.

    The projections, the embedding and the head are stored as MODEL-int8 and the like; the convolution, the
    recurrence, norms, biases and states stay float32. Every verb takes the result. To try a format without
    writing it, give --precision to generate or evaluate; `longscan bench quality` measures what it costs.

    Raises:
        UsageError: there is no such format.
        LongscanError: the model can't be read, is quantised already, or can't be written.
    """
    out = out or _beside(model, to)
    found = resolve(model, revision=revision, offline=offline)
    before = _size(found)
    network = quantize(model, out, to, revision=revision, offline=offline)
    after, count = _size(out), network.num_parameters()
    has_tokenizer = (out / "tokenizer.json").is_file()
    typer.echo(
        f"{out} · {precision(network)} · {count:,} parameters · {after:,} bytes, was {before:,} · "
        f"{8 * after / count:.1f} bits a weight · {'with' if has_tokenizer else 'no'} tokenizer"
    )
    if has_tokenizer and not quiet:
        name = shlex.quote(str(out))
        typer.echo(
            f"▏ try: longscan generate --model {name} · longscan evaluate {name} my.txt",
            err=True,
        )


def _beside(model: str, kind: Kind) -> Path:
    """Name the result after the model: beside a directory, here for what has no place of its own."""
    path = Path(model).expanduser()
    if model in shipped() or not path.exists():
        return Path(f"{path.name}-{kind}")
    path = path.resolve()  # "." has a name too
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{kind}")


def _size(model: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(file.stat().st_size for file in ([model] if model.is_file() else find_weights(model)))
