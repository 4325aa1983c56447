"""Vision Transformers as timm publishes them: tensors alone, whose names and shapes say what the model is.

They do not say the number of heads: that of the published model of this width is taken, other widths are
refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from longscan.checkpoints.formats.base import BareFormat
from longscan.checkpoints.formats.vim import shape_of
from longscan.errors import LongscanError
from longscan.models.vit import PRESETS, ViTConfig

__all__ = ["BARE"]

PATCHES, POSITIONS, QKV = "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"
HEADS = {fields["d_model"]: fields["n_heads"] for name, fields in PRESETS.items() if name != "tiny"}


def _matches(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors are of a Vision Transformer of images."""
    return {PATCHES, POSITIONS, QKV, "cls_token"} <= tensors.keys() and tensors[PATCHES].dim() == 4


def _infer(tensors: Mapping[str, Tensor]) -> ViTConfig:
    """Return the Config; the images are those of the positions."""
    _, in_channels, patch_size, _ = shape_of(tensors, PATCHES, 4)
    _, n_positions, d_model = shape_of(tensors, POSITIONS, 3)
    if "head.weight" not in tensors:
        raise LongscanError("head.weight is missing: expected a classifier, this file holds an encoder.")
    if d_model not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise LongscanError(
            f"{POSITIONS}: expected a width of which the number of heads is known, {known}; got {d_model}. "
            "Make a ViT of your n_heads in Python, and load the tensors into it."
        )
    side = math.isqrt(n_positions - 1)
    if side < 1 or side * side != n_positions - 1:
        raise LongscanError(
            f"{POSITIONS}: expected those of a class token and of a square of patches, got {n_positions}."
        )
    fields = {
        "d_model": d_model,
        "n_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "n_heads": HEADS[d_model],
        "n_classes": shape_of(tensors, "head.weight", 2)[0],
        "in_channels": in_channels,
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "mlp_ratio": shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0] / d_model,
        "bias": "blocks.0.attn.qkv.bias" in tensors,
    }
    if in_channels != 3:  # unknown statistics: the pixels as they are
        fields |= {"mean": [0.0] * in_channels, "std": [1.0] * in_channels}
    return ViTConfig.from_dict(fields)


BARE = BareFormat(name="vit", matches=_matches, infer=_infer)
