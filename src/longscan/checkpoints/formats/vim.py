"""The files of Vim's authors: tensors alone, whose names and shapes say what the model is.

They do not say where the class token stands and whether the two directions are averaged: the image models of
VideoMamba have the same names. What only one of the two has decides; else both formats match, and the name of
the file must.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longscan.checkpoints.formats.base import BareFormat
from longscan.errors import LongscanError
from longscan.models import VimConfig

__all__ = ["BARE", "common_fields", "is_vim", "shape_of"]

IDLE = ("rope.",)  # buffers of rotary positions, which are computed
PATCHES, TOKEN, SCAN = "patch_embed.proj.weight", "cls_token", "layers.0.mixer."
PIXELS = 224  # of the images that the published models were trained on


def is_vim(tensors: Mapping[str, Tensor]) -> bool | None:
    """Return whether tensors are of a Vim, rather than of an image model of VideoMamba.

    Args:
        tensors: of a file, by their names.

    Returns:
        None if they may be of either; False also if they are of neither.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    patches, positions = shapes.get(PATCHES, ()), shapes.get("pos_embed", ())
    if len(patches) != 4 or len(positions) != 3 or SCAN + "in_proj.weight" not in shapes:
        return False
    if "temporal_pos_embedding" in shapes or "norm.weight" in shapes:
        return False
    if any(name.startswith(("distill_head.", "clip_decoder.")) for name in shapes):
        return False
    both = SCAN + "conv1d_b.weight" in shapes and TOKEN in shapes
    return None if both and not {SCAN + "gamma", "rope.freqs_cos"} & shapes.keys() else True


def common_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the Config of a Vim or a VideoMamba that the shapes say.

    Args:
        tensors: by our names.

    Raises:
        LongscanError: a tensor is missing, or its shape is impossible.
    """
    patches, positions = shape_of(tensors, PATCHES), shape_of(tensors, "pos_embed", 3)
    (d_inner, d_state), d_model = shape_of(tensors, SCAN + "A_log", 2), positions[2]
    if "head.weight" not in tensors:
        raise LongscanError(
            "head.weight is missing: this file holds an encoder without a classifier, as pre-training leaves "
            "it. Expected a model that was trained, or fine-tuned, to classify."
        )
    double = TOKEN + "_head" in tensors
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    kind = "v2" if SCAN + "conv1d_b.weight" in tensors else "v1" if SCAN + "A_b_log" in tensors else "none"
    fields = {
        "d_model": d_model,
        "n_layers": len(layers),
        "n_classes": shape_of(tensors, "head.weight", 2)[0],
        "in_channels": patches[1],
        "patch_size": patches[-1],
        "d_state": d_state,
        "d_conv": shape_of(tensors, SCAN + "conv1d.weight", 3)[2],
        "expand": d_inner // d_model,
        "conv_bias": SCAN + "conv1d.bias" in tensors,
        "bias": SCAN + "in_proj.bias" in tensors,
        "bidirectional": kind,
        "layer_scale": 1.0 if SCAN + "gamma" in tensors else None,
    }
    rank = shape_of(tensors, SCAN + "dt_proj.weight", 2)[1]
    if rank != math.ceil(d_model / 16):
        fields["dt_rank"] = rank
    if patches[1] != 3:  # unknown statistics: the pixels as they are
        fields |= {"mean": [0.0] * patches[1], "std": [1.0] * patches[1]}
    if double or TOKEN not in tensors:
        fields["class_token"] = "double" if double else "none"
    return fields | _grid(positions[1] - (2 if double else TOKEN in tensors), patches[-1])


def _grid(n_patches: int, size: int) -> dict[str, int]:
    """Return image_size, and the stride of overlapping patches: that with which the images had 224 pixels."""
    side = math.isqrt(max(0, n_patches))
    if side < 1 or side * side != n_patches:
        raise LongscanError(f"pos_embed: expected the positions of a square of patches, got {n_patches}.")
    stride, rest = divmod(PIXELS - size, max(1, side - 1))
    if side > 1 and rest == 0 and 0 < stride < size:
        return {"image_size": PIXELS, "stride": stride}
    return {"image_size": side * size}


def shape_of(tensors: Mapping[str, Tensor], name: str, n_axes: int | None = None) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Args:
        tensors: by our names.
        name: of the tensor.
        n_axes: expected; None: 4 or 5, of a convolution over images or videos.

    Raises:
        LongscanError: there is no such tensor, or it has other axes, or is empty.
    """
    if name not in tensors:
        raise LongscanError(f"{name} is missing: the file is not that of a whole model.")
    shape = tuple(tensors[name].shape)
    if 0 in shape or (len(shape) not in (4, 5) if n_axes is None else len(shape) != n_axes):
        raise LongscanError(f"{name}: expected {n_axes or '4 or 5'} axes, none of them empty, got {shape}.")
    return shape


def _infer(tensors: Mapping[str, Tensor]) -> VimConfig:
    """Return the Config; a single class token stands in the middle."""
    return VimConfig.from_dict(common_fields(tensors))


def _ours(name: str) -> str | None:
    """Return our name of a tensor, which is theirs."""
    return None if name.startswith(IDLE) else name


BARE = BareFormat(name="vim", matches=lambda tensors: is_vim(tensors) is not False, infer=_infer, ours=_ours)
