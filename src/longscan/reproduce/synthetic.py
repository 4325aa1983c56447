"""Small language models trained on synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.checkpoints.load import load
from longscan.core.config import count
from longscan.core.random import EpochOrder
from longscan.core.runtime import StopSignals
from longscan.data.expressions import arithmetic, brackets, parity
from longscan.data.synthetic import (
    IGNORED,
    Examples,
    copying,
    distinct,
    induction,
    mqar,
    recall,
    selective,
)
from longscan.evaluation.classification import accuracy
from longscan.models import LanguageModel, Model
from longscan.reproduce.experiment import Plan
from longscan.training.build import make_model
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["MAKERS", "SyntheticConfig", "SyntheticRun", "train_and_measure"]

MAKERS: dict[str, Callable[..., Examples]] = {
    make.__name__: make
    for make in (recall, induction, mqar, selective, copying, parity, arithmetic, brackets)
}


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig(FreshConfig):
    """All settings of a run on a synthetic task."""

    KINDS = ("language",)
    EPOCHS: ClassVar[float] = 1.0

    task: Literal[
        "recall", "induction", "mqar", "selective", "copying", "parity", "arithmetic", "brackets"
    ] = setting("recall", "The task.")
    vocab_size: int = setting(10, "Tokens.")
    length: int = setting(20, "Positions before the query.")
    pairs: int | None = setting(None, "Keys of mqar.")
    uneven: bool = setting(False, "Draw the share of zeros of each sequence, for parity.")
    train_examples: int = setting(0, "Training sequences; 0 = new ones at every step.")
    test_examples: int = setting(500, "Test sequences.")
    everywhere: bool = setting(False, "Train on every next token, not on the answers alone.")
    embed_dropout: float = setting(0.0, "Embedding dropout.")
    smoothing: float = setting(0.0, "Label smoothing.")
    batch_size: int = setting(32, "Sequences per step.")
    start: str | None = setting(None, "Model directory to start from; default: random weights.", path=True)
    enough: float | None = setting(None, "Early stopping: at this accuracy in three validations in a row.")

    def make(self, n: int, generator: torch.Generator) -> Examples:
        """Return new sequences of the task.

        Args:
            n: how many.
            generator: randomness.
        """
        more: dict[str, Any] = {} if self.pairs is None else {"pairs": self.pairs}
        more |= {"uneven": True} if self.uneven else {}
        return MAKERS[self.task](n, generator, self.vocab_size, self.length, **more)


class SyntheticRun(Run[SyntheticConfig]):
    """Trains a language model on one task."""

    verb = "reproduce"
    settings = SyntheticConfig
    valid_unit, unit, item = "nats/answer", "nats per answer", "answers"
    score, scores = "accuracy", {"valid_accuracy": "accuracy"}

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that resumes a run."""
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
        """Return the training data and the batch, as text."""
        config = self.config
        of = f"of {config.train_examples:,}" if config.train_examples else "new at every step"
        data = f"{config.task}, {self.test.ids.shape[1]:,} tokens per sequence, {of}"
        return data, count(config.batch_size, "sequence")

    def batch(self, step: int) -> list[tuple[Examples, int]]:
        """Return the sequences of a step."""
        config = self.config
        if self.train is None:
            some = config.make(config.batch_size, torch.Generator().manual_seed(_seed(config.seed, step)))
        else:
            epoch, index = divmod(step, -(-len(self.train.ids) // config.batch_size))
            start = index * config.batch_size
            some = self.train.select(self.orders[epoch][start : start + config.batch_size])
        some = some.everywhere() if config.everywhere else some
        return [(some, int((some.targets != IGNORED).sum()))]

    def loss(self, model: LanguageModel, part: Examples) -> Tensor:
        """Return the mean nats of an answer."""
        ids, targets = (tensor.to(self.config.device) for tensor in part)
        x = ops.dropout(model.backbone.embedding(ids), self.config.embed_dropout, model.training)
        hidden, _ = model.backbone.mix(x)
        answers = targets != IGNORED
        if not self.config.smoothing:
            return model.token_losses(hidden[answers], targets[answers]).mean()
        logits = model.head(hidden[answers])[:, : self.config.vocab_size]
        return F.cross_entropy(logits.float(), targets[answers], label_smoothing=self.config.smoothing)

    @cached_property
    def fingerprint(self) -> str:
        """The sequences: they follow from the settings."""
        return str(self.test.ids.sum().item())

    def report(self, signals: StopSignals) -> None:
        """Validate if it is due, and stop early if the accuracy says so."""
        super().report(signals)
        enough, here = self.config.enough, self.trainer.step_number
        if enough is not None and self.metrics.has(here, "valid_accuracy"):
            shares = [row["valid_accuracy"] for row in self.metrics.records if "valid_accuracy" in row]
            if len(shares) >= 3 and min(shares[-3:]) >= enough:
                self.trainer.total = here

    @torch.inference_mode()
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return loss and accuracy of the test answers."""
        right = accuracy(self.model, self.test)
        self.say(f"accuracy {right:.1%}")
        return {"valid_loss": self.loss(self.model, self.test).item(), "valid_accuracy": right}


def train_and_measure(plan: Plan, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the test accuracy of a model on a task, trained now or earlier.

    Args:
        plan: where.
        name: of the run's directory in `plan.out`.
        fields: of SyntheticConfig.

    Returns:
        "accuracy" in percent, and what `Plan.cached_measurement` adds.
    """
    config = SyntheticConfig.from_dict(dict(fields))
    directory = plan.train(name, config, SyntheticRun)
    model, _ = load(directory / "model")
    draw = torch.Generator().manual_seed(_seed(config.seed, -1))
    test = distinct(config.make, config.train_examples + config.test_examples, draw)
    test = test.select(torch.arange(config.test_examples))

    def score() -> dict[str, Any]:
        return {"accuracy": 100 * accuracy(model, test)}

    return plan.cached_measurement(directory, model, "test", score)


def _seed(seed: int, step: int) -> int:
    """Return the seed of a step's sequences; of the fixed ones if the step is -1."""
    return (seed << 32) + step + 1
