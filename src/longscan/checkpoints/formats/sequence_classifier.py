"""The layout of sequence classifiers: config.json holds the body's Config and what stands around it."""

from __future__ import annotations

from pathlib import Path

from longscan.core.files import read_json

__all__ = ["MODEL_TYPE", "VERSION", "is_sequence_model"]


MODEL_TYPE, VERSION = "sequence", 1  # of config.json


def is_sequence_model(directory: str | Path) -> bool:
    """Tell whether a directory holds what `save_sequence_model` wrote.

    Args:
        directory: of a model.
    """
    path = Path(directory) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE
