"""`longscan classify` for sequences: train blocks of any language model on signals, images and bytes.

The directory of a run (see run.py) holds `data/`, the sequences, besides: nothing else is needed to resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from longscan.config import count
from longscan.errors import LongscanError, UsageError
from longscan.examples import score, shuffled
from longscan.files import atomic_directory
from longscan.generate import utf8
from longscan.models import MODELS, LanguageModelConfig, Model, ModelEntry
from longscan.order import EpochOrder
from longscan.recipe import FreshConfig, model_settings, setting
from longscan.run import Run
from longscan.runs import Signals
from longscan.sequence_checkpoint import is_sequence_model, load_sequence_model, save_sequence_model
from longscan.sequences import BYTES, Sequences, is_sequence_file, read_sequences
from longscan.tasks import BODIES, Body, SequenceConfig, SequenceModel
from longscan.text_input import read_stdin

__all__ = [
    "SequencesConfig",
    "SequencesRun",
    "answers",
    "check_bert",
    "evaluate_sequences",
    "is_sequence_model",
    "load_sequence_model",
    "measure",
    "predict_sequences",
    "save_sequence_model",
    "to_rate",
]

FILES = (".npz", ".npy", ".tsv", ".csv", ".txt", ".jsonl", ".ndjson", ".wav", ".tar", ".tgz")  # of sequences


@dataclass(frozen=True, kw_only=True)
class SequencesConfig(FreshConfig):
    """Everything that decides what `longscan classify train --model NAME` computes."""

    EPOCHS: ClassVar[float] = 20.0

    data: tuple[str, ...] = setting((), "Labelled sequences.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Held-out file; without it a part of DATA is held out. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Part of DATA held out for validation.")
    columns: str = setting("1,2", "Where label, text (and the other text of a pair) stand in a table.")
    pattern: str | None = setting(None, "Regular expression whose group is the label in a sound's path.")
    model: str = setting("mamba", "Whose blocks, see `longscan models`; or neural_ode.")
    bidirectional: bool = setting(False, "Give each block a second mixer, which reads backwards.")
    pooling: Literal["mean", "last"] = setting("mean", "What the head reads of a sequence.")
    dropout: float = setting(0.1, "Share of what a block adds that is left out.")

    seq_len: int | None = setting(None, "Samples of a sequence; longer ones are cut.")
    batch_size: int = setting(32, "Sequences in a forward pass.")
    accumulate: int = setting(1, "Forward passes in a step.")
    weight_decay: float = setting(0.01, "AdamW's decay of the matrices.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its name."""
        super().__post_init__()
        self.check_least(1, "batch_size", "accumulate", "seq_len")
        self.check_fractions("valid_fraction", "dropout")

    @property
    def choice(self) -> Mapping[str, ModelEntry | Body]:
        """The models whose blocks it can train, by name."""
        return BODIES


class _Part(NamedTuple):
    """What a forward pass reads."""

    x: Tensor  # (batch, seq_len, d_input) or (batch, seq_len)
    lengths: Tensor  # (batch,)
    truth: Tensor  # (batch,) or (batch, n_outputs)
    times: Tensor | None  # (batch, seq_len), if there are any


