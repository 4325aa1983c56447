"""Spoken digits from raw samples, after table 4 of S4 (Gu et al. 2021) on Speech Commands, reduced.

Six speakers say ten digits fifty times each, 8,000 samples per second, one to eighteen thousand samples long.
Published on ten words of a larger set: S4 98.32, at half the rate without training 96.30.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.reproduce.accuracy_table import show
from longscan.reproduce.experiment import Plan
from longscan.reproduce.rates import run_systems

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES = ("fsdd.tar.xz",)
SOURCE = "The recordings of the repository Jakobovski/free-spoken-digit-dataset, DIGIT_SPEAKER_NUMBER.wav."
SEEDS = (0, 1, 2)  # of --full
TESTED = 5  # recordings of each digit and speaker, by number from 0: the data set's own division
LONGEST = 6000  # samples; what is longer is cut

SHARED: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 3,
    "epochs": 8.0,
    "lr": 4e-3,
    "warmup": 100,
    "dropout": 0.1,
    "weight_decay": 0.05,
    "batch_size": 16,
    "valid_fraction": 0.05,
    "eval_every": 200,
    "save_every": 100,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "s4": {"option": ["d_state=64", f"l_max={LONGEST}"]},
    "s4d": {"option": ["d_state=64"]},
    "h3": {"n_layers": 2, "option": ["d_state=64"]},
    "mamba": {"n_layers": 2},
}
NOTES = (
    "published: S4 98.32, at half the rate 96.30, on ten words of Speech Commands (S4, table 4)",
    f"measured:  300 held-out recordings, 2,700 to train on; cut at {LONGEST:,} samples",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems, trained here.

    Args:
        plan: where, and how much.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    paths = {part: plan.out / f"digits-{part}.npz" for part in ("train", "test")}
    if not all(path.is_file() for path in paths.values()):
        sounds = read_sequences([plan.files / FILES[0]]).cut(LONGEST)
        for part, path in paths.items():
            _part(sounds, part).save(path)
    seeds = SEEDS if plan.full else SEEDS[:1]
    data = paths["train"], read_sequences([paths["test"]])
    return run_systems(plan, SYSTEMS, SHARED, data, seeds, NOTES, low=True)


def _part(sounds: Sequences, part: str) -> Sequences:
    """Return the recordings for training, or for the test."""
    numbers = [int(Path(name).stem.split("_")[2]) for name in sounds.names]
    return sounds.select(n for n, number in enumerate(numbers) if (number < TESTED) == (part == "test"))
