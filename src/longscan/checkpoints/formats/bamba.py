"""Bamba as transformers' BambaForCausalLM has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.hybrid import Family, layout
from longscan.checkpoints.formats.hybrid_fields import (
    MAMBA,
    MAMBA_MISSING,
    MAX_LAYERS,
    dt_limit,
    rotation,
    ssm_widths,
    whole,
    written_limit,
)
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["FORMAT"]

ROTATES = 0.5  # of each head, in every Bamba, whatever attn_rotary_emb says
FIELDS = {
    **MAMBA,
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "feed_forward_bias",
}
MISSING = {
    **MAMBA_MISSING,
    "mlp_bias": False,
    "mamba_d_head": "auto",
    "attn_layer_indices": None,
    "time_step_limit": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
DERIVED = (
    *("num_hidden_layers", "attn_layer_indices", "mamba_expand", "mamba_n_heads", "mamba_d_head"),
    *("mamba_proj_bias", "time_step_limit", "rope_parameters", "rope_scaling"),
)
IDLE = ("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient", "attn_rotary_emb", "rope_theta")


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    n_layers = whole(fields, "num_hidden_layers", MAX_LAYERS)
    indices = [] if fields["attn_layer_indices"] is None else fields["attn_layer_indices"]
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < n_layers for i in indices):
        raise LongscanError(
            f"attn_layer_indices: expected a list of numbers below {n_layers}, got {indices!r}."
        )
    return {
        "pattern": "".join("*-" if number in indices else "M-" for number in range(n_layers)),
        "rope_theta": rotation(fields, ROTATES),
        "rotary_fraction": ROTATES,
        "ssm_in_bias": fields["mamba_proj_bias"],
        "ssm_out_bias": fields["mamba_proj_bias"],
        "dt_limit": dt_limit(fields),
        **ssm_widths(fields, whole(fields, "mamba_expand") * whole(fields, "hidden_size")),
    }


def _express(config: HybridConfig) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    theta = config.rope_theta
    return {
        "num_hidden_layers": config.n_layers // 2,
        "attn_layer_indices": [i for i, letter in enumerate(config.pattern[::2]) if letter == "*"],
        "mamba_expand": config.channels // config.d_model,
        "mamba_n_heads": config.channels // config.d_ssm_head,
        "mamba_d_head": config.d_ssm_head,
        "mamba_proj_bias": config.ssm_in_bias,
        "rope_parameters": {
            "rope_theta": theta,
            "rope_type": "default",
            "partial_rotary_factor": ROTATES,
        },
        "rope_theta": theta,
        **written_limit(config),
    }


FORMAT = layout(
    Family(
        name="bamba",
        architecture="BambaForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={"partial_rotary_factor": (ROTATES, None)},
        idle=IDLE,
        outer={
            "model.embed_tokens.": "backbone.embedding.",
            "model.final_layernorm.": "backbone.norm_f.",
        },
        inner={
            "M": {"input_layernorm.": "norm.", "mamba.": "mixer."},
            "*": {"input_layernorm.": "norm.", "self_attn.": "mixer."},
            "-": {"pre_ff_layernorm.": "norm.", "feed_forward.": "mixer.mlp."},
        },
    )
)
