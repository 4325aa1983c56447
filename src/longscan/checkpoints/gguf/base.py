"""What a GGUF architecture is: its names of tensors and its keys of sizes, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from longscan.checkpoints.gguf.parser import Header, short
from longscan.checkpoints.gguf.tensors import Shape
from longscan.checkpoints.gguf.tokenizer import vocabulary_size
from longscan.core.config import Config
from longscan.errors import LongscanError

__all__ = [
    "CONTEXT",
    "EPSILON",
    "OUTER",
    "Architecture",
    "Slot",
    "read_count",
    "read_epsilon",
    "read_flag",
    "read_number",
    "read_shared",
    "uniform",
    "with_conv_bias",
]

# our name -> theirs, around the layers
OUTER = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EPSILON = "attention.layer_norm_rms_epsilon"
VOCAB_SIZE = "longscan.vocab_size"  # rows of the embedding that are tokens; needed if there is no tokenizer
CONTEXT = 2**20  # llama.cpp wants one, also for a model without


class Slot(NamedTuple):
    """Where a parameter stands in a file.

    Attributes:
        name: of the tensor in the file.
        shape: of that tensor.
        part: which of the equal parts of the tensor along its first axis the parameter is.
        n_parts: how many there are.
        rows: the order in which the rows of the parameter stand in the file; None: theirs.
        factor: by which it is multiplied in the file, a number or one a row.

    What takes memory is a function, called once the shapes are known to be those of the file.
    """

    name: str
    shape: Shape
    part: int = 0
    n_parts: int = 1
    rows: Callable[[], Tensor] | None = None
    factor: Callable[[], Tensor] | float = 1.0


def everything(config: Config) -> bool:
    """Return True, for an architecture that takes all Configs of its model."""
    return True


def with_conv_bias(config: Any) -> Any:
    """Return a Config whose convolutions have a bias, which llama.cpp wants: of zeros if there is none."""
    return config.replace(conv_bias=True)


@dataclass(frozen=True)
class Architecture:
    """How one model stands in a GGUF file.

    Attributes:
        name: in general.architecture, and before the keys of its sizes.
        model: its name in MODELS.
        n_least: tensors that every layer has.
        read: the Config that the metadata describe, and the tensors that there are.
        write: the sizes of a Config, by their keys without the name; refuses what llama.cpp can't compute.
        locate: where a parameter stands, of its name, its shape and the Config.
        takes: whether a Config of the model is written under this name.
        written: the Config whose parameters all stand in a file.
    """

    name: str
    model: str
    n_least: int
    read: Callable[[Header], Config]
    write: Callable[[Any], dict[str, Any]]
    locate: Callable[[str, Shape, Any], Slot]
    takes: Callable[[Any], bool] = everything
    written: Callable[[Any], Any] = with_conv_bias

    def read_config(self, header: Header) -> Config:
        """Return the Config of a file.

        Args:
            header: of the file.

        Raises:
            LongscanError: a size is missing or impossible.
        """
        n_layers, n_tensors = read_count(header, f"{self.name}.block_count"), len(header.tensors)
        if n_layers * self.n_least > n_tensors:  # before a loop over layers not there
            raise LongscanError(f"{self.name}.block_count is {n_layers:,}, the file has {n_tensors} tensors.")
        return self.read(header)

    def metadata(self, config: Any, file_type: int) -> dict[str, Any]:
        """Return a Config as metadata.

        Args:
            config: of the model.
            file_type: llama.cpp's number for the type of the matrices.

        Raises:
            LongscanError: llama.cpp computes no such model.
        """
        sizes = self.write(config)
        return {
            "general.type": "model",
            "general.file_type": file_type,
            "general.quantization_version": 2,
            VOCAB_SIZE: config.vocab_size,
            **{key if key.startswith("longscan.") else f"{self.name}.{key}": sizes[key] for key in sizes},
        }


def uniform(
    inner: Mapping[str, str], shape: Callable[[str, Shape, Any], Shape]
) -> Callable[[str, Shape, Any], Slot]:
    """Return where the parameters of a model stand whose layers are alike.

    Args:
        inner: our name of a tensor in a layer -> theirs.
        shape: of a tensor in the file, of its name and shape here and the Config.
    """

    def locate(name: str, ours: Shape, config: Any) -> Slot:
        if name in OUTER:
            return Slot(OUTER[name], ours)
        layer, _, rest = name.removeprefix("backbone.layers.").partition(".")
        return Slot(f"blk.{layer}.{inner[rest]}", shape(name, ours, config))

    return locate


def read_count(header: Header, key: str) -> int:
    """Return a size.

    Args:
        header: of the file.
        key: of the metadata.

    Raises:
        LongscanError: it is missing or impossible.
    """
    value = header.metadata.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise LongscanError(f"{key}: expected a whole number of at least 1, got {short(value)}.")
    return value


def read_flag(header: Header, key: str, missing: bool = False) -> bool:
    """Return whether an option is on.

    Args:
        header: of the file.
        key: of the metadata.
        missing: what it is without the key.

    Raises:
        LongscanError: it is neither on nor off.
    """
    value = header.metadata.get(key, missing)
    if not isinstance(value, bool):
        raise LongscanError(f"{key}: expected true or false, got {short(value)}.")
    return value


def read_number(header: Header, key: str, *, most: float) -> float:
    """Return a positive number as it is written: 1e-05, not 9.999999747378752e-06.

    Args:
        header: of the file.
        key: of the metadata.
        most: what it is less than.

    Raises:
        LongscanError: it is missing or impossible.
    """
    value = header.metadata.get(key)
    if type(value) is not float or not 0 <= value < most:
        what = "a small number" if most == 1 else f"a number from 0 to {most:g}"
        raise LongscanError(f"{key}: expected {what}, got {short(value)}.")
    return float(str(np.float32(value)))


def read_epsilon(header: Header, key: str) -> float:
    """Return an epsilon; see `read_number`.

    Args:
        header: of the file.
        key: of the metadata.
    """
    return read_number(header, key, most=1)


def read_shared(header: Header, architecture: str, epsilon: str = EPSILON) -> dict[str, Any]:
    """Return the fields of all language models, as transformers calls them.

    Args:
        header: of the file.
        architecture: its name.
        epsilon: key of that of the norms.

    Raises:
        LongscanError: one is missing or impossible.
    """
    norm_eps = read_epsilon(header, f"{architecture}.{epsilon}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LongscanError("token_embd.weight is missing or no matrix: fetch the file again.")
    n_rows = embedding.shape[0]
    listed = vocabulary_size(header.metadata) or n_rows
    if listed > n_rows:
        raise LongscanError(
            f"the tokenizer has {listed:,} ids, the model {n_rows:,}: they do not belong together."
        )
    return {
        "vocab_size": n_rows,
        "unpadded_vocab_size": read_count(header, VOCAB_SIZE) if VOCAB_SIZE in header.metadata else listed,
        "layer_norm_epsilon": norm_eps,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
