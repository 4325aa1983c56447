"""Why a fixed state can't choose, after table 1 of Mamba (Gu and Dao 2023), reduced.

Sixteen tokens at random positions among blanks have to be repeated in order. When all distances are the
same, plain copying, a convolution does it; here the state has to store some tokens and to ignore others.
The published length is 4,096, in 400,000 steps; here it is 256, in 12,000 (--full: three seeds, 24,000).
"""

from __future__ import annotations

from typing import Any

from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, seeded
from longscan.reproduce.synthetic import train_and_measure

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
STEPS, FULL_STEPS = 12_000, 24_000

SHARED: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 2,
    "vocab_size": 16,
    "length": 256,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "warmup": 200,
    "test_examples": 1000,
    "enough": 0.998,
    "eval_every": 500,
    "save_every": 500,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "s4": {"option": ["d_state=64", "l_max=272"]},
    "mamba": {},
}
MEASURES = {"selective": "selective copying", "copying": "plain copying"}
PUBLISHED = {"selective": {"s4": 18.3, "mamba": 99.8}}
NOTES = (
    "published: Mamba, table 1, at length 4,096 (s4: no gate + S4); by chance 1/14 = 7.1",
    "measured:  the share of right tokens in 1,000 sequences of 256 + 16, 16 of them to be copied, 14 kinds;",
    "           2 layers of width 64, 32 new sequences a step, the rate falls from 1e-3; a run ends early",
    "           when three measurements in a row, 500 steps apart, are at 99.8 or more",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems, trained here.

    Args:
        plan: where, and how much.
    """
    results: dict[str, list[dict[str, Any]]] = {model: [] for model in SYSTEMS}
    steps = FULL_STEPS if plan.full else STEPS
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for model, fields in SYSTEMS.items():
            rows = {}
            for task in MEASURES:
                settings = {**SHARED, **fields, "model": model, "task": task, "seed": seed, "steps": steps}
                rows[task] = train_and_measure(plan, seeded(f"{task}-{steps}-{model}", seed), settings)
            one = rows["selective"]
            results[model].append({**one, **{task: row["accuracy"] for task, row in rows.items()}})
    reduced = "length 256 instead of 4,096" + ("" if plan.full else ", one seed")
    return finish(plan, results, MEASURES, PUBLISHED, reduced, NOTES)
