"""From images to tokens and back: patches, the tokens of the class between them, learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ClassToken", "PatchEmbedding", "join", "resize", "separate"]

ClassToken: TypeAlias = Literal["middle", "front", "double", "none"]  # double: one at each end

AXES = ("n_frames", "height", "width")


class PatchEmbedding(nn.Module):
    """The linear map of every patch.

    Pixels at the right and at the bottom, and the last frames, that fill no patch are not seen.

    Args:
        proj: a blank convolution over patches, of images or videos.
        generator: randomness of its weights; torch's global one if None.
    """

    def __init__(self, proj: nn.Conv2d | nn.Conv3d, generator: torch.Generator | None) -> None:
        super().__init__()
        self.proj = proj
        if not proj.weight.is_meta:
            std = proj.weight[0].numel() ** -0.5 / 0.8796  # 0.8796: that of a standard normal cut at 2
            nn.init.trunc_normal_(proj.weight, 0, std, -2 * std, 2 * std, generator=generator)
            nn.init.zeros_(cast(Tensor, proj.bias))

    def forward(self, images: Tensor) -> Tensor:
        """Return the patches of images.

        Args:
            images: (batch, in_channels, height, width), or (batch, in_channels, n_frames, height, width).

        Returns:
            (batch, d_model, *grid).

        Raises:
            ValueError: shapes do not fit.
        """
        self.grid(images)
        return cast(Tensor, self.proj(images.to(self.proj.weight.dtype)))

    def grid(self, images: Tensor) -> tuple[int, ...]:
        """Return the number of patches along each axis of images; see `forward`."""
        sizes, channels = self.proj.kernel_size, self.proj.in_channels
        axes = ", ".join(AXES[-len(sizes) :])
        shape = tuple(images.shape)
        if len(shape) != 2 + len(sizes) or shape[1] != channels:
            raise ValueError(f"images: expected (batch, {channels}, {axes}), got {shape}")
        if shape[0] == 0:
            raise ValueError(f"images: expected a non-empty batch, got {shape}")
        if any(pixels < size for pixels, size in zip(shape[2:], sizes, strict=True)):
            raise ValueError(f"images: expected {axes} of at least one patch, {sizes}, got {shape[2:]}")
        every = zip(shape[2:], sizes, self.proj.stride, strict=True)
        return tuple((pixels - size) // step + 1 for pixels, size, step in every)


def join(patches: Tensor, classes: Tensor, where: ClassToken) -> Tensor:
    """Return the tokens of patches and class tokens.

    Args:
        patches: (batch, n_patches, d_model).
        classes: (batch, n, d_model), n = 0, 1 or 2.
        where: the class tokens stand.

    Returns:
        (batch, n_patches + n, d_model).
    """
    k = patches.shape[1] // 2 if where == "middle" else 0
    return torch.cat([patches[:, :k], classes[:, :1], patches[:, k:], classes[:, 1:]], 1)


def separate(tokens: Tensor, where: ClassToken) -> tuple[Tensor, Tensor]:
    """Return patches and class tokens: the inverse of `join`.

    Args:
        tokens: (batch, n_tokens, d_model).
        where: the class tokens stand.
    """
    if where == "none":
        return tokens, tokens[:, :0]
    if where == "double":
        return tokens[:, 1:-1], torch.cat([tokens[:, :1], tokens[:, -1:]], 1)
    k = (tokens.shape[1] - 1) // 2 if where == "middle" else 0
    return torch.cat([tokens[:, :k], tokens[:, k + 1 :]], 1), tokens[:, k : k + 1]


def resize(positions: Tensor, grid: Sequence[int], mode: str) -> Tensor:
    """Return learned positions of another grid, interpolated; the same for the same grid.

    Args:
        positions: (1, d_model, *old).
        grid: the new sizes.
        mode: of `torch.nn.functional.interpolate`: "linear" or "bicubic".

    Returns:
        (1, d_model, *grid).
    """
    if tuple(positions.shape[2:]) == tuple(grid):
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    return F.interpolate(wide, tuple(grid), mode=mode, align_corners=False).to(positions.dtype)
