"""`longscan chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._options import Offline, PrecisionOption, Quiet, Revision, Threads, TokenizerName
from longscan.core.config import count
from longscan.core.files import utf8
from longscan.core.progress import Bar
from longscan.core.runtime import use_threads
from longscan.errors import LongscanError, UsageError
from longscan.inference.chat import Conversation
from longscan.inference.sampling import SamplingConfig
from longscan.models.common.summary import describe, scaled
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, find_template

__all__ = ["command"]

# controls such as ESC, and what reverses the direction of text: an answer must not steer the terminal
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
QUOTES = '"""'
HELP = """/back          remove the last question and its answer
/retry         answer the last question again
/system TEXT   set the system message; without TEXT, remove it
/save FILE     write the conversation as JSON, with its state beside it
/load FILE     continue a saved conversation
/state         size of the memory
/quit          or Ctrl-D; Ctrl-C stops an answer
\"\"\"            begins and ends a message of several lines"""
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
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 = off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: from the most likely tokens of this total probability.")
    ] = 0.9,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this fraction of the largest probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 penalises tokens used before.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Random seed; default: a new one.")] = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a language model.

    A turn prefills only what is new: the state holds the rest. Text from a pipe is one message, and its
    answer is all that is printed.

    Raises:
        UsageError: a flag has an invalid value, or the chat template rejects the messages.
        LongscanError: the model or a file can't be read.
    """
    config = _sampling_config(
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
        raise LongscanError(f"{file}: expected a new or another file, in a directory that exists.")
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name)
    found = find_template(tokenizer, template)
    bar = Bar()
    conversation = Conversation(
        network,
        tokenizer,
        found,
        config=config,
        progress=lambda done, total: bar.show("prefill", done, total),
    )
    talk = _Talk(conversation, bar, file, quiet)
    if file is not None and file.exists():
        talk.load(file)
    if instruction is not None:
        conversation.system(instruction)
    if sys.stdin is None or not sys.stdin.isatty():
        message = utf8(sys.stdin.buffer.read() if sys.stdin else b"", "the message on stdin").strip()
        if not message:
            raise UsageError("expected a message on stdin, got nothing.")
        talk.answer(conversation.say(message))
        return
    if not quiet:
        _introduce(model, describe(model, network), tokenizer, found)
    talk.run()


class _Talk:
    """Reads messages and commands from a terminal, and prints answers."""

    def __init__(self, conversation: Conversation, bar: Bar, file: Path | None, quiet: bool) -> None:
        self._conversation, self._bar, self._file, self._quiet = conversation, bar, file, quiet
        self._verbs: dict[str, Callable[[str], None]] = {
            "help": lambda _: typer.echo(HELP, err=True),
            "back": self._back,
            "retry": lambda _: self.answer(self._conversation.retry()),
            "system": self._system,
            "save": self._save,
            "load": lambda name: self.load(Path(name)),
            "state": self._state,
        }

    def run(self) -> None:
        """Talk until the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and editing
        while True:
            try:
                message = _read_message()
            except EOFError:
                typer.echo(err=True)
                return
            except KeyboardInterrupt:
                typer.echo("  (Ctrl-D leaves)", err=True)
                continue
            verb, _, rest = message.removeprefix("/").partition(" ")
            if message in ("/quit", "/exit"):
                return
            try:
                if message.startswith("/") and verb not in self._verbs:
                    raise UsageError(f"no command /{verb}: see /help.")
                if message.startswith("/"):
                    self._verbs[verb](rest.strip())
                elif message:
                    self.answer(self._conversation.say(message))
            except LongscanError as error:
                typer.echo(f"error: {error}", err=True)
            except OSError as error:
                typer.echo(f"error: {error.filename}: {error.strerror or error}", err=True)

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """Print an answer while it is written; Ctrl-C ends it."""
        begun = False
        try:
            for piece in pieces:
                self._bar.clear()
                shown = CONTROLS.sub("", piece if begun else piece.lstrip())
                begun = begun or bool(shown)
                typer.echo(shown, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            typer.echo(" …", nl=False)
        finally:
            pieces.close()
            self._bar.clear()
        typer.echo()
        if self._file is not None:
            self._conversation.save(self._file)
        if sys.stdin is not None and sys.stdin.isatty() and not self._quiet:
            typer.echo(self._footer(), err=True)

    def _footer(self) -> str:
        """Return one line about the last answer."""
        turn = self._conversation.turn
        parts = [f"{count(turn.written, 'token')}"]
        if turn.written > 1 and turn.seconds:
            parts.append(f"{(turn.written - 1) / turn.seconds:,.0f} tok/s")
        parts.append(f"first token {turn.first:.2g} s")
        parts.append(f"{count(turn.read, 'new token')} read, {turn.remembered:,} remembered")
        if turn.finish == "length":
            parts.append("cut off by --max-new-tokens")
        return "▏ " + " · ".join(parts)

    def _back(self, _: str) -> None:
        """Remove the last turn."""
        if not self._conversation.undo():
            raise UsageError("there is nothing to remove.")
        self._changed()

    def _system(self, text: str) -> None:
        """Replace the system message."""
        self._conversation.system(text)
        self._changed()

    def _save(self, name: str) -> None:
        """Write the conversation."""
        if not name:
            raise UsageError("/save: expected a file name.")
        self._conversation.save(name)
        typer.echo(f"saved {count(len(self._conversation.messages), 'message')} in {name}", err=True)

    def load(self, path: Path) -> None:
        """Read a conversation and show it."""
        warm = self._conversation.load(path)
        for message in self._conversation.messages if sys.stdin and sys.stdin.isatty() else ():
            typer.echo(CONTROLS.sub("", f"{message['role']}  {message['content']}"), err=True)
        if not warm and self._conversation.messages and not self._quiet:
            typer.echo("The state was not saved or is another model's: the next turn prefills all.", err=True)

    def _state(self, _: str) -> None:
        """Show the size of the memory."""
        held, grows = self._conversation.position, self._conversation.model.init_state(1).growth
        growth = f" + {scaled(grows, 'kMG')}B a token" if grows else ", however long the conversation gets"
        typer.echo(
            f"{scaled(self._conversation.nbytes, 'kMG')}B after {count(held, 'token')}{growth}", err=True
        )

    def _changed(self) -> None:
        """Save what a command has changed."""
        if self._file is not None:
            self._conversation.save(self._file)


def _introduce(name: str, summary: str, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Print what one talks to."""
    typer.echo(f"{summary} · /help\n", err=True)
    if not template.own:
        typer.echo(f"{name} has no chat template: using {template.name!r}.", err=True)
    if not template.own and not tokenizer.chat_templates:
        typer.echo(SUGGESTION + "\n", err=True)


def _read_message() -> str:
    """Return a message, of several lines between triple quotes."""
    line = input("you  ").strip()
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES) or (len(lines) == 1 and not lines[0]):
        lines.append(input("…    "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()


def _system(given: str | None) -> str | None:
    """Return the system message of the flag."""
    if given is None or not given.startswith("@"):
        return given
    return utf8(Path(given[1:]).read_bytes(), given[1:]).strip()


def _sampling_config(**fields: object) -> SamplingConfig:
    """Return the sampling settings of the flags."""
    try:
        return SamplingConfig.from_dict(fields)
    except LongscanError as error:
        raise UsageError(str(error)) from error
