"""`longscan fill-mask`: the words that a BERT would put where a text says [MASK]."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from longscan.checks import check_text, check_whole
from longscan.encoders import LoadedBert, load_bert
from longscan.errors import LongscanError, UsageError
from longscan.generate import use_threads
from longscan.text_input import read_stdin

__all__ = ["Guess", "command", "fill_mask"]


@dataclass(frozen=True)
class Guess:
    """An entry of the vocabulary, such as "cat" or "##s", and how likely it is at a place."""

    token: str
    probability: float


@torch.inference_mode()
def fill_mask(found: LoadedBert, text: str, top_k: int = 5) -> list[list[Guess]]:
    """Guess the hidden words of a text.

    Args:
        found: a BERT with its masked-word head.
        text: with [MASK] once or more; each is guessed by itself.
        top_k: guesses for each.

    Returns:
        The likeliest first, for each [MASK] in order.

    Raises:
        UsageError: there is no [MASK] in the text.
        LongscanError: the text is longer than the model's positions.
    """
    check_text("text", text)
    check_whole("top_k", top_k, 1)
    found.need("cls.predictions.", "guess words")
    model, tokenizer = found.model, found.tokenizer
    words = tokenizer.encode_masked(text)
    if tokenizer.mask_id not in words:
        raise UsageError(
            f"no {tokenizer.mask_token} in the text: put it where a word is to be found, "
            f'as in "the {tokenizer.mask_token} sat on the mat".'
        )
    framed = tokenizer.frame(words, room=model.config.max_positions)
    if framed.cut:
        raise LongscanError(
            f"the text has {len(framed.ids) + framed.cut:,} tokens, the model {model.config.max_positions:,} "
            "positions: give less of it."
        )
    ids = torch.tensor([framed.ids], device=model.device)
    places = ids[0] == tokenizer.mask_id
    logits = model.words(model(ids).hidden[0, places])[:, : tokenizer.vocab_size]  # (n_masks, vocab_size)
    best = logits.softmax(-1).topk(min(top_k, tokenizer.vocab_size))
    return [
        [Guess(tokenizer.token(token), share) for token, share in zip(tokens, shares, strict=True)]
        for tokens, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


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
