"""Nemotron-H in GGUF files, of which those with experts have an architecture of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

from longscan.checkpoints.gguf.base import EPSILON, Architecture, read_count, read_flag, read_number
from longscan.checkpoints.gguf.hybrid import (
    ACTIVE,
    D_FF,
    D_SHARED,
    EXPERTS,
    KV_HEADS,
    locate,
    one_of,
    read_counts,
    read_experts,
    read_mamba2,
    read_sizes,
    refuse_other,
    write_mamba2,
    write_sizes,
)
from longscan.checkpoints.gguf.parser import Header
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["NEMOTRON_H", "NEMOTRON_H_MOE"]

D_EXPERT, LATENT, GROUPS = "expert_feed_forward_length", "moe_latent_size", "expert_group_count"
NORMALIZE, SCALE = "expert_weights_norm", "expert_weights_scale"
FREE = ("feed_forward", "attention_bias", "feed_forward_bias")
OF_EXPERTS = (
    *("n_experts", "n_active_experts", "d_expert", "d_shared_expert", "d_latent", "router"),
    *("normalize_experts", "experts_multiplier"),
)
OLD_EPSILON = "attention.layer_norm_epsilon"  # which llama.cpp wants, and uses where the other one is missing


def _read(name: str, header: Header) -> HybridConfig:
    """Return the Config of a file."""
    n_blocks, experts = read_count(header, f"{name}.block_count"), name == NEMOTRON_H_MOE.name
    widths = read_counts(header, f"{name}.{D_FF}", n_blocks)
    heads = read_counts(header, f"{name}.{KV_HEADS}", n_blocks)
    second = "E" if experts else "-"
    d_ff = one_of(widths, f"{name}.{D_FF}")
    return HybridConfig.from_dict(
        {
            **read_sizes(header, name, EPSILON if f"{name}.{EPSILON}" in header.metadata else OLD_EPSILON),
            **read_mamba2(header, name),
            **(_experts(name, header) if experts else {"d_ff": d_ff}),
            "family": "nemotron_h",
            "feed_forward": "relu2",
            "pattern": "".join(
                second if width else "*" if n else "M" for width, n in zip(widths, heads, strict=True)
            ),
        }
    )


def _experts(name: str, header: Header) -> dict[str, Any]:
    """Return the fields of the experts."""
    if header.metadata.get(f"{name}.{GROUPS}", 1) not in (0, 1):
        raise LongscanError(
            f"{name}.{GROUPS}: expected 1, more groups of experts are not read from a GGUF file."
        )
    latent, scale = f"{name}.{LATENT}", f"{name}.{SCALE}"
    return {
        **read_experts(header, name, D_EXPERT),
        "router": "sigmoid",
        "d_latent": read_count(header, latent) if header.metadata.get(latent) else 0,
        "normalize_experts": read_flag(header, f"{name}.{NORMALIZE}"),
        "experts_multiplier": read_number(header, scale, most=1e6) if header.metadata.get(scale) else 1.0,
    }


def _write(name: str, config: HybridConfig) -> dict[str, Any]:
    """Return a Config as metadata."""
    experts = name == NEMOTRON_H_MOE.name
    refuse_other(config, (*FREE, *OF_EXPERTS) if experts else FREE)
    second = "E" if experts else "-"
    other = set(config.pattern) - set("M*" + second)
    odd = config.feed_forward != "relu2" or (
        experts and not (config.router == "sigmoid" and config.d_shared_expert)
    )
    if other or odd:
        raise LongscanError(
            "llama.cpp computes only Nemotron-H models of layers M, * and either - or E, with squared ReLUs "
            "and, with experts, a sigmoid router and a shared expert; this one has pattern "
            f"{config.pattern}, feed_forward {config.feed_forward}, router {config.router}. Use a directory."
        )
    kv_heads = 0 if config.n_heads is None else config.n_kv_heads or config.n_heads
    width = config.d_expert if experts else config.d_ff
    of_experts = {
        D_EXPERT: config.d_expert,
        EXPERTS: config.n_experts,
        ACTIVE: config.n_active_experts,
        D_SHARED: config.d_shared_expert,
        "expert_shared_count": 1,
        GROUPS: 1,
        NORMALIZE: config.normalize_experts,
        SCALE: config.experts_multiplier,
        **({LATENT: config.d_latent} if config.d_latent else {}),
    }
    return {
        **write_sizes(config, config.n_layers),
        **write_mamba2(config),
        **(of_experts if experts else {}),
        OLD_EPSILON: config.norm_eps,
        KV_HEADS: [kv_heads if letter == "*" else 0 for letter in config.pattern],
        D_FF: [width if letter == second else 0 for letter in config.pattern],
    }


def _of(name: str, experts: bool) -> Architecture:
    """Return an architecture."""
    return Architecture(
        name,
        "hybrid",
        3,  # of a feed-forward layer
        partial(_read, name),
        partial(_write, name),
        locate,
        takes=lambda config: config.family == "nemotron_h" and ("E" in config.pattern) == experts,
    )


NEMOTRON_H, NEMOTRON_H_MOE = _of("nemotron_h", False), _of("nemotron_h_moe", True)
