"""The engine under `longscan train`: optimizer steps, and checkpoints from which a run goes on bit for bit.

Everything random is a function of the seed and the step number, so a checkpoint is the weights, the moments
of AdamW, torch's random state and one integer. Nothing is pickled: tensors in safetensors, the rest in JSON.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.errors import LongscanError
from longscan.files import atomic_directory, read_json, write_json
from longscan.models import LanguageModel
from longscan.recipe import TrainConfig

__all__ = ["Checkpoints", "DivergedError", "StepReport", "Trainer", "learning_rate"]


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of one step: linear warm-up to `lr`, then a cosine down to `final_lr`.

    Args:
        config: the run.
        step: steps done so far, from 0.
        total: steps in the run.

    Returns:
        The rate for the step after `step`.
    """
    warmup = min(config.warmup, total // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step + 1 - warmup) / (total - warmup)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2


class DivergedError(LongscanError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like; `loss` in nats per token."""

    step: int
    loss: float
    lr: float
    grad_norm: float


class Trainer:
    """A model, its optimizer and the number of steps done: all that changes while training.

    Args:
        model: the model; its parameters are updated in place.
        config: the run.
        total: steps in the whole run, for the learning rate.
        batch: step number -> ids (batch_size * accumulate, seq_len + 1), the same ids whenever it is asked.
    """

    def __init__(
        self, model: LanguageModel, config: TrainConfig, total: int, batch: Callable[[int], Tensor]
    ) -> None:
        self.model, self.config, self.total, self.batch = model, config, total, batch
        self.step_number = 0  # steps done
        self.optimizer = torch.optim.AdamW(
            model.param_groups(config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
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
        config = self.config
        rate = learning_rate(config, self.step_number, self.total)
        ids = self.batch(self.step_number).to(config.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in torch.split(ids, config.batch_size):
            output = self.model(part, labels=part, return_logits=False)
            (output.loss / config.accumulate).backward()
            loss += output.loss.item() / config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            raise DivergedError(f"{what} at step {self.step_number + 1} (learning rate {rate:.2g}).")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_number += 1
        return StepReport(self.step_number, loss, rate, norm)

    def save(self, directory: Path) -> None:
        """Write weights, optimizer and random state into an existing directory.

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
        save_file({**moments, "random_state": torch.get_rng_state()}, directory / "optimizer.safetensors")

    def load(self, directory: Path, step: int) -> None:
        """Take over what `save` wrote.

        Args:
            directory: a directory filled by `save`.
            step: the number of steps done when it was.

        Raises:
            LongscanError: the tensors are not those of this model.
        """
        weights = load_file(directory / "model.safetensors")
        moments = load_file(directory / "optimizer.safetensors")
        torch.set_rng_state(moments.pop("random_state"))
        parameters = dict(self.model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
            raise LongscanError(f"{directory} holds the weights of another model than this run's.")
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
                state = {"format": 1, "step": trainer.step_number, "sha256": hashes, **extra}
                write_json(directory / "state.json", state)
        except (OSError, SafetensorError) as error:
            raise LongscanError(f"checkpoint {target} could not be written: {error}.") from error
        self._prune()
        return target

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole.

        Args:
            warn: receives a line for each checkpoint that had to be passed over.

        Returns:
            Its directory and its state, or None if the run has none yet.

        Raises:
            LongscanError: there are some, but none is whole.
        """
        for directory in self._directories():
            try:
                state = read_json(directory / "state.json")
                for name in self.FILES:
                    if _sha256(directory / name) != state["sha256"][name]:
                        raise LongscanError(f"{name} is damaged (its hash is not the recorded one).")
                if state["step"] != self.step_of(directory):
                    raise LongscanError("it records another step than its name says.")
            except (OSError, LongscanError, KeyError, TypeError) as error:
                warn(f"skipping checkpoint {directory}: {error}")
                continue
            return directory, state
        if self._directories():
            raise LongscanError(
                f"no checkpoint in {self.root} is whole. Delete that folder to begin the run again."
            )
        return None

    def sweep(self, step: int) -> None:
        """Remove what a killed process left half-written or half-removed, and what lies after a step.

        Args:
            step: the last one to keep, from which the run goes on. Only for the process that holds the lock.
        """
        later = [path for path in self._directories() if self.step_of(path) > step]
        for path in [*self.root.glob(".step-*"), *later]:
            shutil.rmtree(path, ignore_errors=True)
        self._prune()

    @staticmethod
    def step_of(directory: Path) -> int:
        """Return the step in a checkpoint's name."""
        return int(directory.name.removeprefix("step-"))

    def _prune(self) -> None:
        """Drop the oldest."""
        for old in self._directories()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _directories(self) -> list[Path]:
        """Return the checkpoint directories, newest first."""
        found = [path for path in self.root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=self.step_of, reverse=True)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
