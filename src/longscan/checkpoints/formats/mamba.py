"""Mamba's config.json in two dialects, Hugging Face and official."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.fields import (
    IDLE,
    QUANTIZATION,
    Dialect,
    build,
    check_fields,
    check_twins,
    unpadded,
)
from longscan.errors import LongscanError
from longscan.models import MambaConfig

__all__ = ["DIALECT", "read_official", "to_official"]

# their name -> ours
HUGGINGFACE = {
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
    "time_step_rank": "dt_rank",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_init_scheme": "dt_init",
    "time_step_scale": "dt_scale",
    "time_step_floor": "dt_init_floor",
}
OFFICIAL = {
    "d_model": "d_model",
    "n_layer": "n_layers",
    "vocab_size": "vocab_size",
    "residual_in_fp32": "residual_in_fp32",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "tie_embeddings": "tie_embeddings",
}
SSM_CFG = {
    name: name
    for name in (
        *("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"),
        *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    )
}

# fields with which only one model is meant: name -> the values that mean it
ONLY: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "d_intermediate": (0,),
    "attn_layer_idx": ([],),
    "attn_cfg": ({},),
}
ONLY_HUGGINGFACE = {
    **ONLY,
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "ssm_cfg": ({}, {"layer": "Mamba1"}),
}


def _to_huggingface(config: MambaConfig) -> dict[str, Any]:
    """Write a configuration as transformers' MambaConfig reads it.

    Args:
        config: the model's.

    Returns:
        The content of config.json. What transformers does not know, such as unpadded_vocab_size, it keeps.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in HUGGINGFACE.items()}
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **fields,
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "time_step_rank": config.rank,
        "intermediate_size": config.d_inner,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rescale_prenorm_residual": False,  # with True transformers 5 rescales out_proj after loading it
        "use_cache": True,
        "use_mambapy": False,
        "use_associative_scan": True,
    }


def to_official(config: MambaConfig) -> dict[str, Any]:
    """Write a configuration as the official package reads it.

    Args:
        config: the model's.

    Returns:
        The content of config.json; ssm_cfg holds only what is not the default, as in the published files.

    Raises:
        LongscanError: the official package has no field for a value.
    """
    usual = MambaConfig(d_model=config.d_model, n_layers=1, vocab_size=1)
    if config.norm_eps != usual.norm_eps:
        raise LongscanError(
            f"the official layout has no field for norm_eps = {config.norm_eps} (it means {usual.norm_eps}): "
            "use the Hugging Face layout."
        )
    config = _usual_rank(config)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in OFFICIAL.items()},
        "ssm_cfg": {
            name: getattr(config, name) for name in SSM_CFG if getattr(config, name) != getattr(usual, name)
        },
        "rms_norm": True,
        "fused_add_norm": True,
    }


def read_official(raw: Mapping[str, Any]) -> MambaConfig:
    """Read the dialect of the official package, which keeps the mixer's fields in ssm_cfg.

    Args:
        raw: the content of config.json.

    Raises:
        LongscanError: a field is missing, unknown, out of range, or means another model.
    """
    check_fields(raw, OFFICIAL, ONLY, {"ssm_cfg", "fused_add_norm"})
    ssm_cfg = raw.get("ssm_cfg", {})
    if not isinstance(ssm_cfg, dict):
        raise LongscanError(f"ssm_cfg: expected an object {{...}}, got {ssm_cfg!r}.")
    if ssm_cfg.get("layer", "Mamba1") != "Mamba1":
        raise LongscanError(
            f"ssm_cfg: layer: expected 'Mamba1', got {ssm_cfg['layer']!r}: not computed here."
        )
    check_fields(ssm_cfg, SSM_CFG, {"layer": ("Mamba1",)}, {"use_fast_path"})
    return _build({**raw, **ssm_cfg}, {**OFFICIAL, **SSM_CFG})


def _from_huggingface(raw: Mapping[str, Any], tokenizer_size: int | None) -> MambaConfig:
    """Read the dialect of transformers, whose vocab_size is the padded one."""
    twins = ("d_model", "n_layer", "d_inner", "intermediate_size", "tie_embeddings")
    check_fields(raw, HUGGINGFACE, ONLY_HUGGINGFACE, IDLE.union(twins, [QUANTIZATION]))
    config = _build(raw, HUGGINGFACE)
    values = (config.d_model, config.n_layers, config.d_inner, config.d_inner, config.tie_embeddings)
    check_twins(raw, dict(zip(twins, values, strict=True)))
    multiple = config.pad_vocab_size_multiple
    return config.replace(**unpadded(raw, config.vocab_size, multiple, tokenizer_size))


def _build(raw: Mapping[str, Any], names: Mapping[str, str]) -> MambaConfig:
    """Make our Config of their fields."""
    fields = {name: None if raw[name] == "auto" else raw[name] for name in names if name in raw}
    return _usual_rank(build(MambaConfig, fields, names))


def _usual_rank(config: MambaConfig) -> MambaConfig:
    """Write the usual rank as None, so that a configuration is equal to itself after a round trip."""
    usual = config.replace(dt_rank=None)
    return usual if usual.rank == config.rank else config


def _publish(name: str) -> str:
    """Return Hugging Face's name of a tensor."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


DIALECT = Dialect(read=_from_huggingface, write=_to_huggingface, publish=_publish)
