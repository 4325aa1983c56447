"""Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model.

Lianghui Zhu, Bencheng Liao, Qian Zhang, Xinlong Wang, Wenyu Liu and Xinggang Wang, 2024, arXiv 2401.09417.

Parent: Mamba.
Kept: the block, with its convolution, selective scan and gate.
Changed: the tokens are patches of an image, with learned positions; each block also scans backwards, with a
second convolution and recurrence between the same projections; a class token in the middle of the sequence
is classified.

Deviations from the official code: any height and width, for which the positions are resized, the class
token's aside (the official resizing takes the first position for it and shifts half of the others); the
backward direction works without a GPU too; the time steps of both directions start as in Mamba, whose
backward ones start at softplus(0) there; weight decay leaves the recurrence alone; without a class token the
head sees the mean. Rotary positions and pairs of layers in two directions, which no published model has, are
left out.

The block, for tokens h of width d_model:

    [x; z] = in_proj h
    forth  = scan(x)                             conv1d, x_proj, dt_proj, A_log, D: as in Mamba
    back   = reverse(scan_b(reverse(x)))         conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b
    out    = out_proj ((forth + back) / 2 * silu(z))

Glossary: B, M, D (sizes) = batch, patches, d_model; L = n_layers; P = patch_size; E D = d_inner; N = d_state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import Linear, Recurrent, RMSNorm, blank
from longscan.models.common.patch_tokens import ClassToken, PatchEmbedding, join, resize, separate
from longscan.models.common.vision import DropPath, VisionConfig, VisionModel, drop_rates, init_linear
from longscan.models.mamba import MambaConfig, MambaMixer
from longscan.ops import causal_conv1d, selective_scan

_TINY, _SMALL, _BASE = ({"d_model": width, "n_layers": 24} for width in (192, 384, 768))
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 32, "n_layers": 2, "patch_size": 4, "image_size": 32, "n_classes": 10},
    "vim_tiny": _TINY,
    "vim_tiny_stride8": {**_TINY, "stride": 8},
    "vim_small": _SMALL,
    "vim_small_stride8": {**_SMALL, "stride": 8},
    "vim_base": _BASE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VimConfig(VisionConfig):
    """The configuration of a Vision Mamba; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: int  # D
    n_layers: int  # L
    patch_size: int = 16  # P: pixels of a patch's side
    stride: int | None = None  # pixels between patches; None is patch_size, less makes them overlap
    d_state: int = 16  # N
    d_conv: int = 4
    expand: int = 2  # E / D
    dt_rank: int | None = None  # None is d_model / 16, rounded up
    conv_bias: bool = True
    bias: bool = False  # of in_proj and out_proj
    bidirectional: Literal["v2", "v1", "none"] = "v2"  # v1: both directions share all but A, and no halving
    halve: bool = True  # whether v2 takes the mean of both directions, not their sum
    class_token: ClassToken = "middle"  # double: one at each end; none: the mean over the patches instead
    layer_scale: float | None = None  # initial scale of the blocks' outputs; None: no scale
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("patch_size", "stride")
        if self.image_size < self.patch_size:
            got = f"{self.image_size} < {self.patch_size}"
            raise LongscanError(f"image_size: expected at least one patch of patch_size, got {got}.")
        if (self.class_token, self.bidirectional) == ("front", "none"):
            raise LongscanError(
                "class_token: expected 'middle', 'double' or 'none' without a backward scan: "
                "a token in front sees no patch then."
            )
        _ = self.mixer  # which checks the rest

    @property
    def mixer(self) -> MambaConfig:
        """The configuration of one direction; it has no vocabulary."""
        shared = {field.name for field in dataclasses.fields(MambaConfig)} & self.to_dict().keys()
        return MambaConfig(vocab_size=1, **{name: getattr(self, name) for name in shared})

    @property
    def step(self) -> int:
        """Pixels between two patches."""
        return self.stride or self.patch_size

    @property
    def grid(self) -> int:
        """Patches in a row, and in a column, of a training image."""
        return (self.image_size - self.patch_size) // self.step + 1


