"""longscan's own layout, for models without a published one: Config, version, our names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats.base import IDLE, QUANTIZATION, TIED_HEAD, Format
from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.models import MODELS

__all__ = ["KEY", "TAKEN", "model_name", "own"]

VERSION, KEY = 1, "longscan"
# transformers has models of these names, and would open a directory of ours with random weights
TAKEN = ("mamba", "mamba2", "resnet", "vit")
PREFIX = "longscan_"  # of their model_type
# what stands in config.json for other readers
ELSE = ("model_type", KEY, "dtype", QUANTIZATION, "bos_token_id", "eos_token_id", "pad_token_id")
# what transformers writes beside it, see compat/transformers.py: none of it changes what a model computes
TRANSFORMERS = (*IDLE, "out_features", "out_indices", "is_encoder_decoder", "auto_map")


def model_name(model_type: object) -> object:
    """Return the name of a model by the model_type of its config.json, which may be anything.

    Args:
        model_type: as the file has it.
    """
    return model_type.removeprefix(PREFIX) if isinstance(model_type, str) else model_type


def own(name: str) -> Format:
    """Return the layout of a model.

    Args:
        name: of the model, in MODELS.
    """

    def read(raw: Mapping[str, Any], tokenizer_size: int | None) -> Config:
        if raw.get(KEY) != VERSION:
            raise LongscanError(
                f"{KEY}: expected version {VERSION} of the layout of a {name}, got {raw.get(KEY)!r}: this "
                "file is of another program, or another longscan. Update it, or make the model again."
            )
        return entry.config.from_dict({key: value for key, value in raw.items() if key not in other})

    def write(config: Config) -> dict[str, Any]:
        return {"model_type": PREFIX * (name in TAKEN) + name, KEY: VERSION, **config.to_dict()}

    entry = MODELS[name]
    other = ELSE + TRANSFORMERS * (entry.kind == "image")
    return Format(read=read, write=write, copy=TIED_HEAD if entry.kind == "language" else None)
