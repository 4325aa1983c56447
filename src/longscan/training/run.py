"""A training run: its loop, stop and resume at any moment.

    train.json         the verb and the resolved configuration
    metrics.jsonl      one JSON object per line: training steps, validations, samples
    loss.png           the curves
    checkpoints/       the newest checkpoints, each complete
    model/             the model, saved when the run ends or is stopped

and what the task adds: a tokenizer, tokens, pairs. A step is computed, its metrics are written, then the
checkpoint if it is due, then validation and sample if they are. So whenever the process is killed, the newest
checkpoint and `metrics.jsonl` determine what remains to be done. `resume` does that, and the final weights
and metrics are those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from longscan.core.config import brief, count
from longscan.core.memory_errors import out_of_memory
from longscan.core.progress import Display, Snapshot
from longscan.core.runtime import StopSignals, use_threads
from longscan.errors import LongscanError, UsageError
from longscan.models import Model
from longscan.models.hybrid_config import PatternConfig
from longscan.ops import release_memory
from longscan.plotting.training import plot_losses
from longscan.training.checkpoints import Checkpoints
from longscan.training.config import RunConfig
from longscan.training.distributed import ALONE, Group
from longscan.training.launch import command, joined, note_start, started_before
from longscan.training.metrics import Metrics
from longscan.training.run_directory import (
    SETTINGS,
    empty,
    lock,
    read_earlier,
    read_settings,
    refuse_changes,
    refuse_content,
    write_settings,
)
from longscan.training.schedule import learning_rate
from longscan.training.task import Task
from longscan.training.trainer import DivergedError, Trainer, UnfinishedError

__all__ = ["Run", "RunResult"]

C = TypeVar("C", bound=RunConfig)

GRACE = 10.0  # seconds: a signal waits for the rest of a step in chunks up to here
PATIENCE = 1.0  # seconds before the progress within a step is shown


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a run, or of the part of it that one process did."""

    directory: Path
    step: int
    total: int
    stopped_by: signal.Signals | None  # None = the run is complete
    valid: float | None  # the last validation, in the run's own unit
    scores: Mapping[str, float]  # every validation metric with its last value: "valid_loss", ...


