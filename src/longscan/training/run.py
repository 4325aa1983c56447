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

import hashlib
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from longscan.checkpoints.save import save
from longscan.core.config import brief, count
from longscan.core.progress import Display, Snapshot
from longscan.core.random import VERSION
from longscan.core.runtime import Signals, use_threads
from longscan.errors import LongscanError, UsageError
from longscan.models import Model
from longscan.ops import release_memory
from longscan.plotting.training import plot_losses
from longscan.tokenizers.base import Tokenizer
from longscan.training.checkpoints import Checkpoints
from longscan.training.config import RunConfig
from longscan.training.metrics import Metrics
from longscan.training.run_directory import (
    empty,
    lock,
    read_earlier,
    read_settings,
    refuse_content,
    write_settings,
)
from longscan.training.schedule import learning_rate
from longscan.training.trainer import DivergedError, Trainer

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
    scores: Mapping[str, float]  # all that the last validations measured: "valid_loss", "valid_accuracy", ...


class Run(ABC, Generic[C]):
    """One process's share of a run; `go` does what remains to be done.

    A subclass names its settings and its verb and says what is trained on what. All that its `batch` and
    `loss` draw at random is a function of the seed and the step: `batch` sees to it itself, and for `loss`
    the trainer seeds torch at every step.

    Args:
        directory: the run's, locked.
        config: the settings.
        display: receives progress.
        figures: whether loss.png is drawn.
        before: the settings so far, if `config` may make the run longer.
    """

    verb: ClassVar[str]  # what a user calls to resume: "train"
    settings: type[C]
    valid_key: ClassVar[str] = "valid_loss"  # of the metrics: the validation that progress shows
    valid_unit: str = "nats/token"
    unit: str = "nats per token"  # of the losses
    item: ClassVar[str] = "tok"  # what progress counts per second
    score: str = ""  # what loss.png shows below the losses: a label, and
    scores: Mapping[str, str] = {}  # the keys of the metrics with a name for each
    trained_on: ClassVar[tuple[str, ...]] = ()  # files in the run's directory
    tokenizer: Tokenizer | None = None  # exported with the model

    def __init__(
        self,
        directory: Path,
        config: C,
        display: Display,
        *,
        figures: bool = True,
        before: C | None = None,
    ) -> None:
        self.directory, self.config, self.display, self.figures = directory, config, display, figures
        model, *self.epoch = self.prepare()
        total, so_far = (each.total_steps(*self.epoch) for each in (config, before or config))
        if total < so_far:
            name = "steps" if config.steps is not None else "epochs"
            raise UsageError(
                f"--{name}: expected at least the {count(so_far, 'step')} of the run, got {total:,}. "
                "A run can become longer, not shorter."
            )
        if before is not None and total == so_far:
            self.config = config = config.replace(steps=before.steps, epochs=before.epochs)
        self.trainer = Trainer(model, config, total, self.batch, self.loss)
        self.trainer.earlier = read_earlier(directory)
        self.metrics = Metrics(directory / "metrics.jsonl")
        self.checkpoints = Checkpoints(directory / "checkpoints", self.kept)
        self.saved: Path | None = None  # the last good checkpoint
        self.seconds = 0.0  # spent in training steps, over all processes
        self.recent: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and tokens of the last steps
        self.introduce()
        self._load(before or config)
        if before is not None and total > so_far:
            self._lengthen(before, so_far)

    @abstractmethod
    def prepare(self) -> tuple[Model, int, int]:
        """Make or find the data, the tokenizer and the fresh model.

        Returns:
            The model, on its device; the items in a pass over the data, and how many of them a step takes.
        """

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Return what is trained on, and what a step takes of it: "5 texts, 1 held out" and "2 texts"."""

    def introduce(self) -> None:
        """Say what is trained on what."""
        data, each = self.describe()
        n, total = self.trainer.model.num_parameters(), self.trainer.total
        size = f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}"
        items, per_step = self.epoch
        epochs = f" ({brief(total * per_step / items)} epochs)" if items else ""
        name = self.config.to_dict().get("model")
        self.display.line(f"data       {data}")
        self.display.line(f"model      {name} of {size} parameters, {count(total, 'step')} of {each}{epochs}")

    @abstractmethod
    def batch(self, step: int) -> Sequence[tuple[Any, int | tuple[int, ...]]]:
        """Return the parts of a step and how many items each term of its loss counts; see `Trainer`."""

    @abstractmethod
    def loss(self, model: Any, part: Any) -> Tensor:
        """Return the mean loss of a part's tokens, a scalar; or a vector of the terms whose sum it is."""

    @cached_property
    def fingerprint(self) -> str:
        """What is trained on, as a hash: a checkpoint goes on with nothing else."""
        digest = hashlib.sha256(f"order {VERSION}".encode())
        for name in self.trained_on:
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def export(self, directory: Path) -> None:
        """Write the model of the last step, not of the best validation, for others to load."""
        save(self.trainer.model, directory, self.tokenizer)

    @property
    def kept(self) -> int:
        """How many checkpoints stay."""
        return 2

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on."""
        return True

    @abstractmethod
    def validate(self, signals: Signals, *, last: bool) -> dict[str, Any] | None:
        """Measure the model on held-out data.

        Args:
            signals: look at them now and then.
            last: whether the training is over: then all of the data, else as much as is quick.

        Returns:
            What goes into the metrics, `valid_key` among it; None if a signal came.
        """

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
            self.display.validated(self._valid)
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
            # what the steps draw is nothing to the caller
            with torch.random.fork_rng(devices=()), Signals() as signals:
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
        except KeyboardInterrupt:
            self.say(f"stopped at once. {self._last_good()} Continue with: {self.again(self.directory)}")
            raise
        finally:
            self.metrics.close()
        return RunResult(
            directory=self.directory,
            step=trainer.step_number,
            total=trainer.total,
            stopped_by=None if self._complete() else signals.received,
            valid=self.metrics.last(self.valid_key),
            scores=self.metrics.latest("valid_"),
        )

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that goes on with a run.

        Args:
            directory: the run's.
        """
        return f"longscan {cls.verb} --resume {directory}"

    @classmethod
    def begin(
        cls, config: C, out: str | Path, display: Display | None = None, *, figures: bool = True
    ) -> RunResult:
        """Start a new run.

        Args:
            config: its settings.
            out: its directory, new or empty.
            display: receives progress; silent if None.
            figures: whether loss.png is drawn.

        Returns:
            How it ended: SIGINT, SIGTERM and SIGHUP end a run in good order after the step in hand.

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
                write_settings(directory, cls.verb, config.to_dict())
                run = cls(directory, config, display, figures=figures)
            except BaseException:  # nothing is trained yet: leave no trace, the command may be given again
                empty(directory, remove=not existed)
                raise
            return run.go()

    @classmethod
    def resume(
        cls,
        out: str | Path,
        changes: dict[str, Any] | None = None,
        display: Display | None = None,
        *,
        figures: bool = True,
    ) -> RunResult:
        """Continue a run from its newest complete checkpoint, bit for bit.

        Args:
            out: its directory.
            changes: settings to change: those that cannot change the weights, and more steps or epochs, also
                of a finished run. The steps that are left then follow the schedule of the new length.
            display: receives progress; silent if None.
            figures: whether loss.png is drawn.

        Returns:
            How it ended.

        Raises:
            LongscanError: there is no run, it is another verb's, it is running, a setting must not change; or
                as `begin`.
        """
        directory, changes = Path(out), dict(changes or {})
        if "steps" in changes or "epochs" in changes:
            changes = {"steps": None, "epochs": None, **changes}
        stored = cls.settings.from_dict(read_settings(directory, cls.verb))
        with lock(directory), closing(display or Display()) as display:
            config = stored.replace(**changes).absolute()
            _refuse_changes(config, stored, directory, longer=True)
            use_threads(config.threads)
            return cls(directory, config, display, figures=figures, before=stored).go()

    def _load(self, before: C) -> None:
        """Go on from the newest whole checkpoint, made with the settings `before`, or else from the start."""
        found = self.checkpoints.newest(self.display.line)
        if found:
            self.saved, state = found
            settings = self.settings.from_dict(state["config"])
            _refuse_changes(before, settings, self.saved, longer=bool(self.trainer.earlier))
            if state["data"] != self.fingerprint:
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
            if self.trainer.done:
                self.display.line("finished   more --steps or --epochs continue it")

    def _lengthen(self, before: C, total: int) -> None:
        """Make the run longer: in the settings of its directory, and the schedule from here on."""
        config, trainer = self.config, self.trainer
        step, new = trainer.step_number, trainer.total
        if step:
            trainer.earlier.append((step, total))
        settings = before.replace(steps=config.steps, epochs=config.epochs)
        write_settings(self.directory, self.verb, settings.to_dict(), trainer.earlier)
        change = ""
        if step and config.schedule != "noam":
            old, now = learning_rate(config, step - 1, total), learning_rate(config, step, new)
            change = f": the learning rate goes from {old:.2g} to {now:.2g}, as in a run of {new:,} steps"
        self.display.line(f"longer     {new:,} steps instead of {total:,}{change}")

    def _step(self) -> None:
        """Do one step, write its metrics, show it."""
        started = time.perf_counter()
        report = self.trainer.step()
        self.recent.append((time.perf_counter() - started, report.tokens))
        self.seconds += self.recent[-1][0]
        tokens = (self.metrics.last("tokens") or 0) + report.tokens
        self.metrics.write({**vars(report), "tokens": tokens, "seconds": round(self.seconds, 3)})
        seconds = sum(taken for taken, _ in self.recent)
        self.display.show(
            Snapshot(
                step=report.step,
                total=self.trainer.total,
                loss=report.loss,
                valid=self._valid,
                tokens_per_second=sum(count for _, count in self.recent) / seconds,
                item=self.item,
                seconds_left=(self.trainer.total - report.step) * seconds / len(self.recent),
            )
        )

    @property
    def _valid(self) -> str | None:
        """The last validation, in words."""
        valid = self.metrics.last(self.valid_key)
        return None if valid is None else f"{valid:.3f} {self.valid_unit}"

    def _save(self) -> None:
        """Write a checkpoint; the metrics up to it reach the disk first."""
        self.metrics.sync()
        extra = {"config": self.config.to_dict(), "data": self.fingerprint, "seconds": self.seconds}
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
        if not self.figures:
            return
        try:
            path = self.directory / "loss.png"
            plot_losses(self.metrics.records, path, self.unit, self.score, self.scores)
        except LongscanError as error:
            self.display.line(f"no loss.png: {error}")
            self.figures = False

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


def _refuse_changes(config: RunConfig, stored: RunConfig, place: Path, *, longer: bool) -> None:
    """Insist that a run goes on with the settings it began with, but for its length if it may be `longer`."""
    changed = [name for name in config.changed(stored) if not (longer and name in ("steps", "epochs"))]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{name} cannot change in the middle of a run: {place} was made with {getattr(stored, name)!r}, "
            f"got {getattr(config, name)!r}. Leave it out, or start a new run."
        )


def _words(error: Exception) -> str:
    """Put an error in a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)
