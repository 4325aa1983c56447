"""A one-line summary of a model: parameters, layers, state size, precision, threads."""

from __future__ import annotations

import torch

from longscan import ops
from longscan.core.config import count
from longscan.models.common.language_model import LanguageModel
from longscan.models.common.quantization import precision as precision_of

__all__ = ["describe", "scaled"]


def describe(name: str, model: LanguageModel) -> str:
    """Return a one-line summary of a model and how it runs here.

    Args:
        name: as the user gave it.
        model: the model.
    """
    threads, state = torch.get_num_threads(), model.init_state(1)
    size = f"{scaled(state.growth, 'kMG')}B a token" if state.growth else f"{scaled(state.nbytes, 'kMG')}B"
    kernels = " · reference kernels, see longscan doctor" if ops.backend() == "reference" else ""
    return (
        f"{name} · {type(model).__name__}, {scaled(model.num_parameters(), 'kMB').strip()} parameters, "
        f"{count(model.config.n_layers, 'layer')} · state {size} · "
        f"{precision_of(model)} · {count(threads, 'thread')}{kernels}"
    )


def scaled(value: float, prefixes: str) -> str:
    """Return a number with three significant digits and an SI prefix: "3.91 M"."""
    for prefix in ("", *prefixes):
        if value < 999.5 or prefix == prefixes[-1]:
            break
        value /= 1000
    return f"{value:.3g} {prefix}"
