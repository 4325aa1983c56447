"""Signals classified at the sampling rate of training and, without training again, at half of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load
from longscan.data.labeled_sequences import Sequences
from longscan.errors import LongscanError
from longscan.evaluation.classification import measure
from longscan.reproduce.accuracy_table import finish
from longscan.reproduce.experiment import Plan, seeded
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun

__all__ = ["MEASURES", "RATE_NOTES", "run_systems"]

MEASURES = {"accuracy": "trained rate", "half": "half, dt doubled", "half_plain": "half, as it is"}
RATE_NOTES = (
    "half the rate: every second sample, no training; 'dt doubled': each time step of the state spaces is",
    "               twice as long; models without a time step have none to double (-)",
)


def run_systems(
    plan: Plan,
    systems: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    data: tuple[Path, Sequences],
    seeds: Sequence[int],
    notes: Sequence[str],
    low: bool = False,
) -> dict[str, Any]:
    """Return the accuracies of models on signals, at both rates.

    Args:
        plan: where, and how much.
        systems: model -> fields of SequencesConfig.
        shared: fields that all have.
        data: the training file, and the test sequences.
        seeds: of the runs.
        notes: lines about the data.
        low: whether to measure too what the upper half of the frequencies is worth.
    """
    train, test = data
    test = test.select(range(min(20, len(test)))) if plan.quick else test
    results: dict[str, list[dict[str, Any]]] = {model: [] for model in systems}
    for seed in seeds:
        for name, fields in systems.items():
            settings = {**shared, **fields, "model": name, "seed": seed, "data": [str(train)]}
            directory = plan.train(
                seeded(f"{plan.name}-{name}", seed), SequencesConfig.from_dict(settings), SequencesRun
            )
            results[name].append(_measure(plan, directory, test, low))
    reduced = None if plan.full else "one seed"
    measures, notes = dict(MEASURES), [*notes, *RATE_NOTES]
    if low:
        measures["low"] = "low-passed"
        notes.append("low-passed: at the trained rate, without what lies above half the Nyquist frequency")
    return finish(plan, results, measures, {}, reduced, notes)


def _measure(plan: Plan, directory: Path, test: Sequences, low: bool) -> dict[str, Any]:
    """Return the accuracies of a model at both rates."""
    model = load(directory / "model", "sequence")
    test = test.labelled(model.config.labels)

    def score() -> dict[str, Any]:
        half = test.thinned(2)
        result = {
            "accuracy": 100 * measure(model, test)["accuracy"],
            "half_plain": 100 * measure(model, half)["accuracy"],
            "half": None,
        }
        if low:
            result["low"] = 100 * measure(model, test.low_passed(2))["accuracy"]
        try:
            model.rescale_time(2)
        except LongscanError:  # it has no time step
            return result
        return {**result, "half": 100 * measure(model, half)["accuracy"]}

    return plan.cached_measurement(directory, model, f"{len(test)}" + (" low" if low else ""), score)