class Run(Task[C]):
    """A run in this process; `go` does what remains to be done.

    Args:
        directory: the run's, locked.
        config: the settings.
        display: receives progress.
        figures: whether loss.png is drawn.
        before: the settings so far, if `config` may extend the run.
        group: the processes of the run, of which only the first shows and writes anything.
    """

    def __init__(
        self,
        directory: Path,
        config: C,
        display: Display,
        *,
        figures: bool = True,
        before: C | None = None,
        group: Group = ALONE,
    ) -> None:
        self.directory, self.config, self.group = directory, config, group
        self.display, self.figures = display if group.first else Display(), figures and group.first
        (model, *self.epoch), earlier = group.in_turn(self._start)
        config, before = self._resolve(before, earlier)
        group.compare("training data", {"fingerprint": self.fingerprint})
        group.compare("weights", {"fingerprint": model.fingerprint() if group.several else ""})
        total, so_far = (each.total_steps(*self.epoch) for each in (config, before or config))
        if total < so_far:
            name = "steps" if config.steps is not None else "epochs"
            raise UsageError(
                f"--{name}: expected at least the {count(so_far, 'step')} of the run, got {total:,}. "
                "A run can be extended, not shortened."
            )
        if before is not None and total == so_far:
            self.config = config = config.replace(steps=before.steps, epochs=before.epochs)
        self.trainer = Trainer(
            model, config, total, self.batch, self.loss, self.average, self.carried, self.replicate(model)
        )
        self.trainer.earlier = earlier
        self.metrics = Metrics(directory / "metrics.jsonl", writes=group.first)
        self.checkpoints = Checkpoints(directory / "checkpoints", self.n_checkpoints)
        self.saved: Path | None = None  # the last good checkpoint
        self.seconds = 0.0  # spent in training steps, over all processes
        self.recent: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and tokens of the last steps
        self.signals: StopSignals | None = None  # while it trains
        self.long_since = 0.0  # when what `advanced` is called in began
        self.introduce()
        group.in_turn(lambda: self._load(before or config))
        group.compare("checkpoint", {"step": self.trainer.step_number})
        if before is not None and total > so_far:
            self._lengthen(before, so_far)

    def introduce(self) -> None:
        """Show a line about the data and one about the model."""
        data, each = self.describe()
        n, total = self.n_parameters, self.trainer.total
        size = f"{n / 1e6:.2f} M" if n >= 1e5 else f"{n:,}"
        items, per_step = self.epoch
        passes = brief(total * per_step / items) if items else ""
        epochs = f" ({passes} epoch{'' if passes == '1' else 's'})" if items else ""
        fields, config = self.config.to_dict(), self.trainer.model.config
        name = fields.get("pretrained") or fields.get("model")
        if isinstance(config, PatternConfig):  # it may have come from a preset, and been repeated or cut
            name = f"{name} {config.pattern[:31]}{'…' * (len(config.pattern) > 31)}"
        self.display.line(f"data       {data}")
        if self.group.several:
            share = "a share of the model" if self.sharded else "the whole model"
            self.display.line(f"processes  {self.group.size}, each with {share}")
        self.display.line(f"model      {name} of {size} parameters, {count(total, 'step')} of {each}{epochs}")

    def report(self, signals: StopSignals) -> None:
        """Validate if that is due; subclasses add samples."""
        last = self.trainer.done
        if self.validates and self.due(self.valid_key, self.config.eval_every, always=last):
            metrics = self.validate(signals, last=last)
            if metrics is None:
                return
            self.metrics.write({"step": self.trainer.step_number, **metrics})
            whole = " (all held-out data)" if last else ""
            value = f"{metrics[self.valid_key]:.4f} {self.valid_unit}{self.remark(metrics)}"
            self.say(f"valid {value}{whole}")
            self.display.validated(self._valid)
            self._plot()

    def due(self, key: str, every: int, *, always: bool = False) -> bool:
        """Whether a metric is due at this step and not recorded yet.

        Args:
            key: of the metric.
            every: steps between two; 0 = never.
            always: whether it is due in any case.
        """
        step = self.trainer.step_number
        regular = every > 0 and step > 0 and step % every == 0
        return (regular or always) and not self.metrics.has(step, key)

    def go(self) -> RunResult:
        """Train to the end, or until a signal arrives.

        Returns:
            The outcome.

        Raises:
            LongscanError: it can't continue; the message names the last intact checkpoint.
        """
        trainer = self.trainer
        try:
            # the steps leave the caller's random state alone
            with (
                torch.random.fork_rng(devices=()),
                self.group.signals() as signals,
                self.group.connected(),
            ):
                self.signals = signals
                self._report(signals)  # in case a process was killed before its report
                while not trainer.done and not signals.received:
                    try:
                        self._step()
                    except UnfinishedError:
                        self.say("stopped within the next step, which resuming repeats from its start")
                        break
                    self.group.agree(signals)
                    if trainer.step_number % self.config.save_every == 0 or trainer.done:
                        self._save()
                    self._report(signals)
                self._finish()
        except DivergedError as error:
            remedy = (
                f"It would happen again: start a new run with a lower --lr (this run: {self.config.lr:g})."
            )
            raise LongscanError(f"{error}\n{self._last_good()} {remedy}") from error
        except (LongscanError, OSError, SafetensorError) as error:
            remedy = f"Fix that and resume with: {self.again(self.directory)}"
            raise LongscanError(f"{_sentence(error)}\n{self._last_good()} {remedy}") from error
        except (MemoryError, RuntimeError) as error:
            if not (what := out_of_memory(error)):
                raise
            raise LongscanError(
                f"{what}\n{self._last_good()} Then resume with: {self.again(self.directory)}"
            ) from error
        except KeyboardInterrupt:
            self.say(f"stopped immediately. {self._last_good()} Resume with: {self.again(self.directory)}")
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
        """Return the command that resumes a run.

        Args:
            directory: the run's.
        """
        return command(f"{cls.verb} --resume {directory}")

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
            The outcome: SIGINT, SIGTERM and SIGHUP stop a run after the current step.

        Raises:
            LongscanError: the data, the directory or the settings are invalid; or later, the disk is full or
                the loss is not finite: then the message names the last intact checkpoint.
        """
        directory = Path(out)
        use_threads(config.threads)
        config = config.absolute().replace(threads=torch.get_num_threads())
        display = display or Display()
        with joined(cls.verb, config.device, cls.timeout(config), cls.context_size(config)) as group:
            group.compare(
                "settings", {**config.to_dict(), "threads": None, "out": os.path.abspath(directory)}
            )
            if group.decide(lambda: (directory / SETTINGS).is_file() and started_before(directory)):
                return cls._continue(directory, config, display, group, figures)
            if not group.first:
                return cls(directory, config, display, group=group).go()
            refuse_content(directory)
            existed = directory.is_dir()
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LongscanError(
                    f"{directory}: {error.strerror}. Choose a directory you can write to."
                ) from error
            with lock(directory), closing(display):
                refuse_content(directory)
                try:
                    write_settings(directory, cls.verb, config.to_dict())
                    note_start(directory)
                    run = cls(directory, config, display, figures=figures, group=group)
                except BaseException:  # nothing is trained yet: clean up, so that the command can be repeated
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
        """Resume a run from its newest complete checkpoint, bit-exactly.

        Args:
            out: its directory.
            changes: settings to change: those that don't affect the weights, and more steps or epochs, also
                of a finished run. The remaining steps then follow the schedule of the new length.
            display: receives progress; silent if None.
            figures: whether loss.png is drawn.

        Returns:
            The outcome.

        Raises:
            LongscanError: there is no run, it is another verb's, it is in progress, a setting must not
                change; or as `begin`.
        """
        directory, changes = Path(out), dict(changes or {})
        if "steps" in changes or "epochs" in changes:
            changes = {"steps": None, "epochs": None, **changes}
        stored = cls.settings.from_dict(read_settings(directory, cls.verb))
        config = stored.replace(**changes).absolute()
        with joined(cls.verb, config.device, cls.timeout(config), cls.context_size(config)) as group:
            group.compare(
                "settings", {**config.to_dict(), "threads": None, "resume": os.path.abspath(directory)}
            )
            return cls._continue(directory, config, display or Display(), group, figures)

    @classmethod
    def _continue(
        cls, directory: Path, config: C, display: Display, group: Group, figures: bool
    ) -> RunResult:
        """Resume a run with settings that may extend it; the first process holds its lock."""
        with lock(directory) if group.first else contextlib.nullcontext(), closing(display):
            stored = cls.settings.from_dict(read_settings(directory, cls.verb))
            config = config.as_resolved(stored)
            refuse_changes(config, stored, directory, longer=True)
            use_threads(config.threads)
            return cls(directory, config, display, figures=figures, before=stored, group=group).go()

    def _start(self) -> tuple[tuple[Model, int, int], list[tuple[int, int]]]:
        """Return what `prepare` does, and the earlier lengths of the run."""
        if not (self.directory / SETTINGS).is_file():
            raise LongscanError(
                f"{self.directory} is not the directory of the run in which process 0 has started. "
                "All processes need the same one: on several machines, on a file system that they share."
            )
        return self.prepare(), read_earlier(self.directory)

    def _load(self, before: C) -> None:
        """Load the newest intact checkpoint, made with the settings `before`, if there is one."""
        newest = self.checkpoints.newest(self.display.line)
        if newest:
            self.saved, state = newest
            settings = self.resolved(self.settings.from_dict(state["config"]))
            refuse_changes(before, settings, self.saved, longer=bool(self.trainer.earlier))
            if state["data"] != self.fingerprint:
                raise LongscanError(
                    f"the data in {self.directory} is not what {self.saved} was trained on, or an earlier "
                    "version of longscan shuffled it into another order. Start a new run."
                )
            self.trainer.load(self.saved, state["step"])
            self.seconds = state["seconds"]
        if self.group.first:
            self.checkpoints.sweep(self.trainer.step_number)
        self.metrics.rewind(self.trainer.step_number)
        if newest:
            self.display.line(f"resumed    after step {self.trainer.step_number:,}")
            if self.trainer.done:
                self.display.line("finished   more --steps or --epochs extend it")

    def _lengthen(self, before: C, total: int) -> None:
        """Extend the run: in the settings of its directory, and the schedule from here on."""
        config, trainer = self.config, self.trainer
        step, new = trainer.step_number, trainer.total
        if step:
            trainer.earlier.append((step, total))
        settings = before.replace(steps=config.steps, epochs=config.epochs)
        if self.group.first:
            write_settings(self.directory, self.verb, settings.to_dict(), trainer.earlier)
        change = ""
        if step and config.schedule != "noam":
            old, now = learning_rate(config, step - 1, total), learning_rate(config, step, new)
            change = f": the learning rate goes from {old:.2g} to {now:.2g}, as in a run of {new:,} steps"
        self.display.line(f"extended   {new:,} steps instead of {total:,}{change}")

    def _step(self) -> None:
        """Do one step, write its metrics and show them."""
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

    def advanced(self, done: int, total: int, what: str = "next step") -> None:
        """Show how far a long step is, and leave it if a signal has arrived; see `Task.advanced`."""
        now = time.perf_counter()
        if done == 1:
            self.long_since = now
        taken = now - self.long_since
        if taken > PATIENCE:
            self.display.within(what, done, total)
        # with several processes the others would wait for this one in vain
        if self.signals is None or not self.signals.received or self.group.several or done == 1:
            return
        if taken / (done - 1) * (total - done) > GRACE:
            raise UnfinishedError(f"a signal stopped the {what} after {done:,} of {total:,} chunks.")

    def _resolve(self, before: C | None, earlier: list[tuple[int, int]]) -> tuple[C, C | None]:
        """Fill in what depends on the model in the settings, those so far, and those in the directory."""
        self.config, stored = self.resolved(self.config), before or self.config
        resolved = self.resolved(stored)
        if resolved != stored and self.group.first:
            write_settings(self.directory, self.verb, resolved.to_dict(), earlier)
        return self.config, before and resolved

    @property
    def _valid(self) -> str | None:
        """The last validation as text."""
        valid = self.metrics.last(self.valid_key)
        return None if valid is None else f"{valid:.3f} {self.valid_unit}"

    def _save(self) -> None:
        """Save a checkpoint, after flushing the metrics up to it to the disk."""
        trained = self.trainer.state()
        if not self.group.first:
            self.saved = self.checkpoints.path_of(trained.step)
            return
        self.metrics.sync()
        extra = {"config": self.config.to_dict(), "data": self.fingerprint, "seconds": self.seconds}
        self.saved = self.checkpoints.save(trained, extra)
        release_memory()

    def _report(self, signals: StopSignals) -> None:
        """Report, in evaluation mode."""
        self.trainer.model.eval()
        self.report(signals)

    def _complete(self) -> bool:
        """Whether nothing remains to be done."""
        validated = not self.validates or self.metrics.has(self.trainer.step_number, self.valid_key)
        return self.trainer.done and validated

    def _plot(self) -> None:
        """Draw the curves, or show once that matplotlib is not installed."""
        if not self.figures:
            return
        try:
            path = self.directory / "loss.png"
            plot_losses(self.metrics.records, path, self.unit, self.score, self.scores)
        except LongscanError as error:
            self.display.line(f"no loss.png: {error}")
            self.figures = False

    def _finish(self) -> None:
        """Save the last checkpoint if it is not saved yet, and export the model."""
        step = self.trainer.step_number
        if step == 0:
            return
        if self.saved is None or self.checkpoints.step_of(self.saved) != step:
            self._save()
        self.trainer.replica.gather()
        if not self.group.first:
            return
        self._plot()
        self.export(self.directory / "model")

    def _last_good(self) -> str:
        """Return a sentence that names the last intact checkpoint."""
        return f"The last intact checkpoint is {self.saved}." if self.saved else "There is no checkpoint yet."


def _sentence(error: Exception) -> str:
    """Return the message of an error as a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)
