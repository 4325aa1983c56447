"""`longscan evaluate`: perplexity and bits per byte of a language model on text files."""

from __future__ import annotations

import functools
import json
import operator
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._options import (
    Adapter,
    Json,
    ModelArgument,
    Offline,
    PrecisionOption,
    Quiet,
    Revision,
    Threads,
    TokenizerName,
)
from longscan.core.checks import check_whole
from longscan.core.config import count
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.data.documents import find_files, iter_pieces
from longscan.errors import UsageError
from longscan.evaluation.likelihood import PairResult, compare_pairs, read_pairs
from longscan.evaluation.lm_eval import run_tasks
from longscan.evaluation.perplexity import Evaluation, evaluate
from longscan.models.common.summary import describe

__all__ = ["command"]


def command(
    model: ModelArgument,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILES]", help="Text files or directories, as for train."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead, as A,B; or .yaml files."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    include: Annotated[Path | None, typer.Option(help="Directory with more tasks.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help='Minimal pairs instead, as BLiMP has them: .jsonl with "good" and "bad".'),
    ] = None,
    per_file: Annotated[bool, typer.Option("--per-file", help="Print one line per file.")] = False,
    separator: Annotated[
        str | None, typer.Option(help="String that separates the documents of a plain-text file.")
    ] = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    adapter: Adapter = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity and bits per byte of a model on text files, or its results in tasks.

    Documents of any length stream through the model in constant memory; a model with a maximum length
    processes them in windows of that length. FILES are .txt, .md or .jsonl in UTF-8, also .gz or .xz; a file
    is a document, and so is each line of a .jsonl file. Each document is predicted from its first byte on,
    after an end-of-text token.

    --tasks runs those of lm-evaluation-harness; a context is prefilled once for all of its answers. --pairs
    counts how often the good sentence of a pair is more likely than the bad one.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model or a file can't be read.
    """
    use_threads(threads)
    if sum(map(bool, (files, tasks, pairs))) != 1:
        raise UsageError("expected FILES, --tasks or --pairs, one of them.")
    if (shots is not None or limit is not None or include is not None) and not tasks:
        raise UsageError("--shots, --limit and --include are for --tasks.")
    if (per_file or separator is not None) and not files:
        raise UsageError("--per-file and --separator are for FILES.")
    for flag, number, least in (("--shots", shots, 0), ("--limit", limit, 1)):
        if number is not None:
            check_whole(flag, number, least)
    sentences = read_pairs(pairs) if pairs else []  # before the model, which takes longer
    if tasks or sentences:
        network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name, adapter)
        if not quiet:
            typer.echo(describe(model, network) + "\n", err=True)
        bar = Bar()
        try:
            if tasks:
                if not sys.stderr.isatty():
                    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars
                names = [name.strip() for name in tasks.split(",") if name.strip()]
                chosen: dict[str, Any] = {"shots": shots, "limit": limit, "include": include}
                shown = _task_table(run_tasks(network, tokenizer, names, show=bar.show, **chosen), as_json)
            else:
                kinds = list(compare_pairs(network, tokenizer, sentences, partial(bar.show, "pairs")))
                shown = _pair_table(kinds, as_json)
        finally:
            bar.clear()
        typer.echo(shown)
        return
    assert files
    paths = find_files(files)
    groups = [[path] for path in paths] if per_file else [paths]
    total = _measure(groups, separator)
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name, adapter)
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


def _task_table(results: dict[str, Any], as_json: bool) -> str:
    """Return the results of tasks, one metric a line."""
    if as_json:
        return json.dumps(results["results"], ensure_ascii=False, indent=2, default=str)
    lines = ["task                            metric              value   error   questions"]
    for task, metrics in results["results"].items():
        counted = results.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                shown = f"{error:.4f}" if isinstance(error, float) else "–"
                lines.append(f"{task[:30]:<30}  {name[:16]:<16}  {value:>7.4f} {shown:>7}  {counted:>10}")
    return "\n".join(lines)


def _pair_table(results: list[PairResult], as_json: bool) -> str:
    """Return the results of pairs, one kind a line."""
    if as_json:
        found = {one.kind: {"accuracy": one.accuracy, "pairs": one.total} for one in results}
        return json.dumps(found, ensure_ascii=False, indent=2)
    return "\n".join(
        f"{one.kind[:40]:<40}  {100 * one.accuracy:>6.1f} %  {one.right:,} of {one.total:,}"
        for one in results
    )


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
