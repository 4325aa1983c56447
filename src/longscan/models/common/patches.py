"""From images to maps of patches, and from maps to maps of half the size; channels are last."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.models.common.layers import Linear, blank

__all__ = ["Conv2d", "Downsample", "PatchEmbed", "PatchMerging", "downsample", "init_conv", "patch_embed"]

PatchEmbed: TypeAlias = Literal["v1", "v2"]
Downsample: TypeAlias = Literal["v1", "v2", "v3"]


class Conv2d(nn.Conv2d):
    """A convolution of images whose channels are last."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, height, width, d_in) to (batch, height, width, d_out)."""
        images = input.permute(0, 3, 1, 2)
        # an image smaller than the kernel is padded to its size
        missing = [
            max(0, kernel - size - 2 * cast(int, pad))
            for kernel, size, pad in zip(self.kernel_size, images.shape[2:], self.padding, strict=True)
        ]
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        return super().forward(images).permute(0, 2, 3, 1)


@torch.no_grad()
def init_conv(layer: nn.Conv2d, generator: torch.Generator | None = None) -> None:
    """Initialise a convolution as torch does.

    Args:
        layer: modified in place.
        generator: randomness; torch's global one if None.
    """
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = layer.weight[0].numel() ** -0.5
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class PatchMerging(nn.Module):
    """Halves a map: the four pixels of a square become one of twice the channels.

    Args:
        d_in: channels.
        d_out: channels of the result.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * d_in), blank(Linear, 4 * d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, height, width, d_in) to half of it, rounded up: odd sizes are padded with zeros."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return cast(Tensor, self.reduction(self.norm(x)))


def patch_embed(version: PatchEmbed, d_in: int, d_out: int, size: int) -> nn.Module:
    """Return a stem, which maps images to patches; the names are those of VMamba's published files.

    Args:
        version: "v1" is one convolution, "v2" two that overlap.
        d_in: channels of an image.
        d_out: channels of a patch.
        size: height and width of a patch, in pixels.
    """
    if version == "v1":
        conv = blank(Conv2d, d_in, d_out, size, stride=size)
        return _named({"0": conv, "2": nn.LayerNorm(d_out)})
    between, step = d_out // 2, size // 2
    first, second = (
        blank(Conv2d, *widths, step + 1, stride=step, padding=1)
        for widths in ((d_in, between), (between, d_out))
    )
    return _named(
        {"0": first, "2": nn.LayerNorm(between), "4": nn.GELU(), "5": second, "7": nn.LayerNorm(d_out)}
    )


def downsample(version: Downsample, d_in: int, d_out: int) -> nn.Module:
    """Return what halves a map; the names are those of VMamba's published files.

    Args:
        version: "v1" merges patches, "v2" is a convolution of 2 x 2, "v3" one of 3 x 3.
        d_in: channels.
        d_out: channels of the result.
    """
    if version == "v1":
        return PatchMerging(d_in, d_out)
    kernel = 2 if version == "v2" else 3
    conv = blank(Conv2d, d_in, d_out, kernel, stride=2, padding=kernel - 2)
    return _named({"1": conv, "3": nn.LayerNorm(d_out)})


def _named(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
