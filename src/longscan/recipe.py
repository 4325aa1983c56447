"""What a run is made of: its settings, and the tokenizer, tokens and model they ask for."""

from __future__ import annotations

import inspect
import math
import time
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longscan.config import Config, nearest
from longscan.data import TokenFiles, prepare, training_text
from longscan.errors import LongscanError, UsageError
from longscan.files import atomic_directory
from longscan.models import MODELS, LanguageModel, LanguageModelConfig
from longscan.progress import duration
from longscan.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "TrainConfig",
    "flag_parameters",
    "make_model",
    "make_tokenizer",
    "make_tokens",
    "model_settings",
    "read_recipe",
]

DEFAULT_EPOCHS = 4.0


def _setting(default: Any, help: str) -> Any:
    """Declare a field of TrainConfig; the text is its line in `longscan train --help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything that decides what `longscan train` computes: a field is a flag and a key of a recipe file.

    Raises:
        UsageError: a value cannot work.
    """

    data: tuple[str, ...] = _setting((), "Text files or folders.")
    valid: tuple[str, ...] = _setting((), "Held-out file; without it a part of DATA is held out. Repeatable.")
    valid_fraction: float = _setting(0.05, "Part of DATA held out for validation.")
    separator: str | None = _setting(None, "What parts the documents of a plain-text file.")
    tokenizer: str = _setting("bpe", "'bpe' trains one, 'bytes' needs none, else a model directory.")
    vocab_size: int = _setting(4096, "Tokens of the BPE to train.")

    model: str = _setting("mamba", "Architecture, see `longscan models`.")
    preset: str = _setting("tiny-lm", "Size of the model; the next flags change it.")
    d_model: int | None = _setting(None, "Width.")
    n_layers: int | None = _setting(None, "Layers.")
    d_state: int | None = _setting(None, "State per channel.")
    d_conv: int | None = _setting(None, "Width of the convolution.")
    expand: int | None = _setting(None, "Channels of the recurrence per channel of the model.")

    seq_len: int = _setting(512, "Tokens in a sequence.")
    batch_size: int = _setting(8, "Sequences in a forward pass.")
    accumulate: int = _setting(1, "Forward passes in a step.")
    steps: int | None = _setting(None, "Optimizer steps.")
    epochs: float | None = _setting(
        None, f"Passes over DATA, instead of --steps; {DEFAULT_EPOCHS:g} without either."
    )
    # AdamW, linear warm-up and cosine as in the Mamba paper, appendix E.2
    lr: float = _setting(3e-3, "Peak learning rate.")
    min_lr: float | None = _setting(None, "Learning rate at the end; a hundredth of --lr without it.")
    warmup: int = _setting(200, "Steps to reach the peak, at most a tenth of the run.")
    weight_decay: float = _setting(0.1, "AdamW's decay of the matrices.")
    beta1: float = _setting(0.9, "AdamW's memory of the gradient.")
    beta2: float = _setting(0.95, "AdamW's memory of its square.")
    clip: float = _setting(1.0, "Largest norm of the gradient.")
    seed: int = _setting(0, "Start of all randomness.")
    device: str = _setting("cpu", "Where to compute, in torch's words.")
    threads: int | None = _setting(None, "Threads; sums, hence the last bits, depend on it.")

    eval_every: int = _setting(200, "Steps between validations; 0 = only at the end.")
    eval_windows: int = _setting(32, "Sequences in a validation; all of them at the end.")
    sample_every: int = _setting(200, "Steps between samples of text; 0 = none.")
    sample_prompt: str = _setting("", "What the samples continue.")
    sample_tokens: int = _setting(64, "Length of a sample.")
    save_every: int = _setting(200, "Steps between checkpoints.")
    log_every: int = _setting(10, "Steps between lines where no bar can be drawn.")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its name."""
        at_least = {
            **dict.fromkeys(("seq_len", "vocab_size"), 2),
            **dict.fromkeys(("d_model", "n_layers", "d_state", "d_conv", "expand", "threads", "steps"), 1),
            **dict.fromkeys(
                ("batch_size", "accumulate", "log_every", "save_every", "eval_windows", "sample_tokens"), 1
            ),
            **dict.fromkeys(("warmup", "seed", "eval_every", "sample_every"), 0),
            **dict.fromkeys(("weight_decay", "min_lr"), 0),
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}: expected {least} or more, got {value}.")
        for name in ("lr", "epochs", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name}: expected more than 0, got {value}.")
        for name in ("beta1", "beta2", "valid_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}.")
        if self.final_lr > self.lr:
            raise UsageError(f"min_lr: expected at most lr = {self.lr:g}, got {self.min_lr:g}.")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("steps: give either steps or epochs, got both.")

    @property
    def final_lr(self) -> float:
        """The learning rate of the last step."""
        return self.lr / 100 if self.min_lr is None else self.min_lr

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.seq_len * self.batch_size * self.accumulate

    def total_steps(self, windows: int) -> int:
        """Return the length of the run in optimizer steps, given the sequences in the training text."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or DEFAULT_EPOCHS) * windows / (self.batch_size * self.accumulate))

    def changed(self, other: TrainConfig) -> list[str]:
        """Return the names of the fields that differ from `other` and would change the weights."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if name not in _HARMLESS and mine[name] != theirs[name]]


# What may change between the halves of an interrupted run: how often it reports, and the threads, because
# another machine may have fewer (the result is then equal but for rounding).
_HARMLESS = frozenset(
    "threads eval_every eval_windows sample_every sample_prompt sample_tokens save_every log_every".split()
)


def read_recipe(path: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Join a recipe file and the flags given beside it; flags win.

    Args:
        path: a TOML file of fields, or None.
        flags: field -> value.

    Returns:
        The settings.

    Raises:
        UsageError: a flag has an impossible value.
        LongscanError: the file is no TOML or has a field that is unknown or impossible.
        OSError: it cannot be read.
    """
    recipe: dict[str, Any] = {}
    if path is not None:
        try:
            recipe = tomllib.loads(path.read_text(encoding="utf-8"))
            TrainConfig.from_dict(recipe)
        except (ValueError, LongscanError) as error:  # tomllib's and Unicode's errors are ValueErrors
            raise LongscanError(f"{path}: {error}") from error
    rivals = {"steps": "epochs", "epochs": "steps"}
    recipe = {name: value for name, value in recipe.items() if rivals.get(name) not in flags}
    try:
        return TrainConfig.from_dict({**recipe, **flags})
    except LongscanError as error:
        name, _, fault = str(error).removeprefix("TrainConfig.").partition(":")
        raise UsageError(f"--{name.replace('_', '-')}:{fault}") from error


