"""Fine-tune a BERT as a classifier of labelled texts."""

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
from longscan.core.runtime import Signals
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
    """Everything that decides what `longscan classify train` computes; rates as in the BERT paper, A.3."""

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
        """Refuse values that cannot work, each by its name."""
        super().__post_init__()
        self.check_least(8, "seq_len")
        self.check_least(1, "batch_size", "accumulate")
        self.check_fractions("valid_fraction")
        parse_columns(self.columns)


class _Part(NamedTuple):
    """What a forward pass reads."""

    ids: Tensor  # (batch, seq_len)
    types: Tensor  # likewise
    labels: Tensor  # (batch,)


class ClassifyRun(Run[ClassifyConfig]):
    """Fine-tunes a BERT: tell the class of a text, or of a pair of texts."""

    verb = "classify train"
    settings = ClassifyConfig
    valid_key, valid_unit = "valid_loss", "nats/text"
    unit, item = "nats per text", "texts"
    score, scores = "accuracy and F1", {"valid_accuracy": "accuracy", "valid_macro_f1": "macro-F1"}
    trained_on = ("data/train.jsonl", "data/valid.jsonl", "start/config.json", "start/model.safetensors")
    tokenizer: WordPieceTokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Read examples and checkpoint, or what the run made of them before."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name files of labelled texts.")
        if not config.model:
            raise UsageError("--model: expected the checkpoint to start from, a BERT's directory or hub id.")
        check_device(config.device)
        place = self.directory / "data"
        if not place.is_dir():
            self._prepare(place)
        found = load_bert(self.directory / "start")
        self.model, self.tokenizer = found.model.to(config.device), found.tokenizer
        self.train, self.valid = (self._encode(place / f"{name}.jsonl") for name in ("train", "valid"))
        self.rows = config.batch_size * config.accumulate
        lengths = [len(one.ids) for one in self.train[0]]
        self.plans = EpochOrder(config.seed, partial(shuffled, lengths, self.rows))
        return self.model, -(-len(self.train[1]) // self.rows), 1

    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it."""
        framed, _ = self.train
        cut = sum(one.cut > 0 for one in framed)
        words = f", {cut:,} cut at {self.config.seq_len} tokens" if cut else ""
        classes = count(len(self.model.config.labels), "class", "classes")
        data = f"{count(len(framed), 'text')} of {classes}{words}, {len(self.valid[1]):,} held out"
        return data, count(self.rows, "text")

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the texts of a step in parts."""
        framed, numbers = self.train
        epoch, place = divmod(step, -(-len(framed) // self.rows))
        chosen, parts = self.plans[epoch][place], []
        for start in range(0, len(chosen), self.config.batch_size):
            some = chosen[start : start + self.config.batch_size]
            ids, types = self.tokenizer.collate([framed[number] for number in some])
            labels = torch.tensor([numbers[number] for number in some])
            parts.append((_Part(ids, types, labels), len(some)))
        return parts

    def loss(self, model: Bert, part: _Part) -> Tensor:
        """Return the mean nats of a text's class."""
        ids, types, labels = (tensor.to(self.config.device) for tensor in part)
        return F.cross_entropy(model.classify(model(ids, types).pooled), labels)

    @property
    def validates(self) -> bool:
        """Whether examples are held out."""
        return bool(self.valid[1])

    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure loss, accuracy and F1 on what is held out."""
        framed, truth = self.valid
        scores = predict(self.model, self.tokenizer, framed, self.config.batch_size)
        found = score(truth, scores.argmax(1).tolist())
        self.say(f"accuracy {found.accuracy:.1%}, macro-F1 {found.macro_f1:.3f}")
        return {
            "valid_loss": F.nll_loss(scores, torch.tensor(truth)).item(),
            "valid_accuracy": found.accuracy,
            "valid_macro_f1": found.macro_f1,
        }

    def _encode(self, path: Path) -> tuple[list[Framed], list[int]]:
        """Frame the examples of a file and number their labels."""
        if not path.stat().st_size:
            return [], []
        examples = read_examples([path])
        framed = frame_examples(self.tokenizer, examples, self.config.seq_len)
        return framed, number_labels(examples, self.model.config.labels)

    def _prepare(self, place: Path) -> None:
        """Divide the examples and put a new head on the checkpoint."""
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
                f"{valid[0].where}: expected pairs there as in the training data, or nowhere."
            )
        generator = torch.Generator().manual_seed(config.seed)
        found = load_bert(config.model, "classifier", labels=labels, generator=generator)
        positions = found.model.config.max_positions
        if config.seq_len > positions:
            raise UsageError(f"--seq-len: expected at most the {positions} positions of {config.model}.")
        if found.fresh:
            parts = ", ".join(part.rstrip(".") for part in found.fresh)
            self.display.line(f"fresh      {parts}: not in {config.model}, learnt from the examples alone")
        save(found.model, self.directory / "start", found.tokenizer)
        with atomic_directory(place) as temporary:
            for name, examples in (("train", train), ("valid", valid)):
                lines = [json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples]
                text = "".join(lines).encode(errors="backslashreplace")  # names of files need not be UTF-8
                (temporary / f"{name}.jsonl").write_bytes(text)
