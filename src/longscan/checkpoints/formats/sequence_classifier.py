"""The layout of sequence classifiers: config.json holds the Config of the blocks and what is around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longscan.checkpoints.formats.base import Format
from longscan.core.files import read_json
from longscan.errors import LongscanError

if TYPE_CHECKING:
    from longscan.models.sequence_classifier import SequenceConfig

__all__ = ["EXPECTED", "FORMAT", "MODEL_TYPE", "TRAIN", "is_sequence_model"]


MODEL_TYPE, KEY, VERSION = "sequence", "longscan", 1  # of config.json
EXPECTED = f"a {MODEL_TYPE} model of version {VERSION}"
TRAIN = "Train one: longscan classify train --model NAME FILE --out DIR"


def is_sequence_model(directory: str | Path) -> bool:
    """Return whether a directory holds a sequence classifier.

    Args:
        directory: of a model.
    """
    path = Path(directory) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def _read(raw: Mapping[str, Any], tokenizer_size: int | None) -> SequenceConfig:
    """Return the Config, of this version only."""
    from longscan.models.sequence_classifier import SequenceConfig  # imports all language models

    if raw.get(KEY) != VERSION:
        raise LongscanError(f"expected {EXPECTED}, got {MODEL_TYPE!r} of {raw.get(KEY)!r}. {TRAIN}")
    fields = {name: value for name, value in raw.items() if name not in ("model_type", KEY)}
    return SequenceConfig.from_dict(fields)


def _write(config: SequenceConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    return {"model_type": MODEL_TYPE, KEY: VERSION, **config.to_dict()}


FORMAT = Format(read=_read, write=_write)
