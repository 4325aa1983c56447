"""`longscan evaluate`: how well a model predicts a text, over whole documents of any length.

All documents are laid end to end and read in chunks. The state is carried from chunk to chunk and starts
afresh where a document begins, so the memory is that of one chunk, and the result that of reading every
document at once, however long it is and however short its neighbours are. A model that was made for texts of
a certain length reads a longer document in windows of that length, each afresh.

The first token of a document is predicted from the end-of-text token, as in training, so every byte of the
text is paid for; the end of a document is not predicted. A document of more than two million characters is
tokenized in pieces of one million, cut before a line break. Byte-level BPE gives the same tokens for the
pieces as for the whole; a tokenizer that joins characters across line breaks may differ by a token per piece.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from longscan.checkpoint import Precision
from longscan.checks import check_texts, check_whole
from longscan.config import count
from longscan.documents import Piece, find_files, iter_pieces
from longscan.errors import LongscanError
from longscan.generate import Bar, describe, load_with_tokenizer, use_threads
from longscan.models import LanguageModel, State
from longscan.sampling import check_fit
from longscan.tokenizer import Tokenizer

__all__ = ["Evaluation", "Source", "command", "evaluate", "follow"]

BLOCK = 4096  # tokens of a piece that are prepared at a time


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a text was predicted.

    Attributes:
        nats: -log p of all tokens together.
        tokens: how many were predicted.
        bytes: of the text in UTF-8.
        documents: how many.
        seconds: what it took.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The e to the mean loss per token: comparable only between models with the same tokenizer."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """What the text would take if the model compressed it: comparable between all models."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def tokens_per_second(self) -> float:
        """The speed."""
        return self.tokens / self.seconds

    def __add__(self, other: Evaluation) -> Evaluation:
        """Take two texts together."""
        return Evaluation(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            documents=self.documents + other.documents,
            seconds=self.seconds + other.seconds,
        )

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as JSON holds them."""
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
    chunk_size: int = 1024,
    progress: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """Measure how well a model predicts documents.

    Args:
        model: what is measured.
        tokenizer: the one it was trained with.
        documents: whole documents, or the pieces that `documents.iter_pieces` reads from files, which are
            never in memory as a whole.
        chunk_size: tokens read at a time; it sets speed and memory, not the result.
        progress: called after each chunk with the numbers so far; the bytes are an estimate.

    Returns:
        The numbers.

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
    """Let a model read documents.

    Args:
        model: what reads.
        blocks: see `Source.blocks`.
        chunk_size: tokens read at a time.

    Yields:
        hidden (1, tokens, d_model), to be turned into logits by `model.head`, and the targets (1, tokens).
    """
    device = model.device
    state: State | None = None
    current = 0  # the document that the state is in the middle of
    if model.max_positions is not None:
        blocks = _windows(blocks, model.max_positions)
    for chunk in _chunks(blocks, chunk_size):
        ids, targets, numbers = chunk.to(device).unsqueeze(1)  # (1, chunk_size) each
        first, last = int(numbers[0, 0]), int(numbers[0, -1])
        # the state does not know that a document ended exactly where the last chunk did
        before = state if first == current else None
        hidden, state = model.backbone(ids, before, numbers if first != last else None)
        current = last
        yield hidden, targets


