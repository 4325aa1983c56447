"""Images as the input of a model: resized and cropped for evaluation, altered at random for training.

All that is random comes from a `RandomStream`, so an image of an epoch is always altered in the same way.

    random resized crop    Szegedy et al. 2014, arXiv 1409.4842
    RandAugment            Cubuk et al. 2019, arXiv 1909.13719
    random erasing         Zhong et al. 2017, arXiv 1708.04896
    mixup, CutMix          Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from longscan.core.random import RandomStream

__all__ = ["Augmentation", "central_crop", "mix", "to_tensor"]

GREY = 128  # of what a shift or a rotation uncovers
ASPECTS = 3 / 4, 4 / 3  # of a random crop
ATTEMPTS = 10  # to draw a rectangle that fits
ERASED, ERASED_ASPECTS = (0.02, 1 / 3), (0.3, 1 / 0.3)  # fraction of the area


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels of an image, (channels, height, width) uint8."""
    pixels = torch.from_numpy(np.array(image, np.uint8))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def central_crop(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Return the centre of an image: as if its shorter side were resized to size / crop, then cropped.

    Bicubic with antialiasing. Only the crop is computed, so a very long image takes no memory.

    Args:
        image: of any size.
        size: height and width of the result.
        crop: see `VisionConfig`.
    """
    width, height = image.size
    shorter = max(size, round(size / crop))
    wide = max(shorter, shorter * width // height)
    high = max(shorter, shorter * height // width)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    if (wide, high) == image.size and size == shorter == width == height:
        return image
    x, y = width / wide, height / high
    box = left * x, top * y, min(width, (left + size) * x), min(height, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


@dataclass(frozen=True)
class Augmentation:
    """Random alterations of a training image.

    Attributes:
        size: height and width of the result.
        min_area: the least fraction of the area that a random crop has; 1 resizes the whole image.
        flip: probability of a horizontal flip.
        magnitude: of two random alterations of colour or geometry, up to 10; 0 for none.
        erase: probability that a random rectangle is replaced by noise.
    """

    size: int
    min_area: float = 0.08
    flip: float = 0.5
    magnitude: float = 9.0
    erase: float = 0.25

    def __call__(self, image: Image.Image, stream: RandomStream) -> Tensor:
        """Return an altered image.

        Args:
            image: of mode RGB or L.
            stream: randomness, of this image in this epoch.

        Returns:
            (channels, size, size) uint8.
        """
        image = self._crop(image, stream)
        if stream.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.magnitude:
            image = _randaugment(image, self.magnitude, stream)
        pixels = to_tensor(image)
        if self.erase and stream.random() < self.erase:
            _erase(pixels, stream)
        return pixels

    def _crop(self, image: Image.Image, stream: RandomStream) -> Image.Image:
        """Return a part of random area and aspect, resized."""
        whole = 0.0, 0.0, float(image.width), float(image.height)
        box = whole if self.min_area == 1 else _rectangle(image, self.min_area, stream)
        if box == whole and image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, stream: RandomStream
) -> tuple[Tensor, Tensor]:
    """Return each image blended with another one of the batch, or with a rectangle of it pasted in.

    Args:
        images: (batch, channels, height, width).
        targets: (batch, n_classes) probabilities.
        mixup: of the Beta(mixup, mixup) distribution of the blend; 0 for none.
        cutmix: the same for the area that remains; with both, each has probability one half.
        stream: randomness, of this batch.

    Returns:
        Images and targets, mixed alike.
    """
    use_cutmix = cutmix > 0 and (mixup == 0 or stream.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    if alpha == 0 or len(images) < 2:
        return images, targets
    share = _beta(alpha, stream)
    if use_cutmix:
        height, width = images.shape[-2:]
        y, x = stream.below(height), stream.below(width)
        half = math.sqrt(1 - share) / 2
        top, bottom = max(0, round(y - half * height)), min(height, round(y + half * height))
        left, right = max(0, round(x - half * width)), min(width, round(x + half * width))
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = share * images + (1 - share) * images.flip(0)
    return mixed, share * targets + (1 - share) * targets.flip(0)


def _beta(alpha: float, stream: RandomStream) -> float:
    """Return a number of the Beta(alpha, alpha) distribution, by Jöhnk's method."""
    while True:
        x, y = stream.random() ** (1 / alpha), stream.random() ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))


