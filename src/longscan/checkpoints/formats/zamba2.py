"""Zamba2 as transformers' Zamba2ForCausalLM has it.

A shared block stands in the first layer that uses it, with the adapters of all its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import check_twins
from longscan.checkpoints.formats.hybrid import Family, layout
from longscan.checkpoints.formats.hybrid_fields import layer_letters, rotation, whole
from longscan.errors import LongscanError
from longscan.models import Zamba2Config

__all__ = ["FORMAT"]

FIELDS = {
    "rms_norm_eps": "norm_eps",
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_ngroups": "n_ssm_groups",
    "add_bias_linear": "bias",
    "num_mem_blocks": "n_shared",
    "adapter_rank": "adapter_rank",
    "use_shared_attention_adapter": "attention_adapters",
}
MISSING = {
    "tie_word_embeddings": True,
    "add_bias_linear": False,
    "use_shared_attention_adapter": False,
    "use_mem_rope": False,
    "intermediate_size": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
DERIVED = (
    *("layers_block_type", "intermediate_size", "mamba_expand", "n_mamba_heads", "use_mem_rope"),
    *("rope_parameters", "rope_scaling"),
)
# what follows from other fields
TWINS = (
    *("num_hidden_layers", "mamba_headdim", "attention_head_dim", "attention_hidden_size"),
    *("kv_channels", "num_query_groups", "hybrid_layer_ids", "num_logits_to_keep"),
)
IDLE = (
    *("chunk_size", "use_mamba_kernels", "use_mem_eff_path", "rope_theta"),
    *("time_step_min", "time_step_max", "time_step_floor"),
)
LETTERS = {"mamba": "M", "linear_attention": "M", "hybrid": "Z"}
ADAPTERS = ("q", "k", "v")


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    pattern, d_model = layer_letters(fields, "layers_block_type", LETTERS), whole(fields, "hidden_size")
    channels, n_heads = whole(fields, "mamba_expand") * d_model, whole(fields, "n_mamba_heads")
    if channels % n_heads:
        raise LongscanError(f"n_mamba_heads: expected a divisor of {channels} channels, got {n_heads}.")
    if type(fields["use_mem_rope"]) is not bool:
        raise LongscanError(f"use_mem_rope: expected true or false, got {fields['use_mem_rope']!r}.")
    theta = rotation(fields)
    derived = {
        "pattern": pattern,
        "d_ff": 4 * d_model if fields["intermediate_size"] is None else whole(fields, "intermediate_size"),
        "d_ssm": channels,
        "d_ssm_head": channels // n_heads,
        "rope_theta": theta if fields["use_mem_rope"] else None,
    }
    twins = {
        "num_hidden_layers": len(pattern),
        "mamba_headdim": channels // n_heads,
        "attention_hidden_size": 2 * d_model,
        "attention_head_dim": 2 * d_model // whole(fields, "num_attention_heads"),
        "hybrid_layer_ids": [number for number, letter in enumerate(pattern) if letter == "Z"],
    }
    check_twins(fields, twins)
    return derived


def _express(config: Zamba2Config) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    theta = 10000.0 if config.rope_theta is None else config.rope_theta
    return {
        "layers_block_type": ["hybrid" if letter == "Z" else "mamba" for letter in config.pattern],
        "num_hidden_layers": config.n_layers,
        "hybrid_layer_ids": [number for number, letter in enumerate(config.pattern) if letter == "Z"],
        "intermediate_size": config.d_ff,
        "mamba_expand": config.channels // config.d_model,
        "n_mamba_heads": config.channels // config.d_ssm_head,
        "mamba_headdim": config.d_ssm_head,
        "use_mem_rope": config.rope_theta is not None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
    }


def _others(config: Zamba2Config) -> dict[str, str]:
    """Return the beginnings of the names of shared blocks and adapters, theirs -> ours."""
    users, names = [number for number, letter in enumerate(config.pattern) if letter == "Z"], {}
    for turn, number in enumerate(users):
        block, mixer = turn % config.n_shared, f"backbone.layers.{number}.mixer."
        theirs = f"model.layers.{users[block]}.shared_transformer."
        names[theirs] = f"backbone.shared.{block}."
        for matrix in ("gate_up_proj.", "down_proj."):
            names[f"{theirs}feed_forward.{matrix}"] = f"backbone.shared.{block}.{matrix}"
        names[f"{theirs}feed_forward.gate_up_proj_adapter_list.{turn}."] = f"{mixer}gate_up_adapter."
        for index, letter in enumerate(ADAPTERS):
            names[f"{theirs}self_attn.linear_{letter}_adapter_list.{turn}."] = f"{mixer}adapters.{index}."
    return names


FORMAT = layout(
    Family(
        name="zamba2",
        architecture="Zamba2ForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={
            "hidden_act": ("gelu",),
            "use_conv_bias": (True,),
            "use_long_context": (False,),
        },
        idle=(*IDLE, *TWINS),
        outer={
            "model.embed_tokens.": "backbone.embedding.",
            "model.final_layernorm.": "backbone.norm_f.",
        },
        inner={
            "M": {"input_layernorm.": "norm.", "mamba.": "mixer."},
            "Z": {
                "linear.": "mixer.linear.",
                "mamba_decoder.input_layernorm.": "norm.",
                "mamba_decoder.mamba.": "mixer.mamba.",
            },
        },
        per_layer=1,
        kind=Zamba2Config,
        others=_others,
    )
)
