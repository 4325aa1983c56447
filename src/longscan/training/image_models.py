"""The model that is trained on images or clips: a new one, or one to fine-tune, adapted to the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from longscan.core.config import count
from longscan.data.labelled import Labelled
from longscan.data.videos import Clip
from longscan.errors import LongscanError, UsageError
from longscan.inference.images import frames_of
from longscan.models import ModelEntry, VideoMamba, entry_of
from longscan.models.common.vision import VisionConfig, VisionModel
from longscan.training.build import model_settings
from longscan.training.image_settings import ImagesConfig

__all__ = ["adapt_model", "check_model", "new_model"]

SAMPLE = 1000  # images or clips from which mean and standard deviation are computed


def check_model(config: ImagesConfig) -> None:
    """Check the settings of a new model, before the data are read.

    Args:
        config: the run's.

    Raises:
        UsageError: there is no such model, or its input is of another kind.
    """
    _settings(config, **_channels(config, 3))


def new_model(config: ImagesConfig, train: Labelled[Any], notify: Callable[[str], None]) -> VisionModel:
    """Return a new model, on the CPU.

    Args:
        config: the run's.
        train: the training data, which set its classes; arrays also size and channels.
        notify: receives a line about a model of videos that is trained on images.

    Raises:
        UsageError: see `check_model`.
    """
    known: dict[str, Any] = {"n_classes": len(train.labels), "labels": train.labels}
    if train.size and train.size[0] == train.size[1]:
        known |= {"image_size": train.size[0], "crop": 1.0}
    known |= _channels(config, train.channels, lambda: _statistics(train))
    settings = _settings(config, **known)
    if _stills(config):
        notify(f"images     {config.model} is trained on single images, n_frames=0; for clips give --frames")
    generator = torch.Generator().manual_seed(config.seed)
    entry = config.choice[config.model]
    assert isinstance(entry, ModelEntry)
    return cast(VisionModel, entry.cls(settings, generator=generator))


def adapt_model(
    config: ImagesConfig, loaded: VisionModel, labels: tuple[str, ...], notify: Callable[[str], None]
) -> VisionModel:
    """Return a model with the classes of the training data and the sizes of the settings.

    Args:
        config: the run's.
        loaded: the model to fine-tune, which is modified. A model of images becomes one of clips.
        labels: of the training data.
        notify: receives a line about what is new.

    Raises:
        UsageError: a setting does not fit the model.
    """
    loaded = _in_time(config, loaded, notify)
    if config.preset != type(config).preset:
        raise UsageError(f"--preset: {config.pretrained} has its own sizes. Leave it out.")
    generator = torch.Generator().manual_seed(config.seed)
    if set(loaded.config.labels) != set(labels):
        loaded.reset_classifier(len(labels), labels, generator)
        notify(f"new        head of {count(len(labels), 'class', 'classes')}, trained from scratch")
    try:
        settings = loaded.config.replace(**config.sizes, **config.options)
        model = cast(VisionModel, entry_of(loaded).cls(settings, generator=generator))
        model.load_state_dict(loaded.state_dict())
    except LongscanError as error:
        raise UsageError(f"{config.pretrained}: {error}") from error
    except RuntimeError as error:  # of another shape
        raise UsageError(f"{config.pretrained}: it can't have other sizes ({error}).") from error
    return model


def _in_time(config: ImagesConfig, loaded: VisionModel, notify: Callable[[str], None]) -> VisionModel:
    """Return a model of as many frames as the settings say, or of images."""
    n, before = config.frames, frames_of(loaded.config)
    if n is None:
        if before:
            raise UsageError(
                f"--from: {config.pretrained} classifies clips of {before} frames. Add --frames {before}."
            )
        return loaded
    if not isinstance(loaded, VideoMamba):
        name = entry_of(loaded).name
        raise UsageError(f"--from: {config.pretrained} is a {name}; clips, --frames, need a videomamba.")
    if before == n:
        return loaded
    try:
        if before:
            loaded.resize_frames(n)
            notify(f"new        positions of {n} frames, interpolated from {before}")
            return loaded
        tubelet = config.options.get("tubelet", 1)
        inflated = loaded.inflated(n, tubelet)
    except LongscanError as error:
        raise UsageError(f"{config.pretrained}: {error}") from error
    notify(f"new        positions of {n} frames, which start at 0: {config.pretrained} classifies images")
    return inflated


def _settings(config: ImagesConfig, **known: Any) -> VisionConfig:
    """Return the configuration of the new model."""
    entry = config.choice.get(config.model)
    if config.frames is not None:
        if entry is not None and not hasattr(entry.config, "n_frames"):
            raise UsageError(f"--frames: {config.model} classifies images. Try --model videomamba.")
        known["n_frames"] = config.frames
    elif _stills(config):
        known["n_frames"] = 0
    settings = cast(VisionConfig, model_settings(config, **known))
    if (n := frames_of(settings)) != (config.frames or 0):
        remedy = "Leave one out." if config.frames else f"Try --frames {n} for clips, n_frames=0 for images."
        raise UsageError(f"--set n_frames: expected {config.frames or 0} as in --frames, got {n}. {remedy}")
    return settings


def _stills(config: ImagesConfig) -> bool:
    """Whether the preset is one of videos, and the settings ask for no frames."""
    entry = config.choice.get(config.model)
    preset = entry.presets.get(config.preset, {}) if entry else {}
    return bool(preset.get("n_frames")) and config.frames is None and "n_frames" not in config.options


def _channels(
    config: ImagesConfig, n: int, statistics: Callable[[], tuple[float, float]] = lambda: (0.0, 1.0)
) -> dict[str, Any]:
    """Return the fields of n channels, unless the settings name another number; RGB has its own mean."""
    n = {"in_channels": n, **config.options}["in_channels"]
    if n not in (1, 3):
        raise UsageError(f"--set in_channels: expected 1 (greyscale) or 3 (RGB), got {n!r}.")
    if n == 3:
        return {}
    mean, std = statistics()
    return {"in_channels": 1, "mean": (mean,), "std": (std,)}


def _statistics(train: Labelled[Any]) -> tuple[float, float]:
    """Return mean and standard deviation of greyscale training data, in [0, 1]."""
    chosen = np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(int)
    pixels = np.concatenate([np.asarray(_still(train.item(n, 1))).ravel() for n in chosen]) / 255
    return float(pixels.mean()), max(float(pixels.std()), 1e-3)


def _still(source: Image.Image | Clip) -> Image.Image:
    """Return an image, or the middle frame of a clip."""
    return next(source.frames([source.n_frames // 2], 1)) if isinstance(source, Clip) else source
