"""A real time series: the speaker, one of nine, from two vowels in twelve channels of 7 to 29 steps.

None of the papers measured these; they show the whole workflow on data that train in minutes.
"""

from __future__ import annotations

from typing import Any

from longscan.data.labeled_sequences import read_sequences
from longscan.reproduce.accuracy_table import show
from longscan.reproduce.experiment import Plan
from longscan.reproduce.rates import run_systems

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES = ("japanese_vowels.npz",)
SOURCE = "Arrays x_train, len_train, y_train and x_test, len_test, y_test of the data set Japanese Vowels."
SEEDS = (0, 1, 2)

SHARED: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 2,
    "epochs": 30.0,
    "lr": 3e-3,
    "warmup": 50,
    "dropout": 0.2,
    "weight_decay": 0.05,
    "valid_fraction": 0.1,
    "eval_every": 100,
    "save_every": 200,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "s4": {"option": ["l_max=32"]},
    "s4d": {},
    "h3": {},
    "mamba": {},
    "lstm": {},
    "cnn": {},
    "llama": {},
}
NOTES = ("measured: 370 held-out utterances, 270 to train on, the archive's own division",)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems, trained here.

    Args:
        plan: where, and how much.
    """
    path = plan.files / FILES[0]
    test = read_sequences([path], split="test")
    seeds = SEEDS if plan.full else SEEDS[:1]
    return run_systems(plan, SYSTEMS, SHARED, (path, test), seeds, NOTES)
