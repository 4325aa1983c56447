"""Many keys at once: accuracy of associative recall against width and state, after Zoology, reduced.

A sequence starts with pairs of a key and its value; later each key returns once, and its value is asked
(Arora et al. 2023, arXiv 2312.04927). Attention compares each query with all tokens, whatever its width; a
state of fixed size has to hold all pairs. The claim is that its accuracy grows with the size of that state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from longscan.models import LanguageModel
from longscan.plotting.style import COLOURS, MARKERS, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce import accuracy_table
from longscan.reproduce.accuracy_table import finish
from longscan.reproduce.experiment import Plan, seeded
from longscan.reproduce.synthetic import SyntheticConfig, train_and_measure
from longscan.training.build import make_model

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
STEPS, FULL_STEPS = 3000, 12000
WIDTHS, FULL_WIDTHS = (16, 32, 64), (16, 32, 64, 128)

SHARED: dict[str, Any] = {
    "task": "mqar",
    "n_layers": 2,
    "vocab_size": 64,
    "length": 32,
    "pairs": 4,
    "batch_size": 32,
    "lr": 5e-3,
    "weight_decay": 0.1,
    "warmup": 100,
    "test_examples": 1000,
    "enough": 0.995,
    "eval_every": 100,
    "save_every": 500,
}
SYSTEMS: dict[str, tuple[str, ...]] = {  # options
    "llama": ("n_heads=1", "n_kv_heads=1"),
    "mamba": (),
    "mamba2": (),
    "mamba3": (),
    "h3": (),
    "s4d": (),
}
NOTES = (
    "published: figures only (Zoology): attention is right at any width, a convolution or a state must grow",
    "measured:  the share of right values in 1,000 sequences of 32 tokens with 4 pairs of 32 keys and 32",
    "           values; 2 layers, 32 new sequences a step; a run ends early when three measurements in a",
    "           row, 100 steps apart, are at 99.5 or more; by chance 3.1",
    "state:     bytes per sequence: after its 32 tokens if it grows, as attention's does",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems at each width.

    Args:
        plan: where, and how much.
    """
    widths, steps = (FULL_WIDTHS, FULL_STEPS) if plan.full else (WIDTHS, STEPS)
    results: dict[str, list[dict[str, Any]]] = {model: [] for model in SYSTEMS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for model, option in SYSTEMS.items():
            rows, states = {}, {}
            for width in widths:
                fields = {"model": model, "d_model": width, "option": option, "seed": seed, "steps": steps}
                name = seeded(f"mqar-{steps}-{model}-{width}", seed)
                rows[width] = train_and_measure(plan, name, {**SHARED, **fields})
                states[str(width)] = _state_bytes(SyntheticConfig.from_dict({**SHARED, **fields}))
            results[model].append(
                {
                    **{str(width): row["accuracy"] for width, row in rows.items()},
                    "state_bytes": states,
                    "parameters": rows[widths[-1]]["parameters"],
                    "minutes": sum(row["minutes"] for row in rows.values()),
                    "seed": seed,
                }
            )
    measures = {str(width): f"width {width}" for width in widths}
    reduced = f"32 tokens, {steps:,} steps" + ("" if plan.full else ", one seed, one learning rate")
    return finish(plan, results, measures, {}, reduced, NOTES, draw=_plot)


def show(report: Mapping[str, Any]) -> str:
    """Return the results as text: accuracies, and the sizes of the states.

    Args:
        report: of `run`.
    """
    states = {name: rows[0]["state_bytes"] for name, rows in report["runs"].items()}
    lines = [
        f"state of {name}: {', '.join(f'{size:,}' for size in s.values())}" for name, s in states.items()
    ]
    return "\n".join([accuracy_table.show(report), *lines])


def _state_bytes(config: SyntheticConfig) -> int:
    """Return the size of a model's state after a sequence, in bytes."""
    model = cast(LanguageModel, make_model(config, config.vocab_size)).eval()
    with torch.inference_mode():
        _, state = model.prefill(torch.zeros(1, config.length, dtype=torch.int64))
    return state.used().nbytes


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against the size of the state, a line for each model and a point for each width."""
    figure = new_figure(7.0, 4.2)
    ax = figure.subplots()
    for (name, rows), colour, marker in zip(report["runs"].items(), COLOURS, MARKERS, strict=False):
        means = {width: report["systems"][name][width]["mean"] for width in report["measures"]}
        sizes = [rows[0]["state_bytes"][width] for width in means]
        ax.plot(sizes, list(means.values()), color=colour, marker=marker, label=name)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="state (bytes per sequence)", ylabel="accuracy (%)", ylim=(0, 105))
    tidy(ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path, reduced_note(report))
