"""The language-model task: batches of token windows, cross-entropy, validation, samples."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.runtime import StopSignals
from longscan.data.token_files import TokenDataset, windows
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate
from longscan.models import MODELS, LanguageModel, Model
from longscan.tokenizers.base import Tokenizer
from longscan.training.build import continued, make_model, make_tokenizer, make_tokens, model_settings
from longscan.training.chunked_loss import check_constant, chunked_loss, has_constant_state
from longscan.training.config import TrainConfig
from longscan.training.run import Run
from longscan.training.run_directory import read_earlier, write_settings

__all__ = ["LanguageRun"]

ONE_PASS = 8192  # tokens; longer sequences are cut into chunks where the model allows it
CHUNK = 2048  # of them


class LanguageRun(Run[TrainConfig]):
    """Trains a language model: predict the next token of running text."""

    verb = "train"
    settings = TrainConfig
    valid_key, valid_unit = "valid_bits_per_byte", "bits/byte"
    trained_on = ("data/meta.json",)
    tokenizer: Tokenizer

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after making the tokenizer and the tokens."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name text files or directories.")
        if config.pretrained:
            before = continued(config, self.directory / "start")
            self.tokenizer = before[1]
        else:
            settings = model_settings(config, vocab_size=config.vocab_size)  # check before the text is read
            with torch.device("meta"):
                self._check_chunk(cast(LanguageModel, MODELS[config.model].cls(settings)))
            self.tokenizer = make_tokenizer(config, self.directory / "tokenizer", self.display.line)
        self.tokens = make_tokens(config, self.tokenizer, self.directory / "data", self.display.prepare)
        rows = config.batch_size * config.accumulate
        self.dataset = TokenDataset(self.tokens.train.path, config.seq_len, rows, config.seed)
        if self.tokens.valid:
            next(windows(self.tokens.valid.path, config.seq_len))  # raise now if it is too short
        made = before[0] if config.pretrained else make_model(config, self.tokenizer.vocab_size)
        self.model = cast(LanguageModel, made)
        self._choose_chunk()
        return self.model, self.dataset.windows_per_epoch, rows

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        train, valid = self.tokens.train, self.tokens.valid
        held_out = f"{valid.tokens:,} held out" if valid else "none held out: no validation"
        data = f"{count(train.tokens, 'token')} of {_megabytes(train.bytes)}, {held_out}"
        step = count(self.config.tokens_per_step, "token")
        chunk = self.config.backward_chunk
        return data, f"{step} in chunks of {chunk:,}" if self._chunked else step

    def batch(self, step: int) -> list[tuple[Tensor, int]]:
        """Return the ids of a step in parts (batch_size, seq_len + 1).

        Where documents are few, as in one long novel, the model would hardly ever see the start of a text,
        which it needs to generate without a prompt. There one window in 16 starts with the end-of-text id.
        """
        ids = self.dataset.batch(step)
        if self.tokens.train.documents < self.dataset.windows_per_epoch / 16:
            first = step * len(ids)
            ids[-first % 16 :: 16, 0] = self.tokenizer.start[-1]
        parts = torch.split(ids, self.config.batch_size)
        return [(part, part.shape[0] * (part.shape[1] - 1)) for part in parts]

    def loss(self, model: LanguageModel, part: Tensor) -> Tensor:
        """Return the mean loss of the next token; its gradients are exact, also in chunks."""
        part = part.to(self.config.device)
        if self._chunked:
            assert self.config.backward_chunk
            return chunked_loss(model, part, chunk=self.config.backward_chunk, directory=self.directory)[0]
        loss: Tensor = model(part, labels=part, return_logits=False).loss
        return loss

    @property
    def validates(self) -> bool:
        """Whether text is held out."""
        return self.tokens.valid is not None

    @torch.inference_mode()
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Measure the loss on held-out windows in nats per token, and in bits per byte."""
        assert self.tokens.valid is not None
        config, total, n = self.config, 0.0, 0
        limit = None if last else config.eval_windows
        for ids in windows(self.tokens.valid.path, config.seq_len, batch_size=config.batch_size, limit=limit):
            if signals.received:
                return None
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            total += self.loss(self.model, ids).item() * predicted
            n += predicted
        loss = total / n
        return {"valid_loss": loss, "valid_bits_per_byte": self.tokens.valid.bits_per_byte(loss)}

    def report(self, signals: StopSignals) -> None:
        """Validate, then generate a sample."""
        super().report(signals)
        every = self.config.sample_every
        if every and not signals.received and self.due("sample", every, always=self.trainer.done):
            text = self._sample()
            self.metrics.write({"step": self.trainer.step_number, "sample": text})
            self.say(text)

    @property
    def _chunked(self) -> bool:
        """Whether sequences are longer than a chunk of the backward pass."""
        return 0 < (self.config.backward_chunk or 0) < self.config.seq_len

    def _check_chunk(self, model: LanguageModel) -> None:
        """Raise UsageError if the backward pass is to run in chunks and the model does not allow it."""
        if self.config.backward_chunk:
            try:
                check_constant(model)
            except LongscanError as error:
                raise UsageError(f"--backward-chunk: {error}") from error

    def _choose_chunk(self) -> None:
        """Settle the chunks of the backward pass and record them, as they affect rounding."""
        config = self.config
        self._check_chunk(self.model)
        if config.backward_chunk is None:
            long = config.seq_len > ONE_PASS and has_constant_state(self.model)
            self.config = config.replace(backward_chunk=CHUNK if long else 0)
            write_settings(self.directory, self.verb, self.config.to_dict(), read_earlier(self.directory))

    def _sample(self) -> str:
        """Return the sample prompt, continued."""
        config = self.config
        pieces = generate(
            self.model,
            self.tokenizer,
            config.sample_prompt,
            max_new_tokens=config.sample_tokens,
            temperature=0.8,
            seed=config.seed + self.trainer.step_number,
        )
        return config.sample_prompt + "".join(pieces)


def _megabytes(n_bytes: int) -> str:
    """Return a size in MB, or in kB if it is small."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"
