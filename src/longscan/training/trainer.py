"""Optimizer steps, and checkpoints from which a run resumes bit-exactly.

Everything random is a function of the seed and the step number, so a checkpoint is the weights, what else the
model accumulates (the statistics of batch norms), the moments of AdamW, the moving average of the weights if
there is one, and one integer. Nothing is pickled: tensors are stored in safetensors, the rest in JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.errors import LongscanError, UsageError
from longscan.models import Model
from longscan.models.common.lora import adapted
from longscan.training.config import RunConfig
from longscan.training.replicas import Replica
from longscan.training.schedule import learning_rate, slow_rate

__all__ = ["DivergedError", "StepReport", "Trainer", "TrainerState", "UnfinishedError", "step_seed"]

AVERAGE = "average"  # the key of an averaged weight in a checkpoint, beside those of AdamW
CARRIED = "carried"  # what the keys of a carried state begin with


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's random numbers, such as dropout, independent of all earlier steps.

    Args:
        seed: the run's.
        step: steps done so far, from 0.

    Returns:
        63 bits that two steps or runs are unlikely to share.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1


def _groups(model: Model, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: those of the model, and the slow ones, without weight decay."""
    slow_ids = {id(parameter) for parameter in model.slow()}
    groups = [{**group, "slow": False} for group in model.param_groups(weight_decay)]
    slow = [p for group in groups for p in group["params"] if id(p) in slow_ids]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in slow_ids]
    return [*groups, {"params": slow, "weight_decay": 0.0, "slow": True}] if slow else groups


class DivergedError(LongscanError):
    """The loss or the gradient is not finite."""


class UnfinishedError(LongscanError):
    """A signal ended a step before the optimizer's update; weights and carried state are those before it."""


