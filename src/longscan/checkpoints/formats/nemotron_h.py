"""Nemotron-H and Nemotron Nano as transformers' NemotronHForCausalLM has them.

Their pattern is ours. transformers clamps time steps to time_step_min in a pass, not in steps; the models
were trained without, so that time_step_limit alone counts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.hybrid import Family, layout
from longscan.checkpoints.formats.hybrid_fields import LAYERS, dt_limit, layer_letters, whole, written_limit
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["FORMAT"]

FIELDS = {
    "head_dim": "d_head",
    "layer_norm_epsilon": "norm_eps",
    "mlp_bias": "feed_forward_bias",
    "ssm_state_size": "d_state",
    "conv_kernel": "d_conv",
    "n_groups": "n_ssm_groups",
    "mamba_head_dim": "d_ssm_head",
    "use_conv_bias": "conv_bias",
}
# of files before transformers 5: older name -> name
OLDER = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
}
EXPERTS = {
    "n_routed_experts": "n_experts",
    "num_experts_per_tok": "n_active_experts",
    "moe_intermediate_size": "d_expert",
    "moe_shared_expert_intermediate_size": "d_shared_expert",
    "n_group": "n_expert_groups",
    "topk_group": "n_active_groups",
    "norm_topk_prob": "normalize_experts",
    "routed_scaling_factor": "experts_multiplier",
}
MISSING = {
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": False,
    "time_step_limit": None,
    "intermediate_size": None,
    "moe_latent_size": None,
    "hybrid_override_pattern": None,
    "layers_block_type": None,
    "layer_types": None,
}
DERIVED = (
    *("hybrid_override_pattern", "layers_block_type", "layer_types", "mamba_num_heads", "use_bias"),
    *("intermediate_size", "time_step_limit", "moe_latent_size"),
)
IDLE = (
    *("num_hidden_layers", "expand", "chunk_size", "mamba_ssm_cache_dtype", "num_logits_to_keep"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "use_mamba_kernels"),
    *("output_router_logits", "moe_shared_expert_overlap", "n_shared_experts"),
    *("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
    *("rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling"),  # nothing rotates
    *("auto_map", "is_hybrid_model", "hybrid_mlp_ratio", "hybrid_attention_ratio"),
)


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    stated = [_pattern(fields, name) for name in DERIVED[:3] if fields[name] is not None]
    if not stated or len(set(stated)) > 1:
        raise LongscanError(
            "hybrid_override_pattern, layers_block_type: expected one pattern of layers, got "
            f"{', '.join(map(repr, stated)) or 'none'}."
        )
    pattern, bias = stated[0], fields["use_bias"]
    derived = {
        "pattern": pattern,
        "d_ssm": whole(fields, "mamba_num_heads") * whole(fields, "mamba_head_dim"),
        "d_ff": fields["intermediate_size"] if "-" in pattern else None,
        "feed_forward": "relu2",
        "ssm_in_bias": bias,
        "ssm_out_bias": bias,
        "dt_limit": dt_limit(fields),
    }
    if "E" not in pattern:
        return derived
    if fields["mlp_bias"]:
        raise LongscanError("mlp_bias: expected false beside experts, which have no biases here.")
    if lacking := [name for name in EXPERTS if name not in fields]:
        raise LongscanError(f"config.json needs {', '.join(lacking)} for the 'E' of the pattern: add them.")
    return {
        **derived,
        "router": "sigmoid",
        "d_latent": fields["moe_latent_size"] or 0,
        **{ours: fields[theirs] for theirs, ours in EXPERTS.items()},
    }


def _pattern(fields: Mapping[str, Any], name: str) -> str:
    """Return the pattern that a field gives."""
    if name != "hybrid_override_pattern":
        return layer_letters(fields, name, {**LAYERS, "mlp": "-", "moe": "E"})
    if not isinstance(pattern := fields[name], str) or set(pattern) - set("M*-E"):
        raise LongscanError(f"{name}: expected letters among M*-E, got {pattern!r}.")
    return pattern


def _express(config: HybridConfig) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    experts = {theirs: getattr(config, ours) for theirs, ours in EXPERTS.items()}
    return {
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": config.n_layers,
        "head_dim": config.head_width if config.n_heads else config.d_head,
        "mamba_num_heads": config.channels // config.d_ssm_head,
        "expand": max(1, config.channels // config.d_model),
        "use_bias": config.ssm_in_bias,
        **({} if config.d_ff is None else {"intermediate_size": config.d_ff}),
        **written_limit(config),
        **({**experts, "moe_latent_size": config.d_latent or None} if "E" in config.pattern else {}),
    }


FORMAT = layout(
    Family(
        name="nemotron_h",
        architecture="NemotronHForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={
            "attention_bias": (False,),
            "mlp_hidden_act": ("relu2",),
            "mamba_hidden_act": ("silu", "swish"),
            "hidden_dropout": (0.0, 0),
            "mamba_proj_bias": (False, None),
        },
        idle=(*IDLE, *EXPERTS),
        outer={"backbone.embeddings.": "backbone.embedding."},
        inner={
            "-": {"mixer.": "mixer.mlp."},
            "E": {
                "mixer.": "mixer.mlp.",
                "mixer.gate.": "mixer.mlp.router.",
                "mixer.gate.e_score_correction_bias": "mixer.mlp.router.correction",
                "mixer.shared_experts.": "mixer.mlp.shared.",
            },
        },
        layers="backbone.layers.",
        per_layer=1,
        older=OLDER,
        dropped=("mtp.",),
    )
)
