"""What experiments have in common: systems that are trained unless they are, measured, and remembered."""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import typer

from longscan.checkpoints.load import load_translator
from longscan.core.files import read_json, write_json
from longscan.core.progress import Terminal
from longscan.data.sentence_pairs import TextPairs
from longscan.errors import LongscanError
from longscan.evaluation.translation import measure
from longscan.models import Model
from longscan.plotting.style import reduced_note
from longscan.plotting.translation import plot_bleu
from longscan.reproduce.bleu_table import minutes, summary
from longscan.training.config import RunConfig
from longscan.training.run import Run
from longscan.training.run_directory import SETTINGS, read_settings
from longscan.training.translation import TranslateRun

__all__ = ["Plan"]


QUICK = {"steps": 3, "epochs": None, "eval_every": 0, "bleu_sentences": 4, "save_every": 100}

QUICK_SENTENCES = 12

N_SAMPLES = 5

BEAM, LENGTH_PENALTY = 5, 0.6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command line asks for; see `reproduce.command`."""

    name: str
    data: Path | None
    out: Path
    full: bool = False
    quick: bool = False
    threads: int | None = None
    model: str | None = None  # what to fine-tune

    def check(self, files: Sequence[str], source: str) -> None:
        """Insist on the data.

        Args:
            files: their names.
            source: where they come from.

        Raises:
            LongscanError: some are missing.
        """
        missing = [file for file in files if not (self.files / file).is_file()]
        if missing:
            raise LongscanError(f"--data {self.data}: expected {', '.join(missing)} there. {source}")

    @property
    def files(self) -> Path:
        """The directory of the data."""
        assert self.data is not None
        return self.data

    def train(self, place: str, config: RunConfig, run: type[Run[Any]] = TranslateRun) -> Path:
        """Train a system, go on with it, or find it finished.

        Args:
            place: its directory in `out`.
            config: its settings.
            run: what they are the settings of.

        Returns:
            The run's directory.

        Raises:
            LongscanError: the directory holds a run with other settings.
            typer.Exit: it was stopped.
        """
        directory = self.out / (f"quick-{place}" if self.quick else place)
        if self.quick:
            known = {entry.name for entry in fields(config)}
            config = config.replace(**{name: value for name, value in QUICK.items() if name in known})
        config, display = config.replace(threads=self.threads), Terminal(100)
        typer.echo(f"── {directory.name} ──", err=True)
        if (directory / SETTINGS).is_file():
            stored = run.settings.from_dict(read_settings(directory, run.verb))
            paths = {entry.name for entry in fields(config) if entry.metadata.get("path")}
            if other := [name for name in config.changed(stored) if name not in paths]:
                raise LongscanError(
                    f"{directory} was trained with {other[0]} = {getattr(stored, other[0])!r}, this "
                    f"experiment has {getattr(config, other[0])!r}. Name another --out."
                )
            changes = {} if self.threads is None else {"threads": self.threads}
            result = run.resume(directory, changes, display)
        else:
            result = run.begin(config, directory, display)
        if result.stopped_by is not None:
            typer.echo(f"stopped after step {result.step:,}; the same command goes on", err=True)
            raise typer.Exit(130 if result.stopped_by == signal.SIGINT else 0)
        return directory

    def measure(self, directory: Path, pairs: TextPairs, tokenize: str) -> dict[str, Any]:
        """Measure a trained system on the test pairs, unless that is done.

        Args:
            directory: the run's.
            pairs: sentences and their translations by people.
            tokenize: see `bleu.score`.

        Returns:
            What `translation.measure` gives, with a few samples instead of all translations; parameters,
            epochs, seed and minutes of the run.
        """
        model, tokenizer = load_translator(directory / "model")
        if self.quick:
            pairs = pairs.select(range(QUICK_SENTENCES))

        def score() -> dict[str, Any]:
            found = measure(model, tokenizer, pairs, BEAM, LENGTH_PENALTY, tokenize)
            translations = found.pop("translations")
            step = max(1, len(translations) // N_SAMPLES)
            samples = [
                {"source": pairs.source[i], "reference": pairs.target[i], "translation": translations[i]}
                for i in range(0, len(translations), step)
            ][:N_SAMPLES]
            epochs = read_settings(directory, TranslateRun.verb)["epochs"]
            return {**found, "samples": samples, "epochs": epochs}

        key = f"{tokenizer.fingerprint} {len(pairs.source)} {tokenize}"
        return self.remember(directory, model, key, score)

    def remember(
        self,
        directory: Path,
        model: Model,
        key: str,
        measure: Callable[[], dict[str, Any]],
        name: str = "test",
    ) -> dict[str, Any]:
        """Measure a trained model, unless that is done.

        Args:
            directory: the run's.
            model: the trained one.
            key: what it is measured on.
            measure: does it.
            name: of the file in the run's directory that keeps it.

        Returns:
            What `measure` gives; parameters, seed and minutes of the run.
        """
        kept, key = directory / f"{name}.json", f"{model.fingerprint()} {key}"
        if kept.is_file() and (found := read_json(kept)).get("key") == key:
            return found
        found = {
            **measure(),
            "key": key,
            "parameters": model.num_parameters(),
            "seed": read_json(directory / SETTINGS)["seed"],
            "minutes": minutes(directory),
        }
        write_json(kept, found)
        return found

    @property
    def machine(self) -> str:
        """What the numbers were measured on."""
        return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def finish(self, rows: Mapping[str, Sequence[dict[str, Any]]], notes: dict[str, Any]) -> dict[str, Any]:
        """Write the results and the figure.

        Args:
            rows: system -> what `measure` gave for each seed.
            notes: what else is to be said; "reduced" tells in what, if it is.

        Returns:
            The results.
        """
        report = {
            "experiment": self.name,
            **notes,
            "machine": self.machine,
            "systems": {name: summary(found) for name, found in rows.items()},
            "runs": {name: list(found) for name, found in rows.items()},
        }
        write_json(self.out / f"{self.name}.json", report)
        try:
            first = {name: found[0] for name, found in rows.items()}
            plot_bleu(first, self.out / f"{self.name}.png", reduced_note(report))
        except LongscanError as error:
            typer.echo(f"no {self.name}.png: {error}", err=True)
        return report