@dataclass(frozen=True)
class StepReport:
    """The metrics of one optimizer step; `loss` in nats per token, `tokens` the number predicted."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds; `weights` and `moments` by name, the latter with AdamW's keys."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]

    def save(self, directory: Path) -> None:
        """Save weights and moments to an existing directory.

        Args:
            directory: receives `model.safetensors` and `optimizer.safetensors`.
        """
        save_file(self.weights, directory / "model.safetensors", metadata={"format": "pt"})
        save_file(self.moments, directory / "optimizer.safetensors")


class Trainer:
    """A model, its optimizer and the number of steps done: all that changes during training.

    Args:
        model: the model; its parameters are updated in place.
        config: the run.
        total: steps in the whole run, for the learning rate.
        batch: step number -> the parts of its batch and how many tokens each predicts; deterministic.
        loss: model, part -> the mean loss per token; a step minimises the mean over the tokens of all parts.
            A loss that is a sum of means over different items is the vector of its terms; `batch` then
            returns the number of items of each term for each part, tokens first.
        average: decay of the exponential moving average of the weights, and of the statistics of batch norms,
            which is lower in the first steps: at most (1 + step) / (10 + step); 0 for no average.
        carried: what else the loss hands from step to step, by name, such as a state; overwritten in place.
        replica: the model as this process trains it beside others; alone if None. `batch` then returns what
            this process takes.

    Raises:
        UsageError: the schedule is noam and the model has no d_model.
    """

    def __init__(
        self,
        model: Model,
        config: RunConfig,
        total: int,
        batch: Callable[[int], Sequence[tuple[Any, int | tuple[int, ...]]]],
        loss: Callable[[Any, Any], Tensor],
        average: float = 0.0,
        carried: Mapping[str, Tensor] | None = None,
        replica: Replica | None = None,
    ) -> None:
        self.replica = replica or Replica(model)
        self.group = self.replica.group
        self.model, self.config, self.total, self.batch, self.loss = model, config, total, batch, loss
        self.d_model = model.config.to_dict().get("d_model")
        if config.schedule == "noam" and self.d_model is None:
            raise UsageError("--schedule noam: expected a model with a d_model, this one has none.")
        self.step_number = 0  # steps done
        self.earlier: list[tuple[int, int]] = []  # see `read_earlier`
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,  # one pass over memory; elementwise, so the bits do not depend on the threads
        )
        self.carried = {f"{CARRIED}.{name}": tensor for name, tensor in (carried or {}).items()}
        self.decay = average
        self.average = {name: x.detach().clone() for name, x in self.tensors.items()} if average else {}

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.step_number >= self.total

    def step(self) -> StepReport:
        """Do one optimizer step.

        Returns:
            Its metrics.

        Raises:
            DivergedError: the loss or the gradient is not finite; the weights are those before the step.
            UnfinishedError: the loss raises it.
        """
        carried = {name: tensor.clone() for name, tensor in self.carried.items()}
        try:
            return self._step()
        except UnfinishedError:
            self.optimizer.zero_grad(set_to_none=True)
            for name, tensor in carried.items():
                self.carried[name].copy_(tensor)
            raise

    def _step(self) -> StepReport:
        """Do one optimizer step; see `step`."""
        length = next((total for until, total in self.earlier if self.step_number < until), self.total)
        rate = learning_rate(self.config, self.step_number, length, self.d_model or 1)
        parts = [(part, torch.tensor(count).reshape(-1)) for part, count in self.batch(self.step_number)]
        totals = self.group.total(torch.stack([counts for _, counts in parts]).sum(0))
        torch.manual_seed(step_seed(self.config.seed, self.step_number) ^ self.group.rank)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for number, (part, counts) in enumerate(parts, 1):
            with self.replica.passing(last=number == len(parts)):
                terms = self.loss(self.replica.module, part).reshape(-1)
                loss = (terms * (counts / totals.clamp(min=1)).to(terms)).sum()
                loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.item()
        mean = self.group.total(torch.tensor(mean, dtype=torch.float64)).item()
        norm = self.replica.clip(self.config.clip)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            what = f"the loss is {mean}" if not math.isfinite(mean) else f"the gradient's norm is {norm}"
            raise DivergedError(f"{what} at step {self.step_number + 1} (learning rate {rate:.2g}).")
        for group in self.optimizer.param_groups:
            group["lr"] = slow_rate(self.config, rate) if group["slow"] else rate
        self.optimizer.step()
        self.step_number += 1
        self._update_average()
        return StepReport(self.step_number, int(totals[0]), mean, rate, norm)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the averaged weights, if there are any, until the context ends."""
        own = {name: self.tensors[name].detach().clone() for name in self.average}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model."""
        for name, weight in weights.items():
            self.tensors[name].copy_(weight)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the weights."""
        share = 1 - min(self.decay, (1 + self.step_number) / (10 + self.step_number))
        for name, average in self.average.items():
            average.lerp_(self.tensors[name], share)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters, and the buffers that belong to the model's state, by name; each once.

        Of a model with adapters only what is trained: the rest is that of the model they are for.
        """
        if any(True for _ in adapted(self.model)):
            return self.trained
        state = self.model.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in state}
        return {**dict(self.model.named_parameters()), **buffers}

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    def state(self) -> TrainerState:
        """Return weights and optimizer, for `save`: in full, also if processes share them; all call it."""
        collect = self.replica.collect
        weights = {name: collect(tensor.detach()) for name, tensor in self.tensors.items()}
        moments = {
            f"{name}.{key}": collect(value)
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        moments |= {f"{name}.{AVERAGE}": value for name, value in self.average.items()}
        return TrainerState(self.step_number, weights, moments | self.carried)

    def load(self, directory: Path, step: int) -> None:
        """Load what `TrainerState.save` wrote.

        Args:
            directory: a directory filled by it.
            step: the number of steps done then.

        Raises:
            LongscanError: the tensors are not those of this model.
        """
        try:
            weights = load_file(directory / "model.safetensors")
            moments = load_file(directory / "optimizer.safetensors")
        except SafetensorError as error:
            raise LongscanError(f"{directory} is no checkpoint of a run ({error}). Remove it.") from error
        parameters, stored = self.trained, self.tensors
        if _shapes(stored) != _shapes(weights):
            raise LongscanError(f"{directory} holds the weights of another model than this run's.")
        shapes = _shapes(parameters)
        expected = {
            f"{name}.{key}": shape for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")
        }
        expected |= {f"{name}.{AVERAGE}": shape for name, shape in _shapes(self.average).items()}
        expected |= _shapes(self.carried)
        if {
            name: tuple(t.shape) for name, t in moments.items() if not name.endswith(".step")
        } != expected or any(f"{name}.step" not in moments for name in parameters):
            raise LongscanError(f"{directory} holds the optimizer state of another model than this run's.")
        with torch.no_grad():
            for name, tensor in stored.items():
                tensor.copy_(self.replica.part(weights[name], tensor))
        for name, parameter in parameters.items():
            self.optimizer.state[parameter] = {
                key: self.replica.part(moments[f"{name}.{key}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        for name, average in self.average.items():
            average.copy_(moments[f"{name}.{AVERAGE}"])
        for name, tensor in self.carried.items():
            tensor.copy_(moments[name])
        self.step_number = step


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
