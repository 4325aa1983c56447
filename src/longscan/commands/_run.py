"""What the commands that train share: their options, and a run as a command line asks for it."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar

import typer

from longscan.core.config import count
from longscan.core.progress import Terminal
from longscan.errors import UsageError
from longscan.ops import keep_memory
from longscan.training.config import RunConfig, read_recipe
from longscan.training.run import Run, RunResult

__all__ = ["Out", "Recipe", "Resume", "exit_stopped", "finished", "run_command"]

C = TypeVar("C", bound=RunConfig)

Out: TypeAlias = Annotated[Path | None, typer.Option(help="Directory of the new run.")]
Resume: TypeAlias = Annotated[
    Path | None,
    typer.Option("--resume", help="Continue the run in this directory; a finished one with more --steps."),
]
Recipe: TypeAlias = Annotated[Path | None, typer.Option("--config", help="TOML file of settings; flags win.")]


def run_command(
    run: type[Run[C]], out: Path | None, resume_from: Path | None, recipe: Path | None, given: dict[str, Any]
) -> RunResult:
    """Train as a command line asks for it.

    Args:
        run: what kind.
        out: the directory of a new run, or
        resume_from: of an earlier one.
        recipe: settings in a file.
        given: flags.

    Returns:
        How it ended; the run is complete.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
        typer.Exit: it was stopped; how to continue it is printed.
    """
    given = {name: value for name, value in given.items() if value is not None and value != []}
    if (out is None) == (resume_from is None):
        raise UsageError("give either --out DIR for a new run or --resume DIR to continue one.")
    keep_memory()
    if resume_from is not None:
        if recipe is not None:
            raise UsageError("--config is for a new run: --resume takes the settings the run began with.")
        result = run.resume(resume_from, given, Terminal(given.get("log_every", 10)))
    else:
        assert out is not None
        config = read_recipe(recipe, given, run.settings)
        result = run.begin(config, out, Terminal(config.log_every))
    if result.stopped_by is not None:
        exit_stopped(result, f"continue with: {run.again(result.directory)}")
    return result


def exit_stopped(result: RunResult, remedy: str) -> NoReturn:
    """Print that a signal stopped a run, and exit: with 130 if it was SIGINT, else with 0.

    Args:
        result: of the run.
        remedy: how to continue it.

    Raises:
        typer.Exit: always.
    """
    with contextlib.suppress(OSError):  # of a terminal that was closed
        typer.echo(f"stopped after step {result.step:,}; {remedy}", err=True)
    raise typer.Exit(130 if result.stopped_by == signal.SIGINT else 0)


def finished(result: RunResult, measured: str, example: str) -> None:
    """Print that a run is complete.

    Args:
        result: how it ended.
        measured: what the validation says of it, "" if there was none.
        example: a command to try, after `longscan`.
    """
    parts = [f"trained {count(result.total, 'step')}", measured, f"try: longscan {example}"]
    typer.echo(" · ".join(part for part in parts if part))
