"""Mamba-2 as transformers' Mamba2ForCausalLM has it, and as its authors published it.

transformers has no d_ssm, no other order of gate and norm, and no D per channel: a model with one of them is
saved in longscan's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from longscan.checkpoints.formats.mamba import ours, theirs
from longscan.checkpoints.formats.official import FIELDS, official
from longscan.checkpoints.formats.own import KEY, own
from longscan.errors import LongscanError
from longscan.models import Mamba2Config

__all__ = ["FORMAT", "OFFICIAL"]

LARGEST = 3.4028234663852886e38  # of float32

# their name -> ours
HUGGINGFACE = {
    "vocab_size": "vocab_size",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "state_size": "d_state",
    "head_dim": "d_head",
    "n_groups": "n_groups",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
    "time_step_limit": "dt_limit",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "A_init_range": "A_init_range",  # ours; transformers ignores it
}
# sizes that transformers takes from Codestral where they are missing, and nobody else means
NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "head_dim", "n_groups", "expand")
MISSING: dict[str, Any] = {"tie_word_embeddings": False}  # for which we take another value
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rms_norm": (True,),
    "is_encoder_decoder": (False,),
}
# our fields that transformers does not have -> the values that it means
PLAIN: dict[str, Any] = {"d_ssm": None, "gated_norm": "gate-first", "D_per_channel": False}

# the authors' fields of ssm_cfg -> ours
SSM_CFG = {
    "d_state": "d_state",
    "headdim": "d_head",
    "ngroups": "n_groups",
    "d_conv": "d_conv",
    "expand": "expand",
    "d_ssm": "d_ssm",
    "D_has_hdim": "D_per_channel",
    "A_init_range": "A_init_range",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "dt_limit": "dt_limit",
    "conv_bias": "conv_bias",
    "bias": "bias",
}
# how kernels divide the work, and an initialisation
IDLE_SSM_CFG = ("chunk_size", "use_mem_eff_path", "process_group", "sequence_parallel", "conv_init")


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> Mamba2Config:
    """Return the Config of a Mamba2ForCausalLM."""
    if KEY in raw:
        config = own("mamba2").read(raw, tokenizer_size)
        assert isinstance(config, Mamba2Config)
        return config
    twins = ("num_heads", "intermediate_size")
    idle = IDLE.union(twins, [QUANTIZATION, "chunk_size", "time_step_rank"])
    check_fields(raw, HUGGINGFACE, ONLY, idle)
    if absent := [name for name in NEEDED if name not in raw]:
        raise LongscanError(f"needs {', '.join(absent)}: add {'it' if len(absent) == 1 else 'them'}.")
    known = {**MISSING, **raw}
    fields = {name: known[name] for name in HUGGINGFACE if name in known}
    config = build(
        Mamba2Config, {**fields, "time_step_limit": _limit(fields.get("time_step_limit"))}, HUGGINGFACE
    )
    check_twins(raw, dict(zip(twins, (config.layer.n_heads, config.d_inner), strict=True)))
    multiple = config.pad_vocab_size_multiple
    return config.replace(**unpadded(raw, config.vocab_size, multiple, tokenizer_size))


def _write(config: Mamba2Config) -> dict[str, Any]:
    """Return config.json as transformers' Mamba2Config reads it."""
    if any(getattr(config.replace(d_ssm=_usual(config)), name) != plain for name, plain in PLAIN.items()):
        return own("mamba2").write(config)
    fields = {theirs: getattr(config, ours) for theirs, ours in HUGGINGFACE.items()}
    if config.dt_limit is None:
        del fields["time_step_limit"]
    else:
        fields["time_step_limit"] = _stated(config.dt_limit)
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **fields,
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "num_heads": config.layer.n_heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rescale_prenorm_residual": False,
        "use_cache": True,
    }


def _usual(config: Mamba2Config) -> int | None:
    """Return d_ssm, None where it is the default."""
    return None if config.channels == config.d_inner else config.d_ssm


def _limit(stated: Any) -> Any:
    """Return the limit of dt as our Config has it: None for no largest one, and for none at all.

    JSON has no infinity, which transformers 5 writes as {"__float__": "Infinity"}.
    """
    if not isinstance(stated, list | tuple) or len(stated) != 2:
        return stated
    low, high = stated
    unlimited = high == {"__float__": "Infinity"} or (isinstance(high, float) and high >= LARGEST)
    return (None if low == 0 else (low, None)) if unlimited else (low, high)


def _stated(limit: tuple[float, float | None]) -> list[float]:
    """Return a limit of dt as files have it, with two numbers."""
    return [limit[0], LARGEST if limit[1] is None else limit[1]]


def _ours(name: str) -> str | None:
    """Return our name of a tensor; Mistral's own files have a prefix."""
    return ours(name.removeprefix("model."))


FORMAT = Format(read=_read, write=_write, ours=_ours, theirs=theirs, copy=TIED_HEAD)


def _from_authors(raw: Mapping[str, Any]) -> Mamba2Config:
    """Return the Config of the authors' fields, those of ssm_cfg among them."""
    gate = {
        (True, False): "gate-first",
        (True, True): "norm-first",
        (False, False): "none",
        (False, True): "none",
    }
    order = (raw.get("rmsnorm", True), raw.get("norm_before_gate", False))
    if order not in gate:
        raise LongscanError(
            f"rmsnorm, norm_before_gate: expected true or false, got {order[0]!r} and {order[1]!r}."
        )
    names = {**FIELDS, **SSM_CFG, "gated_norm": "gated_norm"}
    fields = {name: raw[name] for name in names if name in raw}
    return build(
        Mamba2Config, {**fields, "gated_norm": gate[order], "dt_limit": _limit(raw.get("dt_limit"))}, names
    )


def _to_authors(config: Mamba2Config) -> dict[str, Any]:
    """Return ssm_cfg."""
    usual = Mamba2Config(d_model=config.d_head, n_layers=1, vocab_size=1, d_head=config.d_head)
    fields = {
        theirs: getattr(config, ours)
        for theirs, ours in SSM_CFG.items()
        if ours == "d_head" or getattr(config, ours) != getattr(usual, ours)
    }
    if config.dt_limit is not None:
        fields["dt_limit"] = _stated(config.dt_limit)
    norm = {"none": {"rmsnorm": False}, "norm-first": {"norm_before_gate": True}, "gate-first": {}}
    return {**fields, **norm[config.gated_norm]}


OFFICIAL = official(
    "Mamba2", _from_authors, _to_authors, (*SSM_CFG, "rmsnorm", "norm_before_gate"), IDLE_SSM_CFG
)
