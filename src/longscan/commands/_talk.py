"""A conversation at a terminal: messages, commands that begin with a slash, answers as they are written."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import typer

from longscan.commands._variants import Variants
from longscan.core.config import count
from longscan.core.files import utf8
from longscan.core.printable import printable
from longscan.core.progress import Bar
from longscan.core.runtime import StopSignals
from longscan.errors import LongscanError, UsageError
from longscan.inference.chat import Conversation
from longscan.models.common.summary import scaled

__all__ = ["Talk", "text_or_file"]

QUOTES = '"""'
HELP = """/back          remove the last question and its answer
/retry         answer the last question again
/clear         remove all messages but the system message
/system TEXT   set the system message, @FILE from a file; without TEXT, remove it
/save FILE     write the conversation as JSON, with its state beside it
/load FILE     continue a saved conversation
/state         size of the memory
/adapter NAME  let another adapter answer, or none; without NAME, list them
/quit          or Ctrl-D; Ctrl-C stops an answer, which stays as far as it got
\"\"\"            begins and ends a message of several lines, or one that begins with a slash"""


class _Interrupt(StopSignals):
    """Records the first Ctrl-C; the second one raises. A conversation ends at other signals as usual."""

    CAUGHT = (signal.SIGINT,)


class Talk:
    """Reads messages and commands from a terminal, and prints answers.

    Args:
        conversation: to continue.
        file: where to save each turn.
        quiet: print answers and errors only.
        variants: who may answer.
    """

    def __init__(
        self, conversation: Conversation, file: Path | None, quiet: bool, variants: Variants
    ) -> None:
        self._conversation, self._file, self._quiet = conversation, file, quiet
        self._variants = variants
        self._bar, self._interrupt = Bar(), _Interrupt()
        conversation.progress = self._show_prefill
        self._verbs: dict[str, Callable[[str], bool | None]] = {
            "help": self._help,
            "back": self._back,
            "retry": self._retry,
            "clear": self._clear,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "state": self._state,
            "adapter": self._adapter,
            "quit": self._quit,
            "exit": self._quit,
        }

    def run(self) -> None:
        """Talk until the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and editing
        while True:
            try:
                message, literal = _read_message()
                verb, _, rest = message.partition(" ")
                if message.startswith("/") and not literal:
                    if verb[1:] not in self._verbs:
                        raise UsageError(f"no command {verb}: see /help.")
                    if self._verbs[verb[1:]](rest.strip()):
                        return
                elif message:
                    self._answer(self._conversation.say(message))
            except EOFError:
                typer.echo(err=True)
                return
            except KeyboardInterrupt:
                typer.echo("  (Ctrl-D leaves)", err=True)
            except LongscanError as error:
                typer.echo(printable(f"error: {error}"), err=True)
            except OSError as error:
                typer.echo(f"error: {error.filename}: {error.strerror or error}", err=True)

    def answer_pipe(self, message: str) -> None:
        """Print the answer to a message and nothing else; /state is no message there either.

        Args:
            message: of the user.
        """
        if message == "/state":
            self._state("")
            return
        for piece in self._printable(self._conversation.say(message)):
            self._print(piece)
        typer.echo()
        self._changed()

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        """Print an answer while it is written; Ctrl-C ends it between tokens, so that its state is of use."""
        self._interrupt = _Interrupt()
        self._bar.clear()
        try:
            with self._interrupt, contextlib.closing(pieces):
                for piece in self._printable(pieces):
                    self._print(piece)
                    if self._interrupt.received:
                        self._print(" …")
                        break
        except KeyboardInterrupt:
            typer.echo("stopped before the answer began: the question was not added.", err=True)
            return
        finally:
            self._bar.clear()
        typer.echo()
        self._changed()
        if not self._quiet:
            typer.echo(self._footer(), err=True)

    def _printable(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield what may be printed of an answer, without space before it."""
        begun = False
        for piece in pieces:
            shown = printable(piece if begun else piece.lstrip())
            begun = begun or bool(shown)
            yield shown

    def _print(self, text: str) -> None:
        """Print a piece of an answer at once."""
        self._bar.clear()
        typer.echo(text, nl=False)
        sys.stdout.flush()

    def _show_prefill(self, done: int, total: int) -> None:
        """Show the progress of the prefill."""
        if not self._quiet:
            self._bar.show("prefill", done, total)
        if self._interrupt.received:
            raise KeyboardInterrupt

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

    def _help(self, _: str) -> None:
        """Print the commands."""
        typer.echo(HELP, err=True)

    def _quit(self, _: str) -> bool:
        """End the conversation."""
        return True

    def _retry(self, _: str) -> None:
        """Answer again."""
        self._answer(self._conversation.retry())

    def _back(self, rest: str) -> None:
        """Remove the last turn."""
        if rest:
            raise UsageError("/back: removes one question and its answer; expected nothing behind it.")
        if not self._conversation.undo():
            raise UsageError("there is nothing to remove.")
        self._changed(f"removed; {count(len(self._conversation.messages), 'message')} left")

    def _clear(self, _: str) -> None:
        """Remove all turns."""
        while self._conversation.undo():
            pass
        self._changed("removed all messages but the system message")

    def _system(self, text: str) -> None:
        """Replace the system message."""
        self._conversation.system(text_or_file(text) if text else "")
        self._changed(f"the system message is {'set' if text else 'removed'}; the next turn prefills all")

    def _save(self, name: str) -> None:
        """Write the conversation."""
        path = _path("/save", name)
        if path.exists():
            _check_replaceable(path)
        self._conversation.save(path)
        typer.echo(f"saved {count(len(self._conversation.messages), 'message')} in {path}", err=True)

    def _load(self, name: str) -> None:
        """Continue another conversation, in its own file if this one has one."""
        path = _path("/load", name)
        self.load(str(path))
        if self._file is not None:
            self._file = path
            typer.echo(f"from now on each turn is saved in {path}", err=True)

    def load(self, name: str) -> None:
        """Read a conversation and show it.

        Args:
            name: of its file.

        Raises:
            LongscanError: the file holds no conversation.
            OSError: it cannot be read.
        """
        warm = self._conversation.load(name)
        if self._quiet:
            return
        for message in self._conversation.messages if sys.stdin and sys.stdin.isatty() else ():
            shown = printable((message.get("content") or "").strip())
            typer.echo(f"{message['role']:10} {shown}", err=True)
        if not warm and self._conversation.messages:
            typer.echo("The state was not saved or is another model's: the next turn prefills all.", err=True)

    def _state(self, _: str) -> None:
        """Show the size of the memory."""
        chat = self._conversation
        grows = chat.model.init_state(1).growth
        growth = f" + {scaled(grows, 'kMG')}B a token" if grows else ", however long the conversation gets"
        typer.echo(f"{scaled(chat.nbytes, 'kMG')}B after {count(chat.position, 'token')}{growth}")

    def _adapter(self, name: str) -> None:
        """Let another adapter answer, or list them."""
        if not name:
            typer.echo(self._variants.list())
            return
        before = self._variants.current
        if not self._variants.choose(name, self._conversation):
            typer.echo(f"{name} answers already", err=True)
            return
        note = f"{name} answers from now on, in place of {before}"
        if self._conversation.messages:
            note += "; the next turn prefills all, as a state is of one model"
        self._changed(note)

    def _changed(self, note: str = "") -> None:
        """Save what has changed, and say so."""
        if self._file is not None:
            self._conversation.save(self._file)
        if note and not self._quiet:
            typer.echo(note, err=True)


