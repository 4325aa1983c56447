"""mamba_ssm.utils.hf: a configuration and weights from a directory or the hub."""

import json
from typing import Any

import torch
from torch import Tensor

from longscan.checkpoints.hub import resolve
from longscan.checkpoints.weights import read_weights

__all__ = ["load_config_hf", "load_state_dict_hf"]


def load_config_hf(model_name: str) -> dict[str, Any]:
    """Return the config.json of a directory or hub id.

    Raises:
        LongscanError: there is none.
    """
    config: dict[str, Any] = json.loads((resolve(model_name) / "config.json").read_text(encoding="utf-8"))
    return config


def load_state_dict_hf(
    model_name: str, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the weights of a directory or hub id; of a pickle only tensors are loaded.

    Args:
        model_name: directory or hub id.
        device: to which they are moved.
        dtype: to which they are cast.

    Raises:
        LongscanError: there are none, or the file is damaged.
    """
    tensors = read_weights(resolve(model_name))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
