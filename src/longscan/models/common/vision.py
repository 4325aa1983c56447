"""What vision models share: the configuration of a classifier, drop path, and the base class.

images -> patches -> blocks -> features -> norm, pooling -> head
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models.common.layers import Linear, Recurrent, blank
from longscan.models.common.model import Model

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MLP",
    "DropPath",
    "VisionConfig",
    "VisionModel",
    "drop_rates",
    "init_linear",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """The configuration of an image or video classifier.

    Attributes:
        n_classes: outputs of the head.
        in_channels: of an image.
        image_size: height and width of the training images, in pixels; others are accepted too.
        labels: names of the classes, or empty.
        mean: of each channel in the training images, whose values are in [0, 1]; subtracted from the input.
        std: likewise, divided by.
        crop: fraction of the shorter side that the central crop keeps when an image is classified.
        drop_path: probability to skip a residual branch in training; grows linearly over the blocks to this.
    """

    n_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            LongscanError: a value is out of range.
        """
        super().__post_init__()
        self.check("n_classes", "in_channels", "image_size", least=1)
        self.check("crop", above=0, most=1)
        self.check("drop_path", least=0, below=1)
        if self.labels and len(self.labels) != self.n_classes:
            raise LongscanError(f"labels: expected {self.n_classes} names or none, got {len(self.labels)}.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.in_channels:
                got = len(getattr(self, name))
                raise LongscanError(f"{name}: expected {self.in_channels} numbers, one a channel, got {got}.")
        if any(value <= 0 for value in self.std):
            raise LongscanError("std: expected positive numbers.")


class DropPath(nn.Module):
    """Skips the branch of a residual block for a random part of the batch, in training (arXiv 1603.09382).

    Args:
        rate: the probability; the branches that remain are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch (batch, ...), zero in the rows that are skipped."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))).

    Args:
        d_model: channels.
        d_hidden: channels between.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = blank(Linear, d_model, d_hidden), blank(Linear, d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


def drop_rates(rate: float, n_blocks: int) -> list[float]:
    """Return the drop path rate of each block, from 0 at the first to `rate` at the last.

    Args:
        rate: of the last block.
        n_blocks: their number.
    """
    return [rate * i / max(1, n_blocks - 1) for i in range(n_blocks)]


class VisionModel(Model, ABC):
    """An image or video classifier that also gives its features.

    Attributes:
        head_name: of the linear layer d_features -> n_classes, among the modules.
        d_features: channels of the features.
        gradient_checkpointing: whether to recompute the blocks in the backward pass, which saves memory.
    """

    config: VisionConfig
    head_name: ClassVar[str] = "head"
    d_features: int
    gradient_checkpointing = False

    @property
    def head_layer(self) -> nn.Linear:
        """The head, wherever it stands in the model."""
        return cast(nn.Linear, self.get_submodule(self.head_name))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a training image or video, (in_channels, [n_frames,] height, width)."""
        config = self.config
        frames = (n,) if (n := config.to_dict().get("n_frames")) else ()
        return config.in_channels, *frames, config.image_size, config.image_size

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features before pooling.

        Args:
            images: (batch, in_channels, height, width), normalised; any height and width. Of a video model
                (batch, in_channels, n_frames, height, width).

        Returns:
            Of a model with stages (batch, d_features, height, width), of one with tokens
            (batch, n_tokens, d_features).
        """

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """Return one vector an image, the input of the head.

        Args:
            features: as `forward_features` returns them.

        Returns:
            (batch, d_features).
        """

    @abstractmethod
    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of every stage, or of the last block of a model without stages.

        Args:
            images: see `forward_features`.

        Returns:
            (batch, channels, height, width) each, finest first; of videos
            (batch, channels, n_frames, height, width).
        """

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, n_classes) of images; see `forward_features`.

        Raises:
            LongscanError: the images are bytes or other whole numbers.
        """
        if not images.is_floating_point():
            got = str(images.dtype).removeprefix("torch.")
            raise LongscanError(
                f"images: expected floats that are normalised, got {got}. Try (images / 255 - mean) / std "
                "of model.config."
            )
        return cast(Tensor, self.head_layer(self.pool(self.forward_features(images))))

    def reset_classifier(
        self, n_classes: int, labels: tuple[str, ...] = (), generator: torch.Generator | None = None
    ) -> None:
        """Replace the head by a new one, for fine-tuning on other classes.

        Args:
            n_classes: their number.
            labels: their names, or none.
            generator: randomness of the new weights; torch's global one if None.

        Raises:
            LongscanError: the numbers do not fit.
        """
        self.config = self.config.replace(n_classes=n_classes, labels=labels)
        head = blank(Linear, self.d_features, n_classes).to(self.head_layer.weight)
        init_linear(head, generator)
        self.set_submodule(self.head_name, head)

    def resize(self, image_size: int) -> None:
        """Adapt the model to images of another size; those with learned positions interpolate them.

        Args:
            image_size: height and width in pixels.

        Raises:
            LongscanError: the size is impossible.
        """
        self.config = self.config.replace(image_size=image_size)

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrences, which set their time scales."""
        modules = [module for module in self.modules() if isinstance(module, Recurrent)]
        return (module.get_parameter(name) for module in modules for name in module.recurrence)

    def run(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Return block(*inputs), recomputed in the backward pass with gradient checkpointing.

        Args:
            block: a part of the model.
            inputs: its arguments.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


@torch.no_grad()
def init_linear(layer: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Initialise a linear layer as vision models do: weights normal with 0.02, cut at 2; a bias of zero.

    Args:
        layer: modified in place.
        generator: randomness; torch's global one if None.
    """
    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
