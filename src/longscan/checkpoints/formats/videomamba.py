"""The files of VideoMamba's authors: tensors alone, whose names and shapes say what the model is.

The orders of a scan leave no trace in them; all published models are spatial-first. An image model may look
like a Vim, see `vim`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longscan.checkpoints.formats.base import BareFormat
from longscan.checkpoints.formats.vim import common_fields, is_vim, shape_of
from longscan.models import VideoMambaConfig

__all__ = ["BARE"]

# of training only: teachers, decoders and heads of distillation
IDLE = (
    "distill_head.",
    "clip_decoder.",
    "clip_teacher.",
    "clip_pos_embed",
    "clip_img_pos_embed",
    "pool_norm.",
)
TEMPORAL = "temporal_pos_embedding"


def _matches(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors may be of a VideoMamba."""
    patches = tensors.get("patch_embed.proj.weight")
    if patches is None or "pos_embed" not in tensors or "layers.0.mixer.conv1d_b.weight" not in tensors:
        return False
    return (patches.dim() == 5) == (TEMPORAL in tensors) and is_vim(tensors) is not True


def _infer(tensors: Mapping[str, Tensor]) -> VideoMambaConfig:
    """Return the Config; f64 in a name may stand for 32 frames, the positions are right."""
    fields = common_fields(tensors)
    if TEMPORAL in tensors:
        tubelet = shape_of(tensors, "patch_embed.proj.weight", 5)[2]
        fields |= {"tubelet": tubelet, "n_frames": shape_of(tensors, TEMPORAL, 3)[1] * tubelet}
    return VideoMambaConfig.from_dict(fields)


def _ours(name: str) -> str | None:
    """Return our name of a tensor; pre-training calls the last norm otherwise."""
    if name.startswith(IDLE):
        return None
    return name.replace("norm.", "norm_f.") if name.startswith("norm.") else name


BARE = BareFormat(name="videomamba", matches=_matches, infer=_infer, ours=_ours)
