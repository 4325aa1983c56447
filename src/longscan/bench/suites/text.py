"""`longscan bench text`: bits per byte of a model on held-out text, beside an n-gram model and xz.

The predictions are the same on any machine, so everything runs once, and the seconds are a remark.
"""

from __future__ import annotations

import lzma
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longscan.bench.contenders.ngram import NGram
from longscan.bench.report import Ratio, Report, table
from longscan.checkpoints.load import load_with_tokenizer
from longscan.data.documents import Corpus, iter_pieces
from longscan.data.token_files import open_tokens, prepare
from longscan.evaluation.perplexity import Evaluation, evaluate
from longscan.models import LanguageModel
from longscan.models.common.summary import describe
from longscan.tokenizers.base import Tokenizer

__all__ = ["Progress", "load_and_run", "run"]

ORDER = 5
COUNTING = f"{ORDER}-gram, modified Kneser-Ney"
ALONE, AFTER = "xz -9e, held-out text alone", "xz -9e, after the training text"
XZ = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 * 2**20  # bytes, of this preset

Notify = Callable[[str], None]
Progress = Callable[[Evaluation, int], None]  # the evaluation so far, and the bytes of all text


def load_and_run(
    name: str, corpus: Corpus, notify: Notify = lambda line: None, progress: Progress | None = None
) -> Report:
    """Return the report of a model by its name.

    Args:
        name: a shipped model, a directory, or a hub id.
        corpus: the training text of the n-gram model, and the held-out files.
        notify: see `run`.
        progress: likewise.

    Raises:
        LongscanError: the text or the model cannot be read.
    """
    _ = corpus.sizes  # checks all text before the model is loaded
    model, tokenizer = load_with_tokenizer(name, None, False)
    notify(describe(name, model))
    return run(name, model, tokenizer, corpus, notify, progress)


def run(
    name: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    corpus: Corpus,
    notify: Notify = lambda line: None,
    progress: Progress | None = None,
    xz_window: int = XZ_WINDOW,
) -> Report:
    """Return a report of predictions of the held-out text of a corpus.

    Args:
        name: of the model in the table.
        model: the one to measure.
        tokenizer: its own, and that of the n-gram model.
        corpus: the training text of the n-gram model, and the held-out files.
        notify: receives a line before each contender's run.
        progress: called as the model's evaluation advances.
        xz_window: bytes that xz looks back on; it is not run on both texts if they are larger.

    Raises:
        LongscanError: the text cannot be read, or the model and the tokenizer do not fit.
    """
    report = Report(suite="text")
    notify(f"text: {COUNTING}")
    counted, n_tokens = _count(tokenizer, corpus)
    notify(f"text: {name}")
    pieces = iter_pieces(corpus.valid, separator=corpus.separator)
    measured = evaluate(
        model, tokenizer, pieces, progress=progress and (lambda now: progress(now, counted.bytes))
    )
    assert (measured.tokens, measured.bytes) == (counted.tokens, counted.bytes)
    for contender, result in ((name, measured), (COUNTING, counted)):
        _add(report, contender, result.bits_per_byte, result.perplexity, result.seconds)
    _compress(report, corpus, notify, xz_window)
    train = {"train_tokens": n_tokens, "train_bytes": sum(corpus.sizes[0])}
    for row in report.rows:
        row |= {"tokens": measured.tokens, "bytes": measured.bytes} | train
    _lay_out(report)
    return report


def _lay_out(report: Report) -> None:
    """Add the ratios, the table and the notes."""
    ours, *others = report.rows
    report.ratios = [
        Ratio(
            what=f"bits of the model, share of: {row['contender']}",
            measured=ours["bits_per_byte"] / row["bits_per_byte"],
            percent=True,
        )
        for row in others
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
    held_out = f"held-out text: {ours['tokens']:,} tokens, {ours['bytes']:,} bytes"
    report.tables.append(table(held_out, ["", "bits/byte", "perplexity per token", "seconds"], cells))
    report.notes += [
        f"Training text: {ours['train_tokens']:,} tokens, {ours['train_bytes']:,} bytes. The {ORDER}-gram "
        "has no other text and the model's tokens; both predict each document after an end of text, and not "
        "its end.",
        "One run each. Seconds: the model evaluates the held-out text; the n-gram counts and evaluates; xz "
        "compresses, for its second row the training text and then both.",
    ]


def _count(tokenizer: Tokenizer, corpus: Corpus) -> tuple[Evaluation, int]:
    """Return the evaluation of the n-gram model, and the number of its training tokens."""
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
    p = model.probabilities(test)[test != tokenizer.eos_id]
    result = Evaluation(
        nats=-float(np.log(p).sum()),
        tokens=len(p),
        bytes=files.valid.bytes,
        documents=files.valid.documents,
        seconds=time.perf_counter() - begin,
    )
    return result, int((train != tokenizer.eos_id).sum())


def _compress(report: Report, corpus: Corpus, notify: Notify, window: int) -> None:
    """Add the rows of xz on the held-out text, alone and after the training text."""
    texts = {"train": bytearray(), "valid": bytearray()}
    for split, piece in corpus.pieces():
        texts[split] += piece.text.encode()
    train, test = texts["train"], texts["valid"]
    notify(f"text: {ALONE}")
    size, seconds = _xz(test)
    _add(report, ALONE, 8 * size / len(test), None, seconds)
    if len(train) + len(test) <= window:
        notify(f"text: {AFTER}")
        before, first = _xz(train)
        after, second = _xz(train + test)
        _add(report, AFTER, 8 * (after - before) / len(test), None, first + second)
    else:
        report.notes.append(
            f"{AFTER}: not run, both together are larger than its window of {window / 2**20:g} MiB."
        )


def _xz(data: bytearray) -> tuple[int, float]:
    """Return the bytes of the data compressed by xz, and the seconds it took."""
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
