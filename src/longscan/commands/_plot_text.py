"""`longscan plot delta` and `state`, and `attention` for language models."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._options import FigureOut, TokenizerName
from longscan.core.config import brief, count
from longscan.core.files import utf8
from longscan.core.text_table import lay_out
from longscan.errors import LongscanError, UsageError
from longscan.inference.layer_scans import Scan
from longscan.inference.prefill import encode
from longscan.inference.text_layers import TextLayer, mixing_layers, states, time_steps, visit_layers
from longscan.models import LanguageModel
from longscan.plotting.style import check_out
from longscan.plotting.text import plot_matrices, plot_states, plot_steps
from longscan.tokenizers.words import visible

__all__ = ["attention_of_text", "delta", "state"]

MAX_TOKENS = 2048
MAX_SQUARE = 512  # tokens of a matrix
STATE = "a selective state"
HALF_LIFE = (
    "Half-life of what is stored at a token: the further tokens until exp(sum of Δ A) is at most ½; after "
    "the end of the text, at its mean rate."
)

Text = Annotated[
    str | None, typer.Argument(metavar="TEXT", help="The text; - or a pipe: from stdin.", show_default=False)
]
ModelName = Annotated[
    str, typer.Option("--model", help="A shipped model, a directory, or a hub id of a language model.")
]


class Subject(NamedTuple):
    """A model and a text.

    Attributes:
        model: the model.
        title: what a figure calls it.
        ids: (n,) of the text.
        tokens: as `visible` returns them.
    """

    model: LanguageModel
    title: str
    ids: Tensor
    tokens: list[str]


def delta(
    text: Text = None,
    model: ModelName = "longscan-tiny-en",
    layer: Annotated[
        int | None, typer.Option(help="Layer that colours the text; default: the mean over all.")
    ] = None,
    tokenizer_name: TokenizerName = None,
    out: FigureOut = Path("delta.png"),
) -> None:
    """The time step Δ of each token of a text: how far it opens the state, by layer.

    A large Δ stores the token and resets the state; a small one leaves the state as it is. Of each layer with
    a selective state it is the mean over channels (Mamba) or heads (Mamba-2, Mamba-3).

    Raises:
        UsageError: there is no such layer, the text is empty or too long, or the figure has no format.
        LongscanError: the model has no selective state or no tokenizer, or a file can't be read or written.
    """
    check_out(out)
    subject = _subject(model, text, tokenizer_name, MAX_TOKENS)
    layers = _scanning(subject)
    numbers = [number for number, _ in layers]
    index = None if layer is None else _index(subject.model, numbers, STATE, layer)
    steps = time_steps(subject.model, subject.ids)
    mean = "mean over " + " or ".join(dict.fromkeys(f"{scan.noun}s" for _, scan in layers))
    title = f"Δ of {subject.title}: how far each token opens the state"
    plot_steps(steps, numbers, subject.tokens, index, mean, out, title)
    typer.echo(f"wrote {out}")


def state(
    text: Text = None,
    model: ModelName = "longscan-tiny-en",
    tokenizer_name: TokenizerName = None,
    out: FigureOut = Path("state.png"),
) -> None:
    """The state of each layer over a text: its norm after each token, and the half-life of what it holds.

    The half-life of what is stored at a token is the number of further tokens until exp(sum of Δ A) is at
    most one half; after the end of the text the sum is assumed to grow at its mean rate. Median and quartiles
    are over tokens, channels and states; in Mamba-2 and Mamba-3 over tokens and heads.

    Raises:
        UsageError: the text is empty or too long, or the figure has no format.
        LongscanError: the model has no selective state or no tokenizer, or a file can't be read or written.
    """
    check_out(out)
    subject = _subject(model, text, tokenizer_name, MAX_TOKENS)
    numbers = [number for number, _ in _scanning(subject)]
    norms, quartiles = states(subject.model, subject.ids)
    rows = [("layer", "norm", "half-life", "25 %", "75 %")]
    for number, norm, (low, middle, high) in zip(
        numbers, norms[:, -1].tolist(), quartiles.tolist(), strict=True
    ):
        rows.append((str(number), brief(norm), _tokens(middle), _tokens(low), _tokens(high)))
    typer.echo("\n".join(lay_out(rows, ">")))
    title = f"state of {subject.title} over {count(len(subject.ids), 'token')}"
    plot_states(norms, quartiles, numbers, subject.tokens, out, title, HALF_LIFE)
    typer.echo(f"wrote {out}")


def attention_of_text(
    name: str, text: str, layer: int | None, lane: int | None, tokenizer_name: str | None, out: Path
) -> None:
    """Draw the hidden attention of a scan and the weights of attention in a layer; see `plot attention`.

    Args:
        name: of the model.
        text: its input.
        layer: its number; None: the last one that has either.
        lane: a channel or a head, drawn of scan or attention if only one has so many; None: the mean over
            all.
        tokenizer_name: see `TokenizerName`.
        out: the figure.

    Raises:
        UsageError: there is no such layer, channel or head, or the text is empty or too long.
        LongscanError: the model has neither scan nor attention, or no tokenizer; or a file can't be read or
            written.
    """
    check_out(out)
    subject = _subject(name, text, tokenizer_name, MAX_SQUARE)
    layers = mixing_layers(subject.model)
    if not layers:
        kind = type(subject.model).__name__
        raise LongscanError(
            f"{name}: expected a model with {STATE} or attention, such as mamba, mamba2 or llama; got {kind}."
        )
    numbers = [each.number for each in layers]
    index = -1 if layer is None else _index(subject.model, numbers, f"{STATE} or attention", layer)
    chosen = layers[index]
    parts = [part for part in (chosen.scan, chosen.attention) if part is not None]
    most = max(parts, key=lambda part: part.lanes)
    if lane is not None and not 0 <= lane < most.lanes:
        raise UsageError(f"--{most.noun}: expected 0 to {most.lanes - 1}, got {lane}.")

    def panels(found: TextLayer) -> dict[str, tuple[Tensor, str]]:
        return _panels(found, lane) if found.number == chosen.number else {}

    drawn: dict[str, tuple[Tensor, str]] = {}
    for part_of in visit_layers(subject.model, subject.ids, panels):
        drawn |= part_of
    note = (
        "α: weight of the scan's input at a key in its output at a query; without the skip connection D."
        if chosen.scan is not None
        else ""
    )
    plot_matrices(drawn, subject.tokens, out, f"{subject.title}, layer {chosen.number}", note)
    typer.echo(f"wrote {out}")


def _panels(layer: TextLayer, lane: int | None) -> dict[str, tuple[Tensor, str]]:
    """Return the panels of a layer: a title, a matrix and the label of its colours."""
    panels = {}
    for name, symbol, part in (
        ("hidden attention of the scan", "α", layer.scan),
        ("attention", "weight", layer.attention),
    ):
        if part is None or (lane is not None and lane >= part.lanes):
            continue
        if lane is not None:
            label = f"{symbol} of {part.noun} {lane}"
        else:
            mean = "|α|" if part is layer.scan else symbol
            label = f"{mean}, mean over {count(part.lanes, part.noun)}"
        panels[name] = part.matrix(lane), label
    return panels


def _scanning(subject: Subject) -> list[tuple[int, Scan]]:
    """Return number and scan of the layers with a selective state."""
    layers = [(each.number, each.scan) for each in mixing_layers(subject.model) if each.scan is not None]
    if not layers:
        raise LongscanError(
            f"{subject.title}: expected a model with {STATE}, such as mamba, mamba2 or mamba3; "
            f"got {type(subject.model).__name__}, which has no Δ."
        )
    return layers


def _index(model: LanguageModel, numbers: Sequence[int], what: str, layer: int) -> int:
    """Return the index of a layer among those with something, by its number, from the end if negative."""
    n_layers = len(model.backbone.layers)
    number = layer + n_layers if -n_layers <= layer < 0 else layer
    if number in numbers:
        return numbers.index(number)
    if len(numbers) == n_layers:
        raise UsageError(f"--layer: expected 0 to {n_layers - 1}, got {layer}.")
    listed = ", ".join(map(str, numbers))
    raise UsageError(f"--layer: expected one with {what}: {listed}; got {layer}.")


def _subject(name: str, text: str | None, tokenizer_name: str | None, most: int) -> Subject:
    """Return a model and a text of 1 to `most` tokens; "-" or None is stdin."""
    if text == "-" or (text is None and sys.stdin is not None and not sys.stdin.isatty()):
        text = utf8(sys.stdin.buffer.read(), "the text on stdin").removeprefix("\ufeff")
        text = text.removesuffix("\n").removesuffix("\r")
    elif text is not None:  # Python passes bytes that are not UTF-8 on as lone surrogates
        text = utf8(text.encode(errors="surrogateescape"), "TEXT")
    if not text or not text.strip():
        raise UsageError("TEXT: expected some text, got none.")
    model, tokenizer = load_with_tokenizer(name, None, False, None, tokenizer_name)
    [ids] = encode(tokenizer, [text])
    if len(ids) == len(tokenizer.prefix):
        raise UsageError("TEXT: expected some tokens, got none: the tokenizer of the model has none for it.")
    if len(ids) > most:
        raise UsageError(f"TEXT: expected at most {most:,} tokens, got {len(ids):,}. Shorten it.")
    path = Path(name)
    title = path.resolve().parent.name if path.name == "model" else path.name
    return Subject(model, title, torch.from_numpy(ids), visible(tokenizer, ids.tolist()))


def _tokens(number: float) -> str:
    """Return a number of tokens."""
    return "∞" if math.isinf(number) else f"{number:,.0f}"
