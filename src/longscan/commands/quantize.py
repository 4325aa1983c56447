"""`longscan quantize`: the same model with quantised matrices.

docs/quantization.md describes the formats and what they cost.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.hub import resolve, shipped
from longscan.checkpoints.save import quantize
from longscan.checkpoints.weights import find_weights
from longscan.commands._options import ModelArgument, Offline, Quiet, Revision
from longscan.models.common.quantization import precision
from longscan.ops import Kind

__all__ = ["command"]


def command(
    model: ModelArgument,
    to: Annotated[Kind, typer.Option(help="bf16: 16 bits per weight. int8: about 8. int4: about 4.5.")],
    out: Annotated[
        Path | None, typer.Option(help="A new or empty directory; default: MODEL-int8 or the like.")
    ] = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Quantise a model's weights: smaller files, less memory, faster decoding.

    The projections, the embedding and the head are quantised; the convolution, the recurrence, norms, biases
    and states stay float32. Every verb loads the result. To try a precision without saving anything, give
    --precision to generate or evaluate; `longscan bench quality` measures what it costs.

    Raises:
        UsageError: there is no such format.
        LongscanError: the model can't be read, is quantised already, or can't be written.
    """
    out = out or _beside(model, to)
    directory = resolve(model, revision=revision, offline=offline)
    before = _size(directory)
    network = quantize(model, out, to, revision=revision, offline=offline)
    after, count = _size(out), network.num_parameters()
    has_tokenizer = (out / "tokenizer.json").is_file()
    typer.echo(
        f"{out} · {precision(network)} · {count:,} parameters · {after:,} bytes, was {before:,} · "
        f"{8 * after / count:.1f} bits per weight · {'with' if has_tokenizer else 'no'} tokenizer"
    )
    if has_tokenizer and not quiet:
        name = shlex.quote(str(out))
        typer.echo(
            f"▏ try: longscan generate --model {name} · longscan evaluate {name} my.txt",
            err=True,
        )


def _beside(model: str, kind: Kind) -> Path:
    """Return the default directory, named after the model: beside a local one, else in the current one."""
    path = Path(model).expanduser()
    if model in shipped() or not path.exists():
        return Path(f"{path.name}-{kind}")
    path = path.resolve()  # "." has a name too
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{kind}")


def _size(model: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(file.stat().st_size for file in ([model] if model.is_file() else find_weights(model)))
