"""Build a run's tokenizer, token files and model from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from longscan.checkpoints.formats import config_fields, format_of
from longscan.checkpoints.load import load_with_tokenizer
from longscan.checkpoints.save import save
from longscan.core.config import Config, nearest
from longscan.core.files import atomic_directory
from longscan.core.progress import duration
from longscan.data.documents import training_text
from longscan.data.token_files import TokenFiles, prepare
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, LanguageModel, Model, ModelEntry, preset_owner
from longscan.models.common.quantization import dequantized
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import load_tokenizer, train_bpe
from longscan.tokenizers.wordpiece import load_wordpiece, train_wordpiece
from longscan.training.config import FreshConfig, TrainConfig

__all__ = ["check_device", "continued", "make_model", "make_tokenizer", "make_tokens", "model_settings"]


# the name of a kind of tokenizer, and how to load and to train one
_Kind: TypeAlias = tuple[str, Callable[[str | Path], Tokenizer], Callable[[Iterable[str], int], Tokenizer]]

_BPE: _Kind = "BPE", load_tokenizer, train_bpe

_WORDPIECE: _Kind = "WordPiece", load_wordpiece, train_wordpiece


def make_tokenizer(config: TrainConfig, directory: Path, notify: Callable[[str], None]) -> Tokenizer:
    """Return the run's tokenizer, made from its settings if it is not saved yet.

    Args:
        config: the settings.
        directory: where the run saves it.
        notify: receives a line about a new tokenizer.

    Returns:
        The tokenizer, which is now saved.

    Raises:
        LongscanError: there is no such tokenizer, or no text to train one on.
    """
    masked = MODELS[config.model].kind == "masked"
    name, load, learn = _WORDPIECE if masked else _BPE
    if directory.is_dir():
        return load(directory)
    started = time.perf_counter()
    if config.tokenizer == "bpe":
        tokenizer = learn(training_text(config.data, **_split(config)), config.vocab_size)
        seconds = time.perf_counter() - started
        notify(f"tokenizer  {name} of {tokenizer.vocab_size:,} tokens, trained in {duration(seconds)}")
    else:
        if masked and config.tokenizer == "bytes":
            raise UsageError(
                f"--tokenizer: expected WordPiece for {config.model}, which masks words, got bytes."
            )
        tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else load(config.tokenizer)
        notify(f"tokenizer  {config.tokenizer}, {tokenizer.vocab_size:,} tokens")
    with atomic_directory(directory) as temporary:
        tokenizer.save(temporary)
    return tokenizer


def make_tokens(
    config: TrainConfig, tokenizer: Tokenizer, directory: Path, progress: Callable[[int, int], None]
) -> TokenFiles:
    """Return the run's tokens; once they are saved, the text is no longer needed.

    Args:
        config: the settings.
        tokenizer: the run's.
        directory: where the run saves them.
        progress: called with the bytes of text tokenised so far and their total.

    Returns:
        The token files.

    Raises:
        LongscanError: the text cannot be read.
    """
    if directory.is_dir():
        return TokenFiles.open(directory)
    return prepare(config.data, tokenizer, directory, progress=progress, **_split(config))


def model_settings(config: FreshConfig, **known: Any) -> Config:
    """Return the configuration of the model to train.

    Args:
        config: the settings.
        known: fields that follow from the data, such as vocab_size; the settings override them.

    Returns:
        The preset with the sizes of the settings.

    Raises:
        UsageError: there is no such model, preset or device, or a size is invalid.
    """
    choice = config.choice
    if config.model not in choice:
        if owner := preset_owner(config.model):
            raise UsageError(
                f"--model: {config.model} is a preset. Try --model {owner} --preset {config.model}."
            )
        if config.model not in MODELS:
            for owner, preset in ((name, preset) for name in choice for preset in choice[name].presets):
                if preset.startswith(f"{config.model.lower().removesuffix('-h')}-"):
                    raise UsageError(
                        f"--model: {config.model} is a family. Try --model {owner} --preset {preset}."
                    )
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
        sizes = {**presets[config.preset], **known, **config.sizes, **config.options}
        return entry.config.from_dict(sizes)
    except LongscanError as error:
        raise UsageError(str(error)) from error


def check_device(device: str) -> None:
    """Raise unless a device exists.

    Args:
        device: as torch names it.

    Raises:
        UsageError: there is none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without its support
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


def make_model(config: FreshConfig, vocab_size: int) -> Model:
    """Return a new model, initialised with the run's seed.

    Args:
        config: the settings.
        vocab_size: of the tokenizer.

    Returns:
        The model, on the run's device.

    Raises:
        UsageError: as `model_settings`.
        LongscanError: the model does not fit into memory, or its layout has no field for one of its settings.
    """
    settings = model_settings(config, vocab_size=vocab_size)
    entry, generator = config.choice[config.model], torch.Generator().manual_seed(config.seed)
    assert isinstance(entry, ModelEntry)  # whose class is MODELS', unless an experiment has its own
    try:
        model = entry.cls(settings, generator=generator).to(config.device)
    except RuntimeError as error:  # torch's error for a lack of memory, on any device
        if "allocate" not in str(error) and "memory" not in str(error):
            raise
        numbers = {name: value for name, value in settings.to_dict().items() if type(value) is int}
        sizes = ", ".join(f"{name} {value:,}" for name, value in numbers.items() if name != "vocab_size")
        raise LongscanError(f"not enough memory for a model of {sizes}. Choose a smaller one.") from error
    if MODELS.get(config.model) is entry:  # a model that can't be saved must not be trained first
        config_fields(model, format_of(model), "float32")
    return model


def _split(config: TrainConfig) -> dict[str, Any]:
    """Return how to split the text, as arguments of the data room."""
    return {
        "valid_paths": config.valid or None,
        "valid_fraction": config.valid_fraction,
        "separator": config.separator,
    }


def continued(config: TrainConfig, start: Path) -> tuple[LanguageModel, Tokenizer]:
    """Return the model whose training continues, and its tokenizer.

    Args:
        config: the settings.
        start: where the run saves both, as a run that resumes starts from the same.

    Raises:
        UsageError: settings of a new model were given too.
        LongscanError: the checkpoint can't be read.
    """
    if not start.is_dir():
        assert config.pretrained is not None
        usual, names = TrainConfig(), ("preset", "tokenizer", "vocab_size", "model")
        given = [name for name in names if getattr(config, name) != getattr(usual, name)]
        given += [*config.sizes, *config.options]
        if given:
            raise UsageError(f"--from: {config.pretrained} has its own {', '.join(given)}. Leave that out.")
        loaded, tokenizer = load_with_tokenizer(config.pretrained, None, False)
        save(dequantized(loaded).float(), start, tokenizer)
    check_device(config.device)
    model, its_tokenizer = load_with_tokenizer(str(start), None, True)
    return model.to(config.device).train(), its_tokenizer
