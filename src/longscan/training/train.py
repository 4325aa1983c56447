"""`train` and `resume` for language models and BERT: the Python side of `longscan train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.core.progress import Display
from longscan.models import MODELS
from longscan.training.config import TrainConfig
from longscan.training.language_model import LanguageRun
from longscan.training.masked_lm import PretrainRun
from longscan.training.run import Run, RunResult
from longscan.training.run_directory import SETTINGS, read_settings

__all__ = ["model_in", "resume", "run_of", "train"]


def train(
    config: TrainConfig, out: str | Path, display: Display | None = None, *, figures: bool = True
) -> RunResult:
    """Train a new model; see `Run.begin`.

    Args:
        config: the run.
        out: the run's directory, new or empty.
        display: receives progress; silent if None.
        figures: whether loss.png is drawn.

    Returns:
        How it ended; `valid` in bits per byte, in nats for a BERT.

    Raises:
        LongscanError: as `Run.begin`.
    """
    return run_of(config.model).begin(config, out, display, figures=figures)


def resume(
    out: str | Path,
    changes: dict[str, Any] | None = None,
    display: Display | None = None,
    *,
    figures: bool = True,
) -> RunResult:
    """Continue a run from its newest complete checkpoint, bit-exactly; see `Run.resume`.

    Args:
        out: the run's directory.
        changes: settings to change: those that don't affect the weights, and more steps or epochs.
        display: receives progress; silent if None.
        figures: whether loss.png is drawn.

    Returns:
        How it ended; `valid` in bits per byte, in nats for a BERT.

    Raises:
        LongscanError: as `Run.resume`.
    """
    return run_of(model_in(Path(out))).resume(out, changes, display, figures=figures)


def run_of(model: str) -> type[Run[TrainConfig]]:
    """Return the kind of run that trains a model of this name; it rejects unknown ones."""
    return PretrainRun if model in MODELS and MODELS[model].kind == "masked" else LanguageRun


def model_in(directory: Path) -> str:
    """Return the model of a run; if there is none, which the run reports later, the default one."""
    exists = (directory / SETTINGS).is_file()
    return str(read_settings(directory, "train").get("model")) if exists else TrainConfig.model
