"""VMamba: Visual State Space Model.

Yue Liu, Yunjie Tian, Yuzhong Zhao, Hongtian Yu, Lingxi Xie, Yaowei Wang, Qixiang Ye, Jianbin Jiao,
Yunfan Liu, 2024, arXiv 2401.10166.

Parent: Mamba. Kept: the selective scan, a short depthwise convolution before it, in the first version the
gate. Changed: an image has no order, so it is scanned in four (rows, columns, both reversed) and the results
are added up; a convolution of 3 x 3 pixels, centred; four stages, between which the image is halved and its
channels are doubled, as in a convolutional network; in the second version no gate, an MLP in every block and
a state of one number a channel.

Deviations from the official code: channels are last throughout, which the kernels want; images smaller than a
patch are padded with zeros; the recurrence (A_logs, Ds, dt_projs_bias) is float32 whatever the dtype of the
other weights, and has no weight decay; layers for which no weights are published are left out.

    image -> patches -> [blocks -> halve] x 4 -> norm -> mean -> head
    block:  x = x + ss2d(norm(x));  x = x + mlp(norm2(x))

SS2D (section 4.2), for a map x of d_model channels, in each direction k:

    x     = silu(conv2d(in_proj x))                 the gate z, if any, is the other half of in_proj
    [dt_k; B_k; C_k] = x_proj_k x
    y_k   = selective_scan(x, dt_projs_k dt_k, A_k, B_k, C_k, D_k)
    out   = out_proj(norm(sum_k y_k) * silu(z))

Glossary: C = d_model; D = d_inner; N = d_state; R = rank; K = 4 directions; H, W = height, width;
ssm_ratio = expand; noz = no gate; nozact = a gate without SiLU.
"""

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import Linear, Recurrent, blank
from longscan.models.common.patches import (
    Conv2d,
    Downsample,
    PatchEmbed,
    downsample,
    init_conv,
    patch_embed,
)
from longscan.models.common.vision import MLP, DropPath, VisionConfig, VisionModel, drop_rates, init_linear

N_DIRECTIONS = 4

