"""The image task: train a vision model on labelled images, or fine-tune one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.core.config import count
from longscan.core.random import STEPS, VERSION, EpochOrder, RandomStream, image_stream
from longscan.core.runtime import StopSignals
from longscan.data.augmentation import Augmentation, mix
from longscan.data.images import Images, read_images
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.images import TOP, measure_images
from longscan.inference.images import check_takes_images, normalise
from longscan.models import Model, ModelEntry, entry_of
from longscan.models.common.vision import VisionConfig, VisionModel
from longscan.training.build import check_device, model_settings
from longscan.training.config import FreshConfig, setting
from longscan.training.run import Run

__all__ = ["ImagesConfig", "ImagesRun"]

SAMPLE = 1000  # images from which mean and standard deviation are computed


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(FreshConfig):
    """The settings of `longscan classify train IMAGES --model vmamba`."""

    KINDS = ("image",)
    EPOCHS: ClassVar[float] = 30.0

    data: tuple[str, ...] = setting((), "Labelled images.", path=True, argument=True)
    valid: tuple[str, ...] = setting(
        (), "Validation images; default: hold out a part of DATA. Repeatable.", path=True
    )
    valid_fraction: float = setting(0.1, "Fraction of DATA held out for validation.")
    model: str = setting("vmamba", "Architecture, see `longscan models`.")
    pretrained: str | None = setting(
        None, "Image classifier to fine-tune, a directory or file, in place of a new model.", alias="--from"
    )
    image_size: int | None = setting(
        None, "Height and width of the images in pixels; default: the model's, or that of arrays.", size=True
    )
    drop_path: float | None = setting(
        None, "Probability to skip a residual branch (stochastic depth); default: the model's.", size=True
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute the blocks in the backward pass, which saves memory."
    )

    crop_scale: float = setting(0.35, "Least area of a random resized crop; 1 = no cropping.")
    flip: float = setting(0.5, "Probability of a horizontal flip.")
    randaugment: float = setting(5.0, "Magnitude of RandAugment, 0 to 10.")
    mixup: float = setting(0.0, "Mixup alpha; 0 = off.")
    cutmix: float = setting(0.0, "CutMix alpha; 0 = off.")
    erase: float = setting(0.0, "Probability of random erasing.")
    smoothing: float = setting(0.1, "Label smoothing.")
    ema: float = setting(0.9999, "Decay of the exponential moving average of the weights; 0 = off.")

    batch_size: int = setting(64, "Images per forward pass.")
    accumulate: int = setting(1, "Forward passes per step (gradient accumulation).")
    lr: float = setting(1e-3, "Peak learning rate.")
    weight_decay: float = setting(0.05, "Weight decay of AdamW, on matrices only.")
    beta2: float = setting(0.999, "AdamW beta2.")
    clip: float = setting(5.0, "Gradient clipping: the maximum norm.")

    def __post_init__(self) -> None:
        """Raise UsageError if a value is out of range."""
        super().__post_init__()
        self.check("batch_size", "accumulate", least=1)
        self.check("valid_fraction", "drop_path", "smoothing", "ema", least=0, below=1)
        self.check("flip", "erase", least=0, most=1)
        self.check("crop_scale", above=0, most=1)
        self.check("randaugment", least=0, most=10)
        self.check("mixup", "cutmix", least=0, most=4)

    def absolute(self) -> Self:
        """Return the settings with absolute paths; the model to fine-tune may also be on the hub."""
        given = self.pretrained
        path = os.path.abspath(given) if given and os.path.exists(given) else given
        return super().absolute().replace(pretrained=path)


class _Part(NamedTuple):
    """The input of a forward pass."""

    images: Tensor  # (batch, channels, height, width) uint8
    truth: Tensor  # (batch,)
    stream: RandomStream  # for mixing


class ImagesRun(Run[ImagesConfig]):
    """Trains an image classifier."""

    verb = "classify train"
    settings = ImagesConfig
    valid_key, valid_unit = "valid_loss", "nats/image"
    unit, item = "nats per image", "images"
    score = "accuracy"
    scores = {"valid_top1": "top-1", "valid_top5": "top-5"}  # noqa: RUF012 - as in Task
    model: VisionModel

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after listing the images, which stay where they are."""
        config = self.config
        if not config.data:
            raise UsageError("nothing to train on: name a folder with a folder of images for each class.")
        check_device(config.device)
        if not config.pretrained:  # check the flags before the data are read
            self._settings(**self._channels(3))
        self.average = config.ema
        self.train, self.valid = self._read()
        self.rows = config.batch_size * config.accumulate
        self.orders = EpochOrder(config.seed, lambda stream: stream.permutation(len(self.train)))
        model = self._fine_tuned() if config.pretrained else self._new()
        if model.config.n_classes <= TOP:  # it would be 100 %
            self.scores = {"valid_top1": "top-1"}
        self.model = model.to(config.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.augment = Augmentation(
            size=self.model.config.image_size,
            min_area=config.crop_scale,
            flip=config.flip,
            magnitude=config.randaugment,
            erase=config.erase,
        )
        return self.model, self._steps, 1

    @property
    def _steps(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.train) // self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images, see `Images.fingerprint`, and of the weights to fine-tune."""
        weights = self.start if self.config.pretrained else ""
        return hashlib.sha256(f"order {VERSION} {self.train.fingerprint()} {weights}".encode()).hexdigest()

    def describe(self) -> tuple[str, str]:
        """Return the size of the training data, and of a step."""
        classes, side = count(len(self.train.labels), "class", "classes"), self.model.config.image_size
        data = (
            f"{count(len(self.train), 'image')} of {classes} at {side} × {side}, {len(self.valid):,} held out"
        )
        return data, count(self.rows, "image")

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the images of a step in parts, augmented by seed, epoch and index alone."""
        config, channels = self.config, self.model.config.in_channels
        epoch, index = divmod(step, self._steps)
        chosen = self.orders[epoch][index * self.rows : (index + 1) * self.rows].tolist()
        stream, parts = RandomStream(config.seed, STEPS + step), []
        for start in range(0, len(chosen), config.batch_size):
            some = chosen[start : start + config.batch_size]
            images = [
                self.augment(self.train.image(n, channels), image_stream(config.seed, epoch, n)) for n in some
            ]
            part = _Part(torch.stack(images), torch.from_numpy(self.train.truth[some]), stream)
            parts.append((part, len(some)))
        return parts

    def loss(self, model: VisionModel, part: _Part) -> Tensor:
        """Return the mean cross-entropy of the classes, smoothed and mixed."""
        config, device = self.config, self.config.device
        images, truth = normalise(part.images.to(device), model.config), part.truth.to(device)
        if config.mixup or config.cutmix:
            truth = F.one_hot(truth, model.config.n_classes).float()
            images, truth = mix(images, truth, config.mixup, config.cutmix, part.stream)
        return F.cross_entropy(model(images).float(), truth, label_smoothing=config.smoothing)

    def export(self, directory: Path) -> None:
        """Write the model of the last step, with averaged weights if there are any."""
        with self.trainer.averaged():
            save(self.model, directory)

    @property
    def validates(self) -> bool:
        """Whether images are held out."""
        return len(self.valid) > 0

    def validate(self, signals: StopSignals, *, last: bool) -> dict[str, Any] | None:
        """Return loss and accuracies on held-out images, with averaged weights if there are any."""
        with self.trainer.averaged():
            found = measure_images(
                self.model, self.valid, self.config.batch_size, lambda: signals.received is not None
            )
        if found is None:
            return None
        self.say(
            ", ".join(
                f"{name} {getattr(found, key.removeprefix('valid_')):.1%}"
                for key, name in self.scores.items()
            )
        )
        macro_f1 = found.scores.macro_f1
        return {
            "valid_loss": found.loss,
            "valid_top1": found.top1,
            "valid_top5": found.top5,
            "valid_macro_f1": macro_f1,
        }

    def _read(self) -> tuple[Images, Images]:
        """Return training and validation images."""
        config = self.config
        check = not (self.directory / "checkpoints").exists()  # the files of a run that resumes are known
        train = read_images(config.data, check=check)
        if config.valid:
            valid = read_images(config.valid, split="test", check=check).labelled(train.labels)
        else:
            train, valid = train.divide(config.valid_fraction)
        if len(train.labels) < 2:
            raise LongscanError(
                f"{config.data[0]}: expected two classes or more, all images are {train.labels[0]!r}."
            )
        if animated := train.animated + (valid.animated if config.valid else ()):
            some = ", ".join(animated[:3]) + (", ..." if len(animated) > 3 else "")
            self.display.line(
                f"animated   {count(len(animated), 'file')}, of which the first frame counts: {some}"
            )
        return train, valid

    def _new(self) -> VisionModel:
        """Return a new model."""
        config, train = self.config, self.train
        known: dict[str, Any] = {"n_classes": len(train.labels), "labels": train.labels}
        if train.size and train.size[0] == train.size[1]:
            known |= {"image_size": train.size[0], "crop": 1.0}
        known |= self._channels(train.channels, self._statistics)
        settings = self._settings(**known)
        if self._of_videos:
            self.display.line(f"images     {config.model} is trained on single images, n_frames=0")
        generator = torch.Generator().manual_seed(config.seed)
        entry = config.choice[config.model]
        assert isinstance(entry, ModelEntry)
        return cast(VisionModel, entry.cls(settings, generator=generator))

    def _settings(self, **known: Any) -> VisionConfig:
        """Return the configuration of the new model."""
        if self._of_videos:
            known["n_frames"] = 0
        settings = cast(VisionConfig, model_settings(self.config, **known))
        try:
            check_takes_images(settings, f"--model: {self.config.model}")
        except LongscanError as error:
            raise UsageError(f"{error} Try --set n_frames=0.") from error
        return settings

    @property
    def _of_videos(self) -> bool:
        """Whether the preset is one of videos, and the settings do not ask for a number of frames."""
        entry = self.config.choice.get(self.config.model)
        preset = entry.presets.get(self.config.preset, {}) if entry else {}
        return bool(preset.get("n_frames")) and "n_frames" not in self.config.options

    def _channels(
        self, n: int, statistics: Callable[[], tuple[float, float]] = lambda: (0.0, 1.0)
    ) -> dict[str, Any]:
        """Return the fields of n channels, unless the settings name another number; RGB has its own mean."""
        n = {"in_channels": n, **self.config.options}["in_channels"]
        if n not in (1, 3):
            raise UsageError(f"--set in_channels: expected 1 (greyscale) or 3 (RGB), got {n!r}.")
        if n == 3:
            return {}
        mean, std = statistics()
        return {"in_channels": 1, "mean": (mean,), "std": (std,)}

    def _statistics(self) -> tuple[float, float]:
        """Return mean and standard deviation of greyscale training images, in [0, 1]."""
        chosen = np.linspace(0, len(self.train) - 1, min(SAMPLE, len(self.train))).astype(int)
        pixels = np.concatenate([np.asarray(self.train.image(n, 1)).ravel() for n in chosen]) / 255
        return float(pixels.mean()), max(float(pixels.std()), 1e-3)

    def _fine_tuned(self) -> VisionModel:
        """Return the model to fine-tune, which the run saves, as a run that resumes starts from the same."""
        start = self.directory / "start"
        if not start.is_dir():
            assert self.config.pretrained is not None
            loaded = load(
                self.config.pretrained, "image", model=self.config.model, image_size=self.config.image_size
            )
            save(self._adapted(loaded), start)
        model = load(start, "image")
        self.start = model.fingerprint()
        self.train, self.valid = (images.labelled(model.config.labels) for images in (self.train, self.valid))
        return model

    def _adapted(self, loaded: VisionModel) -> VisionModel:
        """Return a model with the classes of the training images and the sizes of the settings."""
        config, labels = self.config, self.train.labels
        check_takes_images(loaded.config, str(config.pretrained))
        if config.preset != type(config).preset:
            raise UsageError(f"--preset: {config.pretrained} has its own sizes. Leave it out.")
        generator = torch.Generator().manual_seed(config.seed)
        if set(loaded.config.labels) != set(labels):
            loaded.reset_classifier(len(labels), labels, generator)
            self.display.line(
                f"new        head of {count(len(labels), 'class', 'classes')}, trained from scratch"
            )
        try:
            settings = loaded.config.replace(**config.sizes, **config.options)
            model = cast(VisionModel, entry_of(loaded).cls(settings, generator=generator))
            model.load_state_dict(loaded.state_dict())
        except LongscanError as error:
            raise UsageError(f"{config.pretrained}: {error}") from error
        except RuntimeError as error:  # of another shape
            raise UsageError(f"{config.pretrained}: it can't have other sizes ({error}).") from error
        return model
