"""The sequence task: classification or regression with the blocks of any language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longscan.checkpoints.save import save
from longscan.core.config import count
from longscan.core.files import atomic_directory
from longscan.core.random import EpochOrder
from longscan.core.runtime import StopSignals
from longscan.data.batching import shuffled
from longscan.data.labeled_sequences import BYTES, is_sequence_file, read_sequences
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import measure
from longscan.models import MODELS, LanguageModelConfig, Model, ModelEntry
from longscan.models.sequence_classifier import BODIES, Body, SequenceConfig, SequenceModel
from longscan.training.build import model_settings
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["FILES", "SequencesConfig", "SequencesRun", "check_bert"]


FILES = (".npz", ".npy", ".tsv", ".csv", ".txt", ".jsonl", ".ndjson", ".wav", ".tar", ".tgz")  # of sequences


@dataclass(frozen=True, kw_only=True)
class SequencesConfig(FreshConfig):
    """The settings of `longscan classify train --model NAME`."""

    EPOCHS: ClassVar[float] = 20.0

    data: tuple[str, ...] = setting((), "Labelled sequences.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation file; default: hold out a part of DATA. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Fraction of DATA held out for validation.")
    columns: str = setting("1,2", "Table columns of label, text and, for pairs, second text.")
    pattern: str | None = setting(None, "Regular expression whose group is the label in a .wav file's path.")
    model: str = setting("mamba", "Architecture of the blocks, see `longscan models`; or neural_ode.")
    bidirectional: bool = setting(False, "Give each block a second mixer, for the reversed sequence.")
    pooling: Literal["mean", "last"] = setting("mean", "Pooling over time before the head.")
    dropout: float = setting(0.1, "Dropout probability of each block's output.")

    seq_len: int | None = setting(None, "Time steps per sequence, at most; longer ones are cut.")
    batch_size: int = setting(32, "Sequences per forward pass.")
    accumulate: int = setting(1, "Forward passes per step (gradient accumulation).")
    weight_decay: float = setting(0.01, "Weight decay of AdamW, on matrices only.")

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("batch_size", "accumulate", "seq_len", least=1)
        self.check("valid_fraction", "dropout", least=0, below=1)

    @property
    def choice(self) -> Mapping[str, ModelEntry | Body]:
        """The models whose blocks can be trained, by name."""
        return BODIES


class _Part(NamedTuple):
    """The input of a forward pass."""

    x: Tensor  # (batch, seq_len, d_input) or (batch, seq_len)
    lengths: Tensor  # (batch,)
    truth: Tensor  # (batch,) or (batch, n_outputs)
    times: Tensor | None  # (batch, seq_len), if there are any


class SequencesRun(Run[SequencesConfig]):
    """Trains a classifier or a regression of sequences."""

    verb = "classify train"
    settings = SequencesConfig
    valid_key, valid_unit = "valid_loss", "nats/sequence"
    unit, item = "nats per sequence", "sequences"
    score, scores = "accuracy and F1", {"valid_accuracy": "accuracy", "valid_macro_f1": "macro-F1"}
    trained_on = ("data/train.npz",)
    model: SequenceModel

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after reading the sequences or those that the run has saved."""
        config = self.config
        data = self.directory / "data"
        if not data.is_dir():
            self._prepare(data)
        self.train, self.valid = (read_sequences([data / f"{name}.npz"]) for name in ("train", "valid"))
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
        """Return the size of the training data, and of a step."""
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
        epoch, index = divmod(step, self._steps)
        chosen, size = self.plans[epoch][index], self.config.batch_size
        some = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [(_Part(*self.train.batch(numbers)), len(numbers)) for numbers in some]

    def loss(self, model: SequenceModel, part: _Part) -> Tensor:
        """Return the mean cross-entropy of the classes, or the mean squared error."""
        device = self.config.device
        times = None if part.times is None else part.times.to(device)
        return model.loss(model(part.x.to(device), part.lengths.to(device), times), part.truth.to(device))

    def export(self, directory: Path) -> None:
        """Write the model of the last step."""
        save(self.model, directory)

    @property
    def validates(self) -> bool:
        """Whether sequences are held out."""
        return len(self.valid) > 0

    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return the loss, and the accuracy or the error, on the held-out sequences."""
        metrics = measure(self.model, self.valid, self.config.batch_size)
        if self.train.labels:
            self.say(f"accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}")
        else:
            self.say(f"root mean square error {metrics['rmse']:.4g}")
        return {f"valid_{name}": value for name, value in metrics.items()}

    def _configure(self) -> SequenceConfig:
        """Return the configuration of the model."""
        config, train = self.config, self.train
        largest = 0 if train.d_input else max(int(some.values.max(initial=0)) for some in (train, self.valid))
        # other texts may hold bytes that these don't; signals have no vocabulary at all
        body = model_settings(config, vocab_size=max(BYTES, largest + 1) if not train.d_input else 1)
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

    def _prepare(self, directory: Path) -> None:
        """Read, split and save the sequences."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name files of labelled sequences.")
        model_settings(config, vocab_size=BYTES)  # check the flags before the data are read
        how: dict[str, Any] = {"pattern": config.pattern, "columns": config.columns}
        train = read_sequences(config.data, **how)
        if config.valid:
            valid = read_sequences(config.valid, split="test", **how)
        else:
            train, valid = train.divide(config.valid_fraction)
        if not train.labels and (train.truth == train.truth.round()).all():
            self.display.line(
                "regression y holds whole floats, taken as values: for classes save y.astype(int)"
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
        with atomic_directory(directory) as temporary:
            train.cut(config.seq_len).save(temporary / "train.npz")
            valid.cut(config.seq_len).save(temporary / "valid.npz")


def check_bert(model: str, data: object) -> None:
    """Raise if a model is no BERT, or if the data are sequences, which a BERT can't process.

    Args:
        model: of the run, by name or directory.
        data: the files to train on, if it is a list.

    Raises:
        UsageError: the model is another one of longscan, or a file holds sequences.
    """
    images = [name for name, entry in MODELS.items() if entry.kind == "image"]
    expected = (
        f"the directory or hub id of a BERT for texts, for sequences one of {', '.join(BODIES)}, "
        f"or for images one of {', '.join(images)}"
    )
    if model in MODELS and not Path(model).exists():
        raise UsageError(f"--model: expected {expected}; got the {MODELS[model].kind} model {model}.")
    for path in data if model and isinstance(data, list) else ():
        if is_sequence_file(str(path)):
            raise UsageError(f"--model: expected {expected}; got {model} for {path}.")
