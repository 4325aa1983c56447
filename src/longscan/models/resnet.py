"""Deep Residual Learning for Image Recognition.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun, 2015, arXiv 1512.03385: the residual networks of section
4.2, for small images.

Parents: none here; its predecessors are convolutional networks such as VGG (2014, arXiv 1409.1556).
Kept of these: convolutions of 3 x 3 pixels, more channels where the map is smaller.
Changed: a block adds to its input, so that a hundred layers can be trained; no hidden layers after the mean
over the image.

Deviations: the number of channels and the stride of the first convolution are free; drop path, off by
default; with gradient checkpointing, each batch enters the running statistics twice. Shortcuts between stages
are those of the paper's experiments on CIFAR-10 by default (option A: every second pixel, new channels are
zero, no parameters); option B is a convolution of one pixel. The parameters have the names of torchvision's
models.

The block, for maps x (batch norm after each convolution, BN):

    x = relu(shortcut(x) + BN(conv2(relu(BN(conv1(x))))))

Glossary: n = n_blocks of a stage; 6n + 2 = layers with weights; widths = d_model of the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import Linear, blank
from longscan.models.common.vision import DropPath, VisionConfig, VisionModel, drop_rates, init_linear

_CIFAR = {"image_size": 32, "n_classes": 10, "crop": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": (8, 16), "n_blocks": (1, 1), **_CIFAR},
    **{f"resnet{6 * n + 2}": {"n_blocks": (n, n, n), **_CIFAR} for n in (3, 5, 7, 9, 18)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(VisionConfig):
    """The configuration of a residual network; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: tuple[int, ...] = (16, 32, 64)  # channels of every stage; each halves the map of the one before
    n_blocks: tuple[int, ...] = (3, 3, 3)  # n, of every stage
    stride: int = 1  # of the first convolution, in pixels
    shortcut: Literal["A", "B"] = "A"  # between stages: padded with zeros, or a convolution of one pixel
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("stride", least=1)
        widths, counts = self.d_model, self.n_blocks
        if not widths or min(widths + counts) < 1 or len(widths) != len(counts):
            got = f"{widths} and {counts}"
            raise LongscanError(f"d_model, n_blocks: expected a positive number for each stage, got {got}.")
        if self.shortcut == "A" and list(self.d_model) != sorted(self.d_model):
            raise LongscanError(
                f"d_model: expected widths that grow for shortcuts of option A, got {self.d_model}. "
                "Try shortcut='B'."
            )


class BatchNorm(nn.Module):
    """Batch normalisation of each channel (arXiv 1502.03167); torch's, without its counter of batches.

    Args:
        d_model: channels.
    """

    running_mean: Tensor
    running_var: Tensor
    MOMENTUM, EPS = 0.1, 1e-5

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps x (batch, d_model, height, width), normalised by the batch, in evaluation by all."""
        average = self.running_mean, self.running_var
        if self.training and x.numel() == x.shape[1]:  # one value a channel has no variance
            return F.batch_norm(x, *average, self.weight, self.bias, False, 0.0, self.EPS)
        return F.batch_norm(x, *average, self.weight, self.bias, self.training, self.MOMENTUM, self.EPS)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + two convolutions of x).

    Args:
        widths: channels before and after.
        stride: of the first convolution.
        shortcut: option, where widths or sizes differ.
        drop_path: rate.
    """

    def __init__(
        self, widths: tuple[int, int], stride: int, shortcut: Literal["A", "B"], drop_path: float
    ) -> None:
        super().__init__()
        d_in, d_out = widths
        self.stride, self.more = stride, d_out - d_in
        self.conv1 = blank(nn.Conv2d, d_in, d_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm(d_out)
        self.conv2 = blank(nn.Conv2d, d_out, d_out, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(d_out)
        self.drop_path = DropPath(drop_path)
        self.downsample: nn.Sequential | None = None
        if shortcut == "B" and (stride > 1 or self.more):
            conv = blank(nn.Conv2d, d_in, d_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, BatchNorm(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, d_in, height, width) to (batch, d_out, height / stride, width / stride), rounded up."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(x + self.drop_path(y))


class ResNet(VisionModel):
    """A convolutional image classifier of residual blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: ResNetConfig
    head_name = "fc"

    def __init__(self, config: ResNetConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.d_features = config.d_model[-1]
        width = config.d_model[0]
        self.conv1 = blank(
            nn.Conv2d, config.in_channels, width, 3, stride=config.stride, padding=1, bias=False
        )
        self.bn1 = BatchNorm(width)
        rates = iter(drop_rates(config.drop_path, sum(config.n_blocks)))
        for n, (d_out, n_blocks) in enumerate(zip(config.d_model, config.n_blocks, strict=True), 1):
            blocks = []
            for i in range(n_blocks):
                stride = 2 if n > 1 and i == 0 else 1
                blocks.append(BasicBlock((width, d_out), stride, config.shortcut, next(rates)))
                width = d_out
            self.add_module(f"layer{n}", nn.Sequential(*blocks))
        self.fc = blank(Linear, self.d_features, config.n_classes)
        if not self.fc.weight.is_meta:  # which only needs shapes
            init_linear(self.fc, generator)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map (batch, d_features, height, width); see `VisionModel`.

        Raises:
            ValueError: shapes do not fit.
        """
        *_, last = self._stages(images)
        return last

    def pool(self, features: Tensor) -> Tensor:
        """Return the mean of the features (batch, d_features); see `VisionModel`."""
        return features.mean((2, 3))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the map of each stage; see `VisionModel`."""
        return list(self._stages(images))

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the map (batch, width, height, width) of each stage."""
        n_channels = self.config.in_channels
        if images.dim() != 4 or images.shape[1] != n_channels or 0 in images.shape:
            expected = f"(batch, {n_channels}, height, width)"
            raise ValueError(f"images: expected a non-empty {expected}, got {tuple(images.shape)}")
        x = F.relu(self.bn1(self.conv1(images.to(self.conv1.weight.dtype))))
        for n in range(1, len(self.config.d_model) + 1):
            for block in cast(nn.Sequential, self.get_submodule(f"layer{n}")):
                x = self.run(block, x)
            yield x


ENTRY = ModelEntry(
    name="resnet",
    kind="image",
    year=2015,
    paper="Deep Residual Learning for Image Recognition",
    arxiv="1512.03385",
    idea="layers that add to what those below computed",
    parents=(),
    cls=ResNet,
    config=ResNetConfig,
    presets=PRESETS,
    verbs=("classify",),
)
