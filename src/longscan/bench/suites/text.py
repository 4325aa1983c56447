"""`longscan bench text`: how well a model knows held-out text, beside what counting and compressing do.

Nothing races here: a prediction is as good on any machine, so everyone runs once, and seconds are a remark.
"""

from __future__ import annotations

import json
import lzma
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer

from longscan.bench.contenders.ngram import NGram
from longscan.bench.machine import machine, versions
from longscan.bench.report import Ratio, Report, table
from longscan.checkpoints.load import load_with_tokenizer
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.data.documents import Corpus, iter_pieces
from longscan.data.token_files import open_tokens, prepare
from longscan.evaluation.perplexity import Evaluation, evaluate
from longscan.models import LanguageModel
from longscan.models.common.summary import describe
from longscan.tokenizers.base import Tokenizer

__all__ = ["run", "show"]

ORDER = 5
COUNTING = f"{ORDER}-gram, modified Kneser-Ney"
ALONE, AFTER = "xz -9e, held-out text alone", "xz -9e, after the training text"
XZ = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 * 2**20  # bytes that this preset looks back

Tell = Callable[[str], None]


def show(
    model: str, train: list[Path], test: list[Path], separator: str, as_json: bool, threads: int | None
) -> None:
    """Measure and print.

    Args:
        model: a shipped model, a directory, or a hub id.
        train: files and folders to count in.
        test: those to predict.
        separator: what stands between the documents of a text file.
        as_json: whether to print one JSON object instead of a table.
        threads: for the model; torch's choice if None.

    Raises:
        LongscanError: the text or the model cannot be read.
    """
    use_threads(threads)
    corpus = Corpus(train, test, separator=separator)
    _ = corpus.sizes  # finds every error in the text before long work begins
    network, tokenizer = load_with_tokenizer(model, None, False)
    typer.echo(describe(model, network), err=True)
    report = run(model, network, tokenizer, corpus, lambda line: typer.echo(line, err=True))
    about = {"machine": machine(torch.get_num_threads()), "versions": versions(), "model": model}
    if as_json:
        typer.echo(json.dumps(about | {"suites": [report.as_dict()]}, indent=2, ensure_ascii=False))
    else:
        typer.echo(report.text(shutil.get_terminal_size((120, 24)).columns))


def run(name: str, model: LanguageModel, tokenizer: Tokenizer, corpus: Corpus, tell: Tell) -> Report:
    """Let everyone predict the text that a corpus holds out.

    Args:
        name: what the table calls the model.
        model: what is measured.
        tokenizer: its own, and that of the n-gram.
        corpus: the text to count in, and the files held out.
        tell: receives a line before each contender's run.

    Returns:
        The report.

    Raises:
        LongscanError: the text cannot be read, or the model and the tokenizer do not fit.
    """
    report, n_bytes = Report(suite="text"), sum(corpus.sizes[0])
    tell(f"text: {COUNTING}")
    counted, n_tokens = _count(tokenizer, corpus)
    tell(f"text: {name}")
    bar = Bar()
    try:
        measured = evaluate(
            model,
            tokenizer,
            iter_pieces(corpus.valid, separator=corpus.separator),
            progress=lambda now: bar.show("evaluating", now.bytes, counted.bytes),
        )
    finally:
        bar.clear()
    assert (measured.tokens, measured.bytes) == (counted.tokens, counted.bytes)
    for contender, result in ((name, measured), (COUNTING, counted)):
        _add(report, contender, result.bits_per_byte, result.perplexity, result.seconds)
    _compress(report, corpus, tell)
    bits = {row["contender"]: row["bits_per_byte"] for row in report.rows}
    report.ratios = [
        Ratio(what=f"bits of the model, share of: {other}", measured=bits[name] / other_bits, percent=True)
        for other, other_bits in list(bits.items())[1:]
    ]
    cells = [
        [
            row["contender"],
            f"{row['bits_per_byte']:.4f}",
            f"{row['perplexity']:,.2f}" if row["perplexity"] else "–",
            f"{row['seconds']:,.1f}",
        ]
        for row in report.rows
    ]
    held_out = f"held-out text: {measured.tokens:,} tokens, {measured.bytes:,} bytes"
    report.tables.append(table(held_out, ["", "bits/byte", "perplexity per token", "seconds"], cells))
    report.notes += [
        f"Training text: {n_tokens:,} tokens, {n_bytes:,} bytes. The {ORDER}-gram knows no other text and "
        "has the model's tokens; both predict each document after an end of text, and not its end.",
        "One run each. Seconds: the model reads the held-out text; the n-gram counts and reads; xz "
        "compresses, for its second row the training text and then both.",
    ]
    sizes = {"tokens": measured.tokens, "bytes": measured.bytes}
    for row in report.rows:
        row |= sizes | {"train_tokens": n_tokens, "train_bytes": n_bytes}
    return report


def _count(tokenizer: Tokenizer, corpus: Corpus) -> tuple[Evaluation, int]:
    """Train and measure the n-gram; return also how many tokens it was trained on."""
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(
            corpus.train,
            tokenizer,
            Path(folder) / "tokens",
            valid_paths=corpus.valid,
            separator=corpus.separator,
        )
        assert files.valid
        train, test = (np.array(open_tokens(split.path)) for split in (files.train, files.valid))
    begin = time.perf_counter()
    model = NGram(train, tokenizer.vocab_size, tokenizer.eos_id, ORDER)
    found = model.probabilities(test)[test != tokenizer.eos_id]
    result = Evaluation(
        nats=-float(np.log(found).sum()),
        tokens=len(found),
        bytes=files.valid.bytes,
        documents=files.valid.documents,
        seconds=time.perf_counter() - begin,
    )
    return result, int((train != tokenizer.eos_id).sum())


def _compress(report: Report, corpus: Corpus, tell: Tell) -> None:
    """Add what xz makes of the held-out text, alone and as the end of all text."""
    texts = {"train": bytearray(), "valid": bytearray()}
    for split, piece in corpus.pieces():
        texts[split] += piece.text.encode()
    train, test = texts["train"], texts["valid"]
    tell(f"text: {ALONE}")
    size, seconds = _xz(test)
    _add(report, ALONE, 8 * size / len(test), None, seconds)
    if len(train) + len(test) <= XZ_WINDOW:
        tell(f"text: {AFTER}")
        before, first = _xz(train)
        after, second = _xz(train + test)
        _add(report, AFTER, 8 * (after - before) / len(test), None, first + second)
    else:
        report.notes.append(f"{AFTER}: not run, both are together larger than its window of 64 MiB.")


def _xz(data: bytearray) -> tuple[int, float]:
    """Return how small xz makes the data, and the seconds it took."""
    begin = time.perf_counter()
    return len(lzma.compress(data, preset=XZ)), time.perf_counter() - begin


def _add(report: Report, contender: str, bits: float, perplexity: float | None, seconds: float) -> None:
    """Add a row; JSON has no infinity."""
    known = perplexity is not None and math.isfinite(perplexity)
    report.rows.append(
        {
            "case": "text",
            "contender": contender,
            "bits_per_byte": bits,
            "perplexity": perplexity if known else None,
            "seconds": seconds,
        }
    )
