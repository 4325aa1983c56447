"""The language-model task: batches of token windows, cross-entropy, validation, samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.runtime import StopSignals, available_memory
from longscan.data.token_files import TokenDataset, windows
from longscan.data.token_streams import TokenStreams
from longscan.errors import LongscanError, UsageError
from longscan.inference.generate import generate
from longscan.models import LanguageModel, Model, ModelEntry, State
from longscan.tokenizers.base import Tokenizer
from longscan.training.build import continued, make_model, make_tokenizer, make_tokens, model_settings
from longscan.training.chunked_loss import check_constant, chunked_loss, has_constant_state
from longscan.training.config import TrainConfig
from longscan.training.context_parallel import Neighbours, PartedModel, check_context, part_loss
from longscan.training.footprint import footprint, memory_size
from longscan.training.replicas import Replica, SummedModel
from longscan.training.run import Run
from longscan.training.trainer import UnfinishedError

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
    dataset: TokenDataset | TokenStreams
    chunk: int  # tokens of the backward pass at a time; 0: all

    @classmethod
    def timeout(cls, config: TrainConfig) -> float:
        """The seconds that its processes wait for each other."""
        return config.timeout

    @classmethod
    def context_size(cls, config: TrainConfig) -> int:
        """The number of processes that share a sequence."""
        return config.context_parallel

    @property
    def parted(self) -> bool:
        """Whether this process has a part of each sequence only."""
        return self.group.context_size > 1

    @property
    def sharded(self) -> bool:
        """Whether each process has a share of the model only."""
        return self.config.shard

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after making the tokenizer and the tokens."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name text files or directories.")
        if config.carry_state and self.group.several:
            raise UsageError(
                "--carry-state: expected one process, as its checkpoint holds its own states only. "
                "Leave it out, or start without torchrun."
            )
        if self.parted and (config.shard or config.carry_state or config.backward_chunk):
            name = next(n for n in ("shard", "carry_state", "backward_chunk") if getattr(config, n))
            raise UsageError(
                f"--context-parallel: expected no --{name.replace('_', '-')}, as the parts of a sequence are "
                "computed in one pass, layer by layer, with the whole model in each process. Leave one out."
            )
        self.group.part(config.seq_len)  # raise now if there are too few tokens
        self.neighbours = Neighbours(self.group)
        if config.pretrained:
            before = continued(config, self.directory / "start")
            self.tokenizer = before[1]
        else:
            settings = model_settings(config, vocab_size=config.vocab_size)  # check before the text is read
            with torch.device("meta"):
                self._check_state(lambda: cast(ModelEntry, config.choice[config.model]).cls(settings))
            self.tokenizer = make_tokenizer(config, self.directory / "tokenizer", self.display.line)
        self.tokens = make_tokens(config, self.tokenizer, self.directory / "data", self.display.prepare)
        rows = config.batch_size * config.accumulate
        self.group.slices(rows, config.batch_size)  # raise now if there are too few
        kind = TokenStreams if config.carry_state else TokenDataset
        self.dataset = kind(self.tokens.train.path, config.seq_len, rows, config.seed)
        if self.tokens.valid:
            next(windows(self.tokens.valid.path, config.seq_len))  # raise now if it is too short
        made = before[0] if config.pretrained else make_model(config, self.tokenizer.vocab_size)
        self.model = cast(LanguageModel, made)
        self._choose_chunk()
        if config.carry_state:
            self.state = self.model.init_state(rows)
            self.carried = dict(self.state.named_tensors())
        return self.model, self.dataset.windows_per_epoch, rows

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        train, valid = self.tokens.train, self.tokens.valid
        held_out = f"{valid.tokens:,} held out" if valid else "none held out: no validation"
        data = f"{count(train.tokens, 'token')} of {_megabytes(train.bytes)}, {held_out}"
        step = count(self.config.tokens_per_step, "token")
        return data, f"{step} in chunks of {self.chunk:,}" if self.chunk else step

    def introduce(self) -> None:
        """Show also what the processes that share a sequence send."""
        super().introduce()
        if self.parted:
            n, tokens = self.group.context_size, self._longest_part
            state = self.model.init_state(self.config.batch_size)
            size = _megabytes(round(state.nbytes / len(state.layers)))
            self.display.line(
                f"context    {n} processes share a sequence, at most {tokens:,} tokens each; a layer sends "
                f"{size} in each direction, whatever the length"
            )

    def batch(self, step: int) -> list[tuple[tuple[Tensor, int], int]]:
        """Return the ids that this process takes in a step, in parts (batch_size, seq_len + 1).

        With each comes the number of its first row.

        Where documents are few, as in one long novel, the model would hardly ever see the start of a text,
        which it needs to generate without a prompt. There one window in 16 starts with the end-of-text id.
        """
        ids = self.dataset.batch(step)
        few = self.tokens.train.documents < self.dataset.windows_per_epoch / 16
        if few and not self.config.carry_state:
            first = step * len(ids)
            ids[-first % 16 :: 16, 0] = self.tokenizer.start[-1]
        slices = self.group.slices(len(ids), self.config.batch_size)
        tokens = self._part_len(ids)
        return [((ids[rows], rows.start), (rows.stop - rows.start) * tokens) for rows in slices]

    def loss(self, model: LanguageModel, part: tuple[Tensor, int]) -> Tensor:
        """Return the mean loss of the next token; with --carry-state the rows of the part start in theirs."""
        ids, first = part
        n = len(self.group.slices(self.config.batch_size * self.config.accumulate, self.config.batch_size))
        index = first // self.config.batch_size % n  # of the part

        def report(done: int, total: int) -> None:
            self.advanced(index * total + done, n * total)

        if not self.config.carry_state:
            return self._mean_loss(model, ids, report)
        rows = slice(first, first + len(ids))
        state = self.state.map(lambda tensor: tensor[rows].clone())
        loss, after = self._loss(model, ids, state, report=report)
        for name, tensor in after.named_tensors():
            self.carried[name][rows] = tensor.detach()
        return loss

    def _mean_loss(
        self, model: LanguageModel, ids: Tensor, report: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Return the mean loss of ids (batch, seq_len + 1), or of this process's part of them."""
        if not self._divides(ids):
            return self._loss(model, ids, report=report)[0]
        ids = ids.to(self.config.device)
        return part_loss(self.model, ids[:, :-1], ids, group=self.group, neighbours=self.neighbours)[0]

    def _part_len(self, ids: Tensor) -> int:
        """Return how many tokens of ids (batch, seq_len + 1) this process predicts."""
        n = ids.shape[1] - 1
        if not self._divides(ids):
            return n if self.group.context_rank == 0 else 0
        part = self.group.part(n)
        return int(part.stop) - int(part.start)

    def _divides(self, ids: Tensor) -> bool:
        """Whether processes share ids (batch, seq_len + 1); the last ones of held-out text may be too few."""
        return self.parted and ids.shape[1] > self.group.context_size

    def _loss(
        self,
        model: LanguageModel,
        ids: Tensor,
        state: State | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, State]:
        """Return the mean loss of ids (batch, seq_len + 1) from a state, and the state before their last."""
        ids = ids.to(self.config.device)
        if self.chunk:
            return chunked_loss(
                self.model,
                ids[:, :-1],
                ids,
                chunk=self.chunk,
                state=state,
                directory=self.directory,
                progress=report,
            )
        if state is None:
            output = model(ids, labels=ids, return_logits=False)
            return output.loss, output.state
        hidden, after = model.backbone(ids[:, :-1], state)
        return model.hidden_loss(hidden, ids[:, 1:]), after

    @property
    def validates(self) -> bool:
        """Whether text is held out."""
        return self.tokens.valid is not None

    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Measure the loss on held-out windows in nats per token, and in bits per byte."""
        assert self.tokens.valid is not None
        config, total, n = self.config, 0.0, 0
        limit = None if last else config.eval_windows
        batches = windows(self.tokens.valid.path, config.seq_len, batch_size=config.batch_size, limit=limit)
        for ids, counts in self.group.share(batches, signals):
            if signals.received:
                return None
            try:
                with self.trainer.replica.inference():
                    loss = self._mean_loss(self.model, ids, self._validating).item()
                    self.neighbours.wait()
            except UnfinishedError:  # the next start validates again
                return None
            predicted = ids.shape[0] * self._part_len(ids)
            if counts:
                total += loss * predicted
                n += predicted
        total, n = self.group.total(torch.tensor([total, n], dtype=torch.float64)).tolist()
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

    def _check_state(self, make: Callable[[], Model]) -> None:
        """Raise UsageError if a setting needs a state of constant size and the model has none."""
        if self.parted:
            check_context(cast(LanguageModel, make()))
        flags = {"--backward-chunk": self.config.backward_chunk, "--carry-state": self.config.carry_state}
        for flag in (flag for flag, given in flags.items() if given):
            try:
                check_constant(cast(LanguageModel, make()))
            except LongscanError as error:
                raise UsageError(f"{flag}: {error}") from error

    def resolved(self, config: TrainConfig) -> TrainConfig:
        """Return settings with the chunk of the backward pass: a later default changes no run."""
        if config.backward_chunk is not None:
            return config
        long = config.seq_len > ONE_PASS and not self.parted and has_constant_state(self.model)
        return config.replace(backward_chunk=CHUNK if long else 0)

    def _validating(self, done: int, total: int) -> None:
        """Report progress within a batch of the validation."""
        self.advanced(done, total, "validation")

    def _choose_chunk(self) -> None:
        """Settle the chunks of the backward pass."""
        seq_len = self.config.seq_len
        self._check_state(lambda: self.model)
        chunk = self.resolved(self.config).backward_chunk
        assert chunk is not None
        self.chunk = chunk if chunk < seq_len else 0
        if self.chunk and self.sharded and self.group.several:
            raise UsageError(
                "--shard: expected sequences of one pass, as the chunks of --backward-chunk need the whole "
                "model in each process. Leave --shard out, or choose --backward-chunk 0."
            )
        if self._longest_part > ONE_PASS and not self.chunk:
            self._check_memory()

    def replicate(self, model: Model) -> Replica:
        """Return the model as this process trains it: without DDP if gradients come from chunks or parts."""
        if self.parted:
            return PartedModel(model, self.group, self.neighbours)
        if self.group.several and self.chunk:
            return SummedModel(model, self.group)
        return super().replicate(model)

    @property
    def _longest_part(self) -> int:
        """The most tokens of a sequence that a process computes."""
        return -(-self.config.seq_len // self.group.context_size)

    def _check_memory(self) -> None:
        """Raise LongscanError if a long pass clearly exceeds the memory; attention may take still more."""
        tokens, available = self.config.batch_size * self._longest_part, available_memory()
        model = self.model.train()
        needs = footprint(
            model, lambda n: self._loss(model, torch.zeros(1, n + 1, dtype=torch.long))[0], tokens
        )
        if available is not None and self.config.device == "cpu" and needs.total > available:
            raise LongscanError(
                f"a step takes at least {needs}, and {memory_size(available)} are available: one pass "
                "retains what its backward pass needs of every token. Lower --seq-len or --batch-size, or "
                "choose a model whose state has a constant size, such as mamba, without --backward-chunk 0."
            )

    def _sample(self) -> str:
        """Return the sample prompt, continued; "" in other processes than the first."""
        config = self.config
        self.trainer.replica.gather()
        model = self.trainer.replica.plain
        if model is None:  # the first process does it
            return ""
        pieces = generate(
            cast(LanguageModel, model),
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
