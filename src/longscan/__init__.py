"""longscan: sequence models with a memory, from the paper to the prompt.

    model, tokenizer = longscan.load("longscan-tiny-en")
    for piece in longscan.generate(model, tokenizer, "It was a bright morning", seed=0): ...

Every name below is imported when it is first used: `import longscan` alone loads no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longscan import models, ops
    from longscan.checkpoint import convert, load, load_translator, save
    from longscan.config import Config
    from longscan.embed import embed
    from longscan.encoders import load_bert
    from longscan.engine import Engine
    from longscan.errors import LongscanError, UsageError
    from longscan.evaluate import Evaluation, evaluate
    from longscan.fill_mask import fill_mask
    from longscan.generate import SamplingConfig, generate
    from longscan.models import State
    from longscan.prefix import PrefixCache
    from longscan.quantize import quantize
    from longscan.request import Request
    from longscan.snapshots import Snapshots
    from longscan.speculate import DraftModel, PromptLookup
    from longscan.tokenizer import Tokenizer, load_tokenizer
    from longscan.train import TrainConfig, train
    from longscan.translation import translate

__version__ = "0.1.0"

_HOME = {
    "checkpoint": ("convert", "load", "load_translator", "save"),
    "config": ("Config",),
    "embed": ("embed",),
    "encoders": ("load_bert",),
    "engine": ("Engine",),
    "errors": ("LongscanError", "UsageError"),
    "evaluate": ("Evaluation", "evaluate"),
    "fill_mask": ("fill_mask",),
    "generate": ("SamplingConfig", "generate"),
    "models": ("State",),
    "prefix": ("PrefixCache",),
    "quantize": ("quantize",),
    "request": ("Request",),
    "snapshots": ("Snapshots",),
    "speculate": ("DraftModel", "PromptLookup"),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
    "train": ("TrainConfig", "train"),
    "translation": ("translate",),
}
_MODULE_OF = {name: f"longscan.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "Config",
    "DraftModel",
    "Engine",
    "Evaluation",
    "LongscanError",
    "PrefixCache",
    "PromptLookup",
    "Request",
    "SamplingConfig",
    "Snapshots",
    "State",
    "Tokenizer",
    "TrainConfig",
    "UsageError",
    "__version__",
    "convert",
    "embed",
    "evaluate",
    "fill_mask",
    "generate",
    "load",
    "load_bert",
    "load_tokenizer",
    "load_translator",
    "models",
    "ops",
    "quantize",
    "save",
    "train",
    "translate",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in ("models", "ops"):
        value = importlib.import_module(f"longscan.{name}")
    else:
        raise AttributeError(f"module 'longscan' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return __all__


class _Package(types.ModuleType):
    """Keeps `longscan.generate` the function: importing the file generate.py would bind the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
