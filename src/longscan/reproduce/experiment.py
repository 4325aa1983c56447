"""A published experiment on this machine: its data, its training runs and its cached measurements."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from longscan.core.files import read_json, write_json
from longscan.core.progress import Display
from longscan.errors import LongscanError
from longscan.models import Model
from longscan.training.config import RunConfig
from longscan.training.run import Run, RunResult
from longscan.training.run_directory import SETTINGS, read_settings

__all__ = ["NO_RESULT", "Plan", "StoppedError", "minutes", "seeded"]

QUICK = {"steps": 3, "epochs": None, "eval_every": 0, "bleu_sentences": 4, "save_every": 100}
NO_RESULT = "a few steps only: no result"  # how an experiment with --quick is reduced


class StoppedError(LongscanError):
    """A signal stopped a training run; the same experiment resumes it.

    Args:
        result: how far the run got.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(f"stopped after step {result.step:,}")
        self.result = result


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where and how an experiment runs; `train` and `cached` do only what is not done yet.

    Attributes:
        name: the experiment's, as on the command line.
        data: the directory of its data, if it has any.
        out: receives a directory for each run, NAME.json and NAME.png.
        full: several seeds, all of the data.
        quick: a few steps, to see that it works.
        threads: CPU threads; torch's default if None.
        model: the checkpoint to fine-tune, if the experiment fine-tunes one.
        notify: receives a line about what happens next.
        display: makes the progress display of a training run.
    """

    name: str
    data: Path | None
    out: Path
    full: bool = False
    quick: bool = False
    threads: int | None = None
    model: str | None = None
    notify: Callable[[str], None] = lambda line: None
    display: Callable[[], Display] = Display

    def check(self, files: Sequence[str], source: str) -> None:
        """Check that the data are there.

        Args:
            files: their names.
            source: where to get them.

        Raises:
            LongscanError: some are missing.
        """
        missing = [file for file in files if not self.file(file).is_file()]
        if missing:
            raise LongscanError(f"--data {self.data}: expected {', '.join(missing)} there. {source}")

    @property
    def files(self) -> Path:
        """The directory of the data."""
        assert self.data is not None
        return self.data

    def file(self, name: str) -> Path:
        """Return the path of a data file: in the directory of the data, or in a folder there.

        Args:
            name: of the file.
        """
        path = self.files / name
        inside = () if path.is_file() else sorted(self.files.glob(f"*/{name}"))
        return next(iter(inside), path)

    @property
    def machine(self) -> str:
        """What the numbers were measured on."""
        return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def train(self, name: str, config: RunConfig, run: type[Run[Any]]) -> Path:
        """Return the directory of a finished run: trained now, resumed, or trained earlier.

        Args:
            name: of the directory, in `out`.
            config: the run's settings.
            run: its kind.

        Raises:
            LongscanError: the directory holds a run with other settings.
            StoppedError: a signal stopped it.
        """
        directory = self.out / (f"quick-{name}" if self.quick else name)
        if self.quick:
            known = {entry.name for entry in fields(config)}
            config = config.replace(**{field: value for field, value in QUICK.items() if field in known})
        config, display = config.replace(threads=self.threads), self.display()
        self.notify(f"── {directory.name} ──")
        if (directory / SETTINGS).is_file():
            stored = run.settings.from_dict(read_settings(directory, run.verb))
            config = config.as_resolved(stored)
            paths = {entry.name for entry in fields(config) if entry.metadata.get("path")}
            if other := [field for field in config.changed(stored) if field not in paths]:
                raise LongscanError(
                    f"{directory} was trained with {other[0]} = {getattr(stored, other[0])!r}, this "
                    f"experiment has {getattr(config, other[0])!r}. Name another --out."
                )
            changes = {} if self.threads is None else {"threads": self.threads}
            result = run.resume(directory, changes, display)
        else:
            result = run.begin(config, directory, display)
        if result.stopped_by is not None:
            raise StoppedError(result)
        return directory

    def cached_measurement(
        self,
        directory: Path,
        model: Model,
        key: str,
        measure: Callable[[], dict[str, Any]],
        name: str = "test",
    ) -> dict[str, Any]:
        """Return what `measure` gives for a trained model, and the run's parameters, seed and minutes.

        Args:
            directory: the run's.
            model: the trained one.
            key: what it is measured on.
            measure: called unless the run's directory holds the result.
            name: of the result's file in the run's directory.
        """

        def result() -> dict[str, Any]:
            return {
                **measure(),
                "parameters": model.num_parameters(),
                "seed": read_json(directory / SETTINGS)["seed"],
                "minutes": minutes(directory),
            }

        return self.cached(directory / f"{name}.json", f"{model.fingerprint()} {key}", result)

    def cached(self, path: Path, key: object, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the measurement in a file; measure and write it if the file is missing or of another key.

        Args:
            path: the file.
            key: what the measurement depends on, as JSON has it.
            measure: makes the measurement.
        """
        if path.is_file() and (stored := read_json(path)).get("key") == key:
            return stored
        result = {"key": key, **measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        return result

    def save(self, report: Mapping[str, Any], draw: Callable[[Path], None]) -> None:
        """Write the results to NAME.json and the figure to NAME.png.

        Args:
            report: the results.
            draw: saves the figure under a path; notified about if it can't, for want of matplotlib.
        """
        write_json(self.out / f"{self.name}.json", report)
        path = self.out / f"{self.name}.png"
        try:
            draw(path)
        except LongscanError as error:
            self.notify(f"no {path.name}: {error}")


def seeded(name: str, seed: int) -> str:
    """Return the name of a run; the one with seed 0 has no suffix."""
    return name + (f"-seed{seed}" if seed else "")


def minutes(directory: Path) -> float:
    """Return how long a run's steps took, to a tenth of a minute."""
    seconds = 0.0
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        seconds = json.loads(line).get("seconds", seconds)
    return round(seconds / 60, 1)
