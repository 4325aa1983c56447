"""Mamba as transformers has it, with or without inner norms; for the authors' own files see `official`.

FalconMambaForCausalLM is a Mamba with inner norms that have no weights. transformers has none whose inner
norms have some, except within a Jamba: such a model has longscan's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from longscan.checkpoints.formats.base import (
    IDLE,
    QUANTIZATION,
    TIED_HEAD,
    Format,
    build,
    check_fields,
    check_twins,
    unpadded,
)
from longscan.checkpoints.formats.own import PREFIX, own
from longscan.errors import LongscanError
from longscan.models import MambaConfig

__all__ = ["FORMAT", "ONLY", "build_mamba", "ours", "theirs", "usual_rank"]

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
# Falcon Mamba's: only there it says what the inner norms add to the mean square
FALCON, FALCON_TYPE = {**HUGGINGFACE, "mixer_rms_eps": "inner_norm_eps"}, "falcon_mamba"
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
    """Return config.json as transformers' classes read it; they ignore what they don't know."""
    if config.inner_norms == "learned":
        return OWN.write(config)
    falcon = config.inner_norms == "plain"
    fields = {theirs: getattr(config, ours) for theirs, ours in (FALCON if falcon else HUGGINGFACE).items()}
    return {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": FALCON_TYPE if falcon else "mamba",
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


def _from_huggingface(raw: Mapping[str, Any], tokenizer_size: int | None) -> MambaConfig:
    """Return the Config of transformers' fields, whose vocab_size is the padded one."""
    if raw.get("model_type") == PREFIX + "mamba":
        return cast(MambaConfig, OWN.read(raw, tokenizer_size))
    falcon = raw.get("model_type") == FALCON_TYPE
    names = FALCON if falcon else HUGGINGFACE
    twins = ("d_model", "n_layer", "d_inner", "intermediate_size", "tie_embeddings")
    idle = IDLE.union(twins, [QUANTIZATION], ["use_falcon_mambapy"] if falcon else [])
    check_fields(raw, names, ONLY_HUGGINGFACE, idle)
    config = build_mamba(raw if not falcon else _with_expand(raw), names).replace(
        inner_norms="plain" if falcon else "none"
    )
    values = (config.d_model, config.n_layers, config.d_inner, config.d_inner, config.tie_embeddings)
    check_twins(raw, dict(zip(twins, values, strict=True)))
    multiple = config.pad_vocab_size_multiple
    return config.replace(**unpadded(raw, config.vocab_size, multiple, tokenizer_size))


def _with_expand(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return fields with the expand that intermediate_size means: published files say 16, to no effect."""
    if "intermediate_size" not in raw or "hidden_size" not in raw:
        return raw
    d_model, d_inner = raw["hidden_size"], raw["intermediate_size"]
    if type(d_inner) is not int or type(d_model) is not int or d_model < 1 or d_inner % d_model:
        raise LongscanError(
            f"intermediate_size: expected a multiple of hidden_size = {d_model!r}, got {d_inner!r}: other "
            "widths are not computed here."
        )
    return {**raw, "expand": d_inner // d_model}


def build_mamba(raw: Mapping[str, Any], names: Mapping[str, str]) -> MambaConfig:
    """Return our Config of their fields.

    Args:
        raw: the fields.
        names: theirs -> ours.

    Raises:
        LongscanError: a value is missing or impossible.
    """
    fields = {name: None if raw[name] == "auto" else raw[name] for name in names if name in raw}
    return usual_rank(build(MambaConfig, fields, names))


def usual_rank(config: MambaConfig) -> MambaConfig:
    """Return a Config with the usual rank as None, so that it is equal to itself after a round trip.

    Args:
        config: any.
    """
    usual = config.replace(dt_rank=None)
    return usual if usual.rank == config.rank else config


def ours(name: str) -> str:
    """Return our name of a tensor, which is the official one; Hugging Face's embedding has another.

    Args:
        name: theirs.
    """
    start = "backbone.embeddings."
    return f"backbone.embedding.{name.removeprefix(start)}" if name.startswith(start) else name


def theirs(name: str) -> str:
    """Return Hugging Face's name of a tensor.

    Args:
        name: ours.
    """
    return name.replace("backbone.embedding.", "backbone.embeddings.")


OWN = own("mamba")
FORMAT = Format(read=_from_huggingface, write=_to_huggingface, ours=ours, theirs=theirs, copy=TIED_HEAD)
