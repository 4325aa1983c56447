"""The command line; it imports a verb's module on demand, so `longscan --help` loads no torch."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import longscan
from longscan.core.memory_errors import out_of_memory
from longscan.core.printable import printable
from longscan.errors import LongscanError, UsageError

__all__ = ["VERBS", "main"]

#: verb -> its module, which has a `command` function or a dictionary of subcommands, `commands`; and its line
#: in `longscan --help`
VERBS = {
    "generate": ("longscan.commands.generate", "Continue a text with a language model, token by token."),
    "chat": ("longscan.commands.chat", "Talk to a language model."),
    "serve": ("longscan.commands.serve", "Serve a language model over HTTP, for OpenAI's clients."),
    "train": ("longscan.commands.train", "Train a model on your own text files, or resume a run."),
    "finetune": (
        "longscan.commands.finetune",
        "Teach a checkpoint your own conversations or texts.",
    ),
    "merge": ("longscan.commands.merge", "Merge an adapter into the weights of its model."),
    "evaluate": ("longscan.commands.evaluate", "Perplexity and bits per byte of a model on text files."),
    "translate": ("longscan.commands.translate", "Train a translator, evaluate it, translate with it."),
    "classify": (
        "longscan.commands.classify",
        "Train and use classifiers of texts, images or sequences.",
    ),
    "fill-mask": ("longscan.commands.fill_mask", "Predict the tokens behind [MASK] with a BERT."),
    "embed": ("longscan.commands.embed", "Turn texts into vectors, or print their cosine similarities."),
    "remember": (
        "longscan.commands.remember",
        "Compress a signal into a few coefficients and reconstruct it.",
    ),
    "convert": (
        "longscan.commands.convert",
        "Rewrite a model in another layout, precision or format (GGUF, ONNX).",
    ),
    "quantize": ("longscan.commands.quantize", "Quantise a model's weights to bf16, int8 or int4."),
    "models": ("longscan.commands.models", "List the models and what each supports."),
    "plot": (
        "longscan.commands.plot",
        "Figures of a model: attention, alignments, kernels, scans, states.",
    ),
    "reproduce": ("longscan.commands.reproduce", "Repeat a published experiment and compare the results."),
    "bench": ("longscan.commands.bench", "Benchmark this machine: ops, training, generation."),
    "doctor": (
        "longscan.commands.doctor",
        "Show what is installed, and check the native kernels.",
    ),
}


class _Verbs(TyperGroup):
    """A group that imports a command when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command of a verb's module in place of the placeholder that `--help` lists."""
        verb, placeholder, rest = super().resolve_command(ctx, args)
        _refuse_several(verb)
        return verb, verb and placeholder and _load(verb), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb and turn an exception into one `error:` message and an exit code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):  # typer's own signals
            raise
        except BrokenPipeError:
            _mute_stdout()  # the reader, `head` for one, has closed the pipe
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            _complain(_message(error))
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


_STYLE: Any = {
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "rich_markup_mode": None,
}
app = typer.Typer(cls=_Verbs, **_STYLE)
for _verb, (_module, _help) in VERBS.items():
    app.command(_verb, help=_help)(lambda: None)


def _version(requested: bool) -> None:
    """Print the version and exit."""
    if requested:
        typer.echo(f"longscan {longscan.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, run and inspect sequence models on any machine."""
    _show_help(ctx)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        0 done, 1 failed, 2 misused, 130 interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _plain_warnings(), _escaped_names():
        try:
            code = typer.main.get_command(app).main(arguments, prog_name="longscan", standalone_mode=False)
            sys.stdout.flush()
        except typer.TyperException as error:
            _complain(_usage(error))
            return 2
        except typer.Abort:
            return 1
        except BrokenPipeError:
            _mute_stdout()
            return 0
    return code if isinstance(code, int) else 0


def _refuse_several(verb: str | None) -> None:
    """Exit if torchrun started several processes of a verb that would do the same in each of them.

    Args:
        verb: the verb, None if there is none of this name; `train` sees to that itself.

    Raises:
        typer.Exit: there are several.
    """
    n = os.environ.get("WORLD_SIZE", "1")
    if verb in (None, "train") or "MASTER_ADDR" not in os.environ or n == "1":
        return
    if os.environ.get("RANK", "0") == "0":  # the first process says it for all
        _complain(
            f"{verb}: expected one process, got {n}: only longscan train works in several. Start it without "
            "torchrun, or unset MASTER_ADDR."
        )
    raise typer.Exit(2)


def _load(verb: str) -> Any:
    """Return the command of a verb, or the group of its subcommands."""
    module, summary = VERBS[verb]
    loaded = importlib.import_module(module)
    holder = typer.Typer(**_STYLE)
    if not hasattr(loaded, "commands"):
        _add(holder, verb, loaded.command, summary)
        return typer.main.get_command(holder)
    for name, function in loaded.commands.items():
        _add(holder, name, function, summary)
    holder.callback(invoke_without_command=True, help=summary)(_show_help)
    return typer.main.get_command(holder)


def _add(holder: typer.Typer, name: str, function: Callable[..., None], summary: str) -> None:
    """Add a command made of the signature and docstring of its function.

    `Args:` and the rest are for readers of the source: the options have help of their own.
    """
    text = (inspect.getdoc(function) or summary).split("\n\nArgs:")[0].split("\n\nRaises:")[0]
    holder.command(name, help=text)(function)


def _show_help(ctx: typer.Context) -> None:
    """Print the help of a group that is called without a subcommand."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _usage(error: typer.TyperException) -> str:
    """Return what is wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    message = error.format_message().replace(": Value error, ", ": ")  # which is of the parser beneath typer
    return f"{message}\nSee `{context.command_path if context else 'longscan'} --help`."


def _message(error: Exception) -> str:
    """Return the message of an exception, written for users rather than developers."""
    if isinstance(error, LongscanError):
        return str(error)
    if message := out_of_memory(error):
        return message
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename}: {reason}" if error.filename else reason
    return (
        f"{type(error).__name__}: {error}\n"
        "This is a bug in longscan: please report it, with the traceback that `longscan --debug ...` prints."
    )


def _complain(message: str) -> None:
    """Print `error: ...` to stderr, later lines indented below the first, wrapped on a terminal."""
    lines = printable(message).splitlines() or [""]
    if sys.stderr.isatty():
        width = max(20, shutil.get_terminal_size().columns - len("error: "))
        lines = [part for line in lines for part in textwrap.wrap(line, width, **_WRAP) or [""]]
    typer.echo("error: " + "\n       ".join(line.strip() for line in lines), err=True)


_WRAP: Any = {"break_long_words": False, "break_on_hyphens": False}


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show Python warnings as `warning: ...` lines instead of a path, a line number and source code."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _escaped_names() -> Iterator[None]:
    r"""Print bytes of file names that are not UTF-8 as \udcXX, from which JSON restores them.

    So no result is lost because it cannot be printed.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    usual = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, usual, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _mute_stdout() -> None:
    """Redirect stdout to /dev/null, so that the flush at exit does not fail on the closed pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
