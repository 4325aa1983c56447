"""`longscan bench quality`: what the precisions of `longscan quantize` cost, on held-out text.

The same chunks go through the model once at every precision, side by side. Compared with float32: bits per
byte; the mean Kullback-Leibler divergence of the predictions from those of float32; and how often both have
the same most probable token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from longscan.bench.report import Ratio, Report, table
from longscan.checkpoints.load import Precision, load, load_with_tokenizer
from longscan.data.documents import find_files, iter_pieces
from longscan.errors import LongscanError
from longscan.evaluation.perplexity import Evaluation, Source, follow
from longscan.inference.sampling import check_fit
from longscan.models import LanguageModel
from longscan.models.common.quantization import kind_of
from longscan.tokenizers.base import Tokenizer

__all__ = ["Progress", "load_and_run", "run"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)  # float32 first: what the others are compared with
CHUNK = 1024  # tokens processed at a time
MAX_LOGITS = 2**20  # compared at a time, in float64: differences of 1e-7 count

Progress = Callable[[Evaluation, int], None]  # the evaluation so far, and the bytes of all text


@dataclass
class _Score:
    """The sums of one precision so far."""

    nats: float = 0.0
    divergence: float = 0.0  # in nats, of all tokens together
    agreed: int = 0


def load_and_run(name: str, test: Sequence[Path], separator: str, progress: Progress | None = None) -> Report:
    """Return the report of a model by its name, at every precision.

    Args:
        name: a shipped model, a directory, or a hub id.
        test: files and folders to predict.
        separator: between the documents of a text file.
        progress: called as the evaluation advances.

    Raises:
        LongscanError: the text or the model cannot be read, or the model is quantised already.
    """
    paths = find_files(test)
    n_bytes = sum(len(piece.text.encode()) for piece in iter_pieces(paths, separator=separator))
    model, tokenizer = load_with_tokenizer(name, None, False)
    if kind := kind_of(model):
        raise LongscanError(
            f"{name} is quantised already ({kind}), and what that cost can't be measured without the "
            "original: give --model the model that was quantised."
        )
    models = {"float32": model} | {p: load(name, precision=p)[0] for p in PRECISIONS[1:]}
    source = Source(tokenizer, iter_pieces(paths, separator=separator))
    return run(models, tokenizer, source, progress and (lambda now: progress(now, n_bytes)))


@torch.no_grad()
def run(
    models: Mapping[str, LanguageModel],
    tokenizer: Tokenizer,
    source: Source,
    progress: Callable[[Evaluation], None] | None = None,
) -> Report:
    """Return a report of precisions of a model, compared with the first of them.

    Args:
        models: by their names in the table.
        tokenizer: theirs.
        source: the text.
        progress: called after each chunk with the evaluation of the first model so far.

    Raises:
        LongscanError: the tokenizer is not the models', there is no text, or a loss is not finite.
    """
    names, scores, tokens = list(models), [_Score() for _ in models], 0
    for model in models.values():
        check_fit(model, tokenizer)
    begin = time.perf_counter()
    blocks_of = [
        follow(model, blocks, CHUNK)
        for model, blocks in zip(models.values(), tee(source.blocks(), len(models)), strict=True)
    ]
    for chunk in zip(*blocks_of, strict=True):
        targets = chunk[0][1].flatten()  # (tokens,)
        rows = max(1, MAX_LOGITS // tokenizer.vocab_size)
        pieces = zip(*(hidden.flatten(0, 1).split(rows) for hidden, _ in chunk), strict=True)
        for hidden, some in zip(pieces, targets.split(rows), strict=True):
            _compare(list(models.values()), hidden, some, scores)
        tokens += len(targets)
        if progress:
            progress(source.evaluation(scores[0].nats, tokens, time.perf_counter() - begin))
    if not tokens:
        raise LongscanError("no text to evaluate: expected at least one token.")
    if lost := [name for name, score in zip(names, scores, strict=True) if not math.isfinite(score.nats)]:
        raise LongscanError(f"the loss of {', '.join(lost)} is not finite: the model's weights are damaged.")
    return _report(models, scores, source.evaluation(scores[0].nats, tokens, time.perf_counter() - begin))


def _compare(
    models: Sequence[LanguageModel], hidden: Sequence[Tensor], targets: Tensor, scores: Sequence[_Score]
) -> None:
    """Add a few tokens to the scores: hidden (rows, d_model) of each model, targets (rows,)."""
    truth = torch.empty(0)
    for model, h, score in zip(models, hidden, scores, strict=True):
        logits = model.head(h)[:, : model.config.vocab_size].double()
        logs = logits.log_softmax(1)  # (rows, vocab_size)
        if score is scores[0]:
            truth = logs
        score.nats -= float(logs.gather(1, targets.unsqueeze(1)).sum())
        score.divergence += float((truth.exp() * (truth - logs)).sum())
        score.agreed += int((truth.argmax(1) == logs.argmax(1)).sum())


def _report(models: Mapping[str, LanguageModel], scores: Sequence[_Score], total: Evaluation) -> Report:
    """Return rows, table, ratios and notes."""
    report = Report(suite="quality")
    cells: list[list[str]] = []
    size, tokens = math.log(2) * total.bytes, total.tokens
    for (name, model), score in zip(models.items(), scores, strict=True):
        n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        row = {
            "case": "quality",
            "contender": name,
            "bits_per_byte": score.nats / size,
            "kl_nats_per_token": max(0.0, score.divergence / tokens),  # a rounding below zero is zero
            "same_top_token": score.agreed / tokens,
            "weight_bytes": n_bytes,
            "bits_per_weight": 8 * n_bytes / model.num_parameters(),
            "tokens": tokens,
            "bytes": total.bytes,
        }
        more = score.nats / scores[0].nats - 1
        report.rows.append(row)
        cells.append(
            [
                name,
                f"{row['bits_per_byte']:.4f}",
                f"{100 * more:+.3f} %" if cells else "",
                f"{row['kl_nats_per_token']:.6f}",
                f"{100 * score.agreed / tokens:.2f} %",
                f"{n_bytes / 1e6:,.2f}",
                f"{row['bits_per_weight']:.2f}",
            ]
        )
        if name != next(iter(models)):
            what = f"bytes of {name}, share of float32"
            report.ratios.append(
                Ratio(what=what, measured=n_bytes / report.rows[0]["weight_bytes"], percent=True)
            )
    headings = ["bits/byte", "more", "mean KL, nats", "same top token", "weights, MB", "bits per weight"]
    title = f"held-out text: {tokens:,} tokens, {total.bytes:,} bytes"
    report.tables.append(table(title, ["", *headings], cells))
    report.notes.append(
        "KL: of the predictions from those of float32, per token. Weights: all tensors in memory, those that "
        f"stay float32 included. All precisions see the same chunks; together {total.seconds:,.0f} s."
    )
    return report
