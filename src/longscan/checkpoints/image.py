"""An image classifier from a directory or a file."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from longscan.checkpoints.assemble import assemble
from longscan.checkpoints.source import Source
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig, VisionModel

__all__ = ["preprocessor_fields", "read_image_model"]

BICUBIC = 3  # Pillow's number


def read_image_model(source: Source, dtype: torch.dtype | None, image_size: int | None) -> VisionModel:
    """Return an image classifier, resized; a warning says which size is taken if nothing says it.

    Args:
        source: of an image classifier.
        dtype: of the weights; None keeps that of the file.
        image_size: height and width in pixels; None: that of the model.

    Raises:
        UsageError: the size is impossible.
        LongscanError: the file is damaged, or a weight is not finite.
    """
    config = source.config()
    model = assemble(source.path, MODELS[source.name].cls, config, source.weights(config), dtype)
    assert isinstance(model, VisionModel)
    for name, tensor in model.state_dict().items():  # the scores of any image would be NaN
        if not tensor.isfinite().all():
            raise LongscanError(
                f"{source.path}: {name} holds NaN or infinity, so its training failed. "
                "Take an earlier checkpoint."
            )
    if image_size is not None:
        try:
            model.resize(image_size)
        except LongscanError as error:
            raise UsageError(f"{source.path}: {error}") from error
    elif not source.sized:
        size = model.config.image_size
        warnings.warn(
            f"{source.path}: its tensors do not say the image size, which is taken as {size}, with "
            "the usual mean, std and crop. Another size: --image-size N, in Python image_size=N.",
            stacklevel=3,
        )
    return model


def preprocessor_fields(config: VisionConfig) -> dict[str, Any]:
    """Return the content of preprocessor_config.json, by which transformers prepares images as we do.

    Args:
        config: of a model of images.
    """
    size = config.image_size
    return {
        "image_processor_type": "BitImageProcessor",  # resize, crop, rescale, normalise, and no more
        "do_convert_rgb": config.in_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": max(size, round(size / config.crop))},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
