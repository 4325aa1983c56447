"""VMamba as its authors publish it: a file of torch.save, whose tensors describe the model.

What they do not tell is the activation, the directions of the scan and drop rates: usual ones are assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from longscan.checkpoints.formats.base import BareFormat
from longscan.errors import LongscanError
from longscan.models.vmamba import N_DIRECTIONS, VMambaConfig

__all__ = ["BARE"]

BLOCK = re.compile(r"layers\.(\d{1,15})\.blocks\.(\d{1,15})\.(.+)")
# names of the first version, and of the newer code -> those of the published files
OLDER = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(norm|head)\.", r"classifier.\1."),
    (r"(\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"(\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"\.op\.(x_proj|dt_projs)\.weight$", r".op.\1_weight"),
)
MATRICES = tuple(f"{name}.weight" for name in ("in_proj", "out_proj", "fc1", "fc2", "reduction", "head"))


def _ours(name: str) -> str:
    """Return our name of a tensor."""
    for pattern, replacement in OLDER:
        name = re.sub(pattern, replacement, name)
    return name


def _arrange(name: str, tensor: Tensor) -> Tensor:
    """Return a matrix that was the kernel of a convolution, or of all directions in one, in our shape."""
    if name.endswith(MATRICES) and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if not name.endswith((".op.x_proj_weight", ".op.dt_projs_weight")):
        return tensor
    if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor.flatten(1)
    if tensor.dim() == 2 and tensor.shape[0] % N_DIRECTIONS == 0:
        return tensor.unflatten(0, (N_DIRECTIONS, -1))  # type: ignore[no-untyped-call, no-any-return]
    return tensor


def _matches(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there is a block of SS2D."""
    return any(re.search(r"\.blocks\.\d+\.op\.(x_proj_weight|A_logs)$", _ours(name)) for name in tensors)


def _infer(tensors: Mapping[str, Tensor]) -> VMambaConfig:
    """Return the Config: each size is read from the first tensor that has it."""
    blocks = [match.groups() for name in tensors if (match := BLOCK.fullmatch(name))]
    stages = sorted({int(stage) for stage, _, _ in blocks})
    if stages != list(range(len(stages))):
        raise LongscanError(f"expected the tensors of stages 0, 1, 2, ..., got those of {stages}.")

    def each(name: str, axis: int) -> list[int]:
        return [_size(tensors, rf"layers\.{stage}\.blocks\.\d+\.{name}", axis) for stage in stages]

    d_model, d_inner, ranks = (
        each(r"norm\.weight", 0),
        each(r"op\.out_norm\.weight", 0),
        each(r"op\.dt_projs_weight", 2),
    )
    first = r"layers\.0\.blocks\.\d+\."
    in_channels = _size(tensors, r"patch_embed\.0\.weight", 1)
    two = _find(tensors, r"patch_embed\.5\.weight") is not None
    kernel = _size(tensors, r"patch_embed\.0\.weight", 2)
    conv, mlp = _find(tensors, rf"{first}op\.conv2d\.weight"), _find(tensors, rf"{first}mlp\.fc1\.weight")
    fields: dict[str, Any] = {
        "n_classes": _size(tensors, r"classifier\.head\.weight", 0),
        "in_channels": in_channels,
        "d_model": tuple(d_model),
        "n_blocks": tuple(1 + max(int(j) for i, j, _ in blocks if int(i) == stage) for stage in stages),
        "d_state": _size(tensors, rf"{first}op\.A_logs", 1),
        "expand": _ratio(d_inner, d_model),
        "dt_rank": None if ranks == [math.ceil(width / 16) for width in d_model] else ranks[0],
        "d_conv": 1 if conv is None else conv.shape[-1],
        "conv_bias": _find(tensors, rf"{first}op\.conv2d\.bias") is not None,
        "gate": "none" if each(r"op\.in_proj\.weight", 0) == d_inner else "silu",
        "mlp_ratio": 0.0 if mlp is None else _ratio(each(r"mlp\.fc1\.weight", 0), d_model),
        "patch_size": 2 * (kernel - 1) if two else kernel,
        "patch_embed": "v2" if two else "v1",
        "downsample": _downsample(tensors),
    }
    if in_channels != 3:  # whose mean and deviation nobody knows
        fields |= {"mean": (0.0,) * in_channels, "std": (1.0,) * in_channels}
    return VMambaConfig.from_dict(fields)


def _downsample(tensors: Mapping[str, Tensor]) -> str:
    """Return the version of what halves the maps."""
    if _find(tensors, r"layers\.\d+\.downsample\.reduction\.weight") is not None:
        return "v1"
    conv = _find(tensors, r"layers\.\d+\.downsample\.1\.weight")
    return "v2" if conv is not None and conv.shape[-1] == 2 else "v3"


def _ratio(wide: Sequence[int], narrow: Sequence[int]) -> float:
    """Return the smallest number whose products with widths are others, rounded down."""
    ratio = max(w / max(1, n) for w, n in zip(wide, narrow, strict=True))
    exact = all(int(ratio * n) >= w for w, n in zip(wide, narrow, strict=True))
    return ratio if exact else math.nextafter(ratio, math.inf)


def _find(tensors: Mapping[str, Tensor], pattern: str) -> Tensor | None:
    """Return the first tensor whose name fits, if there is one."""
    return next((tensor for name, tensor in tensors.items() if re.fullmatch(pattern, name)), None)


def _size(tensors: Mapping[str, Tensor], pattern: str, axis: int) -> int:
    """Return a size of the first tensor whose name fits."""
    tensor = _find(tensors, pattern)
    if tensor is None or tensor.dim() <= axis:
        name = re.sub(r"\\d\+", "0", pattern).replace("\\", "")
        got = "none" if tensor is None else f"the shape {tuple(tensor.shape)}"
        raise LongscanError(f"expected {name} with {axis + 1} axes or more, which gives a size, got {got}.")
    return tensor.shape[axis]


BARE = BareFormat(name="vmamba", matches=_matches, infer=_infer, ours=_ours, arrange=_arrange, sized=False)