class SequencesRun(Run[SequencesConfig]):
    """Trains a model to tell what a sequence is."""

    verb = "classify train"
    settings = SequencesConfig
    valid_key, valid_unit = "valid_loss", "nats/sequence"
    unit, item = "nats per sequence", "sequences"
    score, scores = "accuracy and F1", {"valid_accuracy": "accuracy", "valid_macro_f1": "macro-F1"}
    trained_on = ("data/train.npz",)
    model: SequenceModel

    def prepare(self) -> tuple[Model, int, int]:
        """Read the sequences, or what the run made of them before, and make the model."""
        config = self.config
        place = self.directory / "data"
        if not place.is_dir():
            self._prepare(place)
        self.train, self.valid = (read_sequences([place / f"{name}.npz"]) for name in ("train", "valid"))
        self.rows = config.batch_size * config.accumulate
        self.plans = EpochOrder(config.seed, partial(shuffled, self.train.lengths.tolist(), self.rows))
        self.model = SequenceModel(self._configure(), torch.Generator().manual_seed(config.seed))
        self.model.to(config.device)
        if not self.train.labels:
            self.valid_unit, self.unit = "squared error", "mean squared error"
            self.score, self.scores = "root mean square error", {"valid_rmse": "error"}
        return self.model, self._steps, 1

    @property
    def _steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.train) // self.rows)

    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it."""
        train, config = self.train, self.model.config
        labels = len(config.labels)
        kind = count(labels, "class", "classes") if labels else count(config.n_outputs, "number")
        low, high = int(train.lengths.min()), int(train.lengths.max())
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        channels = f" × {count(config.d_input, 'channel')}" if config.d_input else ""
        every = f", {train.gap:.3g} s apart on average" if train.gap else ""
        steps = f"{span} {'step' if span == '1' else 'steps'}{channels}{every}"
        data = f"{count(len(train), 'sequence')} of {steps}, {kind}, {len(self.valid):,} held out"
        return data, count(self.rows, "sequence")

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the sequences of a step in parts."""
        epoch, place = divmod(step, self._steps)
        chosen, size = self.plans[epoch][place], self.config.batch_size
        some = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [(_Part(*self.train.batch(numbers)), len(numbers)) for numbers in some]

    def loss(self, model: SequenceModel, part: _Part) -> Tensor:
        """Return the mean nats of a sequence's class, or the mean square of the error."""
        device = self.config.device
        times = None if part.times is None else part.times.to(device)
        return model.loss(model(part.x.to(device), part.lengths.to(device), times), part.truth.to(device))

    def export(self, directory: Path) -> None:
        """Write the model of the last step."""
        save_sequence_model(self.model, directory)

    @property
    def validates(self) -> bool:
        """Whether sequences are held out."""
        return len(self.valid) > 0

    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure the loss, and the accuracy or the error, on what is held out."""
        found = measure(self.model, self.valid, self.config.batch_size)
        self.say(" · ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return {f"valid_{name}": value for name, value in found.items()}

    def _configure(self) -> SequenceConfig:
        """Say what model the run trains."""
        config, train = self.config, self.train
        largest = 0 if train.d_input else max(int(some.values.max(initial=0)) for some in (train, self.valid))
        # texts may hold bytes that these don't; what is known of signals is no vocabulary at all
        body = model_settings(config, max(BYTES, largest + 1) if not train.d_input else 1)
        assert isinstance(body, LanguageModelConfig)
        values = train.values.astype(np.float64)
        return SequenceConfig(
            body=config.model,
            body_config=body,
            n_outputs=train.n_outputs,
            labels=train.labels,
            d_input=train.d_input,
            mean=tuple(values.mean(0).tolist()) if train.d_input else (),
            std=tuple(np.maximum(values.std(0), 1e-6).tolist()) if train.d_input else (),
            rate=train.rate,
            gap=train.gap,
            pooling=config.pooling,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
        )

    def _prepare(self, place: Path) -> None:
        """Read and divide the sequences."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name files of labelled sequences.")
        model_settings(config, BYTES)  # a wrong flag is better known before the data are read
        how: dict[str, Any] = {"pattern": config.pattern, "columns": config.columns}
        train = read_sequences(config.data, **how)
        if config.valid:
            valid = read_sequences(config.valid, split="test", **how)
        else:
            train, valid = train.divide(config.valid_fraction)
        if not train.labels and (train.truth == train.truth.round()).all():
            self.display.line(
                "numbers    y holds whole floats, taken as numbers: for classes save y.astype(int)"
            )
        if len(train.labels) == 1:
            raise LongscanError(
                f"{train.names[0]}: expected two classes or more, all are {train.labels[0]!r}."
            )
        kinds = [(some.d_input, some.rate, some.times is None) for some in (train, valid)]
        if kinds[0] != kinds[1]:
            raise LongscanError(
                f"{valid.names[0]}: expected channels, rate and times as in {train.names[0]}."
            )
        valid = valid.labelled(train.labels) if len(valid) else valid
        if config.seq_len and (cut := int((train.lengths > config.seq_len).sum())):
            cut_at = count(config.seq_len, "step")
            self.display.line(f"cut        {count(cut, 'sequence')} at {cut_at}")
        with atomic_directory(place) as temporary:
            train.cut(config.seq_len).save(temporary / "train.npz")
            valid.cut(config.seq_len).save(temporary / "valid.npz")


def check_bert(model: str, data: object) -> None:
    """Refuse what is no BERT, and files that none reads: it is the model then that doesn't fit.

    Args:
        model: of the run, by name or directory.
        data: the files to train on, if it is a list.

    Raises:
        UsageError: it is another model of ours, or a file holds sequences.
    """
    expected = f"the directory or hub id of a BERT for texts, or for sequences one of {', '.join(BODIES)}"
    if model in MODELS and not Path(model).exists():
        raise UsageError(f"--model: expected {expected}; got the {MODELS[model].kind} model {model}.")
    for path in data if model and isinstance(data, list) else ():
        if is_sequence_file(str(path)):
            raise UsageError(f"--model: expected {expected}; got {model} for the sequences in {path}.")


