"""`longscan chat`: a conversation in the terminal."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._adapters import NONE, Adapters, load_adapters
from longscan.commands._input import sampling_config
from longscan.commands._options import (
    MinP,
    Offline,
    PrecisionOption,
    Quiet,
    RepetitionPenalty,
    Revision,
    SamplingSeed,
    Temperature,
    Threads,
    TokenizerName,
    TopK,
    TopP,
)
from longscan.commands._talk import Talk, text_or_file
from longscan.commands._variants import Variant, Variants
from longscan.core.files import utf8
from longscan.core.runtime import use_threads
from longscan.errors import LongscanError, UsageError
from longscan.inference.chat import Conversation
from longscan.models.common.summary import describe
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, find_template

__all__ = ["command"]

SUGGESTION = (
    "This model continues texts and was not trained to answer. To talk to one that was: "
    "longscan chat --model tiiuae/Falcon-H1-Tiny-90M-Instruct, or ibm-granite/granite-4.0-h-350m"
)


def command(
    model: Annotated[
        str, typer.Option(help="A shipped model, a directory, a .gguf file, or a hub id.")
    ] = "longscan-tiny-en",
    system: Annotated[str | None, typer.Option(help="System message; @FILE reads it from a file.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Chat template: plain, chatml, one of the model's, or a .jinja file; default: the model's."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Continue the conversation of this file, and save each turn there."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: SamplingSeed = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    adapter: Adapters = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a language model.

    A turn prefills only what is new: the state holds the rest. Text from a pipe is one message, and its
    answer is all that is printed. The first --adapter answers; /adapter switches to another one.

    Raises:
        UsageError: a flag has an invalid value, or the chat template rejects the messages.
        LongscanError: the model or a file can't be read.
    """
    config = sampling_config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=secrets.randbelow(10**6) if seed is None else seed,
    )
    use_threads(threads)
    instruction = _system(system)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise LongscanError(f"{file}: expected the name of a file, in a directory that exists.")
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name)
    adapters = load_adapters(network, tokenizer, adapter, NONE)
    variants = {
        name: Variant(*pair, find_template(pair[1], template))
        for name, pair in {NONE: (network, tokenizer), **adapters}.items()
    }
    name = next(iter(adapters), NONE)
    conversation = Conversation(*variants[name], config=config)
    talk = Talk(conversation, file, quiet, Variants(variants, name))
    if file is not None and file.exists():
        talk.load(str(file))
    if instruction is not None:
        conversation.system(instruction)
    if sys.stdin is None or not sys.stdin.isatty():
        message = utf8(sys.stdin.buffer.read() if sys.stdin else b"", "the message on stdin").strip()
        if not message:
            raise UsageError("expected a message on stdin, got nothing.")
        talk.answer_pipe(message)
        return
    if not quiet:
        summary = describe(model, network)
        if adapters:
            summary += f" · adapter {name}" + (" · /adapter switches" if len(adapters) > 1 else "")
        _introduce(model, summary, variants[name].tokenizer, conversation.template)
    talk.run()


def _introduce(name: str, summary: str, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Print what one talks to."""
    typer.echo(f"{summary} · /help\n", err=True)
    if not template.own:
        typer.echo(f"{name} has no chat template: using {template.name!r}.", err=True)
    if not template.own and not tokenizer.chat_templates:
        typer.echo(SUGGESTION + "\n", err=True)


def _system(given: str | None) -> str | None:
    """Return the system message of the flag."""
    try:
        return None if given is None else text_or_file(given)
    except OSError as error:
        raise UsageError(f"--system {given}: {error.strerror}.") from error