class Route(NamedTuple):
    """One scan of a block.

    Attributes:
        backward: its direction, and which parameters it uses.
        order: (n_tokens,) int64, the token at each of its steps; None: as they are.
    """

    backward: bool
    order: Tensor | None = None


FORTH, BACK = Route(False), Route(True)


class VimMixer(Recurrent):
    """The selective state space block in two directions.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    def __init__(self, config: VimConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        forth = MambaMixer(config.mixer, generator)
        self.widths, self.kind = forth.widths, config.bidirectional
        self.halve = config.halve and self.kind == "v2"
        self.in_proj, self.out_proj = forth.in_proj, forth.out_proj
        self.conv1d, self.x_proj, self.dt_proj = forth.conv1d, forth.x_proj, forth.dt_proj
        self.A_log, self.D = forth.A_log, forth.D
        self.recurrence = ("A_log", "D", "dt_proj.bias")
        if self.kind != "none":
            back = MambaMixer(config.mixer, generator)
            self.A_b_log = back.A_log
            self.recurrence += ("A_b_log",)
        if self.kind == "v2":
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = back.conv1d, back.x_proj, back.dt_proj
            self.D_b = back.D
            self.recurrence += ("D_b", "dt_proj_b.bias")
        scale = config.layer_scale
        self.gamma = None if scale is None else nn.Parameter(torch.full((config.d_model,), scale))

    def forward(self, x: Tensor, routes: Sequence[Route] = (FORTH, BACK)) -> Tensor:
        """Return the tokens (batch, n_tokens, d_model), mixed.

        Args:
            x: (batch, n_tokens, d_model).
            routes: the scans, whose outputs are added.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (batch, n_tokens, d_inner) each
        y = self._scan(x, routes[0])
        for route in routes[1:]:
            y = y + self._scan(x, route)
        y = y * F.silu(z)  # once: the gate of a token is the same in all scans
        y = self.out_proj(y / 2 if self.halve else y)
        return cast(Tensor, y if self.gamma is None else y * self.gamma)

    def _scan(self, x: Tensor, route: Route) -> Tensor:
        """Return the output (batch, n_tokens, d_inner) of one scan, without gate, in the order of x."""
        conv1d, x_proj, dt_proj, A_log, D = self._direction(route.backward)
        x = x if route.order is None else x[:, route.order]
        convolved_backward = route.backward and self.kind == "v2"
        x = x.flip(1) if convolved_backward else x
        x, _ = causal_conv1d(x, conv1d.weight.squeeze(1), conv1d.bias, "silu")
        x = x.flip(1) if route.backward and not convolved_backward else x
        dt, B, C = x_proj(x).split(self.widths, dim=-1)
        y, _ = selective_scan(x, dt_proj(dt), -torch.exp(A_log), B, C, D, None, dt_proj.bias, True)
        y = y.flip(1) if route.backward else y
        return y if route.order is None else y[:, route.order.argsort()]

    def _direction(self, backward: bool) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, Tensor, Tensor]:
        """Return conv1d, x_proj, dt_proj, A_log and D of a direction."""
        if not backward:
            return self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D
        if self.kind == "v1":
            return self.conv1d, self.x_proj, self.dt_proj, self.A_b_log, self.D
        return self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b


class VimBlock(nn.Module):
    """x + drop_path(mixer(norm(x)))."""

    def __init__(self, config: VimConfig, drop_path: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = VimMixer(config, generator)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, routes: Sequence[Route]) -> Tensor:
        """Add the mixer's output to the residual stream x (batch, n_tokens, d_model)."""
        return x + cast(Tensor, self.drop_path(self.mixer(self.norm(x), routes)))


