"""Optional packages, each imported where it is first needed.

EXTRAS is the only list of them: install hints and `longscan doctor` use it.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from longscan.errors import LongscanError

__all__ = ["EXTRAS", "installed", "remedy", "require"]

# package, as pip calls it -> its module and the extra of longscan that brings it
EXTRAS = {
    "matplotlib": ("matplotlib", "plot"),
    "sacrebleu": ("sacrebleu", "translate"),
    "gguf": ("gguf", "gguf"),
    "av": ("av", "video"),
    "scikit-learn": ("sklearn", "baseline"),
    "torchdiffeq": ("torchdiffeq", "ode"),
    "transformers": ("transformers", "peers"),
    "mambapy": ("mambapy", "peers"),
    "peft": ("peft", "peers"),
    "llama-cpp-python": ("llama_cpp", "llama"),
    "optimum-intel": ("optimum.intel", "openvino"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "timm": ("timm", "timm"),
    "lm-eval": ("lm_eval", "eval"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "llguidance": ("llguidance", "serve"),
    "sse-starlette": ("sse_starlette", "servers"),
    "starlette-context": ("starlette_context", "servers"),
    "pydantic-settings": ("pydantic_settings", "servers"),
    "accelerate": ("accelerate", "servers"),
    "openai": ("openai", "servers"),
    "jsonschema": ("jsonschema", "servers"),
}


def require(package: str, purpose: str, module: str | None = None) -> ModuleType:
    """Return the module of an optional package.

    Args:
        package: a key of EXTRAS.
        purpose: what needs it, in the plural: "figures".
        module: a submodule, such as "matplotlib.figure"; the package itself if None.

    Returns:
        The module.

    Raises:
        LongscanError: it is not installed, or too old.
    """
    try:
        return importlib.import_module(module or EXTRAS[package][0])
    except ImportError as error:
        raise LongscanError(remedy(package, purpose)) from error


def installed(package: str) -> bool:
    """Whether an optional package can be imported.

    Args:
        package: a key of EXTRAS.
    """
    try:
        return find_spec(EXTRAS[package][0]) is not None
    except ModuleNotFoundError:  # the package around it is missing too
        return False


def remedy(package: str, purpose: str) -> str:
    """Return the install hint of an optional package.

    Args:
        package: a key of EXTRAS.
        purpose: see `require`.
    """
    return f"{purpose} need {package}: pip install 'longscan[{EXTRAS[package][1]}]'"
