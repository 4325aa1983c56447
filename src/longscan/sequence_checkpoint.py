"""Directories of models that tell what sequences are: config.json and model.safetensors of our own kind."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from longscan.checkpoint import assemble
from longscan.errors import LongscanError
from longscan.files import atomic_directory, read_json, write_json
from longscan.tasks import SequenceConfig, SequenceModel
from longscan.weights import read_weights

__all__ = ["is_sequence_model", "load_sequence_model", "save_sequence_model"]

MODEL_TYPE, VERSION = "sequence", 1  # of config.json


def is_sequence_model(directory: str | Path) -> bool:
    """Tell whether a directory holds what `save_sequence_model` wrote.

    Args:
        directory: of a model.
    """
    path = Path(directory) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def save_sequence_model(model: SequenceModel, directory: str | Path) -> None:
    """Write a model directory, whole or not at all.

    Args:
        model: what to save.
        directory: created, or replaced if it is a model directory.

    Raises:
        LongscanError: the directory holds something else.
        OSError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    fields = {"model_type": MODEL_TYPE, "longscan": VERSION, **model.config.to_dict()}
    with atomic_directory(directory, marker="config.json") as new:
        write_json(new / "config.json", fields)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})


def load_sequence_model(directory: str | Path) -> SequenceModel:
    """Load a model that tells what sequences are.

    Args:
        directory: of a model that `longscan classify train --model NAME` made.

    Returns:
        The model, in evaluation mode.

    Raises:
        LongscanError: it is another model, or damaged.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != MODEL_TYPE or raw.get("longscan") != VERSION:
        raise LongscanError(
            f"{path}: expected a {MODEL_TYPE} model of version {VERSION}, got {raw.get('model_type')!r} of "
            f"{raw.get('longscan')!r}. Train one: longscan classify train --model NAME FILE --out DIR"
        )
    try:
        config = SequenceConfig.from_dict(
            {name: value for name, value in raw.items() if name not in ("model_type", "longscan")}
        )
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    tensors = read_weights(directory)
    if (n_layers := config.body_config.n_layers) > len(
        tensors
    ):  # before a loop over layers that aren't there
        raise LongscanError(f"{path} says {n_layers:,} layers, {len(tensors)} tensors are there.")
    model = assemble(directory, SequenceModel, config, tensors, torch.float32)
    assert isinstance(model, SequenceModel)
    return model
