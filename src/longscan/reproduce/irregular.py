"""Irregularly sampled series: Japanese vowels of which half of the steps are dropped, at random.

The remaining steps have their times. A neural ODE (Chen et al. 2018, as the ODE-RNN of Rubanova et al. 2019)
uses the times; the LSTM and S4D see positions only; a second LSTM gets the seconds since the step before in a
channel of its own. None of the papers measured these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longscan.checkpoints.load import load
from longscan.core.optional import installed, remedy
from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.evaluation.classification import measure
from longscan.reproduce import vowels
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, seeded
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = vowels.FILES, vowels.SOURCE
SEEDS = (0, 1, 2)  # of --full
FRAME = 0.0064  # seconds from one step to the next, of the data set
GAPS = "+gaps"  # systems with a channel of them

SHARED: dict[str, Any] = dict(vowels.SHARED)
SYSTEMS: dict[str, dict[str, Any]] = {
    "neural_ode": {},
    "lstm": {},
    f"lstm{GAPS}": {"model": "lstm"},
    "s4d": {},
}
MEASURES = {"all": "all steps", "half": "half of them", "lost": "half, trained on all"}
NOTES = (
    "measured: 370 held-out utterances, 270 to train on, the archive's own division",
    "half:     steps of each utterance chosen at random, the same for all systems, with their times",
    "minutes:  of both trainings",
)
WITHOUT = f"without neural_ode: {remedy('torchdiffeq', 'neural ODEs')}"


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems, trained here.

    Args:
        plan: where, and how much.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    systems, notes = dict(SYSTEMS), list(NOTES)
    if not installed("torchdiffeq"):
        plan.notify(WITHOUT)
        del systems["neural_ode"]
        notes.append(WITHOUT)
    test = _with_half(read_sequences([plan.files / FILES[0]], split="test"))
    if plan.quick:
        test = {part: some.select(range(min(20, len(some)))) for part, some in test.items()}
    files = _write(plan)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for name, fields in systems.items():
            results[name].append(_system(plan, name, {**fields, "seed": seed}, files, test))
    return finish(plan, results, MEASURES, {}, None if plan.full else "one seed", notes)


def _system(
    plan: Plan, name: str, fields: Mapping[str, Any], files: Mapping[str, Path], test: Mapping[str, Sequences]
) -> dict[str, Any]:
    """Return the accuracies of a system trained on all steps, and of one trained on half of them."""
    end = GAPS if name.endswith(GAPS) else ""
    if end:
        test = {part: _with_gaps(some) for part, some in test.items()}
    result: dict[str, Any] = {"minutes": 0.0}
    for part, tests in {"all": {"all": "all", "lost": "half"}, "half": {"half": "half"}}.items():
        run_name = seeded(f"{plan.name}-{name}-{part}", fields["seed"])
        settings = {**SHARED, "model": name, **fields, "data": [str(files[part + end])]}
        directory = plan.train(run_name, SequencesConfig.from_dict(settings), SequencesRun)
        row = _measure(plan, directory, {measure: test[key] for measure, key in tests.items()})
        result |= {**row, "minutes": round(result["minutes"] + row["minutes"], 1)}
    return result


def _measure(plan: Plan, directory: Path, tests: Mapping[str, Sequences]) -> dict[str, Any]:
    """Return the accuracies of a model on each test set."""
    model = load(directory / "model", "sequence")

    def score() -> dict[str, Any]:
        labels = model.config.labels
        return {name: 100 * measure(model, some.labelled(labels))["accuracy"] for name, some in tests.items()}

    key = " ".join(f"{name} {len(some)}" for name, some in tests.items())
    return plan.cached_measurement(directory, model, key, score)


def _write(plan: Plan) -> dict[str, Path]:
    """Return the training files, written unless they exist."""
    files = {
        key: plan.out / f"irregular-{key}.npz" for part in ("all", "half") for key in (part, part + GAPS)
    }
    if not all(path.is_file() for path in files.values()):
        for part, some in _with_half(read_sequences([plan.files / FILES[0]])).items():
            some.save(files[part])
            _with_gaps(some).save(files[part + GAPS])
    return files


def _with_half(whole: Sequences) -> dict[str, Sequences]:
    """Return sequences with their times, and with half of the steps."""
    whole = replace(whole, times=FRAME * np.concatenate([np.arange(length) for length in whole.lengths]))
    draw = np.random.default_rng(0)
    steps = [np.sort(draw.permutation(length)[: -(-length // 2)]) for length in whole.lengths]
    half = whole.changed(lambda rows: [row[some] for row, some in zip(rows, steps, strict=True)])
    return {"all": whole, "half": half}


def _with_gaps(some: Sequences) -> Sequences:
    """Return sequences with one more channel: the seconds since the step before, 0 at the first."""
    assert some.times is not None
    gaps = np.diff(some.times, prepend=some.times[:1])
    gaps[np.cumsum(some.lengths)[:-1]] = 0
    return replace(some, values=np.column_stack([some.values, gaps]).astype(np.float32))
