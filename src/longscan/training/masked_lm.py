"""The masked-LM task: BERT's pre-training on masked tokens and next sentences."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.runtime import StopSignals
from longscan.data.masked_pairs import PairDataset
from longscan.data.token_files import open_tokens
from longscan.errors import UsageError
from longscan.evaluation.masked_lm import measure
from longscan.models import Bert, Model
from longscan.models.bert import PretrainingBatch
from longscan.models.common.losses import IGNORE
from longscan.tokenizers.sentences import SentenceTokenizer
from longscan.tokenizers.wordpiece import WordPieceTokenizer
from longscan.training.build import make_model, make_tokenizer, make_tokens, model_settings
from longscan.training.config import TrainConfig
from longscan.training.run import Run

__all__ = ["PretrainRun"]


class PretrainRun(Run[TrainConfig]):
    """Pre-trains a BERT on running text, divided into documents and sentences."""

    verb = "train"
    settings = TrainConfig
    valid_key, valid_unit = "valid_loss", "nats/masked token + next sentence"
    item = "masked tokens"
    unit = "nats, masked LM + next sentence"
    score = "accuracy"
    scores: Mapping[str, str] = {
        "valid_word_accuracy": "masked tokens",
        "valid_next_accuracy": "next sentence",
    }
    trained_on = ("data/meta.json",)
    tokenizer: WordPieceTokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after making the vocabulary and the sentences."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name text files or directories.")
        if config.pretrained:
            raise UsageError("--from: expected a causal language model, not a BERT. Leave it out.")
        parted = {"context_parallel": config.context_parallel > 1}
        for name in ("backward_chunk", "carry_state", "context_parallel"):
            if parted.get(name, getattr(config, name)):
                raise UsageError(
                    f"--{name.replace('_', '-')}: {config.model} reads in both directions, so no part of a "
                    "text can be read before the next. Leave it out."
                )
        model_settings(config, vocab_size=config.vocab_size)  # check the flags before the text is read
        directory = self.directory / "tokenizer"
        self.tokenizer = cast(WordPieceTokenizer, make_tokenizer(config, directory, self.display.line))
        self.model = cast(Bert, make_model(config, self.tokenizer.vocab_size))
        sizes = self.model.config
        if config.seq_len > sizes.max_positions:
            raise UsageError(
                f"--seq-len: expected at most {sizes.max_positions}, the positions of the model, "
                f"got {config.seq_len}."
            )
        if self.tokenizer.pad_id != sizes.pad_id:
            raise UsageError(
                f"--tokenizer: expected [PAD] to be id {sizes.pad_id}, it is {self.tokenizer.pad_id}."
            )
        sentences = SentenceTokenizer(self.tokenizer)
        self.tokens = make_tokens(config, sentences, self.directory / "data", self.display.prepare)
        rows = config.batch_size * config.accumulate
        self.dataset = PairDataset(self.tokens.train.path, self.tokenizer, config.seq_len, rows, config.seed)
        self.held_out = (
            PairDataset(self.tokens.valid.path, self.tokenizer, config.seq_len, config.batch_size)
            if self.tokens.valid
            else None
        )
        return self.model, self.dataset.pairs_per_epoch, rows

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        train, valid = self.tokens.train, self.tokens.valid
        held_out = f"{valid.tokens:,} held out" if valid else "none held out: no validation"
        data = f"{count(train.tokens, 'token')} in {count(train.documents, 'document')}, {held_out}"
        if train.documents == 1:
            data += (
                "\n           one document, so random next sentences come from it too: --separator splits it"
            )
        pairs, tokens = count(self.dataset.batch_size, "pair"), count(self.config.seq_len, "token")
        return data, f"{pairs} of {tokens}"

    def batch(self, step: int) -> list[tuple[PretrainingBatch, tuple[int, int]]]:
        """Return the pairs of a step in parts, and the number of masked tokens and pairs in each."""
        whole = self.dataset.batch(step)
        pieces = zip(*(torch.split(tensor, self.config.batch_size) for tensor in whole), strict=True)
        parts = [PretrainingBatch(*piece) for piece in pieces]
        return [(part, (int((part.labels != IGNORE).sum()), len(part.ids))) for part in parts]

    def loss(self, model: Bert, part: PretrainingBatch) -> Tensor:
        """Return the mean losses (2,) of masked tokens and next sentences."""
        device = self.config.device
        return torch.stack(model.losses(PretrainingBatch(*(tensor.to(device) for tensor in part))))

    @property
    def validates(self) -> bool:
        """Whether text is held out."""
        return self.held_out is not None

    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return loss and accuracy of both tasks on held-out pairs, and the majority baselines."""
        assert self.held_out is not None
        batches = self.held_out.walk(None if last else self.config.eval_windows)
        metrics = measure(self.model, batches, self._most_frequent, signals)
        if metrics is not None:
            self.say(
                f"masked tokens {metrics['valid_word_accuracy']:.1%} (the most frequent one: "
                f"{metrics['valid_word_baseline']:.1%}), next sentence {metrics['valid_next_accuracy']:.1%} "
                f"(the most frequent answer: {metrics['valid_next_baseline']:.1%})"
            )
        return metrics

    @cached_property
    def _most_frequent(self) -> int:
        """The most frequent token of the training text."""
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        ids = open_tokens(self.tokens.train.path)
        for start in range(0, len(ids), 2**24):  # in blocks, as bincount converts to int64
            counts += np.bincount(ids[start : start + 2**24], minlength=len(counts))
        counts[[self.tokenizer.sep_id, self.tokenizer.cls_id]] = 0
        return int(counts.argmax())
