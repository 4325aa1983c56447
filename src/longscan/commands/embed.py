"""`longscan embed`: texts as vectors of length 1, whose dot products are cosine similarities."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from longscan.checkpoints.load import load_bert
from longscan.commands._input import read_stdin, warn_of_cut
from longscan.commands._options import BertArgument, JsonLines, Offline, Revision, Threads
from longscan.core.config import count
from longscan.core.files import atomic_file
from longscan.core.runtime import use_threads
from longscan.data.sentence_pairs import read_lines
from longscan.errors import LongscanError, UsageError
from longscan.inference.bert import MAX_PAIRED, capacity, sentence_vectors

__all__ = ["command"]


def command(
    model: BertArgument,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXTS", help="Texts; default: the lines of stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read texts from this file, one per line.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the vectors to this .npy file, one row per text.")
    ] = None,
    as_json: JsonLines = False,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Turn texts into vectors: print their cosine similarities, or write the vectors with --out.

    Without --out and --json, prints one line for each pair of texts: their cosine similarity and both texts,
    separated by tabs, the most similar pair first.

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
    if not (out or as_json) and not 2 <= len(given) <= MAX_PAIRED:
        raise UsageError(
            f"expected 2 to {MAX_PAIRED} texts to compare, got {len(given)}: see --out and --json."
        )
    if not given:
        raise UsageError("no text given.")
    loaded = load_bert(model, "none", revision=revision, offline=offline)
    framed = loaded.tokenizer.frame_batch(given, max_length=capacity(loaded))
    warn_of_cut(framed)
    vectors = sentence_vectors(loaded, framed)
    if out is not None:
        with atomic_file(out) as temporary, open(temporary, "wb") as stream:
            np.save(stream, vectors.numpy())
        typer.echo(f"{count(len(given), 'vector')} of {count(vectors.shape[1], 'number')} in {out}")
    elif as_json:
        for text, vector in zip(given, vectors.tolist(), strict=True):
            typer.echo(json.dumps({"text": text, "vector": vector}, ensure_ascii=False))
    else:
        similarity = vectors @ vectors.T  # (n_texts, n_texts)
        for i, j in sorted(combinations(range(len(given)), 2), key=lambda pair: -similarity[pair].item()):
            typer.echo(f"{similarity[i, j].item():.4f}\t{given[i]}\t{given[j]}")
