"""Adapters for tests, as training might leave them."""

from __future__ import annotations

from pathlib import Path

import torch

from longscan.checkpoints.adapter import save_adapter
from longscan.models import LanguageModel
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach, sharing

__all__ = ["write_adapter"]


def write_adapter(
    model: LanguageModel,
    directory: Path,
    seed: int = 1,
    scale: float = 1.5,
    template: str | None = None,
    std: float = 0.05,
) -> Path:
    """Save a random adapter of a model on all its matrices, and return its directory."""
    draw, fingerprint, twin = torch.Generator().manual_seed(seed), model.fingerprint(), sharing(model)
    attach(twin, dict.fromkeys(adaptable(twin), LoraLayer(3, scale)), generator=draw)
    for _, module in adapted(twin):
        torch.nn.init.normal_(module.lora_B, std=std, generator=draw)
    save_adapter(twin, directory, base="some/model", fingerprint=fingerprint, template=template)
    return directory
