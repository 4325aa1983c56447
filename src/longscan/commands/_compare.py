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
from longscan.models import MODELS
from longscan.models.sequence_classifier import BODIES
from longscan.ops import keep_memory
from longscan.reproduce.accuracy_table import show
from longscan.reproduce.comparison import compare_image_models, compare_models
from longscan.reproduce.experiment import Plan, StoppedError
from longscan.training.config import read_recipe
from longscan.training.image_classifier import ImagesConfig
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
    """Train several models on the same sequences or images and print their accuracies.

    Args:
        models: their names.
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
    of_images = [name for name, entry in MODELS.items() if entry.kind == "image"]
    kind = of_images if models[0] in of_images else list(BODIES)
    if other := [name for name in models if name not in kind]:
        what = "all models of images" if kind is of_images else "no model of images among them"
        choices = f"each one of {', '.join(kind)}" if other[0] not in (*BODIES, *of_images) else what
        raise UsageError(f"several --model: expected {choices}; got {other[0]}.")
    settings_of: type[Any] = ImagesConfig if kind is of_images else SequencesConfig
    known = {entry.name for entry in fields(settings_of)}
    settings = {name: value for name, value in given.items() if value is not None and value != []}
    if "pretrained" in settings:
        raise UsageError("several --model and --from: expected one of them, got both.")
    if other := [name for name in settings if name not in known]:
        raise UsageError(
            f"--{other[0].replace('_', '-')}: {', '.join(models)} have no such setting. Leave it out."
        )
    if not settings.get("data"):
        raise UsageError("nothing to train on: name files of labelled sequences or images.")
    keep_memory()
    config: SequencesConfig | ImagesConfig = read_recipe(recipe, settings, settings_of)
    plan = Plan(
        name="comparison",
        data=None,
        out=out,
        threads=config.threads,
        notify=partial(typer.echo, err=True),
        display=partial(Terminal, config.log_every),
    )
    try:
        names = list(dict.fromkeys(models))
        if isinstance(config, ImagesConfig):
            report = compare_image_models(plan, names, config)
        else:
            report = compare_models(plan, names, config)
    except StoppedError as stop:
        exit_stopped(stop.result, "the same command resumes")
    typer.echo(show(report))
    if (figure := out / "comparison.png").is_file():
        typer.echo(f"figure: {figure}", err=True)
