"""Mamba in a GGUF file, with inner norms as Falcon Mamba has them or without.

llama.cpp computes only what the published models are: d_inner is twice d_model, in_proj and out_proj have no
bias, the inner norms no weights. Its inner norms have the epsilon of the other norms; a file written here
names the model's own beside it, with which the model comes back.
"""

from __future__ import annotations

import warnings
from typing import Any

from longscan.checkpoints.formats import read_config
from longscan.checkpoints.gguf.base import (
    CONTEXT,
    EPSILON,
    Architecture,
    read_count,
    read_epsilon,
    read_flag,
    read_shared,
    uniform,
)
from longscan.checkpoints.gguf.parser import Header
from longscan.checkpoints.gguf.tensors import Shape
from longscan.errors import LongscanError
from longscan.models import MambaConfig

__all__ = ["MAMBA", "MIXER"]

NAME = "mamba"
# our name in a mixer -> theirs
MIXER = {
    "in_proj.weight": "ssm_in.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias",
    "x_proj.weight": "ssm_x.weight",
    "dt_proj.weight": "ssm_dt.weight",
    "dt_proj.bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "out_proj.weight": "ssm_out.weight",
}
INNER = {"norm.weight": "attn_norm.weight", **{f"mixer.{ours}": theirs for ours, theirs in MIXER.items()}}
# transformers' name of a size -> its key; see formats/mamba.py
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "intermediate_size": "ssm.inner_size",
    "time_step_rank": "ssm.time_step_rank",
}
INNER_NORMS, INNER_EPSILON = "ssm.dt_b_c_rms", "longscan.inner_norm_epsilon"


def _read(header: Header) -> MambaConfig:
    """Return the Config of a file."""
    raw: dict[str, Any] = {name: read_count(header, f"{NAME}.{key}") for name, key in SIZES.items()}
    if raw["intermediate_size"] % raw["hidden_size"]:
        raise LongscanError(
            f"{NAME}.ssm.inner_size: expected a multiple of {raw['hidden_size']:,}, "
            f"got {raw['intermediate_size']:,}."
        )
    shared = read_shared(header, NAME)
    falcon = {}
    if read_flag(header, f"{NAME}.{INNER_NORMS}"):
        stated = INNER_EPSILON if INNER_EPSILON in header.metadata else f"{NAME}.{EPSILON}"
        falcon = {"model_type": "falcon_mamba", "mixer_rms_eps": read_epsilon(header, stated)}
    _, config = read_config(
        {
            **raw,
            **shared,
            "model_type": "mamba",
            "expand": raw["intermediate_size"] // raw["hidden_size"],
            "use_conv_bias": "blk.0.ssm_conv1d.bias" in header.tensors,
            **falcon,
        }
    )
    assert isinstance(config, MambaConfig)
    return config


def _write(config: MambaConfig) -> dict[str, Any]:
    """Return a Config as metadata; llama.cpp wants some sizes that a Mamba does not have."""
    if config.expand != 2 or config.bias or config.inner_norms == "learned":
        got = f"expand {config.expand}, bias {str(config.bias).lower()}, inner_norms {config.inner_norms}"
        raise LongscanError(
            "llama.cpp computes only Mambas of expand 2 without bias, whose inner norms have no weights; "
            f"this one has {got}. Use a directory."
        )
    normalises = config.inner_norms == "plain"
    if normalises and config.inner_norm_eps != config.norm_eps:
        warnings.warn(
            f"llama.cpp takes the epsilon of the other norms, {config.norm_eps}, for the inner norms too, "
            f"whose own is {config.inner_norm_eps}: its logits will differ a little from longscan's.",
            stacklevel=4,
        )
    return {
        "context_length": CONTEXT,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm.conv_kernel": config.d_conv,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.d_state,
        "ssm.time_step_rank": config.rank,
        EPSILON: config.norm_eps,
        INNER_NORMS: normalises,
        **({INNER_EPSILON: config.inner_norm_eps} if normalises else {}),
    }


def _shape(name: str, shape: Shape, config: MambaConfig) -> Shape:
    """Return the shape of a tensor in the file."""
    return (shape[0], shape[2]) if name.endswith("conv1d.weight") else shape


MAMBA = Architecture(NAME, "mamba", len(INNER) - 1, _read, _write, uniform(INNER, _shape))
