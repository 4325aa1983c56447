"""config.json in two dialects, Hugging Face and official: what the fields mean, and which change the maths.

A field that is not in these tables is an error, because nobody knows what it would have changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from longscan.config import nearest
from longscan.errors import LongscanError
from longscan.models import MambaConfig
from longscan.models.quantized import KINDS
from longscan.ops import Kind

__all__ = ["read_config", "read_format", "to_huggingface", "to_official"]

QUANTIZATION, METHOD = "quantization_config", "longscan"  # the key and value by which others know it
VERSION = 1  # of the layout of quantised weights

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

# fields that say how to run, to start afresh or to finish a text, and leave the logits alone
IDLE = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path add_cross_attention architectures attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    fused_add_norm id2label initializer_range is_decoder label2id layer_types length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty rescale_prenorm_residual return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unpadded_vocab_size
    use_associative_scan use_bfloat16 use_cache use_mambapy
    """.split()
)


def read_config(raw: Mapping[str, Any], tokenizer_size: int | None = None) -> tuple[str, MambaConfig]:
    """Understand a config.json.

    Args:
        raw: its content, of either dialect.
        tokenizer_size: ids of the tokenizer beside it. Hugging Face files give the padded vocabulary only;
            how much of it is real the tokenizer tells, unless the file was written by us and says so.

    Returns:
        The model's name in MODELS and its Config.

    Raises:
        LongscanError: a field is missing, unknown, out of range, or means another model.
    """
    if "model_type" in raw:
        if raw["model_type"] != "mamba":
            raise LongscanError(
                f"model_type: expected 'mamba', got {raw['model_type']!r}: that is another model."
            )
        return "mamba", _from_huggingface(raw, tokenizer_size)
    if "d_model" in raw:
        return "mamba", _from_official(raw)
    raise LongscanError(
        "neither a Hugging Face configuration (no model_type) nor an official Mamba one (no d_model)."
    )


def read_format(raw: Mapping[str, Any]) -> Kind | None:
    """Understand what a config.json says about quantised weights.

    Args:
        raw: its content.

    Returns:
        The format, the narrowest that a matrix of the file has; None if it says nothing.

    Raises:
        LongscanError: the weights were quantised by others, or in a way that is not known here.
    """
    if QUANTIZATION not in raw:
        return None
    found = raw[QUANTIZATION]
    if not isinstance(found, dict):
        raise LongscanError(f"{QUANTIZATION}: expected an object {{...}}, got {found!r}.")
    if found.get("quant_method") != METHOD:
        raise LongscanError(
            f"{QUANTIZATION}: expected the quant_method {METHOD!r}, got {found.get('quant_method')!r}: these "
            "weights were quantised by another program. Take the original model, then `longscan quantize` it."
        )
    if found.get("version") != VERSION:
        raise LongscanError(
            f"{QUANTIZATION}: expected version {VERSION}, got {found.get('version')!r}: these weights were "
            "written by another longscan. Update it, or quantise the original model again."
        )
    if unknown := [name for name in found if name not in ("quant_method", "format", "version")]:
        raise LongscanError(f"{QUANTIZATION}: unknown field {', '.join(map(repr, unknown))}.")
    for kind in KINDS:
        if kind == found.get("format"):
            return kind
    choices = ", ".join(map(repr, KINDS))
    raise LongscanError(f"{QUANTIZATION}: expected a format among {choices}, got {found.get('format')!r}.")


