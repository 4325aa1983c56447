"""What a kind of training run trains on what: the base class of `Run` that every task fills in."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from longscan.checkpoints.save import save
from longscan.core.progress import Display
from longscan.core.random import VERSION
from longscan.core.runtime import StopSignals
from longscan.models import Model
from longscan.tokenizers.base import Tokenizer
from longscan.training.config import RunConfig
from longscan.training.distributed import Group
from longscan.training.replicas import Replica, replica
from longscan.training.trainer import Trainer

__all__ = ["Task"]

C = TypeVar("C", bound=RunConfig)


class Task(ABC, Generic[C]):
    """Data, model, loss and validation of a training run.

    A subclass names its settings and its verb. All random numbers of its `batch` and `loss` are a function of
    the seed and the step: `batch` takes care of that itself, and for `loss` the trainer seeds torch at every
    step.
    """

    directory: Path  # the run's
    config: C
    display: Display
    group: Group  # the processes of the run
    trainer: Trainer

    verb: ClassVar[str]  # the verb that resumes the run: "train"
    settings: type[C]
    valid_key: ClassVar[str] = "valid_loss"  # the metric that progress shows
    valid_unit: str = "nats/token"
    unit: str = "nats per token"  # of the losses
    item: str = "tok"  # the unit of the throughput
    score: str = ""  # the label of the second axes of loss.png, and
    scores: Mapping[str, str] = {}  # the metrics on them, each with a name
    trained_on: ClassVar[tuple[str, ...]] = ()  # files in the run's directory, which the fingerprint covers
    tokenizer: Tokenizer | None = None  # exported with the model
    average: float = 0.0  # decay of the moving average of the weights, see `Trainer`
    carried: Mapping[str, Tensor] = {}  # what `loss` hands from step to step, see `Trainer`

    @abstractmethod
    def prepare(self) -> tuple[Model, int, int]:
        """Return the new model, after making or loading the data and the tokenizer.

        Returns:
            The model, on its device; the items per epoch; and the items per step.
        """

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step: "5 texts, 1 held out" and "2 texts"."""

    @abstractmethod
    def batch(self, step: int) -> Sequence[tuple[Any, int | tuple[int, ...]]]:
        """Return the parts of a step, and the number of items in each term of their loss; see `Trainer`."""

    @abstractmethod
    def loss(self, model: Any, part: Any) -> Tensor:
        """Return the mean loss of a part's tokens, a scalar; or the vector of its terms."""

    def advanced(self, done: int, total: int, what: str = "next step") -> None:
        """Called by a `loss` or a validation that takes minutes, in between: shows how far it is.

        Args:
            done: chunks so far, from 1.
            total: all chunks.
            what: they are of.

        Raises:
            UnfinishedError: a signal has arrived, and the rest would take long.
        """

    def resolved(self, config: C) -> C:
        """Return settings in which a default that depends on the model has its value; `prepare` came before.

        Args:
            config: the settings.
        """
        return config

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training data: a run resumes only with the same data."""
        digest = hashlib.sha256(f"order {VERSION}".encode())
        for name in self.trained_on:
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def export(self, directory: Path) -> None:
        """Save the model of the last step, not of the best validation."""
        assert self.trainer.replica.plain is not None
        save(self.trainer.replica.plain, directory, self.tokenizer)

    @property
    def n_parameters(self) -> int:
        """The size of the model, as it is shown."""
        return self.trainer.model.num_parameters()

    @classmethod
    def timeout(cls, config: C) -> float | None:
        """The seconds that its processes wait for each other; None if it trains in one process only."""
        return None

    @classmethod
    def context_size(cls, config: C) -> int:
        """The number of processes that share a sequence."""
        return 1

    @property
    def sharded(self) -> bool:
        """Whether each process has a share of the model only."""
        return False

    def replicate(self, model: Model) -> Replica:
        """Return the model as this process trains it.

        Args:
            model: the model, the same in all processes.
        """
        return replica(model, self.group, self.sharded)

    @property
    def n_checkpoints(self) -> int:
        """The number of checkpoints to retain."""
        return 2

    @property
    def validates(self) -> bool:
        """Whether there is held-out data."""
        return True

    @abstractmethod
    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return the metrics of the model on held-out data.

        Args:
            signals: to be checked now and then.
            last: whether the training is over: then on all of the data, else on a part.

        Returns:
            The metrics, `valid_key` among them; None if a signal arrived.
        """

    def remark(self, metrics: Mapping[str, Any]) -> str:
        """Return what else is shown of a validation.

        Args:
            metrics: of `validate`.
        """
        return ""

    def say(self, text: str) -> None:
        """Show a line that starts with the step."""
        self.display.line(f"step {self.trainer.step_number:,}: {text}")
