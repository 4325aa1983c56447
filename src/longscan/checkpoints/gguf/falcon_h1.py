"""Falcon-H1 in a GGUF file.

llama.cpp has no multipliers: they are in the weights, and those of a model that is read are 1. Matrices that
differ by a factor are not tied, so that a file written here has an output matrix wherever the multipliers of
embedding and head differ. Files of others leave it out, and llama.cpp's logits are then off by that factor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.gguf.base import Architecture, Slot, read_count, read_number, with_conv_bias
from longscan.checkpoints.gguf.hybrid import (
    D_FF,
    KV_HEADS,
    THETA,
    blocks,
    locate,
    read_mamba2,
    read_sizes,
    refuse_other,
    write_mamba2,
    write_sizes,
)
from longscan.checkpoints.gguf.parser import Header
from longscan.checkpoints.gguf.tensors import Shape
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["FALCON_H1"]

NAME = "falcon-h1"
MULTIPLIERS = (
    *("embedding_multiplier", "logits_multiplier", "logits_divisor", "key_multiplier", "ssm_multipliers"),
    *("attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
    *("gate_multiplier", "down_multiplier"),
)


def _read(header: Header) -> HybridConfig:
    """Return the Config of a file."""
    sizes = read_sizes(header, NAME)
    if sizes["tie_embeddings"]:
        warnings.warn(
            "the file has no output matrix, and the embedding takes its place: if the model's multipliers of "
            "embedding and head differ, all logits are off by one factor, as in llama.cpp. The most likely "
            "token is the same; for others take the original model.",
            stacklevel=5,
        )
    return HybridConfig.from_dict(
        {
            **sizes,
            **read_mamba2(header, NAME),
            "family": "falcon_h1",
            "pattern": "P-" * read_count(header, f"{NAME}.block_count"),
            "d_ff": read_count(header, f"{NAME}.{D_FF}"),
            "rope_theta": read_number(header, f"{NAME}.{THETA}", most=1e20),
        }
    )


def _write(config: HybridConfig) -> dict[str, Any]:
    """Return a Config as metadata."""
    refuse_other(config, (*MULTIPLIERS, "rope_theta", "gated_norm", "feed_forward_bias"))
    mixers, second = blocks(config, "P")
    if "E" in second or config.gated_norm == "norm-first" or config.rope_theta is None:
        got = f"pattern {config.pattern}, gated_norm {config.gated_norm}, rope_theta {config.rope_theta}"
        raise LongscanError(
            "llama.cpp computes only a Falcon-H1 with RoPE and feed-forward layers, whose norm, if any, "
            f"comes after the gate; this one has {got}. Use a directory."
        )
    return {
        **write_sizes(config, len(mixers)),
        **write_mamba2(config),
        D_FF: config.d_ff,
        KV_HEADS: config.n_kv_heads or config.n_heads,
        THETA: config.rope_theta,
    }


def _of_in_proj(config: HybridConfig) -> Tensor:
    """Return the factor of each row of in_proj, as a column."""
    factors = torch.tensor(config.ssm_multipliers, dtype=torch.float64) * config.ssm_in_multiplier
    widths = (config.channels, *config.mamba2.widths, config.mamba2.n_heads)
    return factors.repeat_interleave(torch.tensor(widths))[:, None]


def _factor(name: str, config: HybridConfig) -> Callable[[], Tensor] | float:
    """Return the factor of a parameter in the file."""
    module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if module == "in_proj":
        same = set(config.ssm_multipliers) == {1.0}
        return config.ssm_in_multiplier if same else partial(_of_in_proj, config)
    inward = config.attention_in_multiplier
    return {
        "embedding": config.embedding_multiplier,
        "lm_head": config.logits_multiplier / config.logits_divisor,
        "q_proj": inward,
        "k_proj": inward * config.key_multiplier,
        "v_proj": inward,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "gate_proj": config.gate_multiplier,
        "down_proj": config.down_multiplier,
    }.get(module, 1.0)


def _locate(name: str, ours: Shape, config: HybridConfig) -> Slot:
    """Return where a parameter stands."""
    return locate(name, ours, config)._replace(factor=_factor(name, config))


def _written(config: HybridConfig) -> HybridConfig:
    """Return the Config whose parameters all stand in a file: tied matrices of other factors are two."""
    same = config.embedding_multiplier == config.logits_multiplier / config.logits_divisor
    whole: HybridConfig = with_conv_bias(config)
    return whole.replace(tie_embeddings=config.tie_embeddings and same)


FALCON_H1 = Architecture(
    NAME,
    "hybrid",
    14,  # of a mixer without norm and a feed-forward layer
    _read,
    _write,
    _locate,
    takes=lambda config: config.family == "falcon_h1",
    written=_written,
)