def to_huggingface(config: MambaConfig, dtype: str, kind: Kind | None = None) -> dict[str, Any]:
    """Write a configuration as transformers' MambaConfig reads it.

    Args:
        config: the model's.
        dtype: of most weights, such as "float32". With "int8" and "uint8" transformers refuses the weights;
            an unknown quant_method alone it would skip with a warning.
        kind: the format of the matrices, if they are quantised.

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
        "dtype": dtype,
        **({QUANTIZATION: {"quant_method": METHOD, "format": kind, "version": VERSION}} if kind else {}),
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


def _from_huggingface(raw: Mapping[str, Any], tokenizer_size: int | None) -> MambaConfig:
    """Read the dialect of transformers, whose vocab_size is the padded one."""
    twins = ("d_model", "n_layer", "d_inner", "intermediate_size", "tie_embeddings")
    _check_fields(raw, HUGGINGFACE, ONLY_HUGGINGFACE, IDLE.union(twins, [QUANTIZATION]))
    config = _build({name: raw[name] for name in HUGGINGFACE if name in raw}, HUGGINGFACE)
    values = (config.d_model, config.n_layers, config.d_inner, config.d_inner, config.tie_embeddings)
    for name, value in zip(twins, values, strict=True):  # the same thing under the names of other dialects
        if raw.get(name, value) != value:
            raise LongscanError(f"{name}: expected {value}, as the other fields say, got {raw[name]!r}.")
    padded = config.vocab_size
    size = raw.get("unpadded_vocab_size", min(tokenizer_size or padded, padded))
    if type(size) is not int or not 1 <= size <= padded:
        raise LongscanError(f"unpadded_vocab_size: expected 1 to vocab_size = {padded}, got {size!r}.")
    multiples = (config.pad_vocab_size_multiple, 1, padded)  # the last one always fits
    multiple = next(multiple for multiple in multiples if -(-size // multiple) * multiple == padded)
    return _usual_rank(config.replace(vocab_size=size, pad_vocab_size_multiple=multiple))


def _from_official(raw: Mapping[str, Any]) -> MambaConfig:
    """Read the dialect of the official package, which keeps the mixer's fields in ssm_cfg."""
    _check_fields(raw, OFFICIAL, ONLY, {"ssm_cfg", "fused_add_norm"})
    ssm_cfg = raw.get("ssm_cfg", {})
    if not isinstance(ssm_cfg, dict):
        raise LongscanError(f"ssm_cfg: expected an object {{...}}, got {ssm_cfg!r}.")
    _check_fields(ssm_cfg, SSM_CFG, {"layer": ("Mamba1",)}, {"use_fast_path"})
    names = {**OFFICIAL, **SSM_CFG}
    return _usual_rank(
        _build({name: value for name, value in {**raw, **ssm_cfg}.items() if name in names}, names)
    )


def _check_fields(
    raw: Mapping[str, Any], known: Collection[str], only: Mapping[str, tuple[Any, ...]], idle: Collection[str]
) -> None:
    """Refuse what would make another model."""
    unknown = [name for name in raw if name not in known and name not in only and name not in idle]
    if unknown:
        hint = nearest(unknown[0], [*known, *only])
        hint = hint if len(unknown) == 1 and "did you mean" in hint else "."
        raise LongscanError(
            f"unknown field {', '.join(map(repr, unknown))}{hint}\n"
            "It may change what the model computes, so it is not ignored; if it does not, remove it."
        )
    for name, values in only.items():
        if name in raw and raw[name] not in values:
            raise LongscanError(f"{name}: expected {values[0]!r}, got {raw[name]!r}: that is another model.")


def _build(raw: Mapping[str, Any], names: Mapping[str, str]) -> MambaConfig:
    """Make our Config of their fields; what is wrong is told with their names, which the user's file has."""
    fields = {names[name]: None if value == "auto" else value for name, value in raw.items()}
    try:
        return MambaConfig.from_dict(fields)
    except LongscanError as error:
        theirs = {ours: name for name, ours in names.items()}
        ours = "|".join(theirs)
        text = re.sub(rf"(?:MambaConfig\.)?\b({ours})\b", lambda match: theirs[match[1]], str(error))
        raise LongscanError(text) from error


def _usual_rank(config: MambaConfig) -> MambaConfig:
    """Write the usual rank as None, so that a configuration is equal to itself after a round trip."""
    usual = config.replace(dt_rank=None)
    return usual if usual.rank == config.rank else config