@torch.inference_mode()
def answers(model: SequenceModel, data: Sequences, rows: int = 32) -> Tensor:
    """Tell what sequences are.

    Args:
        model: in any mode, which it keeps.
        data: the sequences.
        rows: read at a time.

    Returns:
        (n, n_outputs): log p of the classes, or the numbers.
    """
    training = model.training
    model.eval()
    found = torch.empty(len(data), model.config.n_outputs)
    order = np.argsort(data.lengths, kind="stable").tolist()  # about equal lengths: little padding
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        x, lengths, _, times = data.batch(numbers)
        times = None if times is None else times.to(model.device)
        outputs = model(x.to(model.device), lengths.to(model.device), times).float().cpu()
        found[numbers] = outputs.log_softmax(-1) if model.config.labels else outputs
    model.train(training)
    return found


def measure(model: SequenceModel, data: Sequences, rows: int = 32) -> dict[str, float]:
    """Measure a model on labelled sequences.

    Args:
        model: of the same labels.
        data: the sequences.
        rows: read at a time.

    Returns:
        loss, and of classes accuracy and macro_f1, of numbers the root mean square of the error.
    """
    found, truth = answers(model, data, rows), torch.from_numpy(data.truth)
    loss = model.loss(found, truth).item()
    if not model.config.labels:
        return {"loss": loss, "rmse": loss**0.5}
    scores = score(data.truth.tolist(), found.argmax(1).tolist())
    return {"loss": loss, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


def to_rate(model: SequenceModel, rate: float | None) -> None:
    """Make a model read signals of another rate than it was trained on, by longer or shorter time steps.

    Args:
        model: changed in place, unless the rates are equal or one is unknown.
        rate: samples per second.

    Raises:
        LongscanError: its body knows no time.
    """
    trained = model.config.rate
    if rate and trained and rate != trained:
        try:
            model.rescale_time(trained / rate)
        except LongscanError as error:
            raise LongscanError(
                f"the signals have {rate:g} samples per second, the model was trained on {trained:g}: {error}"
            ) from error


def evaluate_sequences(
    directory: str, files: Sequence[Path], columns: str, pattern: str | None, as_json: bool
) -> None:
    """Measure a model on labelled sequences and print it; see `classify evaluate`.

    Args:
        directory: of the model.
        files: see `read_sequences`.
        columns: likewise.
        pattern: likewise.
        as_json: for programs.
    """
    model = load_sequence_model(directory)
    data = read_sequences(files, split="test", pattern=pattern, columns=columns)
    _fit(model, data)
    found = measure(model, data.labelled(model.config.labels))
    if as_json:
        typer.echo(json.dumps({"model": directory, "sequences": len(data), **found}, indent=2))
    elif model.config.labels:
        scores = f"accuracy {found['accuracy']:.4f} · macro-F1 {found['macro_f1']:.4f}"
        typer.echo(f"{scores} · {count(len(data), 'sequence')}")
    else:
        typer.echo(f"root mean square error {found['rmse']:.6g} · {count(len(data), 'sequence')}")


def predict_sequences(directory: str, files: Sequence[str], as_json: bool) -> None:
    """Print what sequences are; see `classify predict`.

    Args:
        directory: of the model.
        files: see `read_sequences`; their labels don't count. Of a model of tokens also texts, or none: then
            the lines of stdin are its texts.
        as_json: for programs.

    Raises:
        UsageError: there are no files, and the model is one of signals.
    """
    model = load_sequence_model(directory)
    labels, is_text = model.config.labels, False
    if model.config.d_input:
        if not files:
            raise UsageError("FILES: expected signals, as train takes them; there are none on stdin.")
    else:
        is_text = not any(map(_is_file, files))
        files = files or read_stdin()
        if not files:
            return
    data = _texts(files) if is_text else read_sequences(files, split="test")
    _fit(model, data)
    for name, row in zip(data.names, answers(model, data), strict=True):
        if as_json:
            said = {"probabilities": dict(zip(labels, row.exp().tolist(), strict=True))} if labels else {}
            shown = {"label": labels[int(row.argmax())]} if labels else {"numbers": row.tolist()}
            typer.echo(json.dumps({"text" if is_text else "name": name, **shown, **said}, ensure_ascii=False))
        elif labels:
            shown_name = " ".join(name.splitlines()) if is_text else name
            typer.echo(f"{labels[int(row.argmax())]}\t{row.exp().max():.4f}\t{shown_name}")
        else:
            typer.echo("\t".join([*(f"{number:.6g}" for number in row.tolist()), name]))


def _is_file(argument: str) -> bool:
    """Whether an argument names a file of sequences, be it one that is not there, rather than a text."""
    name = argument.lower().removesuffix(".gz").removesuffix(".xz")
    return os.path.exists(argument) or (len(argument.split()) == 1 and name.endswith(FILES))


def _texts(texts: Sequence[str]) -> Sequences:
    """Take texts as sequences of bytes, as training did."""
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


def _fit(model: SequenceModel, data: Sequences) -> None:
    """Insist on sequences that a model can read; at another rate it reads by other time steps."""
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
