"""The line of models: one line a paper, oldest first.

The entry of a model stands in its file; here it is put in its place. What walks the registry (`longscan
models`, `train`, the tests) knows a new model from its line.
"""

from __future__ import annotations

from longscan.models import (
    bahdanau,
    bert,
    cnn,
    gau,
    h3,
    hippo,
    hyena,
    linear_attention,
    llama,
    lssl,
    lstm,
    luong,
    mamba,
    s4,
    s4d,
    seq2seq,
    transformer,
    videomamba,
    vim,
    vmamba,
)
from longscan.models.common.entry import ModelEntry
from longscan.models.common.model import Model

__all__ = ["LINEAGE", "MODELS", "entry_of", "preset_owner"]

LINEAGE: tuple[ModelEntry, ...] = (
    lstm.ENTRY,
    seq2seq.ENTRY,
    bahdanau.ENTRY,
    luong.ENTRY,
    transformer.ENTRY,
    cnn.ENTRY,
    bert.ENTRY,
    linear_attention.ENTRY,
    hippo.ENTRY,
    lssl.ENTRY,
    s4.ENTRY,
    gau.ENTRY,
    s4d.ENTRY,
    h3.ENTRY,
    hyena.ENTRY,
    llama.ENTRY,
    mamba.ENTRY,
    vim.ENTRY,
    vmamba.ENTRY,
    videomamba.ENTRY,
)

MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in LINEAGE}


def entry_of(model: Model) -> ModelEntry:
    """Return the entry of a model.

    Args:
        model: of a class of the line.

    Raises:
        LookupError: of none.
    """
    for entry in LINEAGE:
        if entry.cls is type(model):
            return entry
    raise LookupError(f"{type(model).__name__} is not in LINEAGE")


def preset_owner(name: str) -> str | None:
    """Return the model that has a preset of this name; None if none or several have.

    Args:
        name: of the preset.
    """
    owners = [entry.name for entry in LINEAGE if name in entry.presets]
    return owners[0] if len(owners) == 1 and name not in MODELS else None
