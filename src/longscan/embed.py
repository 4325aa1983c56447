"""`longscan embed`: texts as vectors of length 1, whose products say how alike the texts are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from longscan.checks import check_texts, check_whole
from longscan.config import count
from longscan.encoders import LoadedBert, load_bert, read_pooling
from longscan.errors import LongscanError, UsageError
from longscan.examples import by_length
from longscan.files import atomic_file, read_json
from longscan.generate import use_threads
from longscan.pairs import read_lines
from longscan.text_input import read_stdin, tell_cut
from longscan.wordpiece import Framed

__all__ = ["command", "embed"]

MOST = 50  # texts of which every pair is printed


def embed(found: LoadedBert, texts: Sequence[str], rows: int = 32) -> Tensor:
    """Turn texts into vectors: the mean over their tokens, or [CLS] if the model says so, scaled to length 1.

    Args:
        found: a BERT, best one that was trained for it, such as all-MiniLM-L6-v2.
        texts: what is too long for the model is cut.
        rows: read at a time.

    Returns:
        (n_texts, d_model) float32: products are cosines.

    Raises:
        LongscanError: the model asks for another pooling.
    """
    check_texts("texts", texts)
    check_whole("rows", rows, 1)
    return _vectors(found, found.tokenizer.frame_batch(texts, room=_room(found)), rows)


@torch.inference_mode()
def _vectors(found: LoadedBert, framed: Sequence[Framed], rows: int = 32) -> Tensor:
    """Do it for texts in tokens."""
    model, tokenizer, first = found.model, found.tokenizer, read_pooling(found.directory) == "cls"
    vectors = torch.empty(len(framed), model.config.d_model)
    for batch in by_length(framed, rows):
        ids, types = (part.to(model.device) for part in tokenizer.collate([framed[n] for n in batch]))
        mask = (ids != tokenizer.pad_id)[:, :, None]  # (batch, seq_len, 1)
        hidden = model(ids, types).hidden
        pooled = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
        vectors[batch] = F.normalize(pooled, dim=-1).float().cpu()
    return vectors


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A BERT's directory or hub id.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without, the lines of stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read texts from this file, one a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the vectors as .npy, a row a text.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
) -> None:
    """Turn texts into vectors: print how alike they are, or write them with --out.

    Without --out and --json a line for each pair of texts: their cosine, then both, parted by tabs, the most
    alike first.

    Raises:
        UsageError: flags that contradict each other, or too few texts to compare.
        LongscanError: the model or the file can't be read, or a text is empty.
    """
    if texts and file:
        raise UsageError("give either texts or --file, not both.")
    if out is not None and out.suffix != ".npy":
        raise UsageError(f"--out: expected a name that ends in .npy, got {out}.")
    use_threads(threads)
    given = read_lines(file) if file else texts or read_stdin()
    for number, text in enumerate(given, 1):
        if not text.strip():
            raise LongscanError(f"text {number} is empty: leave it out.")
    if not (out or as_json) and not 2 <= len(given) <= MOST:
        raise UsageError(f"expected 2 to {MOST} texts to compare, got {len(given)}: see --out and --json.")
    if not given:
        raise UsageError("no text given.")
    found = load_bert(model, "none")
    framed = found.tokenizer.frame_batch(given, room=_room(found))
    tell_cut(framed)
    vectors = _vectors(found, framed)
    if out is not None:
        with atomic_file(out) as temporary, open(temporary, "wb") as stream:
            np.save(stream, vectors.numpy())
        typer.echo(f"{count(len(given), 'vector')} of {count(vectors.shape[1], 'number')} in {out}")
    elif as_json:
        for text, vector in zip(given, vectors.tolist(), strict=True):
            typer.echo(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
    else:
        alike = vectors @ vectors.T  # (n_texts, n_texts)
        for i, j in sorted(combinations(range(len(given)), 2), key=lambda pair: -alike[pair].item()):
            typer.echo(f"{alike[i, j].item():.4f}\t{given[i]}\t{given[j]}")


def _room(found: LoadedBert) -> int:
    """Return the most tokens of a text: what sentence-transformers or the tokenizer say, or all positions."""
    limits = found.directory / "sentence_bert_config.json"
    limit = read_json(limits).get("max_seq_length") if limits.is_file() else None
    tokenizer = found.directory / "tokenizer_config.json"
    if limit is None and limits.is_file() and tokenizer.is_file():
        limit = read_json(tokenizer).get("model_max_length")
    room = found.model.config.max_positions
    return min(room, limit) if isinstance(limit, int) and limit > 2 else room
