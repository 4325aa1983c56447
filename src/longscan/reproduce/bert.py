"""A BERT from scratch (Devlin et al. 2018): hidden words and next sentences of held-out books.

The published models read 3.3 billion words for days; this one reads four million for an hour or two. The
claim that can be tried at this size: both tasks are learnt, far beyond what frequencies tell.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load_bert
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan
from longscan.training.config import TrainConfig
from longscan.training.masked_lm import PretrainRun

__all__ = ["FILES", "SOURCE", "run", "settings", "show"]

FILES = ("train.txt.xz", "valid.txt.xz")
SOURCE = "Each is English text, its documents parted by two empty lines."
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
MEASURES = {"words": "hidden words", "next": "next sentence"}
NOTES = (
    "published: no accuracy; BERT-base read 3.3 billion words, a million steps of 128,000 tokens",
    "measured:  all of the held-out file; 'guess' always says the most frequent word, and the same answer",
)


def settings(plan: Plan, seed: int) -> TrainConfig:
    """Return how the model is trained.

    Args:
        plan: where the data are.
        seed: of the run.
    """
    train, valid = (str(plan.files / name) for name in FILES)
    return TrainConfig.from_dict({**SHARED, "data": [train], "valid": [valid], "seed": seed})


def run(plan: Plan) -> dict[str, Any]:
    """Pre-train and measure.

    Args:
        plan: where, and how much.

    Returns:
        The results.
    """
    found: dict[str, list[dict[str, Any]]] = {"bert": [], "guess": []}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        directory = plan.train("bert" + (f"-seed{seed}" if seed else ""), settings(plan, seed), PretrainRun)
        model = load_bert(directory / "model").model
        row = plan.remember(directory, model, "valid", partial(_measured, directory))
        for name, part in {"bert": "accuracy", "guess": "baseline"}.items():
            shares = {"words": row[f"valid_word_{part}"], "next": row[f"valid_next_{part}"]}
            found[name].append({**row, **{measure: 100 * share for measure, share in shares.items()}})
    found["guess"] = [{**row, "parameters": 0, "minutes": 0.0} for row in found["guess"]]
    reduced = "four million words, 12,000 steps of 2,048 tokens" + ("" if plan.full else ", one seed")
    return finish(plan, found, MEASURES, {}, reduced, NOTES)


def _measured(directory: Path) -> dict[str, Any]:
    """Return what the run measured when it ended, on all that was held out."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = (json.loads(line) for line in reversed(lines))
    return next(row for row in found if "valid_word_accuracy" in row)
