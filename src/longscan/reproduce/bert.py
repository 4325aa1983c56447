"""A BERT from scratch (Devlin et al. 2018): masked tokens and next sentences of held-out books.

The published models trained on 3.3 billion words for days; this one trains on four million for an hour or
two. The claim that can be tested at this size: both tasks are learnt, far beyond the most frequent answer.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load_bert
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, seeded
from longscan.training.config import TrainConfig
from longscan.training.masked_lm import PretrainRun

__all__ = ["FILES", "SOURCE", "run", "settings", "show"]

FILES = ("train.txt.xz", "valid.txt.xz")
SOURCE = "Each is English text, its documents separated by two empty lines."
SEEDS = (0, 1, 2)  # of --full

SHARED: dict[str, Any] = {
    "separator": "\n\n\n",
    "vocab_size": 4096,
    "model": "bert",
    "preset": "tiny-lm",
    "d_model": 192,
    "n_layers": 4,
    "n_heads": 4,
    "option": ["init_std=0.06", "dropout=0", "attention_dropout=0"],
    "seq_len": 32,
    "batch_size": 64,
    "steps": 12_000,
    "schedule": "linear",
    "lr": 1e-3,
    "warmup": 500,
    "weight_decay": 0.01,
    "beta2": 0.98,
    "eval_every": 500,
    "eval_windows": 1024,
    "save_every": 250,
    "sample_every": 0,
}
MEASURES = {"words": "masked tokens", "next": "next sentence"}
NOTES = (
    "published: no accuracy; BERT-base saw 3.3 billion words, a million steps of 128,000 tokens",
    "measured:  all of the held-out file; 'guess' always predicts the most frequent token or answer",
)


def settings(plan: Plan, seed: int) -> TrainConfig:
    """Return the training settings.

    Args:
        plan: where the data are.
        seed: of the run.
    """
    train, valid = (str(plan.files / name) for name in FILES)
    return TrainConfig.from_dict({**SHARED, "data": [train], "valid": [valid], "seed": seed})


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the pre-trained model and of the most frequent answer.

    Args:
        plan: where, and how much.
    """
    results: dict[str, list[dict[str, Any]]] = {"bert": [], "guess": []}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        directory = plan.train(seeded("bert", seed), settings(plan, seed), PretrainRun)
        model = load_bert(directory / "model").model
        row = plan.cached_measurement(directory, model, "valid", partial(_measured, directory))
        for name, part in {"bert": "accuracy", "guess": "baseline"}.items():
            shares = {"words": row[f"valid_word_{part}"], "next": row[f"valid_next_{part}"]}
            results[name].append({**row, **{measure: 100 * share for measure, share in shares.items()}})
    results["guess"] = [{**row, "parameters": 0, "minutes": 0.0} for row in results["guess"]]
    reduced = "four million words, 12,000 steps of 2,048 tokens" + ("" if plan.full else ", one seed")
    return finish(plan, results, MEASURES, {}, reduced, NOTES)


def _measured(directory: Path) -> dict[str, Any]:
    """Return the last validation of a run, on all held-out text."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = (json.loads(line) for line in reversed(lines))
    return next(row for row in records if "valid_word_accuracy" in row)
