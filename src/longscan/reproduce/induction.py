"""Trained on 256 tokens, tried on up to 1,048,576: table 2 of Mamba (Gu and Dao 2023).

A mark appears somewhere in the text and again at its end; the answer is the token after it. A selective
state stores that one token however much follows; attention has to find it at distances it was never trained
on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from longscan.checkpoints.load import load
from longscan.data.synthetic import induction
from longscan.evaluation.classification import accuracy
from longscan.models import LanguageModel
from longscan.plotting.style import COLOURS, MARKERS, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.experiment import NO_RESULT, Plan, minutes, seeded
from longscan.reproduce.synthetic import SyntheticConfig, SyntheticRun

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
TRAINED, LONGEST = 8, 20  # powers of two, lengths
TOKENS, MOST = 2**25, 1024  # per length: 32 sequences of the longest, at most so many of others
CHUNK, ROWS = 1024, 16  # tokens and sequences processed at a time, as many tokens of short ones

SHARED: dict[str, Any] = {
    "task": "induction",
    "d_model": 64,
    "n_layers": 2,
    "vocab_size": 16,
    "length": 2**TRAINED - 1,
    "batch_size": 8,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "warmup": 500,
    "steps": 40_000,
    "test_examples": 1000,
    "enough": 1.0,
    "eval_every": 500,
    "save_every": 500,
}
# Among 256 tokens the one that counts is found by luck, after thousands of steps; among 32 it is at once.
SHORT: dict[str, Any] = {"length": 31, "batch_size": 32}
# What leaks over 256 tokens soon costs nothing, over a million it costs all. Once the answers are right,
# gradients are far below the usual eps, and still lead the right way.
HARDENED: dict[str, Any] = {"model": "mamba", "lr": 3e-3, "eps": 1e-15, "enough": None}


class System(NamedTuple):
    """A model to train.

    Attributes:
        fields: of SyntheticConfig; the model is that of the system's name unless given.
        longest: test sequence, a power of two: attention's time grows with the square.
        after: the system it continues from; if None it starts with short sequences.
    """

    fields: dict[str, Any]
    longest: int
    after: str | None = None


SYSTEMS = {
    "mamba": System({}, 14),
    "mamba-hardened": System(HARDENED, LONGEST, after="mamba"),
    "llama": System({"option": ["n_heads=2", "n_kv_heads=2", "max_positions=8192"]}, 13),
    "h3": System({"option": ["d_state=64"], "enough": 0.995}, 14),
}
PUBLISHED = {  # accuracy at powers of two
    "mamba": dict.fromkeys(range(6, 21), 100.0),
    "llama": {8: 100.0, 9: 83.6, 10: 31.3},
    "h3": {8: 100.0, 9: 80.9, 10: 39.5},
}
NOTES = (
    "published: Mamba, table 2 (llama: attention with rotary positions), 204,800 steps",
    "measured:  steps of 32 new sequences of 32 tokens, then of 8 of 256, of each at most 40,000, fewer when",
    "           three measurements in a row, 500 steps apart, are without an error (h3: at 99.5 or more,",
    "           as it keeps making some); mamba-hardened continues for 40,000 steps at a rate of 3e-3 and an",
    "           eps of 1e-15, which its minutes are of;",
    "           then at each length 2^25 tokens, at most 1,024 sequences, in chunks, the state carried",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems at every length.

    Args:
        plan: where, and how much.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        trained: dict[str, Path] = {}
        for name, system in SYSTEMS.items():
            run_name = seeded(f"induction-{name}", seed)
            config = SyntheticConfig.from_dict({**SHARED, "model": name, **system.fields, "seed": seed})
            if system.after is None:
                before = plan.train(f"{run_name}-short", config.replace(**SHORT), SyntheticRun)
                spent = minutes(before)
            else:
                before, spent = trained[system.after], 0.0
            directory = plan.train(run_name, config.replace(start=str(before / "model")), SyntheticRun)
            model, _ = load(directory / "model")
            powers = range(6, min(system.longest, 12 if plan.quick else LONGEST) + 1)
            rows = {power: _measure(plan, directory, model, power) for power in powers}
            runs[name].append(
                {
                    "parameters": rows[6]["parameters"],
                    "seed": seed,
                    "minutes": spent + rows[6]["minutes"],
                    "by_length": {power: row["accuracy"] for power, row in rows.items()},
                }
            )
            trained[name] = directory
    reduced = "fewer steps, of shorter sequences first" + ("" if plan.full else ", one seed")
    report = {
        "experiment": plan.name,
        "reduced": NO_RESULT if plan.quick else reduced,
        "published": PUBLISHED,
        "notes": list(NOTES),
        "machine": plan.machine,
        "runs": runs,
    }
    plan.save(report, lambda path: _plot(report, path))
    return report


def _measure(plan: Plan, directory: Path, model: LanguageModel, power: int) -> dict[str, Any]:
    """Return the accuracy of a model at one length."""
    length = 2**power
    n = 2 if plan.quick else min(MOST, TOKENS // length)
    rows = CHUNK * ROWS // min(length, CHUNK)

    def measure() -> dict[str, Any]:
        plan.notify(f"{directory.name}: {n:,} sequences of {length:,} tokens")
        draw, right = torch.Generator().manual_seed(power), 0.0
        for start in range(0, n, rows):
            some = min(rows, n - start)
            right += some * accuracy(model, induction(some, draw, SHARED["vocab_size"], length - 1), CHUNK)
        return {"accuracy": 100 * right / n, "sequences": n, "tokens": length}

    return plan.cached_measurement(directory, model, f"{n}", measure, f"test-{power}")


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    powers = sorted({power for rows in report["runs"].values() for power in rows[0]["by_length"]})
    head = [(name, report["published"].get(name)) for name in report["runs"]]
    titles = [f"  {name:>7}" + ("  published" if known else "") for name, known in head]
    lines = [f"{'tokens':>9}{''.join(titles)}"]
    for power in powers:
        line = f"{2**power:>9,}"
        for name, known in head:
            values = [row["by_length"][power] for row in report["runs"][name] if power in row["by_length"]]
            mean = f"{sum(values) / len(values):.1f}" if values else "-"
            line += f"  {mean:>{max(7, len(name))}}"
            if known:
                line += f"  {f'{known[power]:g}' if power in known else '-':>9}"
        lines.append(line)
    for name, rows in report["runs"].items():
        spent = sum(row["minutes"] for row in rows) / len(rows)
        lines.append(f"{name}: {rows[0]['parameters']:,} parameters, {spent:.1f} minutes, {len(rows)} seeds")
    return "\n".join([*lines, f"reduced: {report['reduced']}", *report["notes"]])


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy against length."""
    figure = new_figure(7.0, 4.0)
    ax = figure.subplots()
    for name, colour, marker in zip(report["runs"], COLOURS, MARKERS, strict=False):
        for row in report["runs"][name]:
            points = row["by_length"]
            label = name if row is report["runs"][name][0] else None
            ax.plot([2**p for p in points], list(points.values()), color=colour, marker=marker, label=label)
        known = report["published"].get(name, {})
        ax.plot([2**p for p in known], list(known.values()), color=colour, linestyle=":", linewidth=1.2)
    ax.axvline(2**TRAINED, color="grey", linewidth=0.8, linestyle="--")
    ax.annotate("trained", (2**TRAINED, 3), xytext=(3, 0), textcoords="offset points", color="grey")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="tokens", ylabel="accuracy (%); dotted: published", ylim=(0, 105))
    tidy(ax)
    ax.legend(frameon=False)
    save_figure(figure, path, reduced_note(report))
