"""`longscan finetune`: a checkpoint learns one's own data."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from longscan.commands._run import Out, Recipe, Resume, finished, run_command
from longscan.commands._settings import add_flags
from longscan.core.files import read_json
from longscan.training.finetune import FinetuneRun
from longscan.training.finetune_config import FinetuneConfig
from longscan.training.run_directory import read_settings

__all__ = ["command"]


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A shipped model, a directory, or a hub id.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Files or directories of examples.")
    ] = None,
    out: Out = None,
    resume_from: Resume = None,
    recipe: Recipe = None,
    **settings: Any,
) -> None:
    """Fine-tune a checkpoint on conversations, completions or texts; stop and resume at any moment.

    A row of DATA (.jsonl) has `messages`, `prompt` and `completion`, or `text`; plain text files are texts.
    What is learnt are the assistant's answers and the completions. The directory --out receives checkpoints,
    metrics.jsonl, loss.png and in the end adapter/, which `longscan generate --adapter` and PEFT load, or
    model/ with --method full. Ctrl-C stops after the current step.

    Args:
        model: what to start from.
        data: what to learn.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of FinetuneConfig.

    Raises:
        UsageError: flags that contradict each other or have invalid values.
    """
    given = {"model": model, "data": data, **settings}
    result = run_command(FinetuneRun, out, resume_from, recipe, given)
    scores, measured = result.scores, ""
    if "valid_loss" in scores:
        measured = f"{scores['valid_loss']:.4f} nats per learnt token"
    if "valid_exact" in scores:
        measured += f", {scores['valid_exact']:.1%} of held-out answers exact"
    settings_of_run = read_settings(result.directory, FinetuneRun.verb)
    where = shlex.quote(str(result.directory))
    whole = (result.directory / "model").is_dir()
    named = f"{where}/model" if whole else f"{shlex.quote(settings_of_run['model'])} --adapter {where}"
    talks = read_json(result.directory / "data" / "meta.json")["conversations"]
    plain = (
        " --template plain" if settings_of_run["template"] == "plain" else ""
    )  # others are saved with the result
    finished(result, measured, f"chat --model {named}{plain}" if talks else f"generate --model {named}")


add_flags(command, FinetuneConfig)
