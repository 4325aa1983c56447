"""What the hybrids share in GGUF files: the names of tensors by the kind of layer, and most sizes.

Falcon-H1 and Granite have a mixer and a feed-forward layer in each block of a file, which are two of our
layers; a block of Nemotron-H is one of ours.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.formats.base import unpadded
from longscan.checkpoints.gguf.base import CONTEXT, EPSILON, OUTER, Slot, read_count, read_shared
from longscan.checkpoints.gguf.mamba import MIXER as MAMBA
from longscan.checkpoints.gguf.mamba2 import HEADS, INNER_SIZE, mixer_shape
from longscan.checkpoints.gguf.mamba2 import MIXER as MAMBA2
from longscan.checkpoints.gguf.parser import Header, short
from longscan.checkpoints.gguf.tensors import Shape
from longscan.errors import LongscanError
from longscan.models import HybridConfig

__all__ = [
    "ACTIVE",
    "D_FF",
    "D_SHARED",
    "EXPERTS",
    "KV_HEADS",
    "THETA",
    "blocks",
    "interleaved",
    "locate",
    "one_of",
    "read_counts",
    "read_experts",
    "read_mamba2",
    "read_sizes",
    "refuse_other",
    "write_mamba2",
    "write_sizes",
]

# our name in a mixer -> theirs, beside those of Mamba and Mamba-2
INNER_NORMS = {f"{part}_layernorm.weight": f"ssm_{part}_norm.weight" for part in ("dt", "b", "c")}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
FEED_FORWARD = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
OF_EXPERTS = {
    "router.weight": "ffn_gate_inp.weight",
    "router.correction": "exp_probs_b.bias",
    "fc1_latent_proj.weight": "ffn_latent_down.weight",
    "fc2_latent_proj.weight": "ffn_latent_up.weight",
}
SIZES = {
    "d_model": "embedding_length",
    "d_state": "ssm.state_size",
    "d_conv": "ssm.conv_kernel",
    "n_heads": "attention.head_count",
}
D_FF, THETA = "feed_forward_length", "rope.freq_base"
EXPERTS, ACTIVE, D_SHARED = "expert_count", "expert_used_count", "expert_shared_feed_forward_length"
MAX_EXPERTS = 4096
GROUPS = "ssm.group_count"
KV_HEADS, KEY_WIDTH = "attention.head_count_kv", "attention.key_length"


def locate(name: str, ours: Shape, config: HybridConfig) -> Slot:
    """Return where a parameter of a hybrid stands in a file.

    Args:
        name: ours.
        ours: its shape.
        config: of the model.
    """
    if name in OUTER:
        return Slot(OUTER[name], ours)
    number, _, rest = name.removeprefix("backbone.layers.").partition(".")
    letter, paired = config.pattern[int(number)], config.family != "nemotron_h"
    block = f"blk.{int(number) // 2 if paired else number}."
    if rest == "norm.weight":
        if paired and letter in "-E":
            return Slot(block + ("ffn_norm" if config.family == "falcon_h1" else "ffn_norm.weight"), ours)
        return Slot(block + "attn_norm.weight", ours)
    inner = rest.removeprefix("mixer.").removeprefix("mlp.").removeprefix("attention.")
    if letter == "m":
        shape = (ours[0], ours[2]) if inner == "conv1d.weight" else ours
        return Slot(block + {**MAMBA, **INNER_NORMS}[inner], shape)
    recurrent = inner.removeprefix("mamba.")
    if letter == "M" or recurrent != inner:
        shape = mixer_shape(f"mixer.{recurrent}", ours, config.n_ssm_groups)
        return Slot(block + MAMBA2[recurrent], shape)
    if inner in OF_EXPERTS:
        return Slot(block + OF_EXPERTS[inner], ours)
    table = ATTENTION if letter in "*P" else FEED_FORWARD
    module, _, kind = inner.removeprefix("shared.").rpartition(".")
    if inner.startswith("experts."):
        _, expert, module = module.split(".")
        assert config.n_experts is not None
        shape = (config.n_experts, *ours)
        return Slot(f"{block}{table[module]}_exps.{kind}", shape, int(expert), config.n_experts)
    return Slot(f"{block}{table[module]}{'_shexp' if inner.startswith('shared.') else ''}.{kind}", ours)


def interleaved(n_rows: int, n_heads: int) -> Tensor:
    """Return the order of rows in which channels that rotate together are adjacent.

    Args:
        n_rows: of queries or keys.
        n_heads: of them.
    """
    return torch.arange(n_rows).view(n_heads, 2, -1).transpose(1, 2).flatten()


def read_counts(header: Header, key: str, n_layers: int) -> list[int]:
    """Return one number a layer, which a file may state once for all.

    Args:
        header: of the file.
        key: of the metadata.
        n_layers: blocks of the file.

    Raises:
        LongscanError: they are missing or impossible.
    """
    value = header.metadata.get(key)
    if type(value) is int:
        value = array("q", [value] * n_layers)
    if not isinstance(value, array) or value.typecode in "fd" or len(value) != n_layers or min(value) < 0:
        raise LongscanError(f"{key}: expected {n_layers:,} whole numbers, got {short(value)}.")
    return list(value)


def one_of(counts: list[int], key: str) -> int | None:
    """Return the number that all layers have that have one; None if no layer has.

    Args:
        counts: one a layer, 0 for none.
        key: for the error.

    Raises:
        LongscanError: they differ.
    """
    several = {count for count in counts if count}
    if len(several) > 1:
        raise LongscanError(
            f"{key}: expected one number for all layers that have one, got {sorted(several)}."
        )
    return several.pop() if several else None


def _has(header: Header, name: str) -> bool:
    """Return whether a layer has a tensor of this name."""
    return any(each.endswith(f".{name}") for each in header.tensors)


def read_sizes(header: Header, architecture: str, epsilon: str = EPSILON) -> dict[str, Any]:
    """Return our fields that all hybrids have.

    Args:
        header: of the file.
        architecture: its name.
        epsilon: key of that of the norms.

    Raises:
        LongscanError: one is missing or impossible.
    """
    sizes: dict[str, Any] = {name: read_count(header, f"{architecture}.{key}") for name, key in SIZES.items()}
    channels = read_count(header, f"{architecture}.{INNER_SIZE}")
    if f"{architecture}.{KEY_WIDTH}" in header.metadata:
        sizes["d_head"] = read_count(header, f"{architecture}.{KEY_WIDTH}")
        if sizes["d_head"] * sizes["n_heads"] == sizes["d_model"]:
            sizes["d_head"] = None
    shared = read_shared(header, architecture, epsilon)
    return {
        **sizes,
        **unpadded(shared, shared["vocab_size"], 8, None),
        "n_kv_heads": one_of(
            read_counts(
                header, f"{architecture}.{KV_HEADS}", read_count(header, f"{architecture}.block_count")
            ),
            f"{architecture}.{KV_HEADS}",
        ),
        "d_ssm": None if channels == 2 * sizes["d_model"] else channels,
        "norm_eps": shared["layer_norm_epsilon"],
        "tie_embeddings": shared["tie_word_embeddings"],
        "conv_bias": _has(header, "ssm_conv1d.bias"),
        "attention_bias": _has(header, "attn_q.bias"),
        "feed_forward_bias": _has(header, "ffn_up.bias"),
        "max_positions": min(read_count(header, f"{architecture}.context_length"), CONTEXT),
    }


def read_mamba2(header: Header, architecture: str) -> dict[str, Any]:
    """Return our fields of Mamba-2.

    Args:
        header: of the file.
        architecture: its name.

    Raises:
        LongscanError: one is missing or impossible.
    """
    keys = (INNER_SIZE, HEADS, GROUPS)
    channels, heads, groups = (read_count(header, f"{architecture}.{key}") for key in keys)
    if channels % heads:
        raise LongscanError(
            f"{architecture}.{INNER_SIZE}: expected a multiple of {architecture}.{HEADS} = {heads:,}, got "
            f"{channels:,}."
        )
    return {
        "d_ssm_head": channels // heads,
        "n_ssm_groups": groups,
        "gated_norm": "gate-first" if _has(header, "ssm_norm.weight") else "none",
    }


def write_mamba2(config: HybridConfig) -> dict[str, Any]:
    """Return the sizes of Mamba-2, by their keys.

    Args:
        config: of the model.
    """
    return {HEADS: config.channels // config.d_ssm_head, GROUPS: config.n_ssm_groups}


def write_sizes(config: HybridConfig, n_blocks: int) -> dict[str, Any]:
    """Return the sizes that all hybrids have, by their keys.

    Args:
        config: of the model.
        n_blocks: of the file.

    Raises:
        LongscanError: there is no attention.
    """
    if config.n_heads is None:
        raise LongscanError(f"llama.cpp computes no {config.family} without attention. Use a directory.")
    return {
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": n_blocks,
        "vocab_size": config.padded_vocab_size,
        EPSILON: config.norm_eps,
        "ssm.conv_kernel": config.d_conv,
        INNER_SIZE: config.channels,
        "ssm.state_size": config.d_state,
        "attention.head_count": config.n_heads,
        KEY_WIDTH: config.head_width,
        "attention.value_length": config.head_width,
    }


def read_experts(header: Header, architecture: str, width: str) -> dict[str, Any]:
    """Return the fields of the experts.

    Args:
        header: of the file.
        architecture: its name.
        width: the key of the width inside an expert.

    Raises:
        LongscanError: a size is missing or impossible.
    """
    n_experts = read_count(header, f"{architecture}.{EXPERTS}")
    first = next((t for name, t in header.tensors.items() if name.endswith(".ffn_up_exps.weight")), None)
    if first is None or first.shape[0] != n_experts or n_experts > MAX_EXPERTS:  # before a loop
        raise LongscanError(
            f"{architecture}.{EXPERTS}: expected as many as the tensors have, and {MAX_EXPERTS:,} at most, "
            f"got {n_experts:,}."
        )
    shared = f"{architecture}.{D_SHARED}"
    return {
        "n_experts": n_experts,
        "n_active_experts": read_count(header, f"{architecture}.{ACTIVE}"),
        "d_expert": read_count(header, f"{architecture}.{width}"),
        "d_shared_expert": read_count(header, shared) if header.metadata.get(shared) else 0,
    }


def blocks(config: HybridConfig, mixers: str) -> tuple[str, str]:
    """Return the mixers of a hybrid, and the layers that follow each, as letters.

    Args:
        config: of the model.
        mixers: letters that a block may begin with.

    Raises:
        LongscanError: the pattern is another.
    """
    first, second = config.pattern[::2], config.pattern[1::2]
    if len(first) != len(second) or set(first) - set(mixers) or set(second) - set("-E"):
        raise LongscanError(
            f"pattern: expected {' or '.join(mixers)} and a feed-forward layer by turns in a "
            f"{config.family}, got {config.pattern}. Use a directory."
        )
    return first, second


def refuse_other(config: HybridConfig, free: tuple[str, ...]) -> None:
    """Raise if a hybrid differs in a field that llama.cpp does not know.

    Args:
        config: of the model.
        free: the fields that may have any value, beside those of all hybrids.

    Raises:
        LongscanError: it does.
    """
    known = {
        *("pattern", "n_layers", "family", "d_model", "vocab_size", "norm_eps", "residual_in_fp32"),
        *("tie_embeddings", "pad_vocab_size_multiple", "n_heads", "n_kv_heads", "d_head", "max_positions"),
        *("d_ssm", "d_ssm_head", "n_ssm_groups", "d_state", "d_conv", "conv_bias", "d_ff"),
        *free,
    }
    usual = {field.name: field.default for field in dataclasses.fields(HybridConfig)}
    got = {name: getattr(config, name) for name in usual if name not in known}
    if other := [f"{name} = {value}" for name, value in got.items() if value != usual[name]]:
        raise LongscanError(
            f"llama.cpp computes no {config.family} with {', '.join(other)}. Use a directory."
        )
