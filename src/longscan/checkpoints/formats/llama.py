"""Llama as transformers' LlamaForCausalLM has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import (
    ELSEWHERE,
    IDLE,
    QUANTIZATION,
    TIED_HEAD,
    Format,
    build,
    check_fields,
    check_twins,
    unpadded,
)
from longscan.errors import LongscanError
from longscan.models import LlamaConfig

__all__ = ["FORMAT"]

# their name -> ours
HUGGINGFACE = {
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_positions",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
}
# what transformers takes a field for that is missing, where we take it for something else
MISSING: dict[str, Any] = {"intermediate_size": 11008, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
# fields with which only one model is meant: name -> the values that mean it
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "is_encoder_decoder": (False,),
}
ROTATION = "rope_parameters"  # where transformers 5 stores rope_theta
SCALING = "rope_scaling"  # where older ones say how positions are stretched

# Hugging Face's beginnings of names -> ours
OUTER = {
    "model.embed_tokens.": "backbone.embedding.",
    "model.norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
}
INNER = {
    "self_attn.": "mixer.",
    "mlp.": "mlp.",
    "input_layernorm.": "norm.",
    "post_attention_layernorm.": "mlp_norm.",
}
LAYERS = ("model.layers.", "backbone.layers.")


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> LlamaConfig:
    """Return the Config of a LlamaForCausalLM."""
    layers = raw.get("layer_types")  # one a layer
    if isinstance(layers, list) and all(layer == "full_attention" for layer in layers):
        raw = {name: value for name, value in raw.items() if name != "layer_types"}
    known_here = [*HUGGINGFACE, ROTATION, SCALING]
    check_fields(raw, known_here, ONLY, IDLE.union([QUANTIZATION, "pretraining_tp"]))
    rotation, _ = _rotation(raw, ROTATION), _rotation(raw, SCALING)
    check_twins(raw, rotation if "rope_theta" in raw else {})
    known = {**MISSING, **rotation, **raw}
    config = build(LlamaConfig, {name: known[name] for name in HUGGINGFACE if name in known}, HUGGINGFACE)
    sizes = unpadded(raw, config.vocab_size, config.pad_vocab_size_multiple, tokenizer_size)
    config = config.replace(**sizes)
    for name in ("n_kv_heads", "d_head", "d_ff"):  # the usual is written as None: equal to itself afterwards
        usual = _replaced(config, name)
        if usual and (usual.kv_heads, usual.head_width, usual.ff_width) == _widths(config):
            config = usual
    return config


def _rotation(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a field says about rotations; all kinds but the plain one stretch the positions."""
    rotation = raw.get(name) or {}
    if not isinstance(rotation, dict):
        raise LongscanError(f"{name}: expected an object {{...}}, got {rotation!r}.")
    for key in ("rope_type", "type"):
        if rotation.get(key, "default") != "default":
            raise LongscanError(f"{name}: {key}: expected 'default', got {rotation[key]!r}: {ELSEWHERE}")
    if extra := [key for key in rotation if key not in ("rope_theta", "rope_type", "type")]:
        plain = {"partial_rotary_factor": (1, None), "factor": (1, None)}
        if other := [key for key in extra if rotation[key] not in plain.get(key, (None,))]:
            raise LongscanError(f"{name}: unknown field {', '.join(map(repr, other))}: {ELSEWHERE}")
    return {key: value for key, value in rotation.items() if key == "rope_theta"}


def _write(config: LlamaConfig) -> dict[str, Any]:
    """Return config.json as transformers' LlamaConfig reads it, before its version 5 and since."""
    kv_heads, d_head, d_ff = _widths(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in HUGGINGFACE.items()},
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "intermediate_size": d_ff,
        ROTATION: {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _widths(config: LlamaConfig) -> tuple[int, int, int]:
    return config.kv_heads, config.head_width, config.ff_width


def _replaced(config: LlamaConfig, name: str) -> LlamaConfig | None:
    """Return a Config with a size left to its default, if there is one for these sizes."""
    try:
        return config.replace(**{name: None})
    except LongscanError:
        return None


def _ours(name: str) -> str | None:
    """Return our name of a tensor; None for the rotary frequencies in old files, which the Config gives."""
    return None if name.endswith(".rotary_emb.inv_freq") else _translate(name, LAYERS, OUTER, INNER)


def _theirs(name: str) -> str:
    """Return Hugging Face's name of a tensor."""
    outer, inner = ({ours: theirs for theirs, ours in table.items()} for table in (OUTER, INNER))
    return _translate(name, LAYERS[::-1], outer, inner)


def _translate(name: str, layers: tuple[str, str], outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """Change the beginning of a name, or what follows the number of its layer."""
    if not name.startswith(layers[0]):
        start = next((start for start in outer if name.startswith(start)), "")
        return outer.get(start, "") + name.removeprefix(start)
    number, _, rest = name.removeprefix(layers[0]).partition(".")
    start = next((start for start in inner if rest.startswith(start)), "")
    return f"{layers[1]}{number}.{inner.get(start, '')}{rest.removeprefix(start)}"


FORMAT = Format(read=_read, write=_write, ours=_ours, theirs=_theirs, copy=TIED_HEAD)
