"""The engine under every training: optimizer steps, and checkpoints from which a run goes on bit for bit.

Everything random is a function of the seed and the step number, so a checkpoint is the weights, the moments
of AdamW and one integer. Nothing is pickled: tensors in safetensors, the rest in JSON.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.errors import LongscanError, UsageError
from longscan.models import Model
from longscan.training.config import RunConfig
from longscan.training.schedule import learning_rate, slow_rate

__all__ = ["DivergedError", "StepReport", "Trainer", "step_seed"]


def step_seed(seed: int, step: int) -> int:
    """Return the seed of all that a step draws, such as dropout: it depends on nothing that came before.

    Args:
        seed: the run's.
        step: steps done so far, from 0.

    Returns:
        63 bits that no two steps or runs are likely to share.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1


def _groups(model: Model, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters for AdamW as `Model.param_groups`, those apart that learn slowly; they do not decay."""
    apart = {id(parameter) for parameter in model.slow()}
    groups = [{**group, "slow": False} for group in model.param_groups(weight_decay)]
    slow = [p for group in groups for p in group["params"] if id(p) in apart]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in apart]
    return [*groups, {"params": slow, "weight_decay": 0.0, "slow": True}] if slow else groups


class DivergedError(LongscanError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like; `loss` in nats per token, `tokens` predicted in it."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float


class Trainer:
    """A model, its optimizer and the number of steps done: all that changes while training.

    Args:
        model: the model; its parameters are updated in place.
        config: the run.
        total: steps in the whole run, for the learning rate.
        batch: step number -> the parts of its batch and how many tokens each predicts; the same parts
            whenever it is asked.
        loss: model, part -> the mean loss of a token; a step descends the mean over the tokens of all parts.
            A loss that is a sum of means over different things is the vector of its terms, and `batch` then
            says of each part how many things each term means, the tokens first.

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
    ) -> None:
        self.model, self.config, self.total, self.batch, self.loss = model, config, total, batch, loss
        self.d_model = model.config.to_dict().get("d_model")
        if config.schedule == "noam" and self.d_model is None:
            raise UsageError("--schedule noam: expected a model with a d_model, this one has none.")
        self.step_number = 0  # steps done
        self.earlier: list[tuple[int, int]] = []  # until which step the run was to have how many in all
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,  # one pass over memory; elementwise, so the bits do not depend on the threads
        )

    @property
    def done(self) -> bool:
        """Whether the last step is behind."""
        return self.step_number >= self.total

    def step(self) -> StepReport:
        """Do one optimizer step.

        Returns:
            What happened.

        Raises:
            DivergedError: the loss or the gradient is not finite; the weights are those before the step.
        """
        length = next((total for until, total in self.earlier if self.step_number < until), self.total)
        rate = learning_rate(self.config, self.step_number, length, self.d_model or 1)
        parts = [(part, torch.tensor(count).reshape(-1)) for part, count in self.batch(self.step_number)]
        totals = torch.stack([counts for _, counts in parts]).sum(0)
        torch.manual_seed(step_seed(self.config.seed, self.step_number))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for part, counts in parts:
            terms = self.loss(self.model, part).reshape(-1)
            loss = (terms * (counts / totals.clamp(min=1)).to(terms)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            mean += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if not (math.isfinite(mean) and math.isfinite(norm)):
            what = f"the loss is {mean}" if not math.isfinite(mean) else f"the gradient's norm is {norm}"
            raise DivergedError(f"{what} at step {self.step_number + 1} (learning rate {rate:.2g}).")
        for group in self.optimizer.param_groups:
            group["lr"] = slow_rate(self.config, rate) if group["slow"] else rate
        self.optimizer.step()
        self.step_number += 1
        return StepReport(self.step_number, int(totals[0]), mean, rate, norm)

    def save(self, directory: Path) -> None:
        """Write weights and optimizer into an existing directory.

        Args:
            directory: receives `model.safetensors` and `optimizer.safetensors`.
        """
        save_file(
            {name: parameter.detach() for name, parameter in self.model.named_parameters()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        save_file(moments, directory / "optimizer.safetensors")

    def load(self, directory: Path, step: int) -> None:
        """Take over what `save` wrote.

        Args:
            directory: a directory filled by `save`.
            step: the number of steps done when it was.

        Raises:
            LongscanError: the tensors are not those of this model.
        """
        try:
            weights = load_file(directory / "model.safetensors")
            moments = load_file(directory / "optimizer.safetensors")
        except SafetensorError as error:
            raise LongscanError(f"{directory} is no checkpoint of a run ({error}). Remove it.") from error
        parameters = dict(self.model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
            raise LongscanError(f"{directory} holds the weights of another model than this run's.")
        averages = {
            f"{name}.{key}": shape for name, shape in shapes.items() for key in ("exp_avg", "exp_avg_sq")
        }
        if {
            name: tuple(t.shape) for name, t in moments.items() if not name.endswith(".step")
        } != averages or any(f"{name}.step" not in moments for name in parameters):
            raise LongscanError(f"{directory} holds the optimizer state of another model than this run's.")
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(weights[name])
            self.optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step_number = step
