"""A small Llama whose parameters all matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.models import Llama, LlamaConfig


def make(dtype: torch.dtype = torch.float32, **fields: Any) -> Llama:
    """A small model, every parameter far from its start."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 3, "vocab_size": 261, "n_heads": 4, "max_positions": 512}
    model = Llama(LlamaConfig.from_dict(sizes | fields), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype).eval()


def draw_ids(batch: int = 2, seq_len: int = 57) -> Tensor:
    return torch.randint(0, 261, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
