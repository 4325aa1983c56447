"""The engine under every training: optimizer steps, and checkpoints from which a run goes on bit for bit.

Everything random is a function of the seed and the step number, so a checkpoint is the weights, the moments
of AdamW and one integer. Nothing is pickled: tensors in safetensors, the rest in JSON.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.errors import LongscanError, UsageError
from longscan.files import atomic_directory, read_json, write_json
from longscan.models import Model
from longscan.recipe import RunConfig

__all__ = [
    "Checkpoints",
    "DivergedError",
    "StepReport",
    "Trainer",
    "learning_rate",
    "slow_rate",
    "step_seed",
]


def learning_rate(config: RunConfig, step: int, total: int, d_model: int = 1) -> float:
    """Return the learning rate of one step.

    Cosine and linear rise to `lr` in `warmup` steps and fall to `final_lr`. Noam, of "Attention Is All You
    Need" (Vaswani et al. 2017), section 5.3, is lr d_model^-1/2 min(s^-1/2, s warmup^-3/2), s from 1.

    Args:
        config: the run.
        step: steps done so far, from 0.
        total: steps in the run.
        d_model: width of the model; only noam asks.

    Returns:
        The rate for the step after `step`.
    """
    if config.schedule == "noam":
        rise = (step + 1) * max(config.warmup, 1) ** -1.5
        return float(config.lr * d_model**-0.5 * min((step + 1) ** -0.5, rise))
    warmup = min(config.warmup, total // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step + 1 - warmup) / (total - warmup)
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (config.lr - config.final_lr) * left


def step_seed(seed: int, step: int) -> int:
    """Return the seed of all that a step draws, such as dropout: it depends on nothing that came before.

    Args:
        seed: the run's.
        step: steps done so far, from 0.

    Returns:
        63 bits that no two steps or runs are likely to share.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1


def slow_rate(config: RunConfig, rate: float) -> float:
    """Return the rate of A, B and dt: as their papers train them, by the same schedule up to min(ssm_lr, lr).

    S4's appendix and official code give them min(0.001, lr) and no weight decay (Gu et al. 2021).

    Args:
        config: the run.
        rate: of all other parameters; under noam, where lr is a factor, ssm_lr bounds it.
    """
    if config.schedule == "noam":
        return min(rate, config.ssm_lr)
    return rate * min(1.0, config.ssm_lr / config.lr)


def _groups(model: Model, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters for AdamW as `Model.param_groups`, those apart that learn slowly; they do not decay."""
    apart = {id(parameter) for parameter in model.slow()}
    groups = [{**group, "slow": False} for group in model.param_groups(weight_decay)]
    slow = [p for group in groups for p in group["params"] if id(p) in apart]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in apart]
    return [*groups, {"params": slow, "weight_decay": 0.0, "slow": True}] if slow else groups


class _OtherFormatError(LongscanError):
    """A checkpoint is of another version."""


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


class Checkpoints:
    """The directory of a run's checkpoints: complete or absent, checked by hash, the newest few kept.

    Args:
        root: the directory; created with the first checkpoint.
        keep: how many to keep.
    """

    FILES = ("model.safetensors", "optimizer.safetensors")
    FORMAT = 2  # 1 kept torch's random state, which said nothing before the first checkpoint

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, keep

    def save(self, trainer: Trainer, extra: dict[str, Any]) -> Path:
        """Write a checkpoint of the present step and drop the oldest.

        Args:
            trainer: what to save.
            extra: JSON values to be found again in the state.

        Returns:
            The checkpoint's directory.

        Raises:
            LongscanError: it could not be written, for example because the disk is full.
        """
        target = self.root / f"step-{trainer.step_number:06d}"
        try:
            with atomic_directory(target) as directory:
                trainer.save(directory)
                hashes = {name: _sha256(directory / name) for name in self.FILES}
                state = {"format": self.FORMAT, "step": trainer.step_number, "sha256": hashes, **extra}
                write_json(directory / "state.json", state)
        except OSError as error:
            raise LongscanError(f"checkpoint {target} could not be written: {error.strerror}.") from error
        self._prune()
        return target

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole.

        Args:
            warn: receives a line for each checkpoint that had to be passed over.

        Returns:
            Its directory and its state, or None if the run has none yet.

        Raises:
            LongscanError: there are some, but none is whole, or one is of another version of longscan.
        """
        for directory in self.directories():
            try:
                state = read_json(directory / "state.json")
                if "format" in state and state["format"] != self.FORMAT:
                    raise _OtherFormatError(
                        f"{directory}: expected a checkpoint of format {self.FORMAT}, got "
                        f"{state['format']!r}, which another version of longscan wrote. "
                        "Finish the run with that version, or start anew."
                    )
                for name in self.FILES:
                    if _sha256(directory / name) != state["sha256"][name]:
                        raise LongscanError(f"{name} is damaged (its hash is not the recorded one).")
                if state["step"] != self.step_of(directory):
                    raise LongscanError("it records another step than its name says.")
            except _OtherFormatError:
                raise
            except (OSError, LongscanError, KeyError, TypeError) as error:
                warn(f"skipping checkpoint {directory}: {error}")
                continue
            return directory, state
        if self.directories():
            raise LongscanError(
                f"no checkpoint in {self.root} is whole. Delete that folder to begin the run again."
            )
        return None

    def sweep(self, step: int) -> None:
        """Remove what a killed process left half-written or half-removed, and what lies after a step.

        Args:
            step: the last one to keep, from which the run goes on. Only for the process that holds the lock.
        """
        later = [path for path in self.directories() if self.step_of(path) > step]
        for path in [*self.root.glob(".step-*"), *later]:
            shutil.rmtree(path, ignore_errors=True)
        self._prune()

    @staticmethod
    def step_of(directory: Path) -> int:
        """Return the step in a checkpoint's name."""
        return int(directory.name.removeprefix("step-"))

    def _prune(self) -> None:
        """Drop the oldest."""
        for old in self.directories()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def directories(self) -> list[Path]:
        """Return those there are, newest first."""
        found = [path for path in self.root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=self.step_of, reverse=True)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
