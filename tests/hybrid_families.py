"""Tiny models of the published families of hybrids, as transformers builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FALCON = {
    **{"vocab_size": 37, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3},
    **{"num_attention_heads": 10, "num_key_value_heads": 2, "mamba_d_ssm": 24, "mamba_n_heads": 6},
    **{"mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 8},
    **{"embedding_multiplier": 1.7, "lm_head_multiplier": 0.6, "key_multiplier": 0.7},
    **{"attention_in_multiplier": 1.3, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2},
    **{"ssm_out_multiplier": 0.9, "mlp_multipliers": [0.85, 1.4]},
    **{"ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "rope_parameters": {"rope_theta": 50.0}},
}
GRANITE = {
    **{"vocab_size": 37, "hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 3},
    **{"num_attention_heads": 5, "num_key_value_heads": 1, "shared_intermediate_size": 28},
    **{"mamba_n_heads": 10, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 5},
    **{"mamba_chunk_size": 8, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
    **{"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.6},
    **{"attention_multiplier": 0.4, "num_experts_per_tok": 0},
}
BAMBA = {
    **{"vocab_size": 37, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3},
    **{"num_attention_heads": 3, "num_key_value_heads": 1, "attn_layer_indices": [1]},
    **{"mamba_n_heads": 12, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 5},
    **{"mamba_chunk_size": 8, "rope_parameters": {"rope_theta": 50.0}},
}
NEMOTRON = {
    **{"vocab_size": 37, "hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 3},
    **{"num_key_value_heads": 1, "head_dim": 6, "mamba_num_heads": 10, "mamba_head_dim": 3},
    **{"n_groups": 2, "ssm_state_size": 5, "chunk_size": 8, "time_step_min": 1e-9},
    "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
}
EXPERTS = {
    **NEMOTRON,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    **{"moe_shared_expert_intermediate_size": 14, "routed_scaling_factor": 2.5},
}
JAMBA = {
    **{"vocab_size": 37, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 4},
    **{"num_attention_heads": 5, "num_key_value_heads": 1, "mamba_d_state": 5, "mamba_dt_rank": 3},
    **{"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"num_experts": 6, "num_experts_per_tok": 2},
}
ZAMBA = {
    **{"vocab_size": 37, "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4},
    **{"mamba_d_state": 5, "mamba_ngroups": 2, "n_mamba_heads": 6, "chunk_size": 8, "adapter_rank": 3},
    **{"layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    **{"num_hidden_layers": 5, "time_step_min": 1e-9, "rope_parameters": {"rope_theta": 50.0}},
}

#: a name of each variant -> the class in transformers, the fields of its configuration
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": ("FalconH1", {**FALCON, "mamba_rms_norm": False}),
    "falcon_h1 norm first": (
        "FalconH1",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "attention_bias": True},
    ),
    "falcon_h1 gate first": (
        "FalconH1",
        {
            **{**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "head_dim": 6},
            **{"mamba_proj_bias": True, "projectors_bias": True, "mlp_bias": True},
            **{"tie_word_embeddings": True, "mamba_conv_bias": False},
        },
    ),
    "granite": ("GraniteMoeHybrid", GRANITE),
    "granite rope tied": (
        "GraniteMoeHybrid",
        {
            **{**GRANITE, "position_embedding_type": "rope", "tie_word_embeddings": True},
            **{"mamba_proj_bias": True, "attention_bias": True},
        },
    ),
    "granite attention": ("GraniteMoeHybrid", {**GRANITE, "layer_types": ["attention"] * 3}),
    "granite experts": (
        "GraniteMoeHybrid",
        {**GRANITE, "num_local_experts": 7, "num_experts_per_tok": 3},
    ),
    "bamba": ("Bamba", BAMBA),
    "bamba tied": (
        "Bamba",
        {
            **{**BAMBA, "tie_word_embeddings": True, "mamba_proj_bias": True, "mlp_bias": True},
            **{"attention_bias": True, "num_key_value_heads": 3, "mamba_conv_bias": False},
        },
    ),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "nemotron_h biases": (
        "NemotronH",
        {**NEMOTRON, "use_bias": True, "mlp_bias": True, "use_conv_bias": False},
    ),
    "nemotron_h experts": ("NemotronH", EXPERTS),
    "nemotron_h latent": (
        "NemotronH",
        {
            **{**EXPERTS, "n_group": 4, "topk_group": 2, "moe_latent_size": 6},
            **{"norm_topk_prob": False, "residual_in_fp32": True},
        },
    ),
    "jamba": ("Jamba", JAMBA),
    "jamba dense": ("Jamba", {**JAMBA, "num_experts": 1, "mamba_dt_rank": "auto", "mamba_expand": 3}),
    "jamba tied": (
        "Jamba",
        {
            **{**JAMBA, "tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
            **{"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 9},
        },
    ),
    "zamba2": ("Zamba2", ZAMBA),
    "zamba2 two blocks": (
        "Zamba2",
        {
            **{**ZAMBA, "num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True},
            "add_bias_linear": True,
        },
    ),
}


def build(variant: str, seed: int = 0, **change: Any) -> Any:
    """A model of transformers, every parameter far from its start."""
    import transformers

    name, fields = FAMILIES[variant]
    config = getattr(transformers, f"{name}Config")(**{**fields, **change})
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in key or "mup" in key:
                continue
            spread = 0.2 if parameter.dim() > 1 else 0.4
            centre = 1.0 if "norm" in key or key.endswith(".D") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def draw_ids(seed: int = 1, batch: int = 2, seq_len: int = 29) -> torch.Tensor:
    return torch.randint(0, 37, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def saved(variant: str, directory: Path, seed: int = 0, **change: Any) -> Any:
    """The model of `build`, which is also in a directory."""
    model = build(variant, seed, **change)
    model.save_pretrained(directory)
    return model
