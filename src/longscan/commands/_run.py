"""What the commands that train share: their options, starting or resuming a run, and its last line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar

import typer

from longscan.core.config import count
from longscan.core.progress import Terminal
from longscan.errors import LongscanError, UsageError
from longscan.ops import keep_memory
from longscan.training.config import RunConfig, read_recipe
from longscan.training.launch import launch
from longscan.training.run import Run, RunResult

__all__ = ["Out", "Recipe", "Resume", "exit_stopped", "finished", "run_command"]

C = TypeVar("C", bound=RunConfig)

Out: TypeAlias = Annotated[Path | None, typer.Option(help="Directory of the new run.")]
Resume: TypeAlias = Annotated[
    Path | None,
    typer.Option("--resume", help="Resume the run in this directory; a finished one with more --steps."),
]
Recipe: TypeAlias = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; flags override it.")
]


def run_command(
    run: type[Run[C]], out: Path | None, resume_from: Path | None, recipe: Path | None, flags: dict[str, Any]
) -> RunResult:
    """Start or resume a run.

    Args:
        run: the kind of run.
        out: directory of a new run, or None.
        resume_from: directory of an earlier run, or None.
        recipe: a TOML file of settings, or None.
        flags: settings from the command line.

    Returns:
        The result of the complete run.

    Raises:
        UsageError: flags that contradict each other or have invalid values.
        typer.Exit: the run was stopped; the command that resumes it is printed.
    """
    flags = {name: value for name, value in flags.items() if value is not None and value != []}
    if (out is None) == (resume_from is None):
        raise UsageError("give either --out DIR for a new run or --resume DIR to resume one.")
    keep_memory()
    try:
        result = _run(run, out, resume_from, recipe, flags)
    except LongscanError as error:
        place = launch()
        if place.first:
            raise
        # the first process says it all
        line = str(error).splitlines()[0]
        raise type(error)(f"process {place.rank} of {place.size}: {line}") from error
    if result.stopped_by is not None:
        exit_stopped(result, f"continue with: {run.again(result.directory)}")
    return result


def _run(
    run: type[Run[C]], out: Path | None, resume_from: Path | None, recipe: Path | None, flags: dict[str, Any]
) -> RunResult:
    """Start or resume a run; see `run_command`."""
    if resume_from is not None:
        if recipe is not None:
            raise UsageError("--config is for a new run: --resume uses the settings the run started with.")
        return run.resume(resume_from, flags, Terminal(flags.get("log_every", 10)))
    assert out is not None
    config = read_recipe(recipe, flags, run.settings)
    return run.begin(config, out, Terminal(config.log_every))


def exit_stopped(result: RunResult, remedy: str) -> NoReturn:
    """Print that a signal stopped a run, and exit as a shell reports it: 130 for SIGINT, 143 for SIGTERM.

    Args:
        result: of the run.
        remedy: how to continue it.

    Raises:
        typer.Exit: always.
    """
    with contextlib.suppress(OSError):  # of a terminal that was closed
        if launch().first:
            typer.echo(f"stopped after step {result.step:,}; {remedy}", err=True)
    assert result.stopped_by is not None
    raise typer.Exit(128 + result.stopped_by)


def finished(result: RunResult, measured: str, example: str) -> None:
    """Print that a run is complete.

    Args:
        result: how it ended.
        measured: the validation in a few words, "" if there was none.
        example: a command to try, after `longscan`.
    """
    if not launch().first:
        return
    parts = [f"trained {count(result.total, 'step')}", measured, f"try: longscan {example}"]
    typer.echo(" · ".join(part for part in parts if part))