def flag_parameters() -> list[inspect.Parameter]:
    """Make a flag of each field of TrainConfig, so that flags, recipes and Python have the same names."""
    hints = typing.get_type_hints(TrainConfig)
    parameters = []
    for setting in fields(TrainConfig):
        if setting.name == "data":  # the arguments
            continue
        default = "" if setting.default in (None, (), "") else f" [{setting.default}]"
        option = typer.Option(help=setting.metadata["help"] + default, show_default=False)
        hint: Any = list[str] if setting.name == "valid" else hints[setting.name]
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[hint | None, option],
            )
        )
    return parameters


def make_tokenizer(config: TrainConfig, place: Path, tell: Callable[[str], None]) -> Tokenizer:
    """Return the run's tokenizer: the one it has, or else the one its settings ask for.

    Args:
        config: the settings.
        place: where the run keeps it.
        tell: receives a line about a new one.

    Returns:
        The tokenizer, saved.

    Raises:
        LongscanError: there is no such tokenizer, or no text to train one on.
    """
    if place.is_dir():
        return load_tokenizer(place)
    started = time.perf_counter()
    if config.tokenizer == "bpe":
        tokenizer: Tokenizer = train_bpe(training_text(config.data, **_division(config)), config.vocab_size)
        seconds = time.perf_counter() - started
        tell(f"tokenizer  BPE of {tokenizer.vocab_size:,} tokens, trained in {duration(seconds)}")
    else:
        tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
        tell(f"tokenizer  {config.tokenizer}, {tokenizer.vocab_size:,} tokens")
    with atomic_directory(place) as temporary:
        tokenizer.save(temporary)
    return tokenizer


def make_tokens(
    config: TrainConfig, tokenizer: Tokenizer, place: Path, progress: Callable[[int, int], None]
) -> TokenFiles:
    """Return the run's tokens; once they are there the text is not read again and may be gone.

    Args:
        config: the settings.
        tokenizer: the run's.
        place: where the run keeps them.
        progress: called with the bytes of text done and their total.

    Returns:
        The token files.

    Raises:
        LongscanError: the text cannot be read.
    """
    if place.is_dir():
        return TokenFiles.open(place)
    return prepare(config.data, tokenizer, place, progress=progress, **_division(config))


def model_settings(config: TrainConfig, vocab_size: int) -> LanguageModelConfig:
    """Return the configuration of the model to train.

    Args:
        config: the settings.
        vocab_size: tokens of the tokenizer.

    Returns:
        The preset, changed by the settings.

    Raises:
        UsageError: there is no such model, preset or device, or the sizes are impossible.
    """
    if config.model not in MODELS:
        raise UsageError(f"--model: no model called {config.model!r}{nearest(config.model, MODELS)}")
    entry = MODELS[config.model]
    presets = entry.presets
    if config.preset not in presets:
        close = nearest(config.preset, presets)
        raise UsageError(f"--preset: {config.model} has no preset {config.preset!r}{close}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise UsageError(f"--device {config.device}: {str(error).splitlines()[0]}") from error
    sizes = {name: getattr(config, name) for name in ("d_model", "n_layers", "d_state", "d_conv", "expand")}
    given = {name: value for name, value in sizes.items() if value is not None}
    try:
        return entry.config.from_dict({**presets[config.preset], "vocab_size": vocab_size, **given})
    except LongscanError as error:
        raise UsageError(str(error)) from error


def make_model(config: TrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Build the model with fresh weights drawn from the run's seed.

    Args:
        config: the settings.
        tokenizer: the run's; it decides the vocabulary.

    Returns:
        The model, on the run's device.

    Raises:
        UsageError: as `model_settings`.
        LongscanError: there is no memory for a model of that size.
    """
    settings = model_settings(config, tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        return MODELS[config.model].cls(settings, generator=generator).to(config.device)
    except RuntimeError as error:  # torch's word for a lack of memory, on any device
        if "allocate" not in str(error) and "memory" not in str(error):
            raise
        sizes = f"d_model {settings.d_model:,}, {settings.n_layers:,} layers"
        raise LongscanError(f"no memory for a model of {sizes}. Choose a smaller one.") from error


def _division(config: TrainConfig) -> dict[str, Any]:
    """How the text is divided, in the words of data.py."""
    return {
        "valid_paths": config.valid or None,
        "valid_fraction": config.valid_fraction,
        "separator": config.separator,
    }
