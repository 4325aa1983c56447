"""`longscan classify evaluate` and `predict` for models of whole sequences."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer

from longscan.checkpoints.load import load
from longscan.commands._input import read_stdin
from longscan.core.config import count
from longscan.core.files import utf8
from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import measure
from longscan.inference.sequences import answers, to_rate
from longscan.models.sequence_classifier import BODIES, SequenceModel
from longscan.training.sequence_classifier import FILES

__all__ = ["evaluate_sequences", "predict_sequences"]


def evaluate_sequences(
    directory: str, files: Sequence[Path], columns: str, pattern: str | None, as_json: bool
) -> None:
    """Print the metrics of a model on labelled sequences; see `classify evaluate`.

    Args:
        directory: of the model.
        files: see `read_sequences`.
        columns: see `read_sequences`.
        pattern: see `read_sequences`.
        as_json: whether to print JSON.
    """
    model = load(directory, "sequence")
    data = read_sequences(files, split="test", pattern=pattern, columns=columns)
    _match(model, data)
    metrics = measure(model, data.labelled(model.config.labels))
    if as_json:
        typer.echo(json.dumps({"model": directory, "sequences": len(data), **metrics}, indent=2))
    elif model.config.labels:
        scores = f"accuracy {metrics['accuracy']:.4f} · macro-F1 {metrics['macro_f1']:.4f}"
        typer.echo(f"{scores} · {count(len(data), 'sequence')}")
    else:
        typer.echo(f"root mean square error {metrics['rmse']:.6g} · {count(len(data), 'sequence')}")


def predict_sequences(directory: str, files: Sequence[str], as_json: bool) -> None:
    """Print the predictions of a model for sequences; see `classify predict`.

    Args:
        directory: of the model.
        files: see `read_sequences`; labels in them are ignored. For a model of tokens they may also be texts,
            or none: then the texts are the lines of stdin.
        as_json: whether to print JSON.

    Raises:
        UsageError: there are no files, and the model is one of signals.
    """
    model = load(directory, "sequence")
    labels, is_text = model.config.labels, False
    if model.config.d_input:
        if not files:
            raise UsageError("FILES: expected files of signals, as for train; stdin can't hold them.")
    else:
        is_text = not any(map(_is_file, files))
        files = files or read_stdin()
        if not files:
            return
    data = _texts(files) if is_text else read_sequences(files, split="test")
    _match(model, data)
    for name, row in zip(data.names, answers(model, data), strict=True):
        if as_json:
            probabilities = (
                {"probabilities": dict(zip(labels, row.exp().tolist(), strict=True))} if labels else {}
            )
            shown = {"label": labels[int(row.argmax())]} if labels else {"numbers": row.tolist()}
            typer.echo(
                json.dumps(
                    {"text" if is_text else "name": name, **shown, **probabilities}, ensure_ascii=False
                )
            )
        elif labels:
            shown_name = " ".join(name.splitlines()) if is_text else name
            typer.echo(f"{labels[int(row.argmax())]}\t{row.exp().max():.4f}\t{shown_name}")
        else:
            typer.echo("\t".join([*(f"{number:.6g}" for number in row.tolist()), name]))


def _is_file(argument: str) -> bool:
    """Whether an argument is a file of sequences, even a missing one, rather than a text."""
    name = argument.lower().removesuffix(".gz").removesuffix(".xz")
    return os.path.exists(argument) or (len(argument.split()) == 1 and name.endswith(FILES))


def _texts(texts: Sequence[str]) -> Sequences:
    """Return texts as sequences of bytes, as in training."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise LongscanError(f"text {number} is empty: leave it out.")
    rows = [
        np.frombuffer(utf8(text.encode(errors="surrogateescape"), "the text").encode(), np.uint8)
        for text in texts
    ]
    lengths = np.array([len(row) for row in rows], np.int64)
    values = np.concatenate(rows).astype(np.int64)
    return Sequences(values, lengths, np.zeros((len(rows), 1)), (), tuple(texts))


def _match(model: SequenceModel, data: Sequences) -> None:
    """Raise unless a model accepts the sequences; adapt its time steps to their sampling rate."""
    d_input, vocab_size = model.config.d_input, model.config.body_config.vocab_size
    if data.d_input != d_input:
        expected, got = (f"{n} channels" if n else "tokens" for n in (d_input, data.d_input))
        raise LongscanError(f"{data.names[0]}: expected {expected} as in the training data, got {got}.")
    if not d_input and int(data.values.max()) >= vocab_size:
        raise LongscanError(
            f"{data.names[0]}: expected tokens below {vocab_size:,}, got {int(data.values.max()):,}."
        )
    if BODIES[model.config.body].timed and model.config.gap and data.times is None:
        raise LongscanError(f"{data.names[0]}: expected times as in the training data, got none.")
    if data.rate and model.config.rate and data.rate != model.config.rate:
        to_rate(model, data.rate)
        typer.echo(
            f"{data.rate:g} samples per second instead of {model.config.rate:g}: time steps are "
            f"{model.config.rate / data.rate:g} times as long",
            err=True,
        )
