"""`longscan plot`: alignments, attention, positions, BLEU by length, HiPPO bases, kernels, scans, states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from longscan.checkpoints.formats.sequence_classifier import is_sequence_model
from longscan.checkpoints.load import load, load_translator
from longscan.checkpoints.open import stored_kind
from longscan.commands._options import FigureOut, TokenizerName
from longscan.commands._plot_text import attention_of_text, delta, state
from longscan.commands._plot_vision import (
    Size,
    activation,
    attention_of_image,
    erf,
    scan,
    scans_images,
)
from longscan.core.config import nearest
from longscan.core.files import read_json
from longscan.errors import LongscanError, UsageError
from longscan.inference.translate import translate
from longscan.models import MODELS, Model
from longscan.models.hippo import MEASURES
from longscan.models.sequence_classifier import SequenceModel
from longscan.plotting.attention import Sides, plot_positions, plot_weights, word_weights
from longscan.plotting.memory import SHOWN, layer_systems, plot_kernels, plot_responses
from longscan.plotting.style import check_out
from longscan.plotting.translation import plot_bleu

__all__ = ["commands"]


def alignment(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A translator's directory.")],
    sentence: Annotated[str, typer.Argument(metavar="SENTENCE", help="Sentence to translate.")],
    target: Annotated[
        str | None, typer.Option(help="Translation of SENTENCE; default: the model's own.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of a Transformer; default: the last.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show tokens instead of words.")] = False,
    out: FigureOut = Path("alignment.png"),
) -> None:
    """The alignment of a translation: attention from each target word to the source words.

    For a Transformer it is the mean over the heads of a layer; `plot attention` shows each head.

    Raises:
        UsageError: there is no such layer, or the figure has no format.
        LongscanError: the model has no attention, or a file can't be read or written.
    """
    check_out(out)
    weights, sides = _weights(model, sentence, target, pieces)
    name = _pick(weights, "cross", layer)
    plot_weights({name: weights[name].mean(0)}, *sides["cross"], out, Path(model).resolve().parent.name)
    typer.echo(f"wrote {out}")


def attention(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A translator's directory, a language model, or a model that scans images, such as vim.",
        ),
    ],
    sentence: Annotated[
        str, typer.Argument(metavar="INPUT", help="Sentence to translate, text, or an image file.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Translation of a sentence; default: the model's own.")
    ] = None,
    part: Annotated[
        Literal["encoder", "decoder", "cross"] | None,
        typer.Option(help="Self-attention of encoder or decoder, or cross-attention; default: cross."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the last.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show tokens instead of words.")] = False,
    query: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW,COLUMN",
            help="Patch that attends, or class; repeatable; default: the class token or the centre.",
        ),
    ] = None,
    lane: Annotated[
        int | None,
        typer.Option(
            "--head", "--channel", help="Head or channel of a language model; default: the mean over all."
        ),
    ] = None,
    tokenizer_name: TokenizerName = None,
    size: Size = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of random weights of a model of images.", show_default="0")
    ] = None,
    out: FigureOut = Path("attention.png"),
) -> None:
    """The attention weights of a translator or a language model, or the hidden attention of a scan.

    A scan, over an image or a text, is a product with a matrix alpha of decaying weights, which attention
    would compute with a softmax. In a language model, layers are numbered as in the model.

    Raises:
        UsageError: there is no such part, layer, head or patch; a flag is for others; or the figure has no
            format.
        LongscanError: the model has no attention, or a file can't be read or written.
    """
    check_out(out)
    about_texts = lane is not None or tokenizer_name is not None
    if scans_images(model):
        if target or part or pieces:
            raise UsageError("--target, --part, --pieces: these are for translators, the model is of images.")
        if about_texts:
            raise UsageError(
                "--head, --channel, --tokenizer: these are for language models, the model is of images."
            )
        layer = -1 if layer is None else layer
        attention_of_image(model, Path(sentence), layer, query or [], size, seed or 0, out)
        return
    if query or size or seed is not None:
        raise UsageError("--query, --size, --seed: these are for models of images, the model is none.")
    if stored_kind(model) == "language":
        if target or part or pieces:
            raise UsageError(
                "--target, --part, --pieces: these are for translators, the model is a language model."
            )
        attention_of_text(model, sentence, layer, lane, tokenizer_name, out)
        return
    if about_texts:
        raise UsageError("--head, --channel, --tokenizer: these are for language models, the model is none.")
    weights, sides = _weights(model, sentence, target, pieces)
    name = _pick(weights, part or "cross", layer)
    panels = {f"head {number}": head for number, head in enumerate(weights[name])}
    plot_weights(panels, *sides[part or "cross"], out, f"{name} of {Path(model).resolve().parent.name}")
    typer.echo(f"wrote {out}")


def positions(
    d_model: Annotated[int, typer.Option(help="Width of the encodings.")] = 128,
    length: Annotated[int, typer.Option(help="Number of positions.")] = 100,
    out: FigureOut = Path("positions.png"),
) -> None:
    """The sinusoidal position encodings.

    Raises:
        UsageError: a number makes no sense, or the figure has no format.
    """
    check_out(out)
    if d_model < 2 or d_model % 2:
        raise UsageError(f"--d-model: expected an even number of 2 or more, got {d_model}.")
    if not 2 <= length <= 5000:
        raise UsageError(f"--length: expected 2 to 5,000, got {length:,}.")
    plot_positions(d_model, length, out)
    typer.echo(f"wrote {out}")


def bleu(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES", help="Output of `translate evaluate --json`, one file per translator."
        ),
    ],
    out: FigureOut = Path("bleu.png"),
) -> None:
    """BLEU against the length of the source, by file.

    Raises:
        UsageError: the figure has no format.
        LongscanError: a file is something else.
    """
    check_out(out)
    reports = {file.stem: read_json(file) for file in files}
    for file, report in zip(files, reports.values(), strict=False):
        if not {"by_length", "bleu"} <= report.keys():
            raise LongscanError(f"{file}: expected what `longscan translate evaluate --json` prints.")
    plot_bleu(reports, out)
    typer.echo(f"wrote {out}")


def _weights(
    name: str, sentence: str, target: str | None, pieces: bool
) -> tuple[dict[str, Tensor], dict[str, Sides]]:
    """Return what `word_weights` gives for a translator by its name."""
    if not sentence.strip():
        raise UsageError("SENTENCE: expected some text, got none.")
    model, tokenizer = load_translator(name)
    if target is None:
        target = translate(model, tokenizer, [sentence])[0].text
    weights, sides = word_weights(model, tokenizer, sentence, target, pieces)
    if not weights:
        raise LongscanError(f"{name} has no attention to plot: it is a {type(model).__name__}.")
    return weights, sides


def _pick(weights: Mapping[str, Tensor], part: str, layer: int | None) -> str:
    """Return the name of the weights of a layer."""
    names = [name for name in weights if name.split(".")[0] == part]
    if not names:
        known = ", ".join(dict.fromkeys(name.split(".")[0] for name in weights))
        raise UsageError(f"--part: this model has {known} attention, no {part}.")
    if layer is not None and not -len(names) <= layer < len(names):
        raise UsageError(f"--layer: expected 0 to {len(names) - 1}, got {layer}.")
    return names[-1 if layer is None else layer]


def basis_command(
    measure: Annotated[
        list[str] | None, typer.Option(help=f"HiPPO measure: {', '.join(MEASURES)}; repeatable.")
    ] = None,
    n: Annotated[int, typer.Option(help="Number of coefficients.")] = 64,
    shown: Annotated[int, typer.Option(help="Coefficients to draw.")] = 5,
    out: FigureOut = Path("basis.png"),
) -> None:
    """The basis functions of a HiPPO memory: the weight of each age in each coefficient.

    Raises:
        UsageError: there is no such measure, a number makes no sense, or the figure has no format.
    """
    check_out(out)
    for name in measure or ():
        if name not in MEASURES:
            raise UsageError(f"--measure: there is no {name!r}{nearest(name, MEASURES)}")
    if not 1 <= n <= 512:
        raise UsageError(f"--n: expected 1 to 512 coefficients, got {n}.")
    if not 1 <= shown <= 12:
        raise UsageError(f"--shown: expected 1 to 12, got {shown}.")
    plot_responses(measure or SHOWN, n, shown, out)
    typer.echo(f"wrote {out}")


def kernel(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, or the name of a model for random weights.")
    ],
    length: Annotated[int, typer.Option(help="Length of the kernels, in steps.")] = 512,
    layer: Annotated[int, typer.Option(help="Layer, from 0; the last is -1.")] = 0,
    channels: Annotated[int, typer.Option(help="Channels to draw, from the first.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    out: FigureOut = Path("kernel.png"),
) -> None:
    """The convolution kernels of a state-space model: the weight of the input, by steps ago.

    Raises:
        UsageError: a number makes no sense, there is no such layer, or the figure has no format.
        LongscanError: the model has no kernels, or can't be read.
    """
    check_out(out)
    if not 2 <= length <= 1 << 20:
        raise UsageError(f"--length: expected 2 to {1 << 20:,} steps, got {length:,}.")
    if not 1 <= channels <= 12:
        raise UsageError(f"--channels: expected 1 to 12, got {channels}.")
    loaded: Model
    if model in MODELS:
        entry = MODELS[model]
        config = entry.config.from_dict(entry.presets["tiny"])
        loaded = entry.cls(config, generator=torch.Generator().manual_seed(seed))
    else:
        loaded = load(model, "sequence") if is_sequence_model(model) else load(model)[0]
    kind = loaded.config.body if isinstance(loaded, SequenceModel) else type(loaded).__name__
    systems = layer_systems(loaded)
    if not any(systems):
        raise LongscanError(
            f"{model}: a model of kind {kind} has no convolution kernels. Expected one of time-invariant "
            "state spaces, such as s4, s4d, lssl or h3."
        )
    if not -len(systems) <= layer < len(systems) or not systems[layer]:
        raise UsageError(f"--layer: expected 0 to {len(systems) - 1} with a state space, got {layer}.")
    with torch.no_grad():
        drawn = systems[layer][0].kernel(length)[:channels].float()
    kernels = {f"channel {index}": values for index, values in enumerate(drawn)}
    plot_kernels(kernels, out, f"{kind}, layer {layer % len(systems)}")
    typer.echo(f"wrote {out}")


commands = {
    "alignment": alignment,
    "attention": attention,
    "delta": delta,
    "state": state,
    "positions": positions,
    "bleu": bleu,
    "basis": basis_command,
    "kernel": kernel,
    "scan": scan,
    "erf": erf,
    "activation": activation,
}
