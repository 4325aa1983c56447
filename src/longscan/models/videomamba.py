"""VideoMamba: State Space Model for Efficient Video Understanding.

Kunchang Li, Xinhao Li, Yi Wang, Yinan He, Yali Wang, Limin Wang and Yu Qiao, 2024, arXiv 2403.06977.

Parent: Vim.
Kept: its bidirectional blocks, its class token and its positions.
Changed: patches are tubelets of a video, whose frames have positions too; the class token stands in front;
the two directions are added, not averaged; a scan may visit the tokens in four orders. Without frames it is
an image model.

Deviations from the official code: any height, width and number of frames, for which the positions are
resized; all orders of the paper, of which the authors released the first; the weights start as in Vim (there
every linear layer starts normal with 0.02, the class token at 0, the time steps at softplus(0)). The paper
shows the two spatiotemporal orders in a figure only: version 1, half of the scans, is taken to be forwards
spatial-first and backwards temporal-first; version 2 adds all four, two with each direction's parameters.

The tokens of a video, n_frames of height x width pixels:

    p[t, i, j] = conv3d(video)[t, i, j] + pos_embed[i, j] + temporal_pos_embedding[t]
    tokens     = [cls_token + pos_embed[0], p in an order]
                 spatial    t, i, j: frame by frame
                 temporal   i, j, t: patch by patch, each through time

Glossary: T = n_frames; D = d_model; L = n_layers; P = patch_size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import blank
from longscan.models.common.patch_tokens import ClassToken, join, resize, separate
from longscan.models.vim import BACK, FORTH, Route, Vim, VimConfig

_TINY, _SMALL, _BASE = ({"d_model": width, "n_layers": 24} for width in (192, 384, 768))
_MIDDLE = {"d_model": 576, "n_layers": 32}
_KINETICS = {"n_classes": 400}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 32, "n_layers": 2, "patch_size": 4, "image_size": 32, "n_classes": 10, "n_frames": 4},
    "videomamba_tiny": _TINY,
    "videomamba_small": _SMALL,
    "videomamba_middle": _MIDDLE,
    "videomamba_base": _BASE,
    "videomamba_tiny_f8": {**_TINY, **_KINETICS, "n_frames": 8},
    "videomamba_small_f16": {**_SMALL, **_KINETICS, "n_frames": 16},
    "videomamba_middle_f16": {**_MIDDLE, **_KINETICS, "n_frames": 16},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoMambaConfig(VimConfig):
    """The configuration of a VideoMamba; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    n_frames: int = 0  # T: of the training videos, other numbers are accepted too; 0: images
    tubelet: int = 1  # frames of a patch
    scan_order: Literal["spatial", "temporal", "spatiotemporal_v1", "spatiotemporal_v2"] = "spatial"
    halve: bool = False
    class_token: ClassToken = "front"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("n_frames", least=0)
        self.check("tubelet")
        if self.n_frames and self.n_frames < self.tubelet:
            got = f"{self.n_frames} < {self.tubelet}"
            raise LongscanError(f"n_frames: expected at least one tubelet, or 0 for images, got {got}.")
        if not self.n_frames and (self.tubelet, self.scan_order) != (1, "spatial"):
            raise LongscanError(
                "n_frames: expected frames with a tubelet or a scan_order, got 0, an image model."
            )
        if self.bidirectional == "none" and self.scan_order.startswith("spatiotemporal"):
            raise LongscanError(f"bidirectional: expected 'v2' or 'v1' for {self.scan_order}, got 'none'.")


