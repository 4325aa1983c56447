"""What HiPPO's matrix is worth as initialisation: S4 on digits pixel by pixel, after figure 3 of S4, reduced.

The claim is that a state space initialised with HiPPO's matrix generalises, and one initialised with random
numbers of the same kind does not, though both learn the same parameters. Published on CIFAR-10 with at most
100,000 parameters: 84.27, and more than 15 points less from random initialisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load
from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.evaluation.classification import measure
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES = ("mnist_5k.npz",)
SOURCE = "Arrays x_train, y_train, x_test, y_test of digits of 28 × 28 pixels."
SEEDS = (0, 1, 2)

SHARED: dict[str, Any] = {
    "model": "s4",
    "d_model": 64,
    "n_layers": 2,
    "epochs": 10.0,
    "lr": 4e-3,
    "warmup": 100,
    "dropout": 0.1,
    "weight_decay": 0.05,
    "batch_size": 32,
    "valid_fraction": 0.05,
    "eval_every": 200,
    "save_every": 200,
}
SYSTEMS = {"hippo": "legs", "random": "random", "spread": "spread"}  # S4Config.init
MEASURES = {"accuracy": "accuracy"}
NOTES = (
    "published: sequential CIFAR-10, 84.27 from HiPPO, more than 15 points less from a random start (S4)",
    "measured:  1,000 digits of MNIST held out, 4,000 to train on, 784 pixels one by one; three seeds",
    "           random: normal numbers, small poles of one scale; spread: log-normal ones, over decades",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracy of each initialisation with each seed.

    Args:
        plan: where, and how much.
    """
    test = read_sequences([plan.files / FILES[0]], split="test")
    test = test.select(range(min(20, len(test)))) if plan.quick else test
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for seed in SEEDS:
        for name, init in SYSTEMS.items():
            fields = {"option": ["d_state=64", "l_max=784", f"init={init}"], "seed": seed}
            fields |= {"epochs": 30.0} if plan.full else {}
            config = SequencesConfig.from_dict({**SHARED, **fields, "data": [str(plan.files / FILES[0])]})
            size = "full-" if plan.full else ""
            directory = plan.train(f"hippo-ablation-{size}{name}-seed{seed}", config, SequencesRun)
            results[name].append(_measure(plan, directory, test))
    reduced = "5,000 images of MNIST instead of CIFAR-10" + ("" if plan.full else ", 10 epochs")
    return finish(plan, results, MEASURES, {}, reduced, NOTES)


def _measure(plan: Plan, directory: Path, test: Sequences) -> dict[str, Any]:
    """Return the accuracy of a model."""
    model = load(directory / "model", "sequence")
    test = test.labelled(model.config.labels)

    def score() -> dict[str, Any]:
        return {"accuracy": 100 * measure(model, test)["accuracy"]}

    return plan.cached_measurement(directory, model, f"{len(test)}", score)