def _normal(stream: RandomStream) -> float:
    """Return a number of the standard normal distribution, by Box and Muller's method."""
    return math.sqrt(-2 * math.log(1 - stream.random())) * math.cos(2 * math.pi * stream.random())


def _between(low: float, high: float, stream: RandomStream) -> float:
    """Return a number from [low, high)."""
    return low + (high - low) * stream.random()


def _rectangle(image: Image.Image, least: float, stream: RandomStream) -> tuple[float, float, float, float]:
    """Return a random box (left, top, right, bottom) in an image."""
    width, height = image.size
    for _ in range(ATTEMPTS):
        area = width * height * _between(least, 1, stream)
        aspect = math.exp(_between(math.log(ASPECTS[0]), math.log(ASPECTS[1]), stream))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = stream.below(width - w + 1), stream.below(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def _erase(pixels: Tensor, stream: RandomStream) -> None:
    """Replace a random rectangle by noise, in place."""
    channels, height, width = pixels.shape
    for _ in range(ATTEMPTS):
        area = height * width * _between(*ERASED, stream)
        aspect = math.exp(_between(math.log(ERASED_ASPECTS[0]), math.log(ERASED_ASPECTS[1]), stream))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = stream.below(height - h + 1), stream.below(width - w + 1)
            n = channels * h * w
            noise = stream.raw(-(-n // 8)).astype("<u8").view(np.uint8)[:n].reshape(channels, h, w)
            pixels[:, top : top + h, left : left + w] = torch.from_numpy(noise.copy())
            return


# RandAugment


Alteration = Callable[[Image.Image], Image.Image]


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Alteration:
    """Return an affine map of output to input coordinates about the centre; c and f in widths and heights."""

    def apply(image: Image.Image) -> Image.Image:
        x, y = (image.width - 1) / 2, (image.height - 1) / 2
        right, down = x - a * x - b * y + c * image.width, y - d * x - e * y + f * image.height
        fill = (GREY,) * 3 if image.mode == "RGB" else GREY
        affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, affine, (a, b, right, d, e, down), bilinear, fillcolor=fill)

    return apply


def _rotate(strength: float) -> Alteration:
    """Return a rotation by up to 30 degrees."""
    angle = strength * math.pi / 6
    return _affine(math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle), 0)


def _brighten_dark(strength: float) -> Alteration:
    """Return what adds up to 110 to values below 128."""
    table = [value + round(110 * abs(strength)) if value < 128 else value for value in range(256)]
    return lambda image: image.point(table * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[float], Alteration]:
    """Return an enhancement of Pillow, from a tenth to nearly twice the normal amount."""
    return lambda strength: lambda image: kind(image).enhance(1 + 0.9 * strength)


# strength from -1 to 1 -> an alteration; those with one direction only take its size
ALTERATIONS: tuple[Callable[[float], Alteration], ...] = (
    lambda s: ImageOps.autocontrast,
    lambda s: ImageOps.equalize,
    lambda s: ImageOps.invert,
    lambda s: lambda image: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    lambda s: lambda image: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    _brighten_dark,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _rotate,
    lambda s: _affine(1, 0.3 * s, 0, 0, 1, 0),
    lambda s: _affine(1, 0, 0, 0.3 * s, 1, 0),
    lambda s: _affine(1, 0, 0.45 * s, 0, 1, 0),
    lambda s: _affine(1, 0, 0, 0, 1, 0.45 * s),
)


def _randaugment(image: Image.Image, magnitude: float, stream: RandomStream) -> Image.Image:
    """Return an image with two random alterations, each made with probability one half."""
    for _ in range(2):
        chosen = ALTERATIONS[stream.below(len(ALTERATIONS))]
        strength = min(10.0, max(0.0, magnitude + 0.5 * _normal(stream))) / 10
        sign = 1 if stream.random() < 0.5 else -1
        if stream.random() < 0.5:
            image = chosen(sign * strength)(image)
    return image
