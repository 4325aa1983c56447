"""`longscan train`: text files in, a trained model directory out, stoppable and resumable at any moment.

A run is a directory:

    train.json         the resolved configuration
    tokenizer/, data/  the tokenizer and the memory-mapped tokens
    metrics.jsonl      one JSON object per line: training steps, validations, samples
    loss.png           the curves
    checkpoints/       the newest two states, each complete or absent
    model/             the model in Hugging Face layout, written when the run ends or is stopped

A step is computed, its metrics are written, then the checkpoint if it is due, then validation and sample if
they are. So whenever the process is killed, the newest checkpoint and `metrics.jsonl` tell exactly what
remains to be done, and `resume` does that: weights and metrics end as if nothing had happened. The exported
model is that of the last step, not of the best validation.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import signal
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors import SafetensorError
from torch import Tensor

from longscan.checkpoint import save
from longscan.data import TokenDataset, windows
from longscan.errors import LongscanError, UsageError
from longscan.files import read_json, write_json
from longscan.generate import generate, use_threads
from longscan.ops import keep_memory
from longscan.plot import plot_losses
from longscan.progress import Display, Snapshot, Terminal
from longscan.recipe import (
    TrainConfig,
    flag_parameters,
    make_model,
    make_tokenizer,
    make_tokens,
    model_settings,
    read_recipe,
)
from longscan.runs import SETTINGS, Metrics, Signals, lock, refuse_content
from longscan.trainer import Checkpoints, DivergedError, Trainer

__all__ = ["TrainConfig", "TrainResult", "command", "resume", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` or `resume` ended."""

    directory: Path
    step: int
    total: int
    stopped_by: signal.Signals | None  # None = the run is complete
    valid_bits_per_byte: float | None  # the last one measured


def train(config: TrainConfig, out: str | Path, display: Display | None = None) -> TrainResult:
    """Train a new model.

    Args:
        config: the run.
        out: the run's directory, new or empty.
        display: receives progress; silent if None.

    Returns:
        How it ended: SIGINT and SIGTERM end a run in good order after the step in hand.

    Raises:
        LongscanError: the data, the directory or the configuration cannot be used; or later, the disk is full
            or the loss is not finite: then the last good checkpoint is intact and the message names it.
    """
    directory = Path(out)
    if not config.data:
        raise UsageError("nothing to train on: name text files or folders.")
    anywhere = {name: [os.path.abspath(path) for path in getattr(config, name)] for name in ("data", "valid")}
    use_threads(config.threads)
    config = config.replace(**anywhere, threads=torch.get_num_threads())
    refuse_content(directory)
    existed = directory.is_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongscanError(f"{directory}: {error.strerror}. Choose a directory you can write to.") from error
    with lock(directory), closing(display or Display()) as display:
        refuse_content(directory)
        try:
            write_json(directory / SETTINGS, config.to_dict())
            run = _Run(directory, config, display)
        except BaseException:  # nothing is trained yet: leave no trace, the command may be given again
            _empty(directory, remove=not existed)
            raise
        return run.go()


def resume(
    out: str | Path, changes: dict[str, Any] | None = None, display: Display | None = None
) -> TrainResult:
    """Continue a run from its newest complete checkpoint, bit for bit.

    Args:
        out: the run's directory.
        changes: settings to change: only those that cannot change the weights.
        display: receives progress; silent if None.

    Returns:
        How it ended.

    Raises:
        LongscanError: there is no run, it is running, a setting must not change; or as `train`.
    """
    directory = Path(out)
    if not (directory / SETTINGS).is_file():
        raise LongscanError(
            f"no run to resume in {directory}: expected the {SETTINGS} that `longscan train` writes."
        )
    with lock(directory), closing(display or Display()) as display:
        stored = TrainConfig.from_dict(read_json(directory / SETTINGS))
        config = stored.replace(**(changes or {}))
        _refuse_changes(config, stored, directory)
        use_threads(config.threads)
        return _Run(directory, config, display).go()


