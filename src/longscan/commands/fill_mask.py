"""`longscan fill-mask`: the words that a BERT would put where a text says [MASK]."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from longscan.checkpoints.load import load_bert
from longscan.commands._input import read_stdin
from longscan.core.runtime import use_threads
from longscan.errors import UsageError
from longscan.inference.bert import fill_mask

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A BERT's directory or hub id.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts with [MASK]; without, the lines of stdin.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Guesses for each [MASK].")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; as torch likes if not given.")] = None,
) -> None:
    """Guess the words that are hidden behind [MASK], likeliest first.

    Raises:
        UsageError: a text has no [MASK], or a flag has an impossible value.
        LongscanError: the model can't be read or has no masked-word head, or a text is too long for it.
    """
    if top_k < 1:
        raise UsageError(f"--top-k: expected 1 or more, got {top_k}.")
    use_threads(threads)
    found = load_bert(model, "pretraining")
    found.need("cls.predictions.", "guess words")
    for text in texts or read_stdin():
        guesses = fill_mask(found, text, top_k)
        if as_json:
            shown = {"text": text, "masks": [[asdict(guess) for guess in some] for some in guesses]}
            typer.echo(json.dumps(shown, ensure_ascii=False))
            continue
        typer.echo(text)
        for number, some in enumerate(guesses, 1):
            if len(guesses) > 1:
                typer.echo(f"{found.tokenizer.mask_token} {number}")
            for guess in some:
                typer.echo(f"  {guess.probability:6.1%}  {guess.token}")
