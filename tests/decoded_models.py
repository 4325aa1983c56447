"""Small models of every kind that the native decoder knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.models import MODELS, LanguageModel
from longscan.models.common.quantization import quantize_model

SMALL = {"d_model": 64, "n_layers": 2, "vocab_size": 100}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {**SMALL, "d_state": 32, "d_head": 32}),
    "mamba2-odd": (
        "mamba2",
        {
            **{"d_model": 36, "n_layers": 3, "vocab_size": 37, "d_state": 5, "d_head": 6, "n_groups": 3},
            **{"d_conv": 3, "bias": True, "tie_embeddings": False, "conv_bias": False},
        },
    ),
    "mamba2-norm-first": (
        "mamba2",
        {**SMALL, "d_state": 19, "d_head": 16, "gated_norm": "norm-first", "D_per_channel": True},
    ),
    "mamba2-limits": (
        "mamba2",
        {**SMALL, "d_state": 16, "d_head": 64, "gated_norm": "none", "dt_limit": (0.02, 0.3)},
    ),
    "llama": ("llama", {**SMALL, "n_heads": 4, "n_kv_heads": 2}),
    "llama-odd": (
        "llama",
        {
            **{"d_model": 40, "n_layers": 3, "vocab_size": 37, "n_heads": 3, "d_head": 10, "d_ff": 50},
            **{"tie_embeddings": False, "rope_theta": 100.0},
        },
    ),
    "falcon-h1": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "P-P-", "vocab_size": 61, "n_heads": 6, "n_kv_heads": 2},
            **{"d_head": 16, "rope_theta": 1e4, "d_ssm": 72, "d_ssm_head": 12, "d_state": 20, "d_ff": 50},
            **{"gated_norm": "none", "embedding_multiplier": 3.0, "logits_multiplier": 0.3},
            **{"attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7, "key_multiplier": 0.5},
            **{"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8, "gate_multiplier": 0.9},
            **{"ssm_multipliers": (0.5, 1.5, 0.7, 1.2, 0.9), "down_multiplier": 1.1},
        },
    ),
    "granite": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "M-*-M-", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 2},
            **{"d_ssm_head": 32, "d_state": 16, "d_ff": 96, "residual_multiplier": 0.3},
            **{"attention_multiplier": 0.02, "logits_divisor": 3.0, "embedding_multiplier": 12.0},
        },
    ),
    "nemotron": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "-M*MM-", "vocab_size": 61, "n_heads": 4, "feed_forward": "relu2"},
            **{"d_ssm": 96, "d_ssm_head": 16, "n_ssm_groups": 3, "d_state": 16, "d_ff": 100},
            **{"feed_forward_bias": True, "attention_bias": True, "residual_in_fp32": False},
        },
    ),
    "bamba": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "*-M-", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 1},
            **{"rope_theta": 1e3, "rotary_fraction": 0.5, "d_ssm_head": 16, "d_state": 16, "d_ff": 96},
        },
    ),
    "mamba3": ("mamba3", {**SMALL, "d_state": 32, "d_head": 32}),
    "mamba3-odd": (
        "mamba3",
        {
            **{"d_model": 36, "n_layers": 3, "vocab_size": 37, "d_state": 7, "d_head": 6, "n_groups": 3},
            **{"outproj_norm": True, "d_intermediate": 50, "tie_embeddings": False, "norm_eps": 1e-4},
        },
    ),
    "mamba3-softplus": (
        "mamba3",
        {**SMALL, "d_state": 18, "d_head": 16, "rope_fraction": 1.0, "A_activation": "softplus"}
        | {"A_floor": 0.6, "d_intermediate": 64},
    ),
    "mamba3-mimo": ("mamba3", {**SMALL, "d_state": 32, "d_head": 32, "mimo_rank": 4, "n_groups": 2}),
    "mamba3-mimo-odd": (
        "mamba3",
        {**SMALL, "d_state": 11, "d_head": 4, "mimo_rank": 3, "rope_fraction": 1.0, "outproj_norm": True},
    ),
    "mamba3-mimo-two": (
        "mamba3",
        {**SMALL, "d_state": 20, "d_head": 16, "mimo_rank": 2, "d_intermediate": 9},
    ),
    "mamba3-mimo-one": ("mamba3", {**SMALL, "d_state": 20, "d_head": 16, "mimo_rank": 1}),
    "conv-attention": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "M*-*", "vocab_size": 61, "n_heads": 6, "n_kv_heads": 2},
            **{"rope_theta": 1e3, "attention_conv": 3, "d_ssm_head": 16, "d_state": 16, "d_ff": 50},
        },
    ),
    "granite-experts": (
        "hybrid",
        {
            **{"d_model": 64, "pattern": "ME*E", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 2},
            **{"d_ssm_head": 32, "d_state": 16, "residual_multiplier": 0.3, "logits_divisor": 3.0},
            **{"n_experts": 7, "n_active_experts": 3, "d_expert": 50, "d_shared_expert": 33},
        },
    ),
    "nemotron-experts": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "EM*E", "vocab_size": 61, "n_heads": 4, "feed_forward": "relu2"},
            **{"d_ssm_head": 16, "d_state": 16, "n_experts": 8, "n_active_experts": 3, "d_expert": 40},
            **{"router": "sigmoid", "experts_multiplier": 2.5, "d_shared_expert": 64},
        },
    ),
    "nemotron-latent": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "M-ME", "vocab_size": 61, "feed_forward": "relu2", "d_ff": 50},
            **{"d_ssm_head": 16, "d_state": 16, "n_experts": 12, "n_active_experts": 3, "d_expert": 40},
            **{"router": "sigmoid", "normalize_experts": False, "n_expert_groups": 4, "n_active_groups": 2},
            **{"d_latent": 33, "residual_multiplier": 0.7},
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **{"d_model": 48, "pattern": "MZZMZ", "vocab_size": 61, "n_heads": 6, "d_ff": 50, "n_shared": 2},
            **{"adapter_rank": 5, "attention_adapters": True, "rope_theta": 1e3, "d_ssm_head": 16},
            **{"d_state": 16, "n_kv_heads": 3, "bias": True},
        },
    ),
    "zamba2-plain": (
        "zamba2",
        {
            **{"d_model": 64, "pattern": "ZMZ", "vocab_size": 61, "n_heads": 4, "d_ff": 96},
            **{"adapter_rank": 32, "d_ssm_head": 32, "d_state": 16, "tie_embeddings": False},
        },
    ),
    "jamba": (
        "hybrid",
        {
            **{"d_model": 48, "pattern": "mE*E", "vocab_size": 61, "n_heads": 4, "n_kv_heads": 1},
            **{"d_state": 9, "inner_norms": "learned", "n_experts": 6, "n_active_experts": 2},
            **{"d_expert": 72, "router": "softmax-topk", "tie_embeddings": False},
        },
    ),
}


def build(shape: str, precision: str = "float32") -> LanguageModel:
    name, fields = SHAPES[shape]
    entry = MODELS[name]
    model = entry.cls(entry.config.from_dict(fields), torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if parameter.dim() == 1 or name.endswith(("_bias", "mimo_x", "mimo_z", "mimo_o")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    if precision != "float32":
        quantize_model(model, precision)  # type: ignore[arg-type]
    return model


def tokens(model: LanguageModel, *size: int) -> Tensor:
    return torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))


def largest(difference: Tensor, scale: Tensor) -> float:
    return (difference.detach().abs().max() / scale.detach().abs().max()).item()
