"""Jamba in a GGUF file: Mamba with learned inner norms, now and then attention, experts after some layers."""

from __future__ import annotations

from typing import Any

from longscan.checkpoints.gguf.base import Architecture, read_count
from longscan.checkpoints.gguf.hybrid import (
    ACTIVE,
    D_FF,
    EXPERTS,
    KV_HEADS,
    blocks,
    locate,
    read_counts,
    read_experts,
    read_sizes,
    refuse_other,
    write_sizes,
)
from longscan.checkpoints.gguf.mamba2 import HEADS as RANK  # one key for either
from longscan.checkpoints.gguf.parser import Header
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = ["JAMBA"]

NAME = "jamba"


def _read(header: Header) -> HybridConfig:
    """Return the Config of a file."""
    n_blocks = read_count(header, f"{NAME}.block_count")
    kv_heads = read_counts(header, f"{NAME}.{KV_HEADS}", n_blocks)
    seconds = ["E" if f"blk.{i}.ffn_gate_inp.weight" in header.tensors else "-" for i in range(n_blocks)]
    sizes, rank = read_sizes(header, NAME), read_count(header, f"{NAME}.{RANK}")
    experts = {**read_experts(header, NAME, D_FF), "router": "softmax-topk"} if "E" in seconds else {}
    return HybridConfig.from_dict(
        {
            **sizes,
            **experts,
            **({"d_ff": read_count(header, f"{NAME}.{D_FF}")} if "-" in seconds else {}),
            "family": "jamba",
            "inner_norms": "learned",
            "dt_rank": None if rank == -(-sizes["d_model"] // 16) else rank,
            "pattern": "".join(
                ("*" if n else "m") + second for n, second in zip(kv_heads, seconds, strict=True)
            ),
        }
    )


def _write(config: HybridConfig) -> dict[str, Any]:
    """Return a Config as metadata."""
    free = ("inner_norms", "dt_rank", "n_experts", "n_active_experts", "d_expert", "router")
    refuse_other(config, free)
    mixers, seconds = blocks(config, "m*")
    widths = {config.d_ff if second == "-" else config.d_expert for second in seconds}
    routed = "E" not in seconds or config.router == "softmax-topk"
    if (
        config.inner_norms != "learned"
        or config.channels != 2 * config.d_model
        or len(widths) > 1
        or not routed
    ):
        raise LongscanError(
            f"llama.cpp computes only Jambas of {2 * config.d_model} channels with learned inner norms, one "
            "width of feed-forward layers and experts, and the router softmax-topk; this one has "
            f"{config.channels}, inner_norms {config.inner_norms}, the widths {config.d_ff} and "
            f"{config.d_expert}, the router {config.router}. Use a directory."
        )
    kv_heads = config.n_kv_heads or config.n_heads
    return {
        **write_sizes(config, len(mixers)),
        RANK: config.mamba.rank,
        D_FF: widths.pop(),
        KV_HEADS: [kv_heads if letter == "*" else 0 for letter in mixers],
        **({EXPERTS: config.n_experts, ACTIVE: config.n_active_experts} if "E" in seconds else {}),
    }


JAMBA = Architecture(
    NAME,
    "hybrid",
    9,  # of attention and a feed-forward layer
    _read,
    _write,
    locate,
    takes=lambda config: config.family == "jamba",
)
