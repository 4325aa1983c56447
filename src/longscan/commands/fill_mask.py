"""`longscan fill-mask`: the tokens that a BERT predicts for each [MASK]."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from longscan.checkpoints.load import load_bert
from longscan.commands._input import read_stdin
from longscan.commands._options import BertArgument, JsonLines, Offline, Revision, Threads
from longscan.core.checks import check_whole
from longscan.core.runtime import use_threads
from longscan.inference.bert import fill_mask

__all__ = ["command"]


def command(
    model: BertArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXTS", help="Texts with [MASK]; default: the lines of stdin."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Predictions for each [MASK].")] = 5,
    as_json: JsonLines = False,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Predict the tokens behind [MASK], most likely first.

    Raises:
        UsageError: a text has no [MASK], or a flag has an invalid value.
        LongscanError: the model can't be read or has no masked-LM head, or a text is too long for it.
    """
    check_whole("--top-k", top_k, 1)
    use_threads(threads)
    loaded = load_bert(model, "pretraining", revision=revision, offline=offline)
    loaded.need("cls.predictions.", "predict masked tokens")
    for text in texts or read_stdin():
        predictions = fill_mask(loaded, text, top_k)
        if as_json:
            shown = {"text": text, "masks": [[asdict(each) for each in mask] for mask in predictions]}
            typer.echo(json.dumps(shown, ensure_ascii=False))
            continue
        typer.echo(text)
        for number, mask in enumerate(predictions, 1):
            if len(predictions) > 1:
                typer.echo(f"{loaded.tokenizer.mask_token} {number}")
            for prediction in mask:
                typer.echo(f"  {prediction.probability:6.1%}  {prediction.token}")