class _Run:
    """One process's share of a run; `go` does what remains to be done.

    Args:
        directory: the run's, locked.
        config: the settings.
        display: receives progress.
    """

    def __init__(self, directory: Path, config: TrainConfig, display: Display) -> None:
        self.directory, self.config, self.display = directory, config, display
        model_settings(config, config.vocab_size)  # a wrong flag is better known before the text is read
        self.tokenizer = make_tokenizer(config, directory / "tokenizer", display.line)
        self.tokens = make_tokens(config, self.tokenizer, directory / "data", display.prepare)
        rows = config.batch_size * config.accumulate
        self.dataset = TokenDataset(self.tokens.train.path, config.seq_len, rows, config.seed)
        if self.tokens.valid:
            next(windows(self.tokens.valid.path, config.seq_len))  # too short? better known now than later
        total = config.total_steps(self.dataset.windows_per_epoch)
        self.trainer = Trainer(make_model(config, self.tokenizer), config, total, self._batch)
        self.metrics = Metrics(directory / "metrics.jsonl")
        self.checkpoints = Checkpoints(directory / "checkpoints")
        self.plotless = False
        self.saved: Path | None = None  # the last good checkpoint
        self.seconds = 0.0  # spent in training steps, over all processes
        self.recent: deque[float] = deque(maxlen=20)  # seconds of the last steps
        self._introduce()
        self._load()

    def go(self) -> TrainResult:
        """Train to the end or to a signal.

        Returns:
            How it ended.
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
            remedy = f"Put it right and continue with: longscan train --resume {self.directory}"
            raise LongscanError(f"{_words(error)}\n{self._last_good()} {remedy}") from error
        finally:
            self.metrics.close()
        return TrainResult(
            directory=self.directory,
            step=trainer.step_number,
            total=trainer.total,
            stopped_by=None if self._complete() else signals.received,
            valid_bits_per_byte=self.metrics.last("valid_bits_per_byte"),
        )

    def _introduce(self) -> None:
        """Say what is trained on what."""
        train, valid, model = self.tokens.train, self.tokens.valid, self.trainer.model
        held_out = f"{valid.tokens:,} held out" if valid else "none held out: no validation"
        self.display.line(f"data       {train.tokens:,} tokens of {train.bytes / 1e6:.1f} MB, {held_out}")
        total, rows = self.trainer.total, self.dataset.batch_size
        epochs = total * rows / self.dataset.windows_per_epoch
        self.display.line(
            f"model      {self.config.model} of {model.num_parameters() / 1e6:.2f} M parameters, "
            f"{total:,} steps of {self.config.tokens_per_step:,} tokens ({epochs:.3g} epochs)"
        )

    def _load(self) -> None:
        """Go on from the newest whole checkpoint, or from the start if there is none."""
        found = self.checkpoints.newest(self.display.line)
        if found:
            self.saved, state = found
            stored = TrainConfig.from_dict(state["config"])
            _refuse_changes(self.config, stored, self.saved)
            if state["data"] != self._data_hash():
                raise LongscanError(f"{self.tokens.directory} is not what {self.saved} was trained on.")
            self.trainer.load(self.saved, state["step"])
            self.seconds = state["seconds"]
        self.checkpoints.sweep(self.trainer.step_number)
        self.metrics.rewind(self.trainer.step_number)
        if found:
            self.display.line(f"resumed    after step {self.trainer.step_number:,}")

    def _batch(self, step: int) -> Tensor:
        """Return the ids of a step (batch_size * accumulate, seq_len + 1).

        Where documents are few, as in one long novel, the model would hardly ever see how a text begins, yet
        generating without a prompt asks just that. So there one window in 16 opens with the end-of-text id.
        """
        ids = self.dataset.batch(step)
        if self.tokens.train.documents < self.dataset.windows_per_epoch / 16:
            first = step * len(ids)
            ids[-first % 16 :: 16, 0] = self.tokenizer.eos_id
        return ids

    def _step(self) -> None:
        """Do one step, write its metrics, show it."""
        started = time.perf_counter()
        report = self.trainer.step()
        self.recent.append(time.perf_counter() - started)
        self.seconds += self.recent[-1]
        tokens = report.step * self.config.tokens_per_step
        self.metrics.write({**vars(report), "tokens": tokens, "seconds": round(self.seconds, 3)})
        pace = sum(self.recent) / len(self.recent)
        self.display.show(
            Snapshot(
                step=report.step,
                total=self.trainer.total,
                loss=report.loss,
                valid_bits_per_byte=self.metrics.last("valid_bits_per_byte"),
                tokens_per_second=self.config.tokens_per_step / pace,
                seconds_left=(self.trainer.total - report.step) * pace,
            )
        )

    def _save(self) -> None:
        """Write a checkpoint; the metrics up to it reach the disk first."""
        self.metrics.sync()
        extra = {"config": self.config.to_dict(), "data": self._data_hash(), "seconds": self.seconds}
        self.saved = self.checkpoints.save(self.trainer, extra)

    def _report(self, signals: Signals) -> None:
        """Validate and sample if this step asks for it and it is not done yet; a signal cuts it short."""
        step, last = self.trainer.step_number, self.trainer.done
        if self.tokens.valid and self._due("valid_bits_per_byte", self.config.eval_every, always=last):
            loss = self._validate(None if last else self.config.eval_windows, signals)
            if loss is None:
                return
            bits = self.tokens.valid.bits_per_byte(loss)
            self.metrics.write({"step": step, "valid_loss": loss, "valid_bits_per_byte": bits})
            whole = " (all of the held-out text)" if last else ""
            self.display.line(f"step {step:,}: valid {bits:.4f} bits/byte{whole}")
            self._plot()
        if self.config.sample_every and self._due("sample", self.config.sample_every, always=last):
            text = self._sample()
            self.metrics.write({"step": step, "sample": text})
            self.display.line(f"step {step:,}: {text}")

    def _complete(self) -> bool:
        """Tell whether nothing remains to be done."""
        validated = not self.tokens.valid or self.metrics.has(self.trainer.step_number, "valid_bits_per_byte")
        return self.trainer.done and validated

    def _due(self, key: str, every: int, *, always: bool) -> bool:
        """Tell whether a report is to be made at this step and is not in the metrics yet."""
        step = self.trainer.step_number
        regular = every > 0 and step > 0 and step % every == 0
        return (regular or always) and not self.metrics.has(step, key)

    @torch.inference_mode()
    def _validate(self, limit: int | None, signals: Signals) -> float | None:
        """Return the mean loss on held-out windows in nats per token, or None if a signal came."""
        assert self.tokens.valid is not None
        config, total, count = self.config, 0.0, 0
        for ids in windows(self.tokens.valid.path, config.seq_len, batch_size=config.batch_size, limit=limit):
            if signals.received:
                return None
            ids = ids.to(config.device)
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            loss = self.trainer.model(ids, labels=ids, return_logits=False).loss
            total += loss.item() * predicted
            count += predicted
        return total / count

    def _sample(self) -> str:
        """Continue the sample prompt."""
        config = self.config
        pieces = generate(
            self.trainer.model,
            self.tokenizer,
            config.sample_prompt,
            max_new_tokens=config.sample_tokens,
            temperature=0.8,
            seed=config.seed + self.trainer.step_number,
        )
        return config.sample_prompt + "".join(pieces)

    def _plot(self) -> None:
        """Draw the curves if matplotlib is there; say it once if it is not."""
        try:
            plot_losses(self.metrics.records, self.directory / "loss.png")
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
        save(self.trainer.model, self.directory / "model", self.tokenizer)

    def _data_hash(self) -> str:
        """Identify the tokens trained on."""
        return hashlib.sha256((self.tokens.directory / "meta.json").read_bytes()).hexdigest()

    def _last_good(self) -> str:
        """Say which checkpoint is intact."""
        return f"The last good checkpoint is {self.saved}." if self.saved else "There is no checkpoint yet."


def _refuse_changes(config: TrainConfig, stored: TrainConfig, place: Path) -> None:
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


def command(
    data: Annotated[list[str] | None, typer.Argument(help="Text files or folders.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the new run.")] = None,
    resume_from: Annotated[
        Path | None, typer.Option("--resume", help="Continue the run in this directory.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--config", help="TOML file of settings; flags win.")] = None,
    **settings: Any,
) -> None:
    """Train a model on text files, or resume a run after any kind of stop.

    DATA is .txt, .md or .jsonl in UTF-8, also .gz or .xz. The directory --out receives the tokenizer, the
    tokens, checkpoints, metrics.jsonl, loss.png and in the end model/, which `longscan generate --model` and
    transformers load. Ctrl-C stops after the step in hand.

    Args:
        data: what to train on.
        out: the new run's directory.
        resume_from: an earlier run's.
        recipe: settings in a file.
        settings: one flag for each field of TrainConfig.

    Raises:
        UsageError: flags that contradict each other or have impossible values.
    """
    given = {name: value for name, value in settings.items() if value is not None and value != []}
    if data:
        given["data"] = data
    for name in ("data", "valid"):
        if name in given:
            given[name] = [os.path.abspath(path) for path in given[name]]
    if (out is None) == (resume_from is None):
        raise UsageError("give either --out DIR for a new run or --resume DIR to continue one.")
    keep_memory()
    if resume_from is not None:
        if recipe is not None:
            raise UsageError("--config is for a new run: --resume takes the settings the run began with.")
        result = resume(resume_from, given, Terminal(given.get("log_every", 10)))
    else:
        config = read_recipe(recipe, given)
        torch.manual_seed(config.seed)
        result = train(config, cast(Path, out), Terminal(config.log_every))
    _farewell(result)


def _farewell(result: TrainResult) -> None:
    """Say how the run ended and what to do next."""
    directory = result.directory
    if result.stopped_by is not None:
        remedy = f"continue with: longscan train --resume {directory}"
        typer.echo(f"stopped after step {result.step:,}; {remedy}", err=True)
        raise typer.Exit(130 if result.stopped_by == signal.SIGINT else 0)
    bits = result.valid_bits_per_byte
    measured = f" · {bits:.4f} bits/byte on held-out text" if bits is not None else ""
    remedy = f"try: longscan generate --model {directory / 'model'}"
    typer.echo(f"trained {result.total:,} steps{measured} · {remedy}")


# Typer reads the options from the signature.
_signature = inspect.signature(command, eval_str=True)
command.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[*list(_signature.parameters.values())[:-1], *flag_parameters()]
)
