"""Perplexity and bits per byte of documents of any length, streamed in constant memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.core.checks import check_texts, check_whole
from longscan.data.documents import Piece
from longscan.errors import LongscanError
from longscan.inference.prefill import CHUNK
from longscan.inference.sampling import check_fit
from longscan.models import LanguageModel, State
from longscan.tokenizers.base import Tokenizer

__all__ = ["Evaluation", "Source", "evaluate", "follow"]


BLOCK = 4096  # tokens of a piece per block


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a text was predicted.

    Attributes:
        nats: the sum of -log p over all tokens.
        tokens: the number predicted.
        bytes: of the text in UTF-8.
        documents: their number.
        seconds: the duration.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the mean cross-entropy: comparable only between models of the same tokenizer."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The cross-entropy per byte of text, in bits: comparable between all models."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def tokens_per_second(self) -> float:
        """The throughput."""
        return self.tokens / self.seconds

    def __add__(self, other: Evaluation) -> Evaluation:
        """Return the evaluation of two texts together."""
        return Evaluation(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            documents=self.documents + other.documents,
            seconds=self.seconds + other.seconds,
        )

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as JSON values."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str | Piece],
    *,
    chunk_size: int = 2 * CHUNK,
    progress: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """Return how well a model predicts documents.

    Args:
        model: any language model.
        tokenizer: the one it was trained with.
        documents: whole documents, or the pieces of files that `documents.iter_pieces` yields, which are
            never in memory as a whole.
        chunk_size: tokens per pass; it affects speed and memory, the result only by rounding. No state is
            stored, so the default can be larger and faster than a prefill chunk.
        progress: called after each chunk with the numbers so far; the bytes are an estimate.

    Raises:
        LongscanError: the tokenizer is not the model's, there is no text, or the loss is not finite.
    """
    check_fit(model, tokenizer)
    check_texts("documents", documents)
    check_whole("chunk_size", chunk_size, 1)
    begin, nats, tokens = time.perf_counter(), 0.0, 0
    source = Source(tokenizer, documents)
    for hidden, targets in follow(model, source.blocks(), chunk_size):
        nats += float(model.token_losses(hidden, targets).double().sum())
        tokens += targets.shape[1]
        if not math.isfinite(nats):
            raise LongscanError(
                f"the loss is not finite after {tokens:,} tokens: the model's weights are damaged, "
                "or their type is too narrow (load it in float32)."
            )
        if progress:
            progress(source.evaluation(nats, tokens, time.perf_counter() - begin))
    if not tokens:
        raise LongscanError("no text to evaluate: expected at least one token.")
    return source.evaluation(nats, tokens, time.perf_counter() - begin)


@torch.no_grad()
def follow(
    model: LanguageModel, blocks: Iterable[Tensor], chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the hidden states of documents and the targets.

    Args:
        model: any language model.
        blocks: see `Source.blocks`.
        chunk_size: tokens per pass.

    Yields:
        hidden (1, tokens, d_model), the input of `model.head`, and the targets (1, tokens).
    """
    device = model.device
    state: State | None = None
    current = 0  # the document that the state belongs to
    if model.max_positions is not None:
        blocks = _windows(blocks, model.max_positions)
    for chunk in _chunks(blocks, chunk_size):
        ids, targets, numbers = chunk.to(device).unsqueeze(1)  # (1, chunk_size) each
        first, last = int(numbers[0, 0]), int(numbers[0, -1])
        # numbers alone do not show that a document ended exactly where the last chunk did
        before = state if first == current else None
        hidden, state = model.backbone(ids, before, numbers if first != last else None)
        current = last
        yield hidden, targets


class Source:
    """Turns documents into blocks of tokens, and counts them.

    Args:
        tokenizer: that of the model.
        documents: see `evaluate`.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[str | Piece]) -> None:
        self._tokenizer, self._documents = tokenizer, documents
        self._tokens = self._bytes = self._complete = 0

    def blocks(self) -> Iterator[Tensor]:
        """Yield (3, tokens): the input ids, the targets, and the number of the document (from 1)."""
        start = list(self._tokenizer.start)
        number, previous = 1, start
        for document in self._documents:
            text, ends = (document, True) if isinstance(document, str) else document
            ids = self._tokenizer.encode(text)
            self._bytes += len(text.encode())
            if ids:
                self._tokens += len(previous) - 1 + len(ids)  # all are predicted except the very first
                tokens = torch.tensor([*previous, *ids])  # (previous + tokens,)
                previous = ids[-1:]
                del ids
                for begin in range(0, len(tokens) - 1, BLOCK):
                    part = tokens[begin : begin + BLOCK + 1]  # (at most BLOCK + 1,)
                    yield torch.stack([part[:-1], part[1:], torch.full_like(part[1:], number)])
            if ends:
                number, previous = number + 1, start
                self._complete += 1

    def evaluation(self, nats: float, tokens: int, seconds: float) -> Evaluation:
        """Return the evaluation of the tokens so far.

        Args:
            nats: their sum of -log p.
            tokens: their number.
            seconds: the duration.
        """
        return Evaluation(
            nats=nats,
            tokens=tokens,
            bytes=-(-self._bytes * tokens // self._tokens),  # an estimate until the last token
            documents=self._complete,
            seconds=seconds,
        )


def _windows(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Number the windows of `size` tokens in blocks (3, any) instead of the documents."""
    document = number = position = 0
    for block in blocks:
        if (current := int(block[2, 0])) != document:
            document, number, position = current, number + -(-position // size), 0
        windows = torch.arange(position, position + block.shape[1]) // size
        position += block.shape[1]
        yield torch.cat([block[:2], number + 1 + windows[None]])


def _chunks(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield blocks (3, any) recut into chunks (3, size); the last may be shorter."""
    buffer: list[Tensor] = []
    length = 0
    for block in blocks:
        buffer.append(block)
        length += block.shape[1]
        if length >= size:
            joined = torch.cat(buffer, 1)
            length %= size
            for begin in range(0, joined.shape[1] - length, size):
                yield joined[:, begin : begin + size]
            buffer = [joined[:, joined.shape[1] - length :].clone()]  # a view would retain all of its memory
    if length:
        yield torch.cat(buffer, 1)
