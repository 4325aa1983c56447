"""The line of models: one line a paper, oldest first.

The entry of a model stands in its file, which has the model's name and is imported when the entry is first
looked up. What walks the registry (`longscan models`, `train`, the tests) knows a new model from its line.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import cast

from longscan.core.lazy import LazyMapping
from longscan.models.common.entry import ModelEntry
from longscan.models.common.model import Model

__all__ = ["MODELS", "entry_of", "preset_owner"]

NAMES = (
    "lstm",
    "seq2seq",
    "bahdanau",
    "luong",
    "resnet",
    "transformer",
    "cnn",
    "bert",
    "linear_attention",
    "hippo",
    "vit",
    "lssl",
    "s4",
    "gau",
    "s4d",
    "h3",
    "hyena",
    "llama",
    "mamba",
    "vim",
    "vmamba",
    "videomamba",
    "mamba2",
    "hybrid",
    "zamba2",
    "mamba3",
)


def _entry(name: str) -> ModelEntry:
    """Import a model's file and return its entry."""
    return cast(ModelEntry, importlib.import_module(f"longscan.models.{name}").ENTRY)


MODELS: Mapping[str, ModelEntry] = LazyMapping({name: partial(_entry, name) for name in NAMES})


def entry_of(model: Model) -> ModelEntry:
    """Return the entry of a model.

    Args:
        model: of a class of the line.

    Raises:
        LookupError: of none.
    """
    name = type(model).__module__.rpartition(".")[2]
    if name in MODELS and MODELS[name].cls is type(model):
        return MODELS[name]
    raise LookupError(f"{type(model).__name__} is not in MODELS")


def preset_owner(name: str) -> str | None:
    """Return the model that has a preset of this name; None if none or several have.

    Args:
        name: of the preset.
    """
    if name in MODELS:
        return None
    owners = [entry.name for entry in MODELS.values() if name in entry.presets]
    return owners[0] if len(owners) == 1 else None
