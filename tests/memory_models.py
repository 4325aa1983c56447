"""Small models of the memory line, in float64, and what is drawn for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.models import (
    MODELS,
    LanguageModel,
)

# largest difference allowed from an equation written out; bf16 keeps 8 bits, over two layers
TOLERANCE = {torch.float64: 1e-11, torch.bfloat16: 0.1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def tiny(name: str, **fields: Any) -> LanguageModel:
    entry = MODELS[name]
    sizes = {**entry.presets["tiny"], "vocab_size": 13, **fields}
    model = entry.cls(entry.config.from_dict(sizes), seeded()).eval()
    assert isinstance(model, LanguageModel)
    return model


def stirred(model: LanguageModel) -> LanguageModel:
    """In float64, every parameter far from its start so that every one matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(3))
    return model.double().eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[got.dtype])
