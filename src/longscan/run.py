"""A training run: a directory that is filled step by step, stoppable and resumable at any moment.

    train.json         the verb and the resolved configuration
    metrics.jsonl      one JSON object per line: training steps, validations, samples
    loss.png           the curves
    checkpoints/       the newest states, each complete or absent
    model/             the model, written when the run ends or is stopped

and what the kind of run adds: a tokenizer, tokens, pairs. A step is computed, its metrics are written, then
the checkpoint if it is due, then validation and sample if they are. So whenever the process is killed, the
newest checkpoint and `metrics.jsonl` tell exactly what remains to be done, and `resume` does that: weights
and metrics end as if nothing had happened.
"""

from __future__ import annotations

import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import typer
from safetensors import SafetensorError
from torch import Tensor

from longscan.errors import LongscanError, UsageError
from longscan.files import write_json
from longscan.generate import use_threads
from longscan.models import Model
from longscan.ops import keep_memory, release_memory
from longscan.plot import plot_losses
from longscan.progress import Display, Snapshot, Terminal
from longscan.recipe import RunConfig, read_recipe
from longscan.runs import SETTINGS, VERB, Metrics, Signals, lock, read_settings, refuse_content
from longscan.trainer import Checkpoints, DivergedError, Trainer

__all__ = ["Run", "RunResult"]

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a process's share of a run ended."""

    directory: Path
    step: int
    total: int
    stopped_by: signal.Signals | None  # None = the run is complete
    valid: float | None  # the last validation, in the run's own unit