def text_or_file(given: str) -> str:
    """Return a text, or that of the file behind an @.

    Args:
        given: the text, or @FILE.

    Raises:
        OSError: the file cannot be read.
    """
    if not given.startswith("@"):
        return given
    return utf8(Path(given[1:]).expanduser().read_bytes(), given[1:]).strip()


def _path(verb: str, name: str) -> Path:
    """Return the file of a command."""
    if not name or "\0" in name:
        raise UsageError(f"{verb}: expected a file name.")
    return Path(name).expanduser()


def _check_replaceable(path: Path) -> None:
    """Raise if a file is no conversation: it must not be lost."""
    with contextlib.suppress(OSError, ValueError):
        if '"messages"' in path.read_text(encoding="utf-8"):
            return
    raise UsageError(f"{path} exists and is no conversation: choose another name.")


def _read_message() -> tuple[str, bool]:
    """Return a message, and whether it stood between triple quotes: then it may have several lines."""
    line = _read_line("you  ").strip()
    if not line.startswith(QUOTES):
        return line, False
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(_read_line("…    "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip(), True


def _read_line(prompt: str) -> str:
    """Return a line of input; the prompt is for the terminal and never part of the output."""
    if sys.stdout.isatty():
        line = input(prompt)
    else:
        typer.echo(prompt, nl=False, err=True)
        line = input()
    return utf8(line.encode(errors="surrogateescape"), "the message")
