"""Class probabilities of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from longscan.data.augmentation import central_crop, to_tensor
from longscan.errors import LongscanError
from longscan.models.common.vision import VisionConfig, VisionModel

__all__ = ["check_takes_images", "classify_images", "log_probabilities", "normalise"]


def normalise(pixels: Tensor, config: VisionConfig) -> Tensor:
    """Return pixels as the input of a model.

    Args:
        pixels: (batch, in_channels, height, width) uint8.
        config: of the model.

    Returns:
        The same shape, float32.
    """
    mean, std = (
        torch.tensor(each, device=pixels.device).view(-1, 1, 1) for each in (config.mean, config.std)
    )
    return (pixels.float() / 255 - mean) / std


def check_takes_images(config: VisionConfig, name: str) -> None:
    """Raise if a model classifies videos.

    Args:
        config: of the model.
        name: of the model, for the message.

    Raises:
        LongscanError: its images have a time axis.
    """
    if n_frames := config.to_dict().get("n_frames"):
        raise LongscanError(
            f"{name} classifies videos of {n_frames} frames: expected a model of images, n_frames = 0."
        )


@torch.inference_mode()
def log_probabilities(model: VisionModel, images: Sequence[Image.Image]) -> Tensor:
    """Return the log-probabilities of the classes of a batch of images.

    Args:
        model: in any mode, which does not change.
        images: of any sizes, of mode RGB, or L for a model of one channel.

    Returns:
        (n, n_classes) float32, on the CPU.
    """
    config, training = model.config, model.training
    pixels = torch.stack([to_tensor(central_crop(image, config.image_size, config.crop)) for image in images])
    model.eval()
    logits = model(normalise(pixels.to(model.device), config).to(model.dtype))
    model.train(training)
    predictions: Tensor = logits.float().log_softmax(-1).cpu()
    return predictions


def classify_images(
    model: VisionModel, images: Iterable[Callable[[int], Image.Image]], batch_size: int = 32
) -> Iterator[Tensor]:
    """Yield the log-probabilities of images, batch by batch.

    Args:
        model: in any mode, which does not change.
        images: each opens one, given the number of channels.
        batch_size: images that are in memory at a time.

    Yields:
        (n, n_classes) float32, n at most batch_size.

    Raises:
        LongscanError: an image can't be opened.
    """
    batch: list[Image.Image] = []
    for opened in images:
        batch.append(opened(model.config.in_channels))
        if len(batch) == batch_size:
            yield log_probabilities(model, batch)
            batch = []
    if batch:
        yield log_probabilities(model, batch)