class Run(ABC, Generic[C]):
    """One process's share of a run; `go` does what remains to be done.

    A subclass names its settings and its verb and says what is trained on what. All that its `batch` and
    `loss` draw at random is a function of the seed and the step, or of torch's random state, which a
    checkpoint keeps; so validation and samples must leave that alone.

    Args:
        directory: the run's, locked.
        config: the settings.
        display: receives progress.
    """

    verb: ClassVar[str]  # what a user calls to resume: "train"
    settings: type[C]
    valid_key: ClassVar[str] = "valid_loss"  # of the metrics: what the curve of the validation shows
    valid_unit: ClassVar[str] = "nats/token"

    def __init__(self, directory: Path, config: C, display: Display) -> None:
        self.directory, self.config, self.display = directory, config, display
        model, total = self.prepare()
        self.trainer = Trainer(model, config, total, self.batch, self.loss)
        self.metrics = Metrics(directory / "metrics.jsonl")
        self.checkpoints = Checkpoints(directory / "checkpoints", self.kept)
        self.plotless = False
        self.saved: Path | None = None  # the last good checkpoint
        self.seconds = 0.0  # spent in training steps, over all processes
        self.recent: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and tokens of the last steps
        self.introduce()
        self._load()

    @abstractmethod
    def prepare(self) -> tuple[Model, int]:
        """Make or find the data, the tokenizer and the fresh model.

        Returns:
            The model, on its device, and the steps in the run.
        """

    @abstractmethod
    def introduce(self) -> None:
        """Say what is trained on what."""

    @abstractmethod
    def batch(self, step: int) -> Sequence[tuple[Any, int]]:
        """Return the parts of a step's batch and how many tokens each predicts; see `Trainer`."""

    @abstractmethod
    def loss(self, model: Any, part: Any) -> Tensor:
        """Return the mean loss of a part's tokens, a scalar."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify what is trained on: a checkpoint goes on with nothing else."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Write the model for others to load."""

    @property
    def kept(self) -> int:
        """How many checkpoints stay."""
        return 2

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return False

    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure the model on held-out data.

        Args:
            signals: look at them now and then.
            last: whether the training is over: then all of the data, else as much as is quick.

        Returns:
            What goes into the metrics, `valid_key` among it; None if a signal came.
        """
        raise NotImplementedError

    def report(self, signals: Signals) -> None:
        """Validate if this step asks for it and it is not done yet; subclasses add samples."""
        last = self.trainer.done
        if self.validates and self.due(self.valid_key, self.config.eval_every, always=last):
            found = self.validate(signals, last=last)
            if found is None:
                return
            self.metrics.write({"step": self.trainer.step_number, **found})
            whole = " (all of what is held out)" if last else ""
            self.say(f"valid {found[self.valid_key]:.4f} {self.valid_unit}{whole}")
            self._plot()

    def due(self, key: str, every: int, *, always: bool = False) -> bool:
        """Tell whether a report is to be made at this step and is not in the metrics yet.

        Args:
            key: of the metrics.
            every: steps between two; 0 = never.
            always: whether it is due at any rate.
        """
        step = self.trainer.step_number
        regular = every > 0 and step > 0 and step % every == 0
        return (regular or always) and not self.metrics.has(step, key)

    def say(self, text: str) -> None:
        """Show a line that begins with the step."""
        self.display.line(f"step {self.trainer.step_number:,}: {text}")

    def go(self) -> RunResult:
        """Train to the end or to a signal.

        Returns:
            How it ended.

        Raises:
            LongscanError: it can't go on; the message names the last good checkpoint.
        """
        trainer = self.trainer
        try:
            with Signals() as signals:
                self._report(signals)  # what a killed process still owed
                while not trainer.done and not signals.received:
                    self._step()
                    if trainer.step_number % self.config.save_every == 0 or trainer.done:
                        self._save()
                    self._report(signals)
                self._finish()
        except DivergedError as error:
            remedy = f"It would happen again: start anew with a lower --lr (this run: {self.config.lr:g})."
            raise LongscanError(f"{error}\n{self._last_good()} {remedy}") from error
        except (LongscanError, OSError, SafetensorError) as error:
            remedy = f"Put it right and continue with: {self.again(self.directory)}"
            raise LongscanError(f"{_words(error)}\n{self._last_good()} {remedy}") from error
        finally:
            self.metrics.close()
        return RunResult(
            directory=self.directory,
            step=trainer.step_number,
            total=trainer.total,
            stopped_by=None if self._complete() else signals.received,
            valid=self.metrics.last(self.valid_key),
        )

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that goes on with a run.

        Args:
            directory: the run's.
        """
        return f"longscan {cls.verb} --resume {directory}"

    @classmethod
    def begin(cls, config: C, out: str | Path, display: Display | None = None) -> RunResult:
        """Start a new run.

        Args:
            config: its settings.
            out: its directory, new or empty.
            display: receives progress; silent if None.

        Returns:
            How it ended: SIGINT and SIGTERM end a run in good order after the step in hand.

        Raises:
            LongscanError: the data, the directory or the configuration cannot be used; or later, the disk is
                full or the loss is not finite: then the last good checkpoint is intact, the message names it.
        """
        directory = Path(out)
        use_threads(config.threads)
        config = config.absolute().replace(threads=torch.get_num_threads())
        refuse_content(directory)
        existed = directory.is_dir()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LongscanError(
                f"{directory}: {error.strerror}. Choose a directory you can write to."
            ) from error
        with lock(directory), closing(display or Display()) as display:
            refuse_content(directory)
            try:
                write_json(directory / SETTINGS, {VERB: cls.verb, **config.to_dict()})
                run = cls(directory, config, display)
            except BaseException:  # nothing is trained yet: leave no trace, the command may be given again
                _empty(directory, remove=not existed)
                raise
            return run.go()

    @classmethod
    def resume(
        cls, out: str | Path, changes: dict[str, Any] | None = None, display: Display | None = None
    ) -> RunResult:
        """Continue a run from its newest complete checkpoint, bit for bit.

        Args:
            out: its directory.
            changes: settings to change: only those that cannot change the weights.
            display: receives progress; silent if None.

        Returns:
            How it ended.

        Raises:
            LongscanError: there is no run, it is another verb's, it is running, a setting must not change; or
                as `begin`.
        """
        directory = Path(out)
        stored = cls.settings.from_dict(read_settings(directory, cls.verb))
        with lock(directory), closing(display or Display()) as display:
            config = stored.replace(**(changes or {})).absolute()
            _refuse_changes(config, stored, directory)
            use_threads(config.threads)
            return cls(directory, config, display).go()

    @classmethod
    def serve(
        cls, out: Path | None, resume_from: Path | None, recipe: Path | None, given: dict[str, Any]
    ) -> RunResult:
        """Do what a command line asks for and say how it ended if it was stopped.

        Args:
            out: the directory of a new run, or
            resume_from: of an earlier one.
            recipe: settings in a file.
            given: flags.

        Returns:
            How it ended, if it is complete.

        Raises:
            UsageError: flags that contradict each other or have impossible values.
            typer.Exit: it was stopped.
        """
        given = {name: value for name, value in given.items() if value is not None and value != []}
        if (out is None) == (resume_from is None):
            raise UsageError("give either --out DIR for a new run or --resume DIR to continue one.")
        keep_memory()
        if resume_from is not None:
            if recipe is not None:
                raise UsageError("--config is for a new run: --resume takes the settings the run began with.")
            result = cls.resume(resume_from, given, Terminal(given.get("log_every", 10)))
        else:
            assert out is not None
            config = read_recipe(recipe, given, cls.settings)
            torch.manual_seed(config.seed)
            result = cls.begin(config, out, Terminal(config.log_every))
        if result.stopped_by is not None:
            remedy = f"continue with: {cls.again(result.directory)}"
            typer.echo(f"stopped after step {result.step:,}; {remedy}", err=True)
            raise typer.Exit(130 if result.stopped_by == signal.SIGINT else 0)
        return result

    def _load(self) -> None:
        """Go on from the newest whole checkpoint, or from the start if there is none."""
        found = self.checkpoints.newest(self.display.line)
        if found:
            self.saved, state = found
            _refuse_changes(self.config, self.settings.from_dict(state["config"]), self.saved)
            if state["data"] != self.fingerprint():
                raise LongscanError(
                    f"the data in {self.directory} is not what {self.saved} was trained on, or an earlier "
                    "version of longscan shuffled it into another order. Begin a new run."
                )
            self.trainer.load(self.saved, state["step"])
            self.seconds = state["seconds"]
        self.checkpoints.sweep(self.trainer.step_number)
        self.metrics.rewind(self.trainer.step_number)
        if found:
            self.display.line(f"resumed    after step {self.trainer.step_number:,}")

    def _step(self) -> None:
        """Do one step, write its metrics, show it."""
        started = time.perf_counter()
        report = self.trainer.step()
        self.recent.append((time.perf_counter() - started, report.tokens))
        self.seconds += self.recent[-1][0]
        tokens = (self.metrics.last("tokens") or 0) + report.tokens
        self.metrics.write({**vars(report), "tokens": tokens, "seconds": round(self.seconds, 3)})
        seconds = sum(taken for taken, _ in self.recent)
        valid = self.metrics.last(self.valid_key)
        self.display.show(
            Snapshot(
                step=report.step,
                total=self.trainer.total,
                loss=report.loss,
                valid=None if valid is None else f"{valid:.3f} {self.valid_unit}",
                tokens_per_second=sum(count for _, count in self.recent) / seconds,
                seconds_left=(self.trainer.total - report.step) * seconds / len(self.recent),
            )
        )

    def _save(self) -> None:
        """Write a checkpoint; the metrics up to it reach the disk first."""
        self.metrics.sync()
        extra = {"config": self.config.to_dict(), "data": self.fingerprint(), "seconds": self.seconds}
        self.saved = self.checkpoints.save(self.trainer, extra)
        release_memory()

    def _report(self, signals: Signals) -> None:
        """Report, without dropout."""
        self.trainer.model.eval()
        self.report(signals)

    def _complete(self) -> bool:
        """Tell whether nothing remains to be done."""
        validated = not self.validates or self.metrics.has(self.trainer.step_number, self.valid_key)
        return self.trainer.done and validated

    def _plot(self) -> None:
        """Draw the curves if matplotlib is there; say it once if it is not."""
        try:
            path = self.directory / "loss.png"
            plot_losses(self.metrics.records, path, self.valid_key, f"validation ({self.valid_unit})")
        except LongscanError as error:
            if not self.plotless:
                self.display.line(f"no loss.png: {error}")
            self.plotless = True

    def _finish(self) -> None:
        """Save what is not saved and write the model for others to load."""
        step = self.trainer.step_number
        if step == 0:
            return
        if self.saved is None or self.checkpoints.step_of(self.saved) != step:
            self._save()
        self._plot()
        self.export(self.directory / "model")

    def _last_good(self) -> str:
        """Say which checkpoint is intact."""
        return f"The last good checkpoint is {self.saved}." if self.saved else "There is no checkpoint yet."


def _refuse_changes(config: RunConfig, stored: RunConfig, place: Path) -> None:
    """Insist that a run goes on with the settings it began with."""
    if changed := config.changed(stored):
        name = changed[0]
        raise UsageError(
            f"{name} cannot change in the middle of a run: {place} was made with {getattr(stored, name)!r}, "
            f"got {getattr(config, name)!r}. Leave it out, or start a new run."
        )


def _empty(directory: Path, *, remove: bool) -> None:
    """Take back what the preparation of a failed run wrote into its directory, which was empty before."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if remove:
        directory.rmdir()


def _words(error: Exception) -> str:
    """Put an error in a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)
