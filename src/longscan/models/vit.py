"""An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.

Alexey Dosovitskiy, Lucas Beyer, Alexander Kolesnikov, Dirk Weissenborn, Xiaohua Zhai, Thomas Unterthiner,
Mostafa Dehghani, Matthias Minderer, Georg Heigold, Sylvain Gelly, Jakob Uszkoreit, Neil Houlsby, 2020,
arXiv 2010.11929: the Vision Transformer.

Parent: BERT, itself the encoder of the Transformer.
Kept: self-attention between all tokens, an MLP with GELU, learned positions, a class token in front, which is
classified.
Changed: the tokens are patches of an image, mapped linearly; the norm precedes each branch, and a last one
follows the blocks.

Deviations from the official code: any height and width, for which the positions are interpolated, as the
paper does for fine-tuning; drop path in place of dropout; the head is one linear layer, without the hidden
layer that pre-training has. The parameters have the names of timm's models.

The block, for tokens x of width d_model:

    x = x + proj(attention(q, k, v)),    [q; k; v] = qkv norm1(x)
    x = x + fc2(gelu(fc1(norm2(x))))

Glossary: D = d_model; L = n_layers; P = patch_size; k = n_heads; N = patches of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from longscan import ops
from longscan.errors import LongscanError
from longscan.models.common.entry import ModelEntry
from longscan.models.common.layers import Linear, blank
from longscan.models.common.patch_tokens import PatchEmbedding, join, resize, separate
from longscan.models.common.vision import MLP, DropPath, VisionConfig, VisionModel, drop_rates, init_linear

# tiny and small are of DeiT (arXiv 2012.12877), the others of the paper, table 1
_TINY, _SMALL, _BASE = ({"d_model": 64 * heads, "n_layers": 12, "n_heads": heads} for heads in (3, 6, 12))
_LARGE = {"d_model": 1024, "n_layers": 24, "n_heads": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"d_model": 32, "n_layers": 2, "n_heads": 2},
        **{"patch_size": 4, "image_size": 32, "n_classes": 10},
    },
    "vit_tiny": _TINY,
    "vit_small": _SMALL,
    "vit_base": _BASE,
    "vit_base_patch32": {**_BASE, "patch_size": 32},
    "vit_large": _LARGE,
    "vit_large_patch32": {**_LARGE, "patch_size": 32},
    "vit_huge_patch14": {"d_model": 1280, "n_layers": 32, "n_heads": 16, "patch_size": 14},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
    """The configuration of a Vision Transformer; the paper's symbols are in the comments.

    Raises:
        LongscanError: a value is out of range.
    """

    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # k
    patch_size: int = 16  # P: pixels of a patch's side
    mlp_ratio: float = 4.0  # width of the MLP per channel
    bias: bool = True  # of qkv
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check("d_model", "n_layers", "n_heads", "patch_size", least=1)
        self.check("mlp_ratio", "norm_eps", above=0)
        if self.d_model % self.n_heads:
            got = f"{self.d_model} and {self.n_heads}"
            raise LongscanError(f"d_model, n_heads: expected a multiple and its divisor, got {got}.")
        if self.image_size < self.patch_size:
            got = f"{self.image_size} < {self.patch_size}"
            raise LongscanError(f"image_size: expected at least one patch of patch_size, got {got}.")

    @property
    def grid(self) -> int:
        """Patches in a row, and in a column, of a training image."""
        return self.image_size // self.patch_size


class Attention(nn.Module):
    """Self-attention between all tokens.

    Args:
        config: the configuration.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = blank(Linear, config.d_model, 3 * config.d_model, bias=config.bias)
        self.proj = blank(Linear, config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (batch, n_tokens, d_model), mixed."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.n_heads, -1).unbind(2)  # (batch, n, n_heads, d_head)
        return cast(Tensor, self.proj(ops.attention(q, k, v).flatten(2)))


class ViTBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)).

    Args:
        config: the configuration.
        drop_path: rate.
    """

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config.d_model, int(config.d_model * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (batch, n_tokens, d_model) after the block."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))


class ViT(VisionModel):
    """An image classifier of Transformer blocks.

    Args:
        config: the configuration.
        generator: randomness of the initialisation; torch's global generator if None.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        d_model = self.d_features = config.d_model
        proj = blank(nn.Conv2d, config.in_channels, d_model, config.patch_size, config.patch_size)
        self.patch_embed = PatchEmbedding(proj, generator)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, d_model))
        rates = drop_rates(config.drop_path, config.n_layers)
        self.blocks = nn.ModuleList(ViTBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(d_model, config.norm_eps)
        self.head = blank(Linear, d_model, config.n_classes)
        if not self.pos_embed.is_meta:  # which only needs shapes
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    init_linear(module, generator)
            for parameter in (self.cls_token, self.pos_embed):
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised tokens after the last block, the class token first.

        Args:
            images: (batch, in_channels, height, width), at least a patch in size. The pixels at the right and
                at the bottom that fill no patch are not seen.

        Returns:
            (batch, 1 + n_patches, d_model).

        Raises:
            ValueError: shapes do not fit.
        """
        maps = self.patch_embed(images)  # (batch, d_model, *grid)
        positions, first = self._positions(tuple(maps.shape[2:]))
        classes = (self.cls_token + first).expand(maps.shape[0], -1, -1)
        x = join((maps + positions).flatten(2).mT, classes, "front")
        for block in self.blocks:
            x = self.run(block, x)
        return cast(Tensor, self.norm(x))

    def pool(self, features: Tensor) -> Tensor:
        """Return the class token (batch, d_model)."""
        return features[:, 0]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the normalised patches after the last block, [(batch, d_model, *grid)]."""
        patches, _ = separate(self.forward_features(images), "front")
        return [patches.mT.reshape(patches.shape[0], -1, *self.patch_embed.grid(images))]

    def no_decay_parameters(self) -> Iterable[nn.Parameter]:
        """Return the positions and the class token."""
        return self.pos_embed, self.cls_token

    def resize(self, image_size: int) -> None:
        """Adapt the model to images of another size: their positions are interpolated; see the base class."""
        config = self.config.replace(image_size=image_size)
        with torch.no_grad():
            patches, first = self._positions((config.grid, config.grid))
            self.pos_embed = nn.Parameter(join(patches.flatten(2).mT, first, "front"))
        self.config = config

    def _positions(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the positions of the patches (1, d_model, *grid), and of the class token (1, 1, d_model)."""
        patches, first = separate(self.pos_embed, "front")
        maps = patches.mT.reshape(1, -1, self.config.grid, self.config.grid)
        return resize(maps, grid, "bicubic"), first


ENTRY = ModelEntry(
    name="vit",
    kind="image",
    year=2020,
    paper="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    arxiv="2010.11929",
    idea="an image as patches, each of which attends to all",
    parents=("bert",),
    cls=ViT,
    config=ViTConfig,
    presets=PRESETS,
    verbs=("classify",),
)
