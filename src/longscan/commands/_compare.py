"""`longscan classify train` with several models: one command, one table, one figure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from longscan.commands._run import exit_stopped
from longscan.core.progress import Terminal
from longscan.errors import UsageError
from longscan.models.sequence_classifier import BODIES
from longscan.ops import keep_memory
from longscan.reproduce.accuracy_table import show
from longscan.reproduce.comparison import compare_models
from longscan.reproduce.experiment import Plan, StoppedError
from longscan.training.config import read_recipe
from longscan.training.sequence_classifier import SequencesConfig

__all__ = ["allow_several", "compare"]


def allow_several(command: Callable[..., None], name: str, more: str) -> None:
    """Make a flag of a command repeatable; the command then receives a list.

    Args:
        command: the function; its signature is replaced.
        name: the flag's parameter.
        more: sentence to add to its help.
    """
    signature = inspect.signature(command)
    parameters = dict(signature.parameters)
    option = get_args(parameters[name].annotation)[1]
    option.help += more
    parameters[name] = parameters[name].replace(annotation=Annotated[list[str] | None, option])
    command.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]


def compare(
    models: Sequence[str],
    out: Path | None,
    resume_from: Path | None,
    recipe: Path | None,
    given: Mapping[str, Any],
) -> None:
    """Train several models on the same sequences and print their accuracies.

    Args:
        models: whose blocks.
        out: receives a run for each, comparison.json and comparison.png.
        resume_from: refused: the same command resumes.
        recipe: settings in a file.
        given: flags; None and [] are not given.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
        typer.Exit: a signal stopped it.
    """
    if out is None or resume_from is not None:
        raise UsageError("several --model: expected --out DIR and no --resume; the same command resumes.")
    if other := [name for name in models if name not in BODIES]:
        raise UsageError(f"several --model: expected each one of {', '.join(BODIES)}; got {other[0]}.")
    known = {entry.name for entry in fields(SequencesConfig)}
    settings = {name: value for name, value in given.items() if value is not None and value != []}
    if other := [name for name in settings if name not in known]:
        raise UsageError(f"--{other[0].replace('_', '-')}: only a BERT has it. Leave it out.")
    if not settings.get("data"):
        raise UsageError("nothing to train on: name files of labelled sequences.")
    keep_memory()
    config = read_recipe(recipe, settings, SequencesConfig)
    plan = Plan(
        name="comparison",
        data=None,
        out=out,
        threads=config.threads,
        notify=partial(typer.echo, err=True),
        display=partial(Terminal, config.log_every),
    )
    try:
        report = compare_models(plan, list(dict.fromkeys(models)), config)
    except StoppedError as stop:
        exit_stopped(stop.result, "the same command resumes")
    typer.echo(show(report))
    if (figure := out / "comparison.png").is_file():
        typer.echo(f"figure: {figure}", err=True)
