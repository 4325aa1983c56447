"""Granite 4.0-H in a GGUF file, and Bamba, whose files have the same architecture.

The rows of queries and keys stand in the order in which llama.cpp rotates them, also where nothing rotates.
Bamba rotates half of each head, but the order in its files is that of whole heads, which llama.cpp rotates
wrongly: they are read, and not written.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from longscan.checkpoints.gguf.base import Architecture, Slot, read_count, read_flag, read_number
from longscan.checkpoints.gguf.hybrid import (
    ACTIVE,
    D_FF,
    D_SHARED,
    EXPERTS,
    KV_HEADS,
    THETA,
    blocks,
    interleaved,
    locate,
    read_counts,
    read_experts,
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

__all__ = ["GRANITE"]

NAME = "granitehybrid"
# our field -> its key; a file without one, or with 0, has no such factor
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_divisor": "logit_scale",
    "attention_multiplier": "attention.scale",
}
ROTATES, ROTARY = "rope.scaling.finetuned", "rope.dimension_count"


def _read(header: Header) -> HybridConfig:
    """Return the Config of a file."""
    sizes, stated = read_sizes(header, NAME), header.metadata
    experts = bool(stated.get(f"{NAME}.{EXPERTS}"))
    kv_heads = read_counts(header, f"{NAME}.{KV_HEADS}", read_count(header, f"{NAME}.block_count"))
    scales = {field: f"{NAME}.{key}" for field, key in SCALES.items() if stated.get(f"{NAME}.{key}")}
    return HybridConfig.from_dict(
        {
            **sizes,
            **read_mamba2(header, NAME),
            **(
                read_experts(header, NAME, D_FF)
                if experts
                else {"d_ff": read_count(header, f"{NAME}.{D_FF}")}
            ),
            **{field: read_number(header, key, most=1e6) for field, key in scales.items()},
            **_rotation(header, sizes),
            "pattern": "".join(("*" if heads else "M") + ("E" if experts else "-") for heads in kv_heads),
        }
    )


def _rotation(header: Header, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return how attention rotates; only that of a Bamba does so in a part of each head."""
    if not read_flag(header, f"{NAME}.{ROTATES}", missing=True):
        return {"family": "granitemoehybrid"}
    d_head = sizes.get("d_head") or sizes["d_model"] // sizes["n_heads"]
    width = read_count(header, f"{NAME}.{ROTARY}") if f"{NAME}.{ROTARY}" in header.metadata else d_head
    theta = f"{NAME}.{THETA}"
    return {
        "family": "granitemoehybrid" if width == d_head else "bamba",
        "rope_theta": read_number(header, theta, most=1e20) if theta in header.metadata else 1e4,
        "rotary_fraction": width / d_head,
    }


def _write(config: HybridConfig) -> dict[str, Any]:
    """Return a Config as metadata."""
    if config.family == "bamba":
        raise LongscanError("llama.cpp rotates other channels than a Bamba does. Use a directory.")
    free = ("n_experts", "n_active_experts", "d_expert", "d_shared_expert", "rope_theta")
    refuse_other(config, (*SCALES, *free, "attention_bias", "feed_forward_bias"))
    mixers, second = blocks(config, "M*")
    if len(set(second)) > 1:
        raise LongscanError(
            "llama.cpp computes only Granites with feed-forward layers or experts, this one has both: "
            f"{config.pattern}. Use a directory."
        )
    if "M" not in mixers or config.channels != 2 * config.d_model:
        raise LongscanError(
            f"llama.cpp computes only Granites with Mamba-2 layers of {2 * config.d_model} channels, this "
            f"one has {config.channels if 'M' in mixers else 'none'}. Use a directory."
        )
    kv_heads = 0 if config.n_heads is None else config.n_kv_heads or config.n_heads
    scales = {key: getattr(config, field) for field, key in SCALES.items()}
    experts = {
        D_FF: config.d_expert,
        EXPERTS: config.n_experts,
        ACTIVE: config.n_active_experts,
        D_SHARED: config.d_shared_expert,
    }
    return {
        **write_sizes(config, len(mixers)),
        **write_mamba2(config),
        **(experts if "E" in second else {D_FF: config.d_ff}),
        **{key: value for key, value in scales.items() if value is not None},
        KV_HEADS: [kv_heads if letter == "*" else 0 for letter in mixers],
        ROTATES: config.rope_theta is not None,
        **({} if config.rope_theta is None else {THETA: config.rope_theta}),
    }


def _locate(name: str, ours: Shape, config: HybridConfig) -> Slot:
    """Return where a parameter stands."""
    slot = locate(name, ours, config)
    for part, n_heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads or config.n_heads)):
        if f".{part}." in name and n_heads:
            return slot._replace(rows=partial(interleaved, ours[0], n_heads))
    return slot


GRANITE = Architecture(
    NAME,
    "hybrid",
    9,  # of attention and a feed-forward layer
    _read,
    _write,
    _locate,
    takes=lambda config: config.family in ("granitemoehybrid", "bamba"),
)
