"""Replace the slow paths of transformers' Mamba models by longscan's ops, reversibly.

These models call module-level functions, each either a kernel of mamba_ssm or causal_conv1d, chosen when the
model's file is imported, or plain torch. The patch replaces the functions; models already made use them too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from longscan.compat.conv import causal_conv1d_fn, causal_conv1d_update
from longscan.compat.selective_scan import selective_scan_fn
from longscan.compat.ssd import mamba_chunk_scan_combined
from longscan.compat.state_update import selective_state_update
from longscan.core.optional import require
from longscan.errors import LongscanError

__all__ = ["patch_transformers", "unpatch_transformers"]

MODELS = (
    *("mamba", "falcon_mamba", "jamba", "zamba"),
    *("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"),
)
Function = Callable[..., Any]
# their function -> ours
REPLACEMENTS: dict[str, Function] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
}
_originals: dict[ModuleType, dict[str, Function]] = {}


def patch_transformers() -> list[str]:
    """Let transformers' Mamba models compute with longscan; a second call does nothing.

    Returns:
        The names of the model families that are patched.

    Raises:
        LongscanError: transformers is missing, or its version has no functions to replace.
    """
    version = require("transformers", "patched models").__version__
    for name in MODELS:
        try:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        except ImportError:
            continue  # a family that this version does not have
        theirs = {key: value for key, value in vars(module).items() if key in REPLACEMENTS}
        if not theirs or module in _originals:
            continue
        _originals[module] = theirs
        for key, value in theirs.items():
            setattr(module, key, _adapted(REPLACEMENTS[key], value))
    if not _originals:
        raise LongscanError(
            f"transformers {version}: its Mamba models have no functions to replace; expected 5.20 or newer."
        )
    return [module.__name__.split(".")[-2] for module in _originals]


def unpatch_transformers() -> None:
    """Undo `patch_transformers`."""
    for module, theirs in _originals.items():
        for key, value in theirs.items():
            setattr(module, key, value)
    _originals.clear()


def _adapted(ours: Function, theirs: Function) -> Function:
    """Return our function with their keywords: those of other paths are left out, as transformers does."""
    known = tuple(inspect.signature(ours).parameters)

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("activation") not in (None, "silu", "swish"):
            return theirs(*args, **kwargs)
        return ours(*args, **{key: value for key, value in kwargs.items() if key in known})

    return call
