"""The settings of a run: one dataclass field is a flag, a key of a recipe file and a Python argument."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, overload

from longscan.core.config import Config
from longscan.core.files import read_toml
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, ModelEntry, ModelKind
from longscan.models.sequence_classifier import Body

__all__ = ["FreshConfig", "RunConfig", "TrainConfig", "read_recipe", "setting"]


def setting(default: Any, help: str, alias: str | None = None, **traits: bool) -> Any:
    """Declare a field of a RunConfig.

    Args:
        default: its default value.
        help: its line in `--help`.
        alias: a second name of its flag.
        traits: `harmless`: it may change when a run is resumed, as it doesn't affect the weights; `path`: it
            names files; `size`: it is a field of the model's Config; `argument`: it is no flag.
    """
    return field(default=default, metadata={"help": help, "alias": alias, **traits})


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """The settings of every training run: a field is a flag and a key of a recipe file. Subclasses add more.

    Raises:
        UsageError: a value is out of range.
    """

    EPOCHS: ClassVar[float] = 4.0  # of a run without --steps and --epochs

    steps: int | None = setting(None, "Optimizer steps; with --resume, a larger number extends the run.")
    epochs: float | None = setting(None, "Passes over the data, instead of --steps.")
    schedule: Literal["cosine", "linear", "noam"] = setting(
        "cosine", "Learning-rate schedule; noam is the Transformer's, with --lr as its factor."
    )
    lr: float = setting(3e-3, "Peak learning rate.")
    ssm_lr: float = setting(1e-3, "Peak learning rate of A, B and dt in S4, S4D, LSSL and H3, at most --lr.")
    min_lr: float | None = setting(None, "Final learning rate; default: --lr / 100 (cosine) or 0 (linear).")
    warmup: int = setting(200, "Warm-up steps, at most a tenth of the run except for noam.")
    weight_decay: float = setting(0.1, "Weight decay of AdamW, on matrices only.")
    beta1: float = setting(0.9, "AdamW beta1.")
    beta2: float = setting(0.95, "AdamW beta2.")
    eps: float = setting(1e-8, "AdamW epsilon.")
    clip: float = setting(1.0, "Gradient clipping: the maximum norm.")
    seed: int = setting(0, "Random seed.")
    device: str = setting("cpu", "Device of the training, as torch names it.")
    # harmless, as another machine may have fewer: the result differs by rounding only
    threads: int | None = setting(None, "CPU threads; rounding depends on their number.", harmless=True)

    eval_every: int = setting(200, "Steps between validations; 0 = only at the end.", harmless=True)
    save_every: int = setting(200, "Steps between checkpoints.", harmless=True)
    log_every: int = setting(10, "Steps between progress lines where stderr is no terminal.", harmless=True)

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("steps", "threads", "save_every", "log_every", least=1)
        self.check("seed", least=0, most=2**63 - 1)
        self.check("warmup", "eval_every", "weight_decay", "min_lr", least=0)
        self.check("lr", "ssm_lr", "epochs", "clip", "eps", above=0)
        self.check("beta1", "beta2", least=0, below=1)
        if self.final_lr > self.lr:
            raise UsageError(f"min_lr: expected at most lr = {self.lr:g}, got {self.min_lr:g}.")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("steps: give either steps or epochs, got both.")

    @property
    def final_lr(self) -> float:
        """The learning rate of the last step."""
        return self.lr / 100 * (self.schedule == "cosine") if self.min_lr is None else self.min_lr

    def total_steps(self, items: int, per_step: int = 1) -> int:
        """Return the length of the run in optimizer steps.

        Args:
            items: sequences, or batches, in one epoch.
            per_step: items per step.
        """
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or self.EPOCHS) * items / per_step)

    def changed(self, other: RunConfig) -> list[str]:
        """Return the names of the fields that differ from `other` and affect the weights."""
        return [
            entry.name
            for entry in fields(self)
            if not entry.metadata.get("harmless") and getattr(self, entry.name) != getattr(other, entry.name)
        ]

    def as_resolved(self, stored: Self) -> Self:
        """Return the configuration, with what a run has resolved of its defaults.

        Args:
            stored: the configuration of the run.
        """
        names = [name for name in ("backward_chunk",) if getattr(self, name, 0) is None]
        return self.replace(**{name: getattr(stored, name) for name in names})

    def absolute(self) -> Self:
        """Return the configuration with absolute paths, which stay valid in any working directory."""
        paths = [entry.name for entry in fields(self) if entry.metadata.get("path")]
        return self.replace(**{name: _absolute(getattr(self, name)) for name in paths})


@dataclass(frozen=True, kw_only=True)
class FreshConfig(RunConfig):
    """The settings of a run that starts with a new model: its name, preset and sizes."""

    KINDS: ClassVar[tuple[ModelKind, ...]]  # of the models it can train

    model: str = setting("mamba", "Architecture, see `longscan models`.")
    preset: str = setting("tiny", "Model size; the next flags override it.")
    d_model: int | None = setting(None, "Width of the model.", size=True)
    n_layers: int | None = setting(None, "Number of layers.", size=True)
    option: tuple[str, ...] = setting(
        (),
        "NAME=VALUE: any field of the model's Config, such as d_state=32 or d_ff=256. Repeatable.",
        alias="--set",
    )

    def __post_init__(self) -> None:
        """Raise UsageError if a size is less than 1."""
        super().__post_init__()
        self.check(*(name for name, value in self.sizes.items() if type(value) is int), least=1)

    @property
    def choice(self) -> Mapping[str, ModelEntry | Body]:
        """The models that can be trained, by name."""
        return {name: entry for name, entry in MODELS.items() if entry.kind in self.KINDS}

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of the model's Config that are given by flags of their own."""
        names = [entry.name for entry in fields(self) if entry.metadata.get("size")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the model's Config that are given as NAME=VALUE.

        Raises:
            UsageError: one has another form.
        """
        values: dict[str, Any] = {}
        for option in self.option:
            name, equals, value = option.partition("=")
            if not equals or not name:
                raise UsageError(f"option: expected NAME=VALUE such as d_state=16, got {option!r}.")
            try:
                values[name] = json.loads(value)
            except ValueError:
                values[name] = value
        return values


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FreshConfig):
    """The settings of `longscan train`."""

    KINDS = ("language", "masked")

    data: tuple[str, ...] = setting((), "Text files or directories.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation file; default: hold out a part of DATA. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.05, "Fraction of DATA held out for validation.")
    separator: str | None = setting(None, "String that separates the documents of a plain-text file.")
    pretrained: str | None = setting(
        None,
        "Checkpoint whose training continues, with its sizes and tokenizer: a directory, a file or a hub id.",
        alias="--from",
    )
    tokenizer: str = setting(
        "bpe", "'bpe' trains one (bert: WordPiece), 'bytes' for none, or a model directory."
    )
    vocab_size: int = setting(4096, "Vocabulary size of the BPE to train.")

    preset: str = setting("tiny-lm", "Model size; the next flags override it.")
    n_heads: int | None = setting(None, "Attention heads.", size=True)
    n_kv_heads: int | None = setting(None, "Key and value heads, for grouped-query attention.", size=True)
    d_ff: int | None = setting(None, "Hidden width of the feed-forward layers.", size=True)
    d_state: int | None = setting(None, "State size per channel.", size=True)
    d_conv: int | None = setting(None, "Width of the convolution.", size=True)
    expand: int | None = setting(None, "Channels of the recurrence per channel of the model.", size=True)

    seq_len: int = setting(512, "Tokens per sequence.")
    batch_size: int = setting(8, "Sequences per forward pass.")
    accumulate: int = setting(1, "Forward passes per step (gradient accumulation).")

    backward_chunk: int | None = setting(
        None,
        "Tokens per chunk of the backward pass: exact, and memory stays that of one chunk; 0 = one pass. "
        "Default: 2048 if --seq-len is over 8192 and the model's state has a constant size, else 0.",
    )

    carry_state: bool = setting(
        False,
        "Each row continues where it stopped a step ago, from its state; gradients end at the step. "
        "Default: shuffled sequences, each from the initial state.",
    )

    shard: bool = setting(
        False,
        "Under torchrun: shard weights, gradients and optimizer over the processes (FSDP2).",
        harmless=True,
    )
    context_parallel: int = setting(
        1,
        "Under torchrun: processes that share each sequence, each with a part of its tokens; a divisor of "
        "their number. For models whose state has a constant size.",
        harmless=True,
    )
    timeout: int = setting(600, "Under torchrun: seconds to wait for another process.", harmless=True)

    eval_windows: int = setting(32, "Sequences per validation; all of them at the end.", harmless=True)
    sample_every: int = setting(200, "Steps between samples of text; 0 = none.", harmless=True)
    sample_prompt: str = setting("", "Prompt of the samples.", harmless=True)
    sample_tokens: int = setting(64, "Tokens per sample.", harmless=True)

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("seq_len", "vocab_size", least=2)
        self.check("batch_size", "accumulate", "timeout", "eval_windows", "sample_tokens", least=1)
        self.check("context_parallel", least=1)
        self.check("sample_every", "backward_chunk", least=0)
        self.check("valid_fraction", least=0, below=1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.seq_len * self.batch_size * self.accumulate


C = TypeVar("C", bound=RunConfig)


@overload
def read_recipe(path: Path | None, flags: Mapping[str, Any]) -> TrainConfig: ...


@overload
def read_recipe(path: Path | None, flags: Mapping[str, Any], kind: type[C]) -> C: ...


def read_recipe(
    path: Path | None, flags: Mapping[str, Any], kind: type[RunConfig] = TrainConfig
) -> RunConfig:
    """Return the settings of a recipe file and of flags, which override it.

    Args:
        path: a TOML file of fields, or None.
        flags: field -> value.
        kind: the class of the settings.

    Returns:
        The settings.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the file is no TOML or has an unknown field or an invalid value.
        OSError: it cannot be read.
    """
    recipe: dict[str, Any] = {}
    if path is not None:
        recipe = read_toml(path)
        try:
            kind.from_dict(recipe)
        except LongscanError as error:
            raise LongscanError(f"{path}: {error}") from error
    rivals = {"steps": "epochs", "epochs": "steps"}
    recipe = {name: value for name, value in recipe.items() if rivals.get(name) not in flags}
    try:
        return kind.from_dict({**recipe, **flags})
    except LongscanError as error:
        name, _, fault = str(error).removeprefix(f"{kind.__name__}.").partition(":")
        raise UsageError(f"--{name.replace('_', '-')}:{fault}") from error


def _absolute(value: str | tuple[str, ...] | None) -> str | list[str] | None:
    """Return a path, or several, as absolute ones."""
    if isinstance(value, str):
        return os.path.abspath(value) if value else value
    return None if value is None else [os.path.abspath(path) for path in value]
