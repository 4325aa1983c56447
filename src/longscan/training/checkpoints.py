"""Checkpoints of a run: atomic, verified on loading, the newest few retained."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longscan.core.files import atomic_directory, read_json, write_json
from longscan.errors import LongscanError
from longscan.training.trainer import TrainerState

__all__ = ["Checkpoints"]


class OtherFormatError(LongscanError):
    """A checkpoint has the format of another version."""


class Checkpoints:
    """The directory of a run's checkpoints: complete, verified by hash, only the newest few retained.

    Args:
        root: the directory; created with the first checkpoint.
        keep: how many to retain.
    """

    FILES = ("model.safetensors", "optimizer.safetensors")
    FORMAT = 2  # 1 stored torch's random state, which says nothing before the first checkpoint

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, keep

    def save(self, trained: TrainerState, extra: dict[str, Any]) -> Path:
        """Save a checkpoint of a step and delete the oldest.

        Args:
            trained: what to save.
            extra: further JSON values of the state.

        Returns:
            The checkpoint's directory.

        Raises:
            LongscanError: it could not be written, for example because the disk is full.
        """
        target = self.path_of(trained.step)
        try:
            with atomic_directory(target) as directory:
                trained.save(directory)
                hashes = {name: _sha256(directory / name) for name in self.FILES}
                state = {"format": self.FORMAT, "step": trained.step, "sha256": hashes, **extra}
                write_json(directory / "state.json", state)
        except OSError as error:
            raise LongscanError(f"checkpoint {target} could not be written: {error.strerror}.") from error
        self._prune()
        return target

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is intact.

        Args:
            warn: receives a line for each damaged checkpoint.

        Returns:
            Its directory and its state, or None if the run has none yet.

        Raises:
            LongscanError: all of them are damaged, or one is from another version of longscan.
        """
        for directory in self.directories():
            try:
                state = read_json(directory / "state.json")
                if "format" in state and state["format"] != self.FORMAT:
                    raise OtherFormatError(
                        f"{directory}: expected a checkpoint of format {self.FORMAT}, got "
                        f"{state['format']!r}, which another version of longscan wrote. "
                        "Finish the run with that version, or start a new one."
                    )
                for name in self.FILES:
                    if _sha256(directory / name) != state["sha256"][name]:
                        raise LongscanError(f"{name} is damaged (its hash is not the recorded one).")
                if state["step"] != self.step_of(directory):
                    raise LongscanError("its state and its name disagree about the step.")
            except OtherFormatError:
                raise
            except (OSError, LongscanError, KeyError, TypeError) as error:
                warn(f"skipping checkpoint {directory}: {error}")
                continue
            return directory, state
        if self.directories():
            raise LongscanError(
                f"no checkpoint in {self.root} is intact. Delete that directory to start the run again."
            )
        return None

    def sweep(self, step: int) -> None:
        """Remove incomplete checkpoints of a killed process, and those after a step.

        Only the process that holds the lock may call this.

        Args:
            step: the last one to retain, from which the run resumes.
        """
        later = [path for path in self.directories() if self.step_of(path) > step]
        for path in [*self.root.glob(".step-*"), *later]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()  # a lock file
        self._prune()

    def path_of(self, step: int) -> Path:
        """Return the directory of the checkpoint of a step."""
        return self.root / f"step-{step:06d}"

    @staticmethod
    def step_of(directory: Path) -> int:
        """Return the step in a checkpoint's name."""
        return int(directory.name.removeprefix("step-"))

    def _prune(self) -> None:
        """Delete the oldest."""
        for old in self.directories()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def directories(self) -> list[Path]:
        """Return the directories of all checkpoints, newest first."""
        paths = [path for path in self.root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(paths, key=self.step_of, reverse=True)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
