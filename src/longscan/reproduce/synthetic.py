"""Small language models that are trained on sequences made by rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from longscan import ops
from longscan.checkpoints.load import load
from longscan.core.config import count
from longscan.core.random import EpochOrder
from longscan.core.runtime import Signals
from longscan.data import synthetic as synthetics
from longscan.data.synthetic import IGNORED, Examples, distinct
from longscan.evaluation.classification import accuracy
from longscan.models import LanguageModel, Model
from longscan.reproduce.experiment import Plan
from longscan.training.build import make_model
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["SyntheticConfig", "SyntheticRun", "train_and_measure"]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(FreshConfig):
    """Everything that decides what a model of a synthetic task becomes."""

    KINDS = ("language",)
    EPOCHS: ClassVar[float] = 1.0

    task: Literal["recall", "induction", "selective", "copying"] = setting("recall", "Which sequences.")
    vocab_size: int = setting(10, "Tokens.")
    length: int = setting(20, "Places before what is asked.")
    train_examples: int = setting(0, "Sequences trained on; 0 = new ones at every step.")
    test_examples: int = setting(500, "Sequences measured on.")
    everywhere: bool = setting(False, "Train on every next token, not on the answers alone.")
    embed_dropout: float = setting(0.0, "Share of the embeddings that is left out.")
    batch_size: int = setting(32, "Sequences in a step.")
    start: str | None = setting(None, "Model directory to begin with, not at random.", path=True)
    enough: float | None = setting(
        None, "Stop once this share of the answers was right in three measurements in a row."
    )

    def make(self, n: int, generator: torch.Generator) -> Examples:
        """Make sequences of the task.

        Args:
            n: how many.
            generator: randomness.
        """
        return cast(Examples, getattr(synthetics, self.task)(n, generator, self.vocab_size, self.length))


class SyntheticRun(Run[SyntheticConfig]):
    """Trains a language model on one task."""

    verb = "reproduce"
    settings = SyntheticConfig
    valid_unit, unit, item = "nats/answer", "nats per answer", "answers"
    score, scores = "accuracy", {"valid_accuracy": "accuracy"}

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that goes on with a run."""
        return "the same command"

    def prepare(self) -> tuple[Model, int, int]:
        """Make the sequences and the model."""
        config = self.config
        draw = torch.Generator().manual_seed(_seed(config.seed, -1))
        examples = distinct(config.make, config.train_examples + config.test_examples, draw)
        rows = torch.arange(len(examples.ids))
        self.test = examples.select(rows[: config.test_examples])
        self.train = examples.select(rows[config.test_examples :]) if config.train_examples else None
        n = config.train_examples
        self.orders = EpochOrder(config.seed, lambda stream: torch.from_numpy(stream.permutation(n)))
        self.model = cast(LanguageModel, make_model(config, config.vocab_size))
        if config.start is not None:
            self.model.load_state_dict(load(config.start)[0].state_dict())
        return self.model, -(-config.train_examples // config.batch_size), 1

    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it."""
        config = self.config
        of = f"of {config.train_examples:,}" if config.train_examples else "new at every step"
        data = f"{config.task}, {self.test.ids.shape[1]:,} tokens a sequence, {of}"
        return data, count(config.batch_size, "sequence")

    def batch(self, step: int) -> list[tuple[Examples, int]]:
        """Return the sequences of a step."""
        config = self.config
        if self.train is None:
            some = config.make(config.batch_size, torch.Generator().manual_seed(_seed(config.seed, step)))
        else:
            epoch, place = divmod(step, -(-len(self.train.ids) // config.batch_size))
            start = place * config.batch_size
            some = self.train.select(self.orders[epoch][start : start + config.batch_size])
        some = some.everywhere() if config.everywhere else some
        return [(some, int((some.targets != IGNORED).sum()))]

    def loss(self, model: LanguageModel, part: Examples) -> Tensor:
        """Return the mean nats of an answer."""
        ids, targets = (tensor.to(self.config.device) for tensor in part)
        x = ops.dropout(model.backbone.embedding(ids), self.config.embed_dropout, model.training)
        hidden, _ = model.backbone.mix(x)
        asked = targets != IGNORED
        return model.token_losses(hidden[asked], targets[asked]).mean()

    @cached_property
    def fingerprint(self) -> str:
        """The sequences: they follow from the settings."""
        return str(self.test.ids.sum().item())

    def report(self, signals: Signals) -> None:
        """Measure if it is due, and end the run if that was enough."""
        super().report(signals)
        enough, here = self.config.enough, self.trainer.step_number
        if enough is not None and self.metrics.has(here, "valid_accuracy"):
            shares = [found["valid_accuracy"] for found in self.metrics.records if "valid_accuracy" in found]
            if len(shares) >= 3 and min(shares[-3:]) >= enough:
                self.trainer.total = here

    @torch.inference_mode()
    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure the answers."""
        right = accuracy(self.model, self.test)
        self.say(f"accuracy {right:.1%}")
        return {"valid_loss": self.loss(self.model, self.test).item(), "valid_accuracy": right}


def train_and_measure(plan: Plan, place: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model on a task unless it is trained, and measure it on the task's test.

    Args:
        plan: where.
        place: the run's directory in `plan.out`.
        fields: of SyntheticConfig.

    Returns:
        "accuracy" in percent, and what `Plan.remember` adds.
    """
    config = SyntheticConfig.from_dict(dict(fields))
    directory = plan.train(place, config, SyntheticRun)
    model, _ = load(directory / "model")
    draw = torch.Generator().manual_seed(_seed(config.seed, -1))
    test = distinct(config.make, config.train_examples + config.test_examples, draw)
    test = test.select(torch.arange(config.test_examples))
    return plan.remember(directory, model, "test", lambda: {"accuracy": 100 * accuracy(model, test)})


def _seed(seed: int, step: int) -> int:
    """Return the seed of a step's sequences; of the fixed ones if the step is -1."""
    return (seed << 32) + step + 1
