"""The effective receptive field of a vision model (Luo, Li, Urtasun and Zemel 2016, arXiv 1701.04128)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longscan.models.common.vision import VisionModel

__all__ = ["area", "receptive_field"]


def receptive_field(model: VisionModel, images: Iterable[Tensor]) -> Tensor:
    """Return how much each input pixel changes the central pixel of the last feature map.

    It is the absolute gradient of that pixel, summed over its channels, with respect to the input; summed
    over the channels of the input and averaged over images.

    Args:
        model: in evaluation mode.
        images: at least one, (in_channels, height, width) each, of one size, normalised.

    Returns:
        (height, width) float32 on the CPU; the largest value is 1, unless all are 0.
    """
    total: Tensor | None = None
    for image in images:
        x = image[None].to(model.device, model.dtype).requires_grad_()
        last = model.feature_maps(x)[-1]
        centre = last[..., last.shape[-2] // 2, last.shape[-1] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, x)
        field = gradient[0].abs().sum(0).float().cpu()
        total = field if total is None else total + field
    assert total is not None, "expected at least one image"
    return total / total.max().clamp_min(torch.finfo(total.dtype).tiny)


def area(field: Tensor, share: float = 0.5) -> float:
    """Return the least fraction of the pixels that holds a share of the whole gradient.

    Args:
        field: what `receptive_field` gives.
        share: of the gradient, 0 to 1.
    """
    largest = field.flatten().sort(descending=True).values.double().cumsum(0)
    needed = int((largest < share * largest[-1]).sum()) + 1
    return needed / field.numel()
