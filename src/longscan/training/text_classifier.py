"""The text-classification task: fine-tune a BERT on labelled texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.load import load_bert
from longscan.checkpoints.save import save
from longscan.core.config import count
from longscan.core.files import atomic_directory
from longscan.core.random import EpochOrder
from longscan.core.runtime import StopSignals
from longscan.data.batching import shuffled
from longscan.data.labeled_texts import (
    divide,
    frame_examples,
    number_labels,
    parse_columns,
    read_examples,
)
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import score
from longscan.inference.bert import predict
from longscan.models import Bert, Model
from longscan.tokenizers.wordpiece import Framed, WordPieceTokenizer
from longscan.training.build import check_device
from longscan.training.config import RunConfig, setting
from longscan.training.run import Run

__all__ = ["ClassifyConfig", "ClassifyRun"]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """The settings of `longscan classify train --model BERT`; defaults as in the BERT paper, A.3."""

    EPOCHS: ClassVar[float] = 3.0

    data: tuple[str, ...] = setting((), "Files of labelled texts.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation file; default: hold out a part of DATA. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Fraction of DATA held out for validation.")
    columns: str = setting("1,2", "Table columns of label, text and, for pairs, second text.")
    model: str = setting("", "Checkpoint to start from: a BERT's directory or hub id.")

    seq_len: int = setting(128, "Tokens per text, at most; longer ones are cut.")
    batch_size: int = setting(32, "Texts per forward pass.")
    accumulate: int = setting(1, "Forward passes per step (gradient accumulation).")

    schedule: Literal["cosine", "linear", "noam"] = setting("linear", "Learning-rate schedule.")
    lr: float = setting(5e-5, "Peak learning rate.")
    warmup: int = setting(100, "Warm-up steps, at most a tenth of the run.")
    weight_decay: float = setting(0.01, "Weight decay of AdamW, on matrices only.")
    beta2: float = setting(0.999, "AdamW beta2.")
    eps: float = setting(1e-6, "AdamW epsilon.")

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("seq_len", least=8)
        self.check("batch_size", "accumulate", least=1)
        self.check("valid_fraction", least=0, below=1)
        parse_columns(self.columns)


class _Part(NamedTuple):
    """The input of a forward pass."""

    ids: Tensor  # (batch, seq_len)
    types: Tensor  # likewise
    labels: Tensor  # (batch,)


class ClassifyRun(Run[ClassifyConfig]):
    """Fine-tunes a BERT to classify texts or pairs of texts."""

    verb = "classify train"
    settings = ClassifyConfig
    valid_key, valid_unit = "valid_loss", "nats/text"
    unit, item = "nats per text", "texts"
    score, scores = "accuracy and F1", {"valid_accuracy": "accuracy", "valid_macro_f1": "macro-F1"}
    trained_on = ("data/train.jsonl", "data/valid.jsonl", "start/config.json", "start/model.safetensors")
    tokenizer: WordPieceTokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after reading the examples and the checkpoint or those that the run has saved."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name files of labelled texts.")
        if not config.model:
            raise UsageError(
                "--model: expected a BERT's directory or hub id for texts, or for sequences the name of a "
                "language model such as mamba, or for images that of an image model such as vmamba; got none."
            )
        check_device(config.device)
        data = self.directory / "data"
        if not data.is_dir():
            self._prepare(data)
        loaded = load_bert(self.directory / "start")
        self.model, self.tokenizer = loaded.model.to(config.device), loaded.tokenizer
        self.train, self.valid = (self._encode(data / f"{name}.jsonl") for name in ("train", "valid"))
        self.rows = config.batch_size * config.accumulate
        lengths = [len(one.ids) for one in self.train[0]]
        self.plans = EpochOrder(config.seed, partial(shuffled, lengths, self.rows))
        return self.model, -(-len(self.train[1]) // self.rows), 1

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        framed, _ = self.train
        cut = sum(one.cut > 0 for one in framed)
        remark = f", {cut:,} cut at {self.config.seq_len} tokens" if cut else ""
        classes = count(len(self.model.config.labels), "class", "classes")
        data = f"{count(len(framed), 'text')} of {classes}{remark}, {len(self.valid[1]):,} held out"
        return data, count(self.rows, "text")

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the texts of a step in parts."""
        framed, numbers = self.train
        epoch, index = divmod(step, -(-len(framed) // self.rows))
        chosen, parts = self.plans[epoch][index], []
        for start in range(0, len(chosen), self.config.batch_size):
            some = chosen[start : start + self.config.batch_size]
            ids, types = self.tokenizer.collate([framed[number] for number in some])
            labels = torch.tensor([numbers[number] for number in some])
            parts.append((_Part(ids, types, labels), len(some)))
        return parts

    def loss(self, model: Bert, part: _Part) -> Tensor:
        """Return the mean cross-entropy of the classes."""
        ids, types, labels = (tensor.to(self.config.device) for tensor in part)
        return F.cross_entropy(model.classify(model(ids, types).pooled), labels)

    @property
    def validates(self) -> bool:
        """Whether examples are held out."""
        return bool(self.valid[1])

    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return loss, accuracy and F1 on the held-out texts."""
        framed, truth = self.valid
        scores = predict(self.model, self.tokenizer, framed, self.config.batch_size)
        result = score(truth, scores.argmax(1).tolist())
        self.say(f"accuracy {result.accuracy:.1%}, macro-F1 {result.macro_f1:.3f}")
        return {
            "valid_loss": F.nll_loss(scores, torch.tensor(truth)).item(),
            "valid_accuracy": result.accuracy,
            "valid_macro_f1": result.macro_f1,
        }

    def _encode(self, path: Path) -> tuple[list[Framed], list[int]]:
        """Return the examples of a file as token ids, and the indices of their labels."""
        if not path.stat().st_size:
            return [], []
        examples = read_examples([path])
        framed = frame_examples(self.tokenizer, examples, self.config.seq_len)
        return framed, number_labels(examples, self.model.config.labels)

    def _prepare(self, directory: Path) -> None:
        """Split and save the examples; save the checkpoint with a new head."""
        config = self.config
        train = read_examples(config.data, config.columns)
        if config.valid:
            valid = read_examples(config.valid, config.columns)
        else:
            train, valid = divide(train, config.valid_fraction)
        names = {example.label for example in train}
        labels = sorted(names, key=int if all(name.isdecimal() for name in names) else None)
        if len(labels) < 2:
            raise LongscanError(f"{train[0].where}: expected two classes or more, all are {labels[0]!r}.")
        number_labels(valid, labels)
        if valid and (valid[0].pair is None) != (train[0].pair is None):
            raise LongscanError(
                f"{valid[0].where}: expected pairs in both training and validation data, or in neither."
            )
        generator = torch.Generator().manual_seed(config.seed)
        loaded = load_bert(config.model, "classifier", labels=labels, generator=generator)
        positions = loaded.model.config.max_positions
        if config.seq_len > positions:
            raise UsageError(
                f"--seq-len: expected at most the {positions} positions of {config.model}, "
                f"got {config.seq_len}."
            )
        if loaded.fresh:
            parts = ", ".join(part.rstrip(".") for part in loaded.fresh)
            self.display.line(f"new        {parts}: not in {config.model}, so trained from scratch")
        save(loaded.model, self.directory / "start", loaded.tokenizer)
        with atomic_directory(directory) as temporary:
            for name, examples in (("train", train), ("valid", valid)):
                lines = [json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples]
                text = "".join(lines).encode(errors="backslashreplace")  # file names need not be UTF-8
                (temporary / f"{name}.jsonl").write_bytes(text)
