"""Granite 4.0 as transformers' GraniteMoeHybridForCausalLM has it, dense and with experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.formats.hybrid import Family, layout
from longscan.checkpoints.formats.hybrid_fields import (
    LAYERS,
    MAMBA,
    MAMBA_MISSING,
    dt_limit,
    layer_letters,
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
    "rms_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logits_scaling": "logits_divisor",
}
MISSING = {
    **MAMBA_MISSING,
    "mamba_d_head": "auto",
    "time_step_limit": None,
    "position_embedding_type": None,
    "rope_parameters": None,
    "rope_scaling": None,
}
DERIVED = (
    *("num_hidden_layers", "layer_types", "mamba_expand", "mamba_n_heads", "mamba_d_head"),
    *("mamba_proj_bias", "time_step_limit", "shared_intermediate_size", "intermediate_size"),
    *("num_local_experts", "num_experts_per_tok", "position_embedding_type"),
    *("rope_parameters", "rope_scaling"),
)
IDLE = ("mamba_chunk_size", "output_router_logits", "router_aux_loss_coef", "rope_theta", "init_method")


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    mixers = layer_letters(fields, "layer_types", LAYERS)
    if whole(fields, "num_hidden_layers") != len(mixers):
        got = fields["num_hidden_layers"]
        raise LongscanError(f"num_hidden_layers: expected {len(mixers)}, as in layer_types, got {got}.")
    if (kind := fields["position_embedding_type"]) not in (None, "nope", "rope"):
        raise LongscanError(f"position_embedding_type: expected 'nope' or 'rope', got {kind!r}.")
    other, shared = ("E" if fields["num_local_experts"] else "-"), whole(fields, "shared_intermediate_size")
    derived: dict[str, Any] = {"d_ff": shared}
    if other == "E":
        derived = {
            "n_experts": whole(fields, "num_local_experts"),
            "n_active_experts": whole(fields, "num_experts_per_tok"),
            "d_expert": whole(fields, "intermediate_size"),
            "d_shared_expert": shared,
        }
    channels = whole(fields, "mamba_expand") * whole(fields, "hidden_size")
    if "M" in mixers or channels % whole(fields, "mamba_n_heads") == 0:  # without M they may mean nothing
        derived |= ssm_widths(fields, channels)
    theta = rotation(fields)
    return {
        **derived,
        "pattern": "".join(f"{mixer}{other}" for mixer in mixers),
        "rope_theta": theta if kind == "rope" else None,
        "ssm_in_bias": fields["mamba_proj_bias"],
        "ssm_out_bias": fields["mamba_proj_bias"],
        "dt_limit": dt_limit(fields),
    }


def _express(config: HybridConfig) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    experts = "E" in config.pattern
    theta = 10000.0 if config.rope_theta is None else config.rope_theta
    return {
        "num_hidden_layers": config.n_layers // 2,
        "layer_types": ["attention" if letter == "*" else "mamba" for letter in config.pattern[::2]],
        "mamba_expand": config.channels // config.d_model,
        "mamba_n_heads": config.channels // config.d_ssm_head,
        "mamba_d_head": config.d_ssm_head,
        "mamba_proj_bias": config.ssm_in_bias,
        "attention_multiplier": config.head_width**-0.5
        if config.attention_multiplier is None
        else config.attention_multiplier,
        "shared_intermediate_size": config.d_shared_expert if experts else config.d_ff,
        "intermediate_size": config.d_expert if experts else config.d_ff,
        "num_local_experts": config.n_experts if experts else 0,
        "num_experts_per_tok": config.n_active_experts if experts else 0,
        "position_embedding_type": "nope" if config.rope_theta is None else "rope",
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        **written_limit(config),
    }


def _split(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors with gate and up projections apart, and each expert for itself."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".mixer.mlp.")
        part, _, matrix = rest.rpartition("_linear.")
        ends = ("gate_proj", "up_proj") if part.endswith("input") else ("down_proj",)
        if part.rpartition(".")[2] not in ("input", "output"):
            ours[name] = tensor
            continue
        before = f"{layer}.mixer.mlp.{part.removesuffix('input').removesuffix('output')}"
        if before.endswith(".experts."):
            for number, expert in enumerate(tensor):
                for end, piece in zip(ends, expert.chunk(len(ends)), strict=True):
                    ours[f"{before}{number}.{end}.{matrix}"] = piece
        else:
            for end, piece in zip(ends, tensor.chunk(len(ends)), strict=True):
                ours[f"{before}{end}.{matrix}"] = piece
    return ours


def _fuse(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors with gate and up projections in one, and all experts in one."""
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, _, matrix = name.rpartition("_proj.")
        layer, _, part = before.rpartition(".")
        if ".mixer.mlp." not in name or part not in ("gate", "up", "down"):
            fused[name] = tensor
        elif part == "gate":
            fused[f"{layer}.input_linear.{matrix}"] = torch.cat(
                [tensor, tensors[f"{layer}.up_proj.{matrix}"]]
            )
        elif part == "down":
            fused[f"{layer}.output_linear.{matrix}"] = tensor
    experts: dict[str, dict[int, Tensor]] = {}
    for name in list(fused):
        if match := re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", name):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = fused.pop(name)
    stacked = {name: torch.stack([each[n] for n in range(len(each))]) for name, each in experts.items()}
    return {**fused, **stacked}


FORMAT = layout(
    Family(
        name="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={"normalization_function": ("rmsnorm",)},
        idle=IDLE,
        outer={"model.embed_tokens.": "backbone.embedding.", "model.norm.": "backbone.norm_f."},
        inner={
            "M": {"input_layernorm.": "norm.", "mamba.": "mixer."},
            "*": {"input_layernorm.": "norm.", "self_attn.": "mixer."},
            "-": {"post_attention_layernorm.": "norm.", "shared_mlp.": "mixer.mlp."},
            "E": {
                "post_attention_layernorm.": "norm.",
                "shared_mlp.": "mixer.mlp.shared.",
                "block_sparse_moe.router.layer.": "mixer.mlp.router.",
                "block_sparse_moe.": "mixer.mlp.experts.",
            },
        },
        split=_split,
        fuse=_fuse,
    )
)
