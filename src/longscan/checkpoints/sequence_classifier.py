"""Sequence classifiers on disk: longscan's own layout, written and read strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from longscan.checkpoints.formats.sequence_classifier import MODEL_TYPE, VERSION
from longscan.checkpoints.load import assemble
from longscan.checkpoints.weights import read_weights
from longscan.core.files import atomic_directory, read_json, write_json
from longscan.errors import LongscanError
from longscan.models.sequence_classifier import SequenceConfig, SequenceModel

__all__ = ["load_sequence_model", "save_sequence_model"]


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
