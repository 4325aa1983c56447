"""A cue, a hundred thousand tokens, a question: exact gradients beside truncated ones.

Each sequence begins with one of two cues and ends with a question, whose answer is the cue. In between is one
token, a hundred thousand times. Two runs train the same model on the same sequences, and in both the
state passes through all of a sequence. Truncated backpropagation follows the loss over the last 2,048 tokens:
it can learn to use what the state holds, but not what the state should hold, as no gradient reaches the cue.
Exact gradients do.

So long a memory must be possible at the start: dt begins near 0.1 / length, so that a state lasts for the
whole sequence and not, as with Mamba's usual range, for 10 to 1,000 tokens. The cue is then one part in a
million of the state; the gradients that reach it are as small, and Adam needs an eps below them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from longscan.core.config import count
from longscan.core.runtime import StopSignals
from longscan.data.synthetic import IGNORED, Examples, distant
from longscan.evaluation.classification import accuracy
from longscan.models import LanguageModel, Model
from longscan.plotting.style import COLOURS, MARKERS, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.experiment import NO_RESULT, Plan, minutes, seeded
from longscan.training.build import make_model
from longscan.training.chunked_loss import chunked_loss
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["FILES", "SOURCE", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
LENGTH, QUICK_LENGTH = 100_000, 5000
WINDOW = 2048  # tokens of the truncated gradient
ENOUGH = 0.1  # nats per answer of the test, at which a run ends
SYSTEMS = {"exact": 0, "truncated": WINDOW}
SHARED: dict[str, Any] = {
    "model": "mamba",
    "d_model": 16,
    "n_layers": 1,
    "option": ["d_state=4", "dt_min=5e-7", "dt_max=2e-6", "dt_init_floor=5e-7", "tie_embeddings=false"],
    "steps": 800,
    "lr": 1e-2,
    "min_lr": 1e-2,
    "warmup": 20,
    "weight_decay": 0.0,
    "eps": 1e-15,
    "eval_every": 25,
    "save_every": 25,
}
NOTES = (
    f"the same Mamba (1 layer of width 16), sequences, settings; truncated: gradients of the last {WINDOW:,}",
    "tokens, the state carried through all; by chance 50 % and 0.693 nats; dt starts at 5e-7 to 2e-6, the",
    "eps of AdamW is 1e-15; a run ends at a test loss below 0.1, else after 800 steps; there are two",
    "sequences, one for each cue, so those of the test are those of training",
)


@dataclass(frozen=True, kw_only=True)
class DependencyConfig(FreshConfig):
    """All settings of a run."""

    KINDS = ("language",)
    EPOCHS: ClassVar[float] = 1.0

    length: int = setting(LENGTH, "Tokens between the cue and the question.")
    rare: float = setting(0.0, "Probability of another token among them.")
    chunk: int = setting(8192, "Tokens per chunk.")
    window: int = setting(0, "Tokens of the truncated gradient; 0 = exact.")
    batch_size: int = setting(2, "Sequences per step, as many of each cue.")
    test_examples: int = setting(16, "Test sequences.")


class DependencyRun(Run[DependencyConfig]):
    """Trains a language model to answer with the first token of a sequence."""

    verb = "reproduce"
    settings = DependencyConfig
    valid_unit, unit, item = "nats/answer", "nats per answer", "answers"
    score: str = "accuracy"
    scores: Mapping[str, str] = {"valid_accuracy": "accuracy"}

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that resumes a run."""
        return "the same command"

    def prepare(self) -> tuple[Model, int, int]:
        """Make the model."""
        self.model = cast(LanguageModel, make_model(self.config, 6))
        return self.model, 0, 1

    def describe(self) -> tuple[str, str]:
        """Return the training data and the batch, as text."""
        config = self.config
        data = f"two cues, each with {config.length:,} tokens before the question"
        return data, count(config.batch_size, "sequence")

    def batch(self, step: int) -> list[tuple[Examples, int]]:
        """Return the sequences of a step."""
        return [(self._make(step, self.config.batch_size), self.config.batch_size)]

    def loss(self, model: LanguageModel, part: Examples) -> Tensor:
        """Return the mean nats of an answer."""
        ids, targets = part
        config, state = self.config, None
        if config.window:
            before = ids.shape[1] - config.window
            _, state = model.prefill(ids[:, :before], chunk_size=config.chunk)
            ids, targets = ids[:, before:], targets[:, before:]
        labels = torch.cat([torch.full_like(targets[:, :1], IGNORED), targets], 1)
        return chunked_loss(model, ids, labels, chunk=config.chunk, state=state)[0]

    @cached_property
    def fingerprint(self) -> str:
        """The sequences follow from the settings."""
        return str(self._make(-1, 2).ids.sum().item())

    def report(self, signals: StopSignals) -> None:
        """Validate if it is due, and stop once the answers are learnt."""
        super().report(signals)
        rows = [row for row in self.metrics.records if "valid_accuracy" in row]
        here = self.trainer.step_number
        if rows and rows[-1]["step"] == here and rows[-1]["valid_loss"] < ENOUGH:
            self.trainer.total = here

    @torch.inference_mode()
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return loss and accuracy of the test answers."""
        test = self._make(-1, self.config.test_examples)
        right = accuracy(self.model, test, self.config.chunk)
        self.say(f"accuracy {right:.1%}")
        return {"valid_loss": self.loss(self.model, test).item(), "valid_accuracy": right}

    def _make(self, step: int, n: int) -> Examples:
        """Return the sequences of a step, or those of the test if it is -1."""
        generator = torch.Generator().manual_seed((self.config.seed << 32) + step + 1)
        return distant(n, generator, self.config.length, self.config.rare)


def run(plan: Plan) -> dict[str, Any]:
    """Return the losses and accuracies of exact and truncated gradients.

    Args:
        plan: where, and how much.
    """
    length = QUICK_LENGTH if plan.quick else LENGTH
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for name, window in SYSTEMS.items():
            config = DependencyConfig.from_dict({**SHARED, "length": length, "window": window, "seed": seed})
            directory = plan.train(seeded(f"long-dependency-{name}", seed), config, DependencyRun)
            runs[name].append({"seed": seed, "minutes": minutes(directory), **_curves(directory)})
    report = {
        "experiment": plan.name,
        "reduced": NO_RESULT if plan.quick else "" if plan.full else "one seed",
        "length": length,
        "notes": list(NOTES),
        "machine": plan.machine,
        "runs": runs,
    }
    plan.save(report, lambda path: _plot(report, path))
    return report


def _curves(directory: Path) -> dict[str, Any]:
    """Return what a run recorded: steps, losses, and the accuracy by step."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    tested = [row for row in records if "valid_accuracy" in row]
    return {
        "loss": [row["loss"] for row in records if "loss" in row],
        "accuracy": {row["step"]: 100 * row["valid_accuracy"] for row in tested},
        "test_loss": tested[-1]["valid_loss"],
    }


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    lines = [
        f"a cue, {report['length']:,} tokens, the question:",
        f"{'gradients':<12}{'accuracy':>10}{'nats':>10}{'steps':>8}{'minutes':>9}",
    ]
    for name, rows in report["runs"].items():
        for row in rows:
            last = list(row["accuracy"].values())[-1]
            cells = f"{last:>8.0f} %{row['test_loss']:>10.4f}{len(row['loss']):>8}{row['minutes']:>9.1f}"
            lines.append(f"{name:<12}{cells}" + (f"  seed {row['seed']}" if len(rows) > 1 else ""))
    reduced = [f"reduced: {report['reduced']}"] if report["reduced"] else []
    return "\n".join([*lines, *reduced, *report["notes"]])


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draw the loss, and the accuracy, by step."""
    figure = new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for (name, rows), colour, marker in zip(report["runs"].items(), COLOURS, MARKERS, strict=False):
        for row in rows:
            label = name if row is rows[0] else None
            left.plot(range(1, len(row["loss"]) + 1), row["loss"], color=colour, linewidth=0.9, label=label)
            points = {int(step): value for step, value in row["accuracy"].items()}
            right.plot(list(points), list(points.values()), color=colour, marker=marker, label=label)
    left.set(xlabel="step", ylabel="nats per answer")
    right.axhline(50, color="grey", linewidth=0.8, linestyle="--")
    right.set(xlabel="step", ylabel="accuracy (%); dashed: by chance", ylim=(0, 105))
    for ax in (left, right):
        tidy(ax)
    right.legend(frameon=False, title="gradients")
    save_figure(figure, path, reduced_note(report))
