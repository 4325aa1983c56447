"""`longscan evaluate`: perplexity and bits per byte of a language model on text files."""

from __future__ import annotations

import functools
import json
import operator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._options import (
    Json,
    ModelArgument,
    Offline,
    PrecisionOption,
    Quiet,
    Revision,
    Threads,
    TokenizerName,
)
from longscan.core.config import count
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.data.documents import find_files, iter_pieces
from longscan.evaluation.perplexity import Evaluation, evaluate
from longscan.models.common.summary import describe

__all__ = ["command"]


def command(
    model: ModelArgument,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Text files or directories, as for train.")
    ],
    per_file: Annotated[bool, typer.Option("--per-file", help="Print one line per file.")] = False,
    separator: Annotated[
        str | None, typer.Option(help="String that separates the documents of a plain-text file.")
    ] = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity and bits per byte of a model on text files.

    Documents of any length stream through the model in constant memory; a model with a maximum length
    processes them in windows of that length. FILES are .txt, .md or .jsonl in UTF-8, also .gz or .xz; a file
    is a document, and so is each line of a .jsonl file. Each document is predicted from its first byte on,
    after an end-of-text token.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model or a file can't be read.
    """
    use_threads(threads)
    paths = find_files(files)
    groups = [[path] for path in paths] if per_file else [paths]
    total = _measure(groups, separator)
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name)
    if not quiet:
        typer.echo(describe(model, network) + "\n", err=True)
    table = per_file and not as_json
    if table:
        typer.echo(ROW.format("bits/byte", "perplexity", "tokens", "bytes", "file"))
    bar, parts = Bar(), list[Evaluation]()
    try:
        for group in groups:
            progress = partial(_show, bar, total, _sum(parts) if parts else None)
            pieces = iter_pieces(group, separator=separator)
            parts.append(evaluate(network, tokenizer, pieces, progress=progress))
            if table:
                bar.clear()
                typer.echo(_row(parts[-1], str(group[0])))
    finally:
        bar.clear()
    result = _sum(parts)
    if as_json:
        each = [{"file": str(path), **part.to_dict()} for path, part in zip(paths, parts, strict=False)]
        report = {"model": model, **result.to_dict(), **({"files": each} if per_file else {})}
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        typer.echo(_row(result, "total") if table else _sentence(result))


def _sum(parts: list[Evaluation]) -> Evaluation:
    """Return the evaluation of all files together, at least one."""
    return functools.reduce(operator.add, parts)


ROW = "{:>9}  {:>10}  {:>13}  {:>13}  {}"


def _row(part: Evaluation, name: str) -> str:
    """Return the numbers of a file in columns."""
    bits, perplexity = f"{part.bits_per_byte:.4f}", f"{part.perplexity:,.2f}"
    return ROW.format(bits, perplexity, f"{part.tokens:,}", f"{part.bytes:,}", name)


def _sentence(result: Evaluation) -> str:
    """Return the result in one line."""
    tokens, n_bytes = count(result.tokens, "token"), count(result.bytes, "byte")
    documents = count(result.documents, "document")
    return (
        f"{result.bits_per_byte:.4f} bits/byte · perplexity {result.perplexity:,.2f} per token · "
        f"{tokens} · {n_bytes} · {documents} · "
        f"{result.tokens_per_second:,.0f} tok/s"
    )


def _measure(groups: list[list[Path]], separator: str | None) -> int | None:
    """Return the bytes of all text, which also finds every error in it before the evaluation starts."""
    if not all(path.is_file() for group in groups for path in group):
        return None  # a pipe can be read only once
    pieces = (piece for group in groups for piece in iter_pieces(group, separator=separator))
    return sum(len(piece.text.encode()) for piece in pieces)


def _show(bar: Bar, total: int | None, done: Evaluation | None, now: Evaluation) -> None:
    """Show the progress of the evaluation; `done` are the files before this one."""
    now = now if done is None else done + now
    numbers = f"{now.bits_per_byte:.3f} bits/byte  {now.tokens_per_second:,.0f} tok/s"
    bar.show("evaluating", now.bytes, total, numbers)
