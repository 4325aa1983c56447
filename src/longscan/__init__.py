"""longscan: sequence models with a memory, from the paper to the prompt.

    model, tokenizer = longscan.load("longscan-tiny-en")
    for piece in longscan.generate(model, tokenizer, "It was a bright morning", seed=0): ...

Every name below is imported when it is first used: `import longscan` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longscan.core.lazy import lazy_names

if TYPE_CHECKING:
    from longscan import models, ops
    from longscan.checkpoints.load import load, load_bert, load_translator
    from longscan.checkpoints.save import convert, quantize, save
    from longscan.core.config import Config
    from longscan.errors import LongscanError, UsageError
    from longscan.evaluation.perplexity import Evaluation, evaluate
    from longscan.inference.bert import embed, fill_mask
    from longscan.inference.chat import Conversation
    from longscan.inference.drafters import DraftModel, PromptLookup
    from longscan.inference.engine import Engine
    from longscan.inference.generate import generate
    from longscan.inference.grammar import Grammars
    from longscan.inference.prefix_cache import PrefixCache
    from longscan.inference.request import Request
    from longscan.inference.sampling import SamplingConfig
    from longscan.inference.snapshots import Snapshots
    from longscan.inference.translate import translate
    from longscan.models import State
    from longscan.tokenizers.base import Tokenizer
    from longscan.tokenizers.bpe import load_tokenizer
    from longscan.training.config import TrainConfig
    from longscan.training.train import train

__version__ = "0.1.0"

_HOME = {
    "checkpoints.load": (
        "load",
        "load_bert",
        "load_translator",
    ),
    "checkpoints.save": (
        "convert",
        "quantize",
        "save",
    ),
    "core.config": ("Config",),
    "errors": (
        "LongscanError",
        "UsageError",
    ),
    "evaluation.perplexity": (
        "Evaluation",
        "evaluate",
    ),
    "inference.bert": (
        "embed",
        "fill_mask",
    ),
    "inference.engine": ("Engine",),
    "inference.generate": ("generate",),
    "inference.grammar": ("Grammars",),
    "inference.prefix_cache": ("PrefixCache",),
    "inference.request": ("Request",),
    "inference.sampling": ("SamplingConfig",),
    "inference.snapshots": ("Snapshots",),
    "inference.chat": ("Conversation",),
    "inference.drafters": (
        "DraftModel",
        "PromptLookup",
    ),
    "inference.translate": ("translate",),
    "models": ("State",),
    "tokenizers.base": ("Tokenizer",),
    "tokenizers.bpe": ("load_tokenizer",),
    "training.config": ("TrainConfig",),
    "training.train": ("train",),
}

__all__ = [
    "Config",
    "Conversation",
    "DraftModel",
    "Engine",
    "Evaluation",
    "Grammars",
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

_getter = lazy_names(__name__, _HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in ("models", "ops"):
        return importlib.import_module(f"longscan.{name}")
    return _getter(name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return __all__
