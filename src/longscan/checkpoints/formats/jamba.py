"""Jamba as transformers' JambaForCausalLM has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longscan.checkpoints.formats.hybrid import Family, layout
from longscan.checkpoints.formats.hybrid_fields import MAX_LAYERS, whole
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["FORMAT"]

FIELDS = {
    "rms_norm_eps": "norm_eps",
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_conv_bias": "conv_bias",
}
MISSING = {
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_dt_rank": "auto",
    "num_experts": 16,
}
ATTENTION, EXPERTS = "attn_layer", "expert_layer"
DERIVED = (
    *("num_hidden_layers", "intermediate_size", "mamba_expand", "mamba_dt_rank", "mamba_proj_bias"),
    *("num_experts", "num_experts_per_tok"),
    *(f"{kind}_{name}" for kind in (ATTENTION, EXPERTS) for name in ("period", "offset")),
)
IDLE = (
    *("num_logits_to_keep", "output_router_logits", "router_aux_loss_coef", "use_mamba_kernels"),
    *("calc_logits_for_entire_prompt", "n_ctx", "mamba_inner_layernorms", "attn_layer_types"),
)


def _derive(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that several of theirs give."""
    n_layers, n_experts = whole(fields, "num_hidden_layers", MAX_LAYERS), whole(fields, "num_experts")
    attends, mixes = (_every(fields, kind, n_layers) for kind in (ATTENTION, EXPERTS))
    pattern = "".join(
        ("*" if attention else "m") + ("E" if mixture and n_experts > 1 else "-")
        for attention, mixture in zip(attends, mixes, strict=True)
    )
    width, rank = whole(fields, "intermediate_size"), fields["mamba_dt_rank"]
    derived = {
        "pattern": pattern,
        "d_ssm": whole(fields, "mamba_expand") * whole(fields, "hidden_size"),
        "dt_rank": None if rank in ("auto", -(-whole(fields, "hidden_size") // 16)) else rank,
        "inner_norms": "learned",
        "ssm_in_bias": fields["mamba_proj_bias"],
        "ssm_out_bias": fields["mamba_proj_bias"],
        "d_ff": width if "-" in pattern else None,
    }
    if "E" not in pattern:
        return derived
    return {
        **derived,
        "router": "softmax-topk",
        "d_expert": width,
        "n_experts": n_experts,
        "n_active_experts": whole(fields, "num_experts_per_tok"),
    }


def _every(fields: Mapping[str, Any], kind: str, n_layers: int) -> list[bool]:
    """Return which layers are of a kind: one in every period, from an offset on."""
    period, offset = whole(fields, f"{kind}_period"), fields[f"{kind}_offset"]
    if type(offset) is not int or not 0 <= offset < period:
        raise LongscanError(f"{kind}_offset: expected 0 to {period - 1}, got {offset!r}.")
    return [number % period == offset for number in range(n_layers)]


def _express(config: HybridConfig) -> dict[str, Any]:
    """Return their fields that several of ours give."""
    rank = -(-config.d_model // 16) if config.dt_rank is None else config.dt_rank
    return {
        "num_hidden_layers": config.n_layers // 2,
        "intermediate_size": config.d_ff or config.d_expert,
        "mamba_expand": config.channels // config.d_model,
        "mamba_dt_rank": rank,
        "mamba_proj_bias": config.ssm_in_bias,
        "num_experts": config.n_experts or 1,
        "num_experts_per_tok": config.n_active_experts or 1,
        **_period(config.pattern[::2], "*", ATTENTION),
        **_period(config.pattern[1::2], "E", EXPERTS),
    }


def _period(letters: str, letter: str, kind: str) -> dict[str, int]:
    """Return period and offset of a letter; those of a pattern that has none are beyond its end."""
    first, n_layers = letters.find(letter), len(letters)
    if first < 0:
        return {f"{kind}_period": n_layers + 1, f"{kind}_offset": n_layers}
    second = letters.find(letter, first + 1)
    period = second - first if second > 0 else n_layers
    return {f"{kind}_period": period, f"{kind}_offset": first % period}


def _split(tensors: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Return tensors with the only expert of a layer, as old files have it, as its feed-forward layer."""
    ours = {}
    for name, tensor in tensors.items():
        layer, only, rest = name.partition(".mixer.mlp.experts.0.")
        number = layer.rpartition(".")[2]
        plain = only and number.isdecimal() and config.pattern[int(number)] == "-"
        ours[f"{layer}.mixer.mlp.{rest}" if plain else name] = tensor
    return ours


FORMAT = layout(
    Family(
        name="jamba",
        architecture="JambaForCausalLM",
        fields=FIELDS,
        missing=MISSING,
        derived=DERIVED,
        derive=_derive,
        express=_express,
        only={"attention_bias": (False,), "sliding_window": (None,)},
        idle=(*IDLE, "use_mambapy", "use_associative_scan"),
        outer={
            "model.embed_tokens.": "backbone.embedding.",
            "model.final_layernorm.": "backbone.norm_f.",
        },
        inner={
            "m": {"input_layernorm.": "norm.", "mamba.": "mixer."},
            "*": {"input_layernorm.": "norm.", "self_attn.": "mixer."},
            "-": {"pre_ff_layernorm.": "norm.", "feed_forward.": "mixer.mlp."},
            "E": {"pre_ff_layernorm.": "norm.", "feed_forward.": "mixer.mlp."},
        },
        split=_split,
    )
)
