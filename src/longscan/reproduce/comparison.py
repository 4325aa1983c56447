"""Several models on the same labelled sequences, images or clips: one table and one figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load
from longscan.data.labeled_sequences import BYTES, read_sequences
from longscan.errors import LongscanError
from longscan.evaluation.classification import measure
from longscan.reproduce.accuracy_table import finish
from longscan.reproduce.experiment import Plan
from longscan.training.build import model_settings
from longscan.training.image_classifier import ImagesConfig, ImagesRun
from longscan.training.image_models import check_model
from longscan.training.run import Run
from longscan.training.run_directory import SETTINGS, read_settings
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun

__all__ = ["compare_image_models", "compare_models"]

MEASURES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


def compare_models(plan: Plan, models: Sequence[str], config: SequencesConfig) -> dict[str, Any]:
    """Return the held-out accuracies of several models, in percent; `accuracy_table.show` makes a table.

    Each model has its run in `plan.out`, by its name. Runs that are finished are not trained again.

    Args:
        plan: where to.
        models: whose blocks; each once.
        config: the settings of all runs; its own model does not count.

    Raises:
        LongscanError: a run in `plan.out` has other settings or data, the labels are numbers, or no
            sequences are held out.
        StoppedError: a signal stopped a run.
    """
    configs = {name: config.replace(model=name).absolute() for name in models}
    for name, own in configs.items():
        model_settings(
            own, vocab_size=BYTES
        )  # refuses options that a model does not have, before any training
        _check(plan.out / name, own, SequencesRun)
    if not read_sequences(config.data, pattern=config.pattern, columns=config.columns).labels:
        raise LongscanError(
            f"{config.data[0]}: expected labels that are classes, got numbers. For regression, compare the "
            "root mean square errors of single runs."
        )
    results: dict[str, list[dict[str, Any]]] = {}
    for name, own in configs.items():
        directory = plan.train(name, own, SequencesRun)
        results[name] = [_measure(plan, directory)]
    n = next(iter(results.values()))[0]["sequences"]
    notes, label = [f"measured: {n:,} held-out sequences"], f"{' and '.join(MEASURES.values())} (%)"
    return finish(plan, results, MEASURES, {}, None, notes, label)


def compare_image_models(plan: Plan, models: Sequence[str], config: ImagesConfig) -> dict[str, Any]:
    """Return the held-out accuracies of several image models, in percent; see `compare_models`.

    Args:
        plan: where to.
        models: their names; each once.
        config: the settings of all runs; its own model does not count.

    Raises:
        UsageError: a setting does not fit a model.
        LongscanError: a run in `plan.out` has other settings or data, or no images are held out.
        StoppedError: a signal stopped a run.
    """
    configs = {name: config.replace(model=name).absolute() for name in models}
    for name, own in configs.items():
        check_model(own)
        _check(plan.out / name, own, ImagesRun)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, own in configs.items():
        results[name] = [_last_validation(plan, plan.train(name, own, ImagesRun))]
    notes, label = (
        ["measured: the last step's model on the held-out images"],
        f"{' and '.join(MEASURES.values())} (%)",
    )
    return finish(plan, results, MEASURES, {}, None, notes, label)


def _last_validation(plan: Plan, directory: Path) -> dict[str, Any]:
    """Return what a finished run of images measured after its last step."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    scores: dict[str, Any] = next((row for row in reversed(rows) if "valid_top1" in row), {})
    if not scores:
        raise LongscanError(
            f"{directory}: expected held-out images to compare models by, got none. Name --valid images."
        )
    found = {"accuracy": 100 * scores["valid_top1"], "macro_f1": 100 * scores["valid_macro_f1"]}
    return plan.cached_measurement(directory, load(directory / "model", "image"), "", lambda: found, "valid")


def _measure(plan: Plan, directory: Path) -> dict[str, Any]:
    """Return accuracy and macro-F1 of a finished run on its held-out sequences."""
    model = load(directory / "model", "sequence")
    valid = read_sequences([directory / "data" / "valid.npz"])
    if not len(valid):
        raise LongscanError(
            f"{directory}: expected held-out sequences to compare models by, got none. Name a --valid file."
        )

    def score() -> dict[str, Any]:
        scores = measure(model, valid)
        return {"sequences": len(valid), **{name: 100 * scores[name] for name in MEASURES}}

    return plan.cached_measurement(directory, model, f"{len(valid)}", score, "valid")


def _check(directory: Path, config: SequencesConfig | ImagesConfig, run: type[Run[Any]]) -> None:
    """Refuse a run on other data: its settings are for `Plan.train` to compare."""
    if not (directory / SETTINGS).is_file():
        return
    stored = run.settings.from_dict(read_settings(directory, run.verb))
    if (stored.data, stored.valid) != (config.data, config.valid):
        raise LongscanError(
            f"{directory} was trained on {', '.join(stored.data)}; expected the data of this command, "
            f"{', '.join(config.data)}. Name another --out."
        )
