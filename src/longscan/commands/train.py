"""`longscan train`: train a language model or BERT on text files; stop and resume at any moment."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longscan.commands._run import Out, Recipe, Resume, finished, run_command
from longscan.commands._settings import add_flags
from longscan.training.config import TrainConfig, read_recipe
from longscan.training.masked_lm import PretrainRun
from longscan.training.train import model_in, run_of

__all__ = ["command"]


def command(
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Text files or directories.")
    ] = None,
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Train a model on text files, or resume a run after any kind of stop.

    DATA is .txt, .md or .jsonl in UTF-8, also .gz or .xz. The directory --out receives the tokenizer, the
    tokens, checkpoints, metrics.jsonl, loss.png and in the end model/, which `longscan generate --model` and
    transformers load. Ctrl-C stops after the current step.

    Args:
        data: what to train on.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of TrainConfig.

    Raises:
        UsageError: flags that contradict each other or have invalid values.
    """
    given = {name: value for name, value in {"data": data, **settings}.items() if value not in (None, [])}
    model = model_in(resume_from) if resume_from else read_recipe(recipe, given).model
    run = run_of(model)
    result = run_command(run, out, resume_from, recipe, given)
    measured = f"{result.valid:.4f} {run.valid_unit} on held-out text" if result.valid is not None else ""
    directory = result.directory / "model"
    masked = f'fill-mask {directory} "the [MASK] of the day"'
    finished(result, measured, masked if run is PretrainRun else f"generate --model {directory}")


add_flags(command, TrainConfig)