class Source:
    """Turns documents into blocks of tokens, and counts.

    Args:
        tokenizer: that of the model.
        documents: see `evaluate`.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[str | Piece]) -> None:
        self._tokenizer, self._documents = tokenizer, documents
        self._tokens = self._bytes = self._complete = 0

    def blocks(self) -> Iterator[Tensor]:
        """Yield (3, tokens): what is read, what is to be predicted, the number of the document (from 1)."""
        start = list(self._tokenizer.start)
        number, previous = 1, start
        for document in self._documents:
            text, ends = (document, True) if isinstance(document, str) else document
            ids = self._tokenizer.encode(text)
            self._bytes += len(text.encode())
            if ids:
                self._tokens += len(previous) - 1 + len(ids)  # only the very first token is not predicted
                read = torch.tensor([*previous, *ids])  # (previous + tokens,)
                previous = ids[-1:]
                del ids
                for begin in range(0, len(read) - 1, BLOCK):
                    part = read[begin : begin + BLOCK + 1]  # (at most BLOCK + 1,)
                    yield torch.stack([part[:-1], part[1:], torch.full_like(part[1:], number)])
            if ends:
                number, previous = number + 1, start
                self._complete += 1

    def evaluation(self, nats: float, tokens: int, seconds: float) -> Evaluation:
        """Return the numbers after some of the tokens.

        Args:
            nats: of these tokens together.
            tokens: how many.
            seconds: what they took.
        """
        return Evaluation(
            nats=nats,
            tokens=tokens,
            bytes=-(-self._bytes * tokens // self._tokens),  # an estimate until all tokens are read
            documents=self._complete,
            seconds=seconds,
        )


def _windows(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Number the windows of `size` tokens in blocks (3, any) instead of the documents."""
    document = number = place = 0
    for block in blocks:
        if (found := int(block[2, 0])) != document:
            document, number, place = found, number + -(-place // size), 0
        windows = torch.arange(place, place + block.shape[1]) // size
        place += block.shape[1]
        yield torch.cat([block[:2], number + 1 + windows[None]])


def _chunks(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut blocks (3, any) anew into chunks (3, size); the last may be shorter."""
    waiting: list[Tensor] = []
    length = 0
    for block in blocks:
        waiting.append(block)
        length += block.shape[1]
        if length >= size:
            joined = torch.cat(waiting, 1)
            length %= size
            for begin in range(0, joined.shape[1] - length, size):
                yield joined[:, begin : begin + size]
            waiting = [joined[:, joined.shape[1] - length :].clone()]  # a view would keep all of it alive
    if length:
        yield torch.cat(waiting, 1)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model, a directory, or a hub id.")],
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Text files or folders, as train takes them.")
    ],
    per_file: Annotated[bool, typer.Option("--per-file", help="A line for each file.")] = False,
    separator: Annotated[
        str | None, typer.Option(help="What parts the documents of a plain-text file.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Hold the weights so; if not given, float32 or as quantised.")
    ] = None,
    tokenizer_name: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A tokenizer.json, a directory or a hub id, if MODEL has none."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
) -> None:
    """Perplexity and bits per byte of a model on text files.

    Documents of any length are read as a whole, in constant memory; by a model made for texts of a certain
    length, in windows of that length. FILES are .txt, .md or .jsonl in UTF-8,
    also .gz or .xz; a file is a document, and so is each line of a .jsonl file. Each is predicted from its
    first byte on, after an end of text.

    Raises:
        UsageError: a flag has an impossible value.
        LongscanError: the model or a file can't be read.
    """
    use_threads(threads)
    paths = find_files(files)
    groups = [[path] for path in paths] if per_file else [paths]
    total = _measure(groups, separator)
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name)
    if not quiet:
        typer.echo(describe(model, network) + "\n", err=True)
    bar, parts = Bar(), []
    done: Evaluation | None = None
    if per_file and not as_json:
        typer.echo(ROW.format("bits/byte", "perplexity", "tokens", "bytes", "file"))
    try:
        for group in groups:
            part = evaluate(
                network,
                tokenizer,
                iter_pieces(group, separator=separator),
                progress=partial(_show, bar, total, done),
            )
            parts.append(part)
            done = part if done is None else done + part
            if per_file and not as_json:
                bar.clear()
                typer.echo(_row(part, str(group[0])))
    finally:
        bar.clear()
    assert done is not None  # find_files returns at least one
    if as_json:
        files_report = [
            {"file": str(path), **part.to_dict()} for path, part in zip(paths, parts, strict=False)
        ]
        report = {"model": model, **done.to_dict(), **({"files": files_report} if per_file else {})}
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    elif per_file:
        typer.echo(_row(done, "total"))
    else:
        typer.echo(_sentence(done))


ROW = "{:>9}  {:>10}  {:>13}  {:>13}  {}"


def _row(part: Evaluation, name: str) -> str:
    """Lay the numbers of a file out in columns."""
    bits, perplexity = f"{part.bits_per_byte:.4f}", f"{part.perplexity:,.2f}"
    return ROW.format(bits, perplexity, f"{part.tokens:,}", f"{part.bytes:,}", name)


def _sentence(result: Evaluation) -> str:
    """Say the result in a line."""
    tokens, n_bytes = count(result.tokens, "token"), count(result.bytes, "byte")
    documents = count(result.documents, "document")
    return (
        f"{result.bits_per_byte:.4f} bits/byte · perplexity {result.perplexity:,.2f} per token · "
        f"{tokens} · {n_bytes} · {documents} · "
        f"{result.tokens_per_second:,.0f} tok/s"
    )


def _measure(groups: list[list[Path]], separator: str | None) -> int | None:
    """Read all text once: that finds every error in it before long work begins, and counts the bytes."""
    if not all(path.is_file() for group in groups for path in group):
        return None  # a pipe can be read only once
    pieces = (piece for group in groups for piece in iter_pieces(group, separator=separator))
    return sum(len(piece.text.encode()) for piece in pieces)


def _show(bar: Bar, total: int | None, done: Evaluation | None, now: Evaluation) -> None:
    """Show how far the evaluation is; `done` are the files before this one."""
    now = now if done is None else done + now
    words = f"{now.bits_per_byte:.3f} bits/byte  {now.tokens_per_second:,.0f} tok/s"
    bar.show("evaluating", now.bytes, total, words)
