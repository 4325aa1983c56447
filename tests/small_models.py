"""Small random language models that have opinions: fresh ones find all tokens equally likely."""

from __future__ import annotations

import torch

from longscan.models import MODELS, LanguageModel

NAMES = ("mamba", "llama", "hyena")  # a state of one size, one that grows, one that has both
SIZES = {
    "mamba": {"d_model": 16, "n_layers": 2, "d_state": 4},
    "hyena": {"d_model": 16, "n_layers": 2, "d_filter": 8, "max_positions": 8192},
    "llama": {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_positions": 8192},
}


def build(vocab_size: int = 257, seed: int = 0, sharpness: float = 5, name: str = "mamba") -> LanguageModel:
    """Make one. All but Mamba are float64: torch rounds the rows of a batch otherwise than each alone."""
    entry = MODELS[name]
    fields = {**SIZES[name], "vocab_size": vocab_size, "tie_embeddings": False}
    model = entry.cls(entry.config.from_dict(fields), torch.Generator().manual_seed(seed)).eval()
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        if name == "llama":
            for parameter in model.parameters():
                parameter.mul_(5)
        if name != "mamba":
            model.double()
        model.lm_head.weight.mul_(sharpness)
    return model
