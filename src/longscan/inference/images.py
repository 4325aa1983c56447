"""Class probabilities of images, or of clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from longscan.data.augmentation import central_crop, to_tensor
from longscan.data.videos import Clip, clip_tensor
from longscan.models.common.vision import VisionConfig, VisionModel

__all__ = [
    "Input",
    "classify_images",
    "frames_of",
    "log_probabilities",
    "normalise",
    "to_pixels",
]

Input: TypeAlias = Image.Image | Clip | Tensor  # of a model of images, or of clips; pixels as it sees them
BATCH = 32  # images, or frames of clips, that are in memory at a time


def normalise(pixels: Tensor, config: VisionConfig) -> Tensor:
    """Return pixels as the input of a model.

    Args:
        pixels: (batch, in_channels, height, width) uint8, or (batch, in_channels, n_frames, height, width).
        config: of the model.

    Returns:
        The same shape, float32.
    """
    axes = [1] * (pixels.dim() - 2)
    mean, std = (
        torch.tensor(each, device=pixels.device).view(-1, *axes) for each in (config.mean, config.std)
    )
    return (pixels.float() / 255 - mean) / std


def frames_of(config: VisionConfig) -> int:
    """Return the number of frames of a clip that a model classifies, 0 if it classifies images.

    Args:
        config: of the model.
    """
    return int(config.to_dict().get("n_frames", 0))


def to_pixels(source: Input, config: VisionConfig) -> Tensor:
    """Return the pixels of an image, or of frames of a clip, as a model sees them.

    Args:
        source: the image, of mode RGB, or L for a model of one channel; or the clip; or such pixels.
        config: of the model.

    Returns:
        (in_channels, image_size, image_size) uint8, of a clip (in_channels, n_frames, image_size,
        image_size).

    Raises:
        LongscanError: a frame can't be decoded.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, Clip):
        return clip_tensor(source, frames_of(config), config.in_channels, config.image_size, config.crop)
    return to_tensor(central_crop(source, config.image_size, config.crop))


@torch.inference_mode()
def log_probabilities(model: VisionModel, images: Sequence[Input]) -> Tensor:
    """Return the log-probabilities of the classes of a batch of images or clips.

    Args:
        model: in any mode, which does not change.
        images: of any sizes; see `to_pixels`.

    Returns:
        (n, n_classes) float32, on the CPU.
    """
    config, training = model.config, model.training
    pixels = torch.stack([to_pixels(image, config) for image in images])
    model.eval()
    logits = model(normalise(pixels.to(model.device), config).to(model.dtype))
    model.train(training)
    predictions: Tensor = logits.float().log_softmax(-1).cpu()
    return predictions


def classify_images(
    model: VisionModel, images: Iterable[Callable[[int], Input]], batch_size: int | None = None
) -> Iterator[Tensor]:
    """Yield the log-probabilities of images or clips, batch by batch.

    Args:
        model: in any mode, which does not change.
        images: each opens one, given the number of channels.
        batch_size: images or clips per forward pass; None: 32 images, or clips of as many frames.

    Yields:
        (n, n_classes) float32, n at most batch_size.

    Raises:
        LongscanError: an image can't be opened.
    """
    batch: list[Input] = []
    batch_size = batch_size or max(1, BATCH // max(1, frames_of(model.config)))
    for opened in images:
        batch.append(opened(model.config.in_channels))
        if len(batch) == batch_size:
            yield log_probabilities(model, batch)
            batch = []
    if batch:
        yield log_probabilities(model, batch)