class VideoMamba(Vim):
    """A classifier of videos, or of images, of bidirectional Mamba blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: VideoMambaConfig

    def __init__(self, config: VideoMambaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        if config.n_frames:
            self.temporal_pos_embedding = nn.Parameter(
                torch.zeros(1, config.n_frames // config.tubelet, config.d_model)
            )

    @staticmethod
    def convolution(config: VideoMambaConfig) -> nn.Conv2d | nn.Conv3d:
        """Return the convolution of the patches, uninitialised; see `Vim.convolution`."""
        if not config.n_frames:
            return Vim.convolution(config)
        size, step = (config.tubelet, *[config.patch_size] * 2), (config.tubelet, *[config.step] * 2)
        return blank(nn.Conv3d, config.in_channels, config.d_model, size, step)

    def positions(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the positions of the patches and of the class token; see `Vim.positions`.

        Args:
            grid: frames, if there are any, rows and columns of patches.
        """
        spatial, classes = super().positions(grid[-2:])
        if not self.config.n_frames:
            return spatial, classes
        temporal = resize(self.temporal_pos_embedding.mT, grid[:1], "linear")  # (1, d_model, n_frames)
        return spatial[:, :, None] + temporal[..., None, None], classes

    def flatten(self, maps: Tensor) -> Tensor:
        """Return the patches in scan order; see `Vim.flatten`."""
        return super().flatten(maps.movedim(2, -1) if self.config.scan_order == "temporal" else maps)

    def unflatten(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return the maps of patches: the inverse of `flatten`."""
        if self.config.scan_order != "temporal":
            return super().unflatten(patches, grid)
        return super().unflatten(patches, (*grid[1:], grid[0])).movedim(-1, 2)

    def routes(self, grid: tuple[int, ...]) -> tuple[Route, ...]:
        """Return the scans of every block, for a grid of patches."""
        config = self.config
        if not config.scan_order.startswith("spatiotemporal"):
            return super().routes(grid)
        order = temporal_first(grid, config.class_token).to(self.device)
        if config.scan_order == "spatiotemporal_v1":
            return FORTH, Route(True, order)
        return FORTH, BACK, Route(False, order), Route(True, order)

    @torch.no_grad()
    def inflated(self, n_frames: int, tubelet: int = 1, mean: bool = False) -> VideoMamba:
        """Return a video model with the weights of this image model, for fine-tuning.

        Args:
            n_frames: of its training videos.
            tubelet: frames of its patches.
            mean: whether all frames of a tubelet share a patch's weights; False: the middle one has them.

        Returns:
            The model; the positions of the frames are 0.

        Raises:
            LongscanError: this is a video model already, or the numbers do not fit.
        """
        if self.config.n_frames:
            raise LongscanError("inflated: expected an image model, this is a video model already.")
        model = VideoMamba(self.config.replace(n_frames=n_frames, tubelet=tubelet))
        weights = self.state_dict()
        name = "patch_embed.proj.weight"
        weights[name] = inflate(weights[name], tubelet, mean)
        weights["temporal_pos_embedding"] = torch.zeros_like(model.temporal_pos_embedding)
        model.load_state_dict(weights)
        return model.to(self.device, self.dtype)

    @torch.no_grad()
    def resize_frames(self, n_frames: int) -> None:
        """Adapt a video model to another number of frames, whose positions are interpolated.

        Args:
            n_frames: of the videos to come.

        Raises:
            LongscanError: this is an image model, or the number does not fit.
        """
        if not self.config.n_frames or not n_frames:
            raise LongscanError("n_frames: expected a video model and frames; see `inflated` for images.")
        config = self.config.replace(n_frames=n_frames)
        grid = (n_frames // config.tubelet,)
        resized = resize(self.temporal_pos_embedding.mT, grid, "linear").mT.contiguous()
        self.temporal_pos_embedding = nn.Parameter(resized)
        self.config = config


def inflate(weight: Tensor, tubelet: int, mean: bool = False) -> Tensor:
    """Return the weights of tubelets, of those of patches.

    Args:
        weight: (d_model, in_channels, height, width).
        tubelet: frames.
        mean: see `VideoMamba.inflated`.

    Returns:
        (d_model, in_channels, tubelet, height, width).
    """
    if mean:
        return weight[:, :, None].repeat(1, 1, tubelet, 1, 1) / tubelet
    inflated = weight.new_zeros(*weight.shape[:2], tubelet, *weight.shape[2:])
    inflated[:, :, tubelet // 2] = weight
    return inflated


def temporal_first(grid: tuple[int, ...], where: ClassToken) -> Tensor:
    """Return the temporal-first order of tokens that stand in spatial-first order.

    Args:
        grid: frames, rows and columns of patches.
        where: the class tokens stand; they stay there.

    Returns:
        (n_tokens,) int64.
    """
    n_classes = {"none": 0, "double": 2}.get(where, 1)
    n_tokens = n_classes + grid[0] * grid[1] * grid[2]
    patches, classes = separate(torch.arange(n_tokens)[None, :, None], where)
    patches = patches.view(grid).permute(1, 2, 0).reshape(1, -1, 1)
    return join(patches, classes, where).flatten()


ENTRY = ModelEntry(
    name="videomamba",
    kind="image",
    year=2024,
    paper="VideoMamba: State Space Model for Efficient Video Understanding",
    arxiv="2403.06977",
    idea="a video scanned frame by frame",
    parents=("vim",),
    cls=VideoMamba,
    config=VideoMambaConfig,
    presets=PRESETS,
    verbs=("classify",),
)