class Vim(VisionModel):
    """An image classifier of bidirectional Mamba blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: VimConfig

    def __init__(self, config: VimConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        d_model = self.d_features = config.d_model
        self.patch_embed = PatchEmbedding(self.convolution(config), generator)
        names = {"double": ("cls_token_head", "cls_token_tail"), "none": ()}
        self.class_names = names.get(config.class_token, ("cls_token",))
        for name in self.class_names:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, d_model)))
        n_positions = config.grid**2 + len(self.class_names)
        self.pos_embed = nn.Parameter(torch.empty(1, n_positions, d_model))
        rates = drop_rates(config.drop_path, config.n_layers)
        self.layers = nn.ModuleList(VimBlock(config, rate, generator) for rate in rates)
        self.norm_f = RMSNorm(d_model, config.norm_eps)
        self.head = blank(Linear, d_model, config.n_classes)
        if not self.pos_embed.is_meta:  # which only needs shapes
            init_linear(self.head, generator)
            for name in ("pos_embed", *self.class_names):
                nn.init.trunc_normal_(self.get_parameter(name), std=0.02, generator=generator)

    @staticmethod
    def convolution(config: Any) -> nn.Conv2d | nn.Conv3d:
        """Return the convolution of the patches, uninitialised."""
        return blank(nn.Conv2d, config.in_channels, config.d_model, config.patch_size, config.step)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised tokens after the last block, class tokens included.

        Args:
            images: (batch, in_channels, height, width), at least a patch in size. The pixels at the right and
                at the bottom that fill no patch are not seen.

        Returns:
            (batch, n_tokens, d_model).

        Raises:
            ValueError: shapes do not fit.
        """
        maps = self.patch_embed(images)  # (batch, d_model, *grid)
        grid, config = tuple(maps.shape[2:]), self.config
        positions, class_positions = self.positions(grid)
        classes = [self.get_parameter(name) for name in self.class_names]
        class_tokens = torch.cat([*classes, class_positions[:, :0]], 1) + class_positions
        x = join(
            self.flatten(maps + positions), class_tokens.expand(maps.shape[0], -1, -1), config.class_token
        )
        if config.residual_in_fp32:  # so that many small additions are not lost
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        routes = self.routes(grid)
        for layer in self.layers:
            x = self.run(layer, x, routes)
        return cast(Tensor, self.norm_f(x))

    def pool(self, features: Tensor) -> Tensor:
        """Return the class token (batch, d_model), the mean of two, or that of the patches without one."""
        _, classes = separate(features, self.config.class_token)
        return (classes if classes.shape[1] else features).mean(1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the normalised patches after the last block, [(batch, d_model, *grid)]."""
        patches, _ = separate(self.forward_features(images), self.config.class_token)
        return [self.unflatten(patches, self.patch_embed.grid(images))]

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the recurrences, the positions and the class tokens."""
        yield from super().no_decay_parameters()
        yield from (parameter for name, parameter in self.named_parameters() if "." not in name)

    def positions(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the positions of the patches (1, d_model, *grid), and of the class tokens (1, n, d_model).

        Args:
            grid: rows and columns of patches.
        """
        patches, classes = separate(self.pos_embed, self.config.class_token)
        maps = patches.mT.reshape(1, -1, self.config.grid, self.config.grid)
        return resize(maps, grid, "bicubic"), classes

    def resize(self, image_size: int) -> None:
        """Adapt the model to images of another size: their positions are interpolated; see the base class."""
        config = self.config.replace(image_size=image_size)
        with torch.no_grad():  # those in time, of videos, stand elsewhere
            patches, classes = Vim.positions(self, (config.grid, config.grid))
            self.pos_embed = nn.Parameter(join(patches.flatten(2).mT, classes, config.class_token))
        self.config = config

    def flatten(self, maps: Tensor) -> Tensor:
        """Return the patches (batch, n_patches, d_model) of maps (batch, d_model, *grid), in scan order."""
        return maps.flatten(2).mT

    def unflatten(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return the maps of patches: the inverse of `flatten`."""
        return patches.mT.reshape(patches.shape[0], -1, *grid)

    def routes(self, grid: tuple[int, ...]) -> tuple[Route, ...]:
        """Return the scans of every block, for a grid of patches."""
        return (FORTH,) if self.config.bidirectional == "none" else (FORTH, BACK)


ENTRY = ModelEntry(
    name="vim",
    kind="image",
    year=2024,
    paper="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    arxiv="2401.09417",
    idea="an image scanned in both directions",
    parents=("mamba",),
    cls=Vim,
    config=VimConfig,
    presets=PRESETS,
    verbs=("classify",),
)