_V0: dict[str, Any] = {  # the paper's first version
    **{"d_state": 16, "expand": 2.0, "gate": "silu", "conv_bias": True, "mlp_ratio": 0.0},
    **{"patch_embed": "v1", "downsample": "v1"},
}
_BASE = (128, 256, 512, 1024)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": (16, 32), "n_blocks": (1, 2), "n_classes": 10, "drop_path": 0.0, "image_size": 32},
    "vanilla_vmamba_tiny": {"n_blocks": (2, 2, 9, 2), "drop_path": 0.2, **_V0},
    "vanilla_vmamba_small": {"n_blocks": (2, 2, 27, 2), "drop_path": 0.3, **_V0},
    "vanilla_vmamba_base": {"n_blocks": (2, 2, 27, 2), "d_model": _BASE, "drop_path": 0.6, **_V0},
    "vmamba_tiny_s2l5": {"n_blocks": (2, 2, 5, 2), "expand": 2.0, "drop_path": 0.2},
    "vmamba_small_s2l15": {"n_blocks": (2, 2, 15, 2), "expand": 2.0, "drop_path": 0.3},
    "vmamba_base_s2l15": {"n_blocks": (2, 2, 15, 2), "expand": 2.0, "d_model": _BASE, "drop_path": 0.6},
    "vmamba_tiny_s1l8": {"n_blocks": (2, 2, 8, 2), "drop_path": 0.2},
    "vmamba_small_s1l20": {"n_blocks": (2, 2, 20, 2), "drop_path": 0.3},
    "vmamba_base_s1l20": {"n_blocks": (2, 2, 20, 2), "d_model": _BASE, "drop_path": 0.5},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VMambaConfig(VisionConfig):
    """The configuration of a VMamba; the names of the official code are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: tuple[int, ...] = (96, 192, 384, 768)  # dims, of every stage
    n_blocks: tuple[int, ...] = (2, 2, 8, 2)  # depths
    d_state: int = 1  # ssm_d_state, N
    expand: float = 1.0  # ssm_ratio
    dt_rank: int | None = None  # ssm_dt_rank, R; None is d_model / 16, rounded up
    d_conv: int = 3  # ssm_conv, height and width of the kernel, odd; 1 is no convolution
    conv_bias: bool = False  # ssm_conv_bias
    gate: Literal["none", "silu", "linear"] = "none"  # noz, neither, nozact in forward_type
    scan: Literal["cross", "bidirectional", "unidirectional"] = "cross"  # v05, v052d, v051d in forward_type
    mlp_ratio: float = 4.0  # width of the MLP per channel; 0 is none
    patch_size: int = 4  # pixels
    patch_embed: PatchEmbed = "v2"  # one convolution, or two
    downsample: Downsample = "v3"  # merged patches, a convolution of 2 x 2, of 3 x 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_state", "dt_rank", "d_conv", "patch_size")
        self.check("expand", above=0)
        self.check("mlp_ratio", least=0)
        for name in ("d_model", "n_blocks"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(values) != len(self.d_model):
                got = f"{self.d_model} and {self.n_blocks}"
                raise LongscanError(
                    f"d_model, n_blocks: expected a positive number for each stage, got {got}."
                )
        if self.d_conv % 2 == 0:
            raise LongscanError(f"d_conv: expected an odd size, whose middle is a pixel, got {self.d_conv}.")
        if self.patch_embed == "v2" and (self.patch_size % 2 or self.d_model[0] % 2):
            got = f"{self.patch_size} and {self.d_model[0]}"
            raise LongscanError(
                f"patch_size, d_model: expected even numbers for patch_embed 'v2', got {got}."
            )
        if any(int(self.expand * width) < 1 for width in self.d_model):
            raise LongscanError(f"expand: expected at least one channel, got {self.expand} per channel.")

    def rank(self, d_model: int) -> int:
        """Return the width of dt before its projection in a stage: dt_rank or its default.

        Args:
            d_model: channels of the stage.
        """
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank


class SS2D(Recurrent):
    """The selective scan in two dimensions.

    Args:
        config: the configuration.
        d_model: channels of the stage.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    recurrence = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(self, config: VMambaConfig, d_model: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        d_inner, rank, d_state = int(config.expand * d_model), config.rank(d_model), config.d_state
        self.gate, self.scan = config.gate, config.scan
        self.repeat = {"cross": 1, "bidirectional": 2, "unidirectional": 4}[config.scan]
        self.widths = [rank, d_state, d_state]
        self.in_proj = blank(Linear, d_model, d_inner * (1 if config.gate == "none" else 2), bias=False)
        self.conv2d = (
            blank(
                Conv2d,
                *(d_inner, d_inner, config.d_conv),
                **{"padding": config.d_conv // 2, "groups": d_inner, "bias": config.conv_bias},
            )
            if config.d_conv > 1
            else None
        )
        self.x_proj_weight = nn.Parameter(torch.empty(N_DIRECTIONS, sum(self.widths), d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(N_DIRECTIONS, d_inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(N_DIRECTIONS, d_inner))
        self.A_logs = nn.Parameter(torch.empty(N_DIRECTIONS * d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(N_DIRECTIONS * d_inner))
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = blank(Linear, d_inner, d_model, bias=False)
        if not self.A_logs.is_meta:
            self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """Initialise what `init_linear` and `init_conv` do not: the projections and the recurrence."""
        _, d_inner, rank = self.dt_projs_weight.shape
        bound = d_inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound, generator=generator)
        bound = rank**-0.5
        nn.init.uniform_(self.dt_projs_weight, -bound, bound, generator=generator)
        dt = self.dt_projs_bias.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        dt += torch.log(-torch.expm1(-dt))  # the inverse of softplus
        self.A_logs.copy_(torch.arange(1.0, self.A_logs.shape[1] + 1).log())  # S4D-real: A_n = -n

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map x (batch, height, width, d_model) in all directions; the result has its shape."""
        x = self.in_proj(x)
        z = None
        if self.gate != "none":
            x, z = x.chunk(2, dim=-1)
        x = F.silu(x if self.conv2d is None else self.conv2d(x))
        y = self._scan(x)  # (batch, height, width, d_inner)
        norm = self.out_norm
        y = F.layer_norm(y, norm.weight.shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)
        y = y.to(x.dtype)
        if z is not None:
            y = y * (F.silu(z) if self.gate == "silu" else z)
        return cast(Tensor, self.out_proj(y))

    def _scan(self, x: Tensor) -> Tensor:
        """Return the sum of the four scans of x (batch, height, width, d_inner), in at least float32."""
        pattern = ops.scan_pattern(x.shape[1:3], self.scan, repeat=self.repeat, device=x.device)
        # a projection of each pixel commutes with the order of the pixels: one product serves all directions
        x = x.flatten(1, 2)  # (batch, n_positions, d_inner)
        projected = ops.linear(x, self.x_proj_weight.flatten(0, 1))
        projected = projected.view(*x.shape[:2], N_DIRECTIONS, sum(self.widths))
        dt, B, C = torch.split(projected, self.widths, dim=-1)
        dt = torch.einsum("blkr,kdr->blkd", dt, self.dt_projs_weight)
        A, D = -torch.exp(self.A_logs).view(*dt.shape[2:], -1), self.Ds.view(dt.shape[2:])
        u = x.to(torch.promote_types(x.dtype, torch.float32))  # and so is y: four terms add up
        y = ops.path_scan(u, dt, A, B, C, D, self.dt_projs_bias, pattern.order)
        return y.view(y.shape[0], *pattern.shape, -1)


class VSSBlock(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)).

    Args:
        config: the configuration.
        d_model: channels of the stage.
        drop_path: rate.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(
        self, config: VMambaConfig, d_model: int, drop_path: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.mlp: MLP | None = None
        self.norm, self.op = nn.LayerNorm(d_model), SS2D(config, d_model, generator)
        if config.mlp_ratio:
            self.norm2 = nn.LayerNorm(d_model)
            self.mlp = MLP(d_model, int(d_model * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map after the block; x is (batch, height, width, d_model)."""
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """Blocks on maps of one size, and what halves them.

    Args:
        blocks: in order.
        downsample: after them; an identity in the last stage.
    """

    def __init__(self, blocks: list[VSSBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


class VMamba(VisionModel):
    """An image classifier of four stages of VSS blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: VMambaConfig
    head_name = "classifier.head"

    def __init__(self, config: VMambaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.d_features = config.d_model[-1]
        self.patch_embed = patch_embed(
            config.patch_embed, config.in_channels, config.d_model[0], config.patch_size
        )
        rates = iter(drop_rates(config.drop_path, sum(config.n_blocks)))
        halves = [downsample(config.downsample, *widths) for widths in pairwise(config.d_model)]
        self.layers = nn.ModuleList(
            Stage([VSSBlock(config, width, next(rates), generator) for _ in range(n_blocks)], half)
            for width, n_blocks, half in zip(
                config.d_model, config.n_blocks, [*halves, nn.Identity()], strict=True
            )
        )
        head = blank(Linear, self.d_features, config.n_classes)
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(self.d_features), "head": head})
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                init_linear(module, generator)
            elif isinstance(module, Conv2d) and not module.weight.is_meta:
                init_conv(module, generator)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map (batch, d_features, height / 32, width / 32); see `VisionModel`."""
        *_, last = self._stages(images)
        return last.permute(0, 3, 1, 2)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the map of each stage before it is halved, at strides 4, 8, 16, 32; see `VisionModel`."""
        return [x.permute(0, 3, 1, 2) for x in self._stages(images)]

    def pool(self, features: Tensor) -> Tensor:
        """Return the mean of the normalised features (batch, d_features); see `VisionModel`."""
        return cast(Tensor, self.classifier["norm"](features.permute(0, 2, 3, 1)).mean((1, 2)))

    def _stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the map (batch, height, width, d_model) of each stage."""
        n_channels = self.config.in_channels
        if images.dim() != 4 or images.shape[1] != n_channels or 0 in images.shape:
            expected = f"(batch, {n_channels}, height, width)"
            raise ValueError(f"images: expected a non-empty {expected}, got {tuple(images.shape)}")
        # channels last in memory too, or the first norm would copy its map
        x = self.patch_embed(images.permute(0, 2, 3, 1).contiguous())
        for stage in cast(dict[str, Stage], self.layers._modules).values():
            for block in stage.blocks:
                x = self.run(block, x)
            yield x
            x = stage.downsample(x)


ENTRY = ModelEntry(
    name="vmamba",
    kind="image",
    year=2024,
    paper="VMamba: Visual State Space Model",
    arxiv="2401.10166",
    idea="a state carried in four directions",
    parents=("mamba",),
    cls=VMamba,
    config=VMambaConfig,
    presets=PRESETS,
    verbs=("classify",),
)
