"""Falcon-H1 as transformers' FalconH1ForCausalLM has it."""

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

FIELDS = {
    **MAMBA,
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "mamba_proj_bias": "ssm_in_bias",
    "projectors_bias": "ssm_out_bias",
    "attention_bias": "attention_bias",
    "mlp_bias": "feed_forward_bias",
    "embedding_multiplier": "embedding_multiplier",
    "lm_head_multiplier": "logits_multiplier",
    "key_multiplier": "key_multiplier",
    "attention_in_multiplier": "attention_in_multiplier",
    "attention_out_multiplier": "attention_out_multiplier",
    "ssm_in_multiplier": "ssm_in_multiplier",
    "ssm_out_multiplier": "ssm_out_multiplier",
    "ssm_multipliers": "ssm_multipliers",
}
MISSING = {
    **MAMBA_MISSING,
    "head_dim": None,
    "projectors_bias": False,
    "mlp_bias": False,
    "mamba_d_ssm": None,
    "mamba_expand": 2,
    "mamba_d_head": "auto",
    "time_step_limit": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
DERIVED = (
    *("num_hidden_layers", "mamba_d_ssm", "mamba_expand", "mamba_n_heads", "mamba_d_head"),
    *("mamba_rms_norm", "mamba_norm_before_gate", "mlp_multipliers", "time_step_limit"),
    *("rope_parameters", "rope_scaling"),
)
IDLE = (
    *("mamba_chunk_size", "num_logits_to_keep", "mlp_expansion_factor", "expansion_factor"),
    *("time_step_min", "time_step_max", "time_step_floor", "mamba_expand"),
)
ORDERS = {
    (False, False): "none",
    (False, True): "none",
    (True, False): "gate-first",
    (True, True): "norm-first",
}


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    order = fields["mamba_rms_norm"], fields["mamba_norm_before_gate"]
    if not all(type(value) is bool for value in order):
        raise LongscanError(f"mamba_rms_norm, mamba_norm_before_gate: expected true or false, got {order}.")
    factors = fields["mlp_multipliers"]
    if not isinstance(factors, list) or len(factors) != 2:
        raise LongscanError(f"mlp_multipliers: expected two numbers, got {factors!r}.")
    if fields["mamba_d_ssm"] is None:
        channels = whole(fields, "mamba_expand") * whole(fields, "hidden_size")
    else:
        channels = whole(fields, "mamba_d_ssm")
    return {
        "pattern": "P-" * whole(fields, "num_hidden_layers", MAX_LAYERS),
        "rope_theta": rotation(fields),
        "gated_norm": ORDERS[order],
        "dt_limit": dt_limit(fields),
        "gate_multiplier": factors[0],
        "down_multiplier": factors[1],
        **ssm_widths(fields, channels),
    }


def _express(config: HybridConfig) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    return {
        "num_hidden_layers": config.n_layers // 2,
        "head_dim": config.head_width,
        "mamba_d_ssm": config.channels,
        "mamba_n_heads": config.channels // config.d_ssm_head,
        "mamba_d_head": config.d_ssm_head,
        "mamba_rms_norm": config.gated_norm != "none",
        "mamba_norm_before_gate": config.gated_norm != "gate-first",
        "ssm_multipliers": list(config.ssm_multipliers),
        "mlp_multipliers": [config.gate_multiplier, config.down_multiplier],
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        **written_limit(config),
    }


FORMAT = layout(
    Family(
        name="falcon_h1",
        architecture="FalconH1ForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={"mamba_use_mlp": (True,), "attn_layer_indices": (None,)},
        idle=(*IDLE, "rope_theta"),
        outer={
            "model.embed_tokens.": "backbone.embedding.",
            "model.final_layernorm.": "backbone.norm_f.",
        },
        inner={
            "P": {
                "input_layernorm.": "norm.",
                "mamba.": "mixer.mamba.",
                "self_attn.": "mixer.attention.",
            },
            "-": {"pre_ff_layernorm.": "norm.", "feed_forward.": "mixer.mlp."},
        },
    )
)
