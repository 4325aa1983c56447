"""The image task: train a vision model on labelled images or clips, or fine-tune one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.core.config import count
from longscan.core.random import STEPS, VERSION, EpochOrder, RandomStream, clip_stream, image_stream
from longscan.core.runtime import StopSignals
from longscan.data.augmentation import Augmentation, mix
from longscan.data.clips import read_clips
from longscan.data.images import read_images
from longscan.data.labelled import Labelled
from longscan.data.videos import Clip, choose_frames
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.images import TOP, measure_images
from longscan.inference.images import normalise
from longscan.models import Model
from longscan.models.common.vision import VisionModel
from longscan.training.build import check_device
from longscan.training.image_models import adapt_model, check_model, new_model
from longscan.training.image_settings import ImagesConfig
from longscan.training.run import Run

__all__ = ["ImagesConfig", "ImagesRun"]


class _Part(NamedTuple):
    """The input of a forward pass."""

    images: Tensor  # uint8 (batch, channels, height, width), or (batch, channels, n_frames, height, width)
    truth: Tensor  # (batch,)
    stream: RandomStream  # for mixing


class ImagesRun(Run[ImagesConfig]):
    """Trains a classifier of images or clips."""

    verb = "classify train"
    settings = ImagesConfig
    valid_key, valid_unit = "valid_loss", "nats/image"
    unit, item = "nats per image", "images"
    score = "accuracy"
    scores = {"valid_top1": "top-1", "valid_top5": "top-5"}  # noqa: RUF012 - as in Task
    model: VisionModel

    def prepare(self) -> tuple[Model, int, int]:
        """Return the model, after listing the images or clips, which stay where they are."""
        config = self.config
        if not config.data:
            raise UsageError(
                "nothing to train on: name a folder with a folder of images, or clips, for each class."
            )
        check_device(config.device)
        if not config.pretrained:  # check the flags before the data are read
            check_model(config)
        self.average = config.ema
        if config.frames:
            self.valid_unit, self.unit, self.item = "nats/clip", "nats per clip", "clips"
        self.train, self.valid = self._read()
        self.rows = config.batch_size * config.accumulate
        self.orders = EpochOrder(config.seed, lambda stream: stream.permutation(len(self.train)))
        model = self._fine_tuned() if config.pretrained else new_model(config, self.train, self.display.line)
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
        item, size = ("clip", f"{self.config.frames} × ") if self.config.frames else ("image", "")
        data = f"{count(len(self.train), item)} of {classes} at {size}{side} × {side}"
        return f"{data}, {len(self.valid):,} held out", count(self.rows, item)

    def batch(self, step: int) -> list[tuple[_Part, int]]:
        """Return the images of a step in parts, augmented by seed, epoch and index alone."""
        config = self.config
        epoch, index = divmod(step, self._steps)
        chosen = self.orders[epoch][index * self.rows : (index + 1) * self.rows].tolist()
        stream, parts = RandomStream(config.seed, STEPS + step), []
        for start in range(0, len(chosen), config.batch_size):
            some = chosen[start : start + config.batch_size]
            images = torch.stack([self._altered(n, epoch) for n in some])
            part = _Part(images, torch.from_numpy(self.train.truth[some]), stream)
            parts.append((part, len(some)))
        return parts

    def _altered(self, number: int, epoch: int) -> Tensor:
        """Return an image as an epoch has it; or frames of a clip, all altered alike."""
        config, source = self.config, self.train.item(number, self.model.config.in_channels)
        if not isinstance(source, Clip):
            return self.augment(source, image_stream(config.seed, epoch, number))
        chosen = choose_frames(source.n_frames, config.frames or 1, clip_stream(config.seed, epoch, number))
        frames = source.frames(chosen, self.model.config.in_channels)
        return torch.stack([self.augment(f, image_stream(config.seed, epoch, number)) for f in frames], 1)

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

    def _read(self) -> tuple[Labelled[Any], Labelled[Any]]:
        """Return training and validation data."""
        config = self.config
        read: Callable[..., Labelled[Any]] = read_clips if config.frames else read_images
        check = not (self.directory / "checkpoints").exists()  # the files of a run that resumes are known
        train = read(config.data, check=check)
        if config.valid:
            valid = read(config.valid, split="test", check=check).labelled(train.labels)
        else:
            train, valid = train.divide(config.valid_fraction)
        if len(train.labels) < 2:
            raise LongscanError(
                f"{config.data[0]}: expected two classes or more, all {self.item} are {train.labels[0]!r}."
            )
        if animated := train.animated + (valid.animated if config.valid else ()):
            some = ", ".join(animated[:3]) + (", ..." if len(animated) > 3 else "")
            self.display.line(
                f"animated   {count(len(animated), 'file')}, of which the first frame counts: {some}"
            )
        return train, valid

    def _fine_tuned(self) -> VisionModel:
        """Return the model to fine-tune, which the run saves, as a run that resumes starts from the same."""
        start = self.directory / "start"
        if not start.is_dir():
            assert self.config.pretrained is not None
            loaded = load(
                self.config.pretrained, "image", model=self.config.model, image_size=self.config.image_size
            )
            save(adapt_model(self.config, loaded, self.train.labels, self.display.line), start)
        model = load(start, "image")
        self.start = model.fingerprint()
        self.train, self.valid = (images.labelled(model.config.labels) for images in (self.train, self.valid))
        return model
