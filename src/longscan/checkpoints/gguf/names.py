"""What a Mamba is called in a GGUF file: its tensors and its sizes, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longscan.checkpoints.formats import read_config
from longscan.checkpoints.gguf.parser import Header, Value, short
from longscan.checkpoints.gguf.tokenizer import vocabulary_size
from longscan.errors import LongscanError
from longscan.models import MambaConfig

__all__ = ["ARCHITECTURE", "check_architecture", "gguf_name", "read_sizes", "write_sizes"]

ARCHITECTURE = "mamba"
# our name -> theirs, around the layers and in them
OUTER = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
# transformers' name of a size -> its key; see formats/mamba.py
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "intermediate_size": "ssm.inner_size",
    "time_step_rank": "ssm.time_step_rank",
}
EPSILON = "attention.layer_norm_rms_epsilon"
VOCAB_SIZE = "longscan.vocab_size"  # rows of the embedding that are tokens; needed if there is no tokenizer


def gguf_name(name: str) -> str:
    """Return the name of a tensor in the file.

    Args:
        name: ours.
    """
    if name in OUTER:
        return OUTER[name]
    layer, _, inner = name.removeprefix("backbone.layers.").partition(".")
    return f"blk.{layer}.{INNER[inner]}"


def check_architecture(header: Header) -> None:
    """Raise unless a file holds a whole Mamba.

    Args:
        header: of the file.

    Raises:
        LongscanError: it is of another model, or a part of one.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE or metadata.get(f"{ARCHITECTURE}.ssm.dt_b_c_rms", False) is not False:
        what = "a Mamba with extra norms" if architecture == ARCHITECTURE else short(architecture)
        raise LongscanError(
            f"general.architecture: expected mamba (Mamba-1), got {what}: GGUF files of other models are not "
            "read. Take the model as a directory of safetensors."
        )
    if metadata.get("split.count", 0) not in (0, 1):  # merging leaves 0 behind
        raise LongscanError("this is one part of a model: join them with `llama-gguf-split --merge`.")


def read_sizes(header: Header) -> MambaConfig:
    """Return the Config that the metadata describe, and the tensors that there are.

    Args:
        header: of the file.

    Raises:
        LongscanError: a size is missing or impossible.
    """
    metadata, tensors = header.metadata, header.tensors
    raw: dict[str, Any] = {name: _count(metadata, key) for name, key in SIZES.items()}
    if raw["num_hidden_layers"] * (len(INNER) - 1) > len(tensors):  # before a loop over layers not there
        raise LongscanError(
            f"{ARCHITECTURE}.block_count is {raw['num_hidden_layers']:,}, "
            f"the file has {len(tensors)} tensors."
        )
    if raw["intermediate_size"] % raw["hidden_size"]:
        raise LongscanError(
            f"{ARCHITECTURE}.ssm.inner_size: expected a multiple of {raw['hidden_size']:,}, "
            f"got {raw['intermediate_size']:,}."
        )
    epsilon = metadata.get(f"{ARCHITECTURE}.{EPSILON}")
    if type(epsilon) is not float or not 0 <= epsilon < 1:
        raise LongscanError(f"{ARCHITECTURE}.{EPSILON}: expected a small number, got {short(epsilon)}.")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LongscanError("token_embd.weight is missing or no matrix: fetch the file again.")
    n_rows = embedding.shape[0]
    listed = vocabulary_size(metadata) or n_rows
    if listed > n_rows:
        raise LongscanError(
            f"the tokenizer has {listed:,} ids, the model {n_rows:,}: they do not belong together."
        )
    size = _count(metadata, VOCAB_SIZE, prefix="") if VOCAB_SIZE in metadata else listed
    _, config = read_config(
        {
            **raw,
            "model_type": "mamba",
            "vocab_size": n_rows,
            "unpadded_vocab_size": size,
            "expand": raw["intermediate_size"] // raw["hidden_size"],
            "layer_norm_epsilon": float(str(np.float32(epsilon))),  # 1e-05, not 9.999999747378752e-06
            "tie_word_embeddings": "output.weight" not in tensors,
            "use_conv_bias": "blk.0.ssm_conv1d.bias" in tensors,
        }
    )
    assert isinstance(config, MambaConfig)
    return config


def _count(metadata: Mapping[str, Value], key: str, prefix: str = f"{ARCHITECTURE}.") -> int:
    """Return a size of the metadata."""
    value = metadata.get(prefix + key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise LongscanError(f"{prefix}{key}: expected a whole number of at least 1, got {short(value)}.")
    return value


def write_sizes(config: MambaConfig, file_type: int) -> dict[str, Any]:
    """Return a Config as metadata; llama.cpp wants some sizes that a Mamba does not have.

    Args:
        config: of the model.
        file_type: llama.cpp's number for the type of the matrices.
    """
    sizes = {
        "context_length": 2**20,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layers,
        "vocab_size": config.padded_vocab_size,
        "ssm.conv_kernel": config.d_conv,
        "ssm.inner_size": config.d_inner,
        "ssm.state_size": config.d_state,
        "ssm.time_step_rank": config.rank,
        EPSILON: config.norm_eps,
        "ssm.dt_b_c_rms": False,
    }
    return {
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        VOCAB_SIZE: config.vocab_size,
        **{f"{ARCHITECTURE}.{key}": value for key, value in sizes.items()},
    }
