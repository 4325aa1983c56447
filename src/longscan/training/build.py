"""Build what a run's settings ask for: the tokenizer, the token files, the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from longscan.core.config import Config, nearest
from longscan.core.files import atomic_directory
from longscan.core.progress import duration
from longscan.data.documents import training_text
from longscan.data.token_files import TokenFiles, prepare
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, Model
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import load_tokenizer, train_bpe
from longscan.tokenizers.wordpiece import load_wordpiece, train_wordpiece
from longscan.training.config import FreshConfig, TrainConfig

__all__ = ["check_device", "make_model", "make_tokenizer", "make_tokens", "model_settings"]


# how tokenizers are called, read and learnt
_Kind: TypeAlias = tuple[str, Callable[[str | Path], Tokenizer], Callable[[Iterable[str], int], Tokenizer]]

_BPE: _Kind = "BPE", load_tokenizer, train_bpe

_WORDPIECE: _Kind = "WordPiece", load_wordpiece, train_wordpiece


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
    masked = MODELS[config.model].kind == "masked"
    name, load, learn = _WORDPIECE if masked else _BPE
    if place.is_dir():
        return load(place)
    started = time.perf_counter()
    if config.tokenizer == "bpe":
        tokenizer = learn(training_text(config.data, **_division(config)), config.vocab_size)
        seconds = time.perf_counter() - started
        tell(f"tokenizer  {name} of {tokenizer.vocab_size:,} tokens, trained in {duration(seconds)}")
    else:
        if masked and config.tokenizer == "bytes":
            raise UsageError(f"--tokenizer: {config.model} needs WordPiece, which hides words, not bytes.")
        tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else load(config.tokenizer)
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


def model_settings(config: FreshConfig, vocab_size: int) -> Config:
    """Return the configuration of the model to train.

    Args:
        config: the settings.
        vocab_size: tokens of the tokenizer.

    Returns:
        The preset, changed by the settings.

    Raises:
        UsageError: there is no such model, preset or device, or the sizes are impossible.
    """
    choice = config.choice
    if config.model not in choice:
        if config.model not in MODELS:
            raise UsageError(f"--model: no model called {config.model!r}{nearest(config.model, choice)}")
        kind = MODELS[config.model].kind
        raise UsageError(
            f"--model: expected one of {', '.join(choice)}, got the {kind} model {config.model}."
        )
    entry = choice[config.model]
    presets = entry.presets
    if config.preset not in presets:
        close = nearest(config.preset, presets)
        raise UsageError(f"--preset: {config.model} has no preset {config.preset!r}{close}")
    check_device(config.device)
    try:
        sizes = {**presets[config.preset], "vocab_size": vocab_size, **config.sizes, **config.options}
        return entry.config.from_dict(sizes)
    except LongscanError as error:
        raise UsageError(str(error)) from error


def check_device(device: str) -> None:
    """Insist that there is such a device.

    Args:
        device: in torch's words.

    Raises:
        UsageError: there is none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


def make_model(config: FreshConfig, vocab_size: int) -> Model:
    """Build the model with fresh weights drawn from the run's seed.

    Args:
        config: the settings.
        vocab_size: tokens of the tokenizer.

    Returns:
        The model, on the run's device.

    Raises:
        UsageError: as `model_settings`.
        LongscanError: there is no memory for a model of that size.
    """
    settings = model_settings(config, vocab_size)
    generator = torch.Generator().manual_seed(config.seed)
    try:
        return MODELS[config.model].cls(settings, generator=generator).to(config.device)
    except RuntimeError as error:  # torch's word for a lack of memory, on any device
        if "allocate" not in str(error) and "memory" not in str(error):
            raise
        numbers = {name: value for name, value in settings.to_dict().items() if type(value) is int}
        sizes = ", ".join(f"{name} {value:,}" for name, value in numbers.items() if name != "vocab_size")
        raise LongscanError(f"no memory for a model of {sizes}. Choose a smaller one.") from error


def _division(config: TrainConfig) -> dict[str, Any]:
    """How the text is divided, in the words of data.py."""
    return {
        "valid_paths": config.valid or None,
        "valid_fraction": config.valid_fraction,
        "separator": config.separator,
    }
