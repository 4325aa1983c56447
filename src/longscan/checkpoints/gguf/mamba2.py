"""Mamba-2 in a GGUF file.

llama.cpp computes only what the published models are: all channels are recurrent, the norm comes after the
gate, D is a number per head, dt has no limits, in_proj and out_proj have no bias.
"""

from __future__ import annotations

from typing import Any

from longscan.checkpoints.formats.base import unpadded
from longscan.checkpoints.gguf.base import CONTEXT, EPSILON, Architecture, read_count, read_shared, uniform
from longscan.checkpoints.gguf.parser import Header
from longscan.checkpoints.gguf.tensors import Shape
from longscan.errors import LongscanError
from longscan.models import Mamba2Config

__all__ = ["MAMBA2", "MIXER", "mixer_shape"]

NAME = "mamba2"
# our name in a mixer -> theirs
MIXER = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
INNER = {"norm.weight": "attn_norm.weight", **{f"mixer.{ours}": theirs for ours, theirs in MIXER.items()}}
SIZES = {
    "d_model": "embedding_length",
    "n_layers": "block_count",
    "d_state": "ssm.state_size",
    "d_conv": "ssm.conv_kernel",
    "n_groups": "ssm.group_count",
}
INNER_SIZE, HEADS = "ssm.inner_size", "ssm.time_step_rank"


def _read(header: Header) -> Mamba2Config:
    """Return the Config of a file."""
    sizes = {name: read_count(header, f"{NAME}.{key}") for name, key in SIZES.items()}
    d_inner, n_heads = (read_count(header, f"{NAME}.{key}") for key in (INNER_SIZE, HEADS))
    for what, divisor in {"embedding_length": sizes["d_model"], HEADS: n_heads}.items():
        if d_inner % divisor:
            raise LongscanError(
                f"{NAME}.{INNER_SIZE}: expected a multiple of {NAME}.{what} = {divisor:,}, got {d_inner:,}."
            )
    shared = read_shared(header, NAME)
    blank = Mamba2Config(d_model=64, n_layers=1, vocab_size=1)
    return Mamba2Config.from_dict(
        {
            **sizes,
            **unpadded(shared, shared["vocab_size"], blank.pad_vocab_size_multiple, None),
            "expand": d_inner // sizes["d_model"],
            "d_head": d_inner // n_heads,
            "norm_eps": shared["layer_norm_epsilon"],
            "tie_embeddings": shared["tie_word_embeddings"],
            "conv_bias": "blk.0.ssm_conv1d.bias" in header.tensors,
        }
    )


def _write(config: Mamba2Config) -> dict[str, Any]:
    """Return a Config as metadata; llama.cpp wants some sizes that a Mamba-2 does not have."""
    usual = {
        "d_ssm": config.d_inner,
        "gated_norm": "gate-first",
        "bias": False,
        "D_per_channel": False,
        "dt_limit": None,
    }
    got = {**{name: getattr(config, name) for name in usual}, "d_ssm": config.channels}
    if other := [
        f"{name} = {got[name]} instead of {usual[name]}" for name in usual if got[name] != usual[name]
    ]:
        raise LongscanError(f"llama.cpp computes no such Mamba-2: {', '.join(other)}. Use a directory.")
    return {
        "context_length": CONTEXT,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm.conv_kernel": config.d_conv,
        INNER_SIZE: config.d_inner,
        "ssm.state_size": config.d_state,
        HEADS: config.layer.n_heads,
        "ssm.group_count": config.n_groups,
        EPSILON: config.norm_eps,
    }


def mixer_shape(name: str, shape: Shape, n_groups: int) -> Shape:
    """Return the shape of a tensor of a mixer in the file.

    Args:
        name: ours, with or without what stands before it.
        shape: ours.
        n_groups: of the norm after the gate.
    """
    if name.endswith("conv1d.weight"):
        return shape[0], shape[2]
    if name.endswith(("mixer.A_log", "mixer.D")):
        return *shape, 1
    return (n_groups, shape[0] // n_groups) if name.endswith("mixer.norm.weight") else shape


def _shape(name: str, shape: Shape, config: Mamba2Config) -> Shape:
    """Return the shape of a tensor in the file."""
    return mixer_shape(name, shape, config.n_groups)


MAMBA2 = Architecture(NAME, "mamba2", len(INNER) - 1, _read, _write, uniform(INNER, _shape))
