"""Model directories in words: which model a config.json describes, and how ours are written.

A model with a published layout has a dialect, a file here. The others have our own layout: config.json is
their Config beside "model_type" and "longscan", the tensors have the names they have in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longscan.checkpoints.formats import bert, llama, mamba
from longscan.checkpoints.formats.fields import QUANTIZATION, Dialect
from longscan.checkpoints.formats.mamba import to_official
from longscan.core.config import Config, nearest
from longscan.errors import LongscanError
from longscan.models import MODELS, Model, entry_of
from longscan.models.common.quantization import KINDS
from longscan.ops import Kind

__all__ = ["publish", "read_config", "read_format", "to_official", "write_config"]

METHOD = "longscan"  # the quant_method by which others know it
VERSION = 1  # of our own layout, and of that of quantised weights
OWN = "longscan"  # the key of the former

# models of others whose names resemble ours
OTHERS = ("mamba2", "falcon_mamba", "llama4", "llama4_text", "mllama", "roberta", "distilbert", "albert")
DIALECTS: dict[str, Dialect] = {
    "bert": bert.DIALECT,
    "llama": llama.DIALECT,
    "mamba": mamba.DIALECT,
}


def read_config(raw: Mapping[str, Any], tokenizer_size: int | None = None) -> tuple[str, Config]:
    """Understand a config.json.

    Args:
        raw: its content, of any dialect.
        tokenizer_size: ids of the tokenizer beside it. Hugging Face files give the padded vocabulary only;
            how much of it is real the tokenizer tells, unless the file was written by us and says so.

    Returns:
        The model's name in MODELS and its Config.

    Raises:
        LongscanError: a field is missing, unknown, out of range, or means another model.
    """
    if "model_type" not in raw:
        if "d_model" in raw:
            return "mamba", mamba.read_official(raw)
        raise LongscanError(
            "neither a Hugging Face configuration (no model_type) nor an official Mamba one (no d_model)."
        )
    name = raw["model_type"]
    if not isinstance(name, str) or name not in MODELS:
        if isinstance(name, str) and name in OTHERS:
            raise LongscanError(f"model_type: {name!r} is another model, which is not computed here.")
        raise LongscanError(f"model_type: no model called {name!r}{nearest(str(name), MODELS)}")
    if name in DIALECTS:
        return name, DIALECTS[name].read(raw, tokenizer_size)
    return name, _read_own(name, raw)


def read_format(raw: Mapping[str, Any]) -> Kind | None:
    """Understand what a config.json says about quantised weights.

    Args:
        raw: its content.

    Returns:
        The format, the narrowest that a matrix of the file has; None if it says nothing.

    Raises:
        LongscanError: the weights were quantised by others, or in a way that is not known here.
    """
    if QUANTIZATION not in raw:
        return None
    found = raw[QUANTIZATION]
    if not isinstance(found, dict):
        raise LongscanError(f"{QUANTIZATION}: expected an object {{...}}, got {found!r}.")
    if found.get("quant_method") != METHOD:
        raise LongscanError(
            f"{QUANTIZATION}: expected the quant_method {METHOD!r}, got {found.get('quant_method')!r}: these "
            "weights were quantised by another program. Take the original model, then `longscan quantize` it."
        )
    if found.get("version") != VERSION:
        raise LongscanError(
            f"{QUANTIZATION}: expected version {VERSION}, got {found.get('version')!r}: these weights were "
            "written by another longscan. Update it, or quantise the original model again."
        )
    if unknown := [name for name in found if name not in ("quant_method", "format", "version")]:
        raise LongscanError(f"{QUANTIZATION}: unknown field {', '.join(map(repr, unknown))}.")
    for kind in KINDS:
        if kind == found.get("format"):
            return kind
    choices = ", ".join(map(repr, KINDS))
    raise LongscanError(f"{QUANTIZATION}: expected a format among {choices}, got {found.get('format')!r}.")


def write_config(model: Model, dtype: str, kind: Kind | None = None) -> dict[str, Any]:
    """Write the configuration of a model as it is published, or as our own layout has it.

    Args:
        model: of a class of the line.
        dtype: of most weights, such as "float32". With "int8" and "uint8" transformers refuses the weights;
            an unknown quant_method alone it would skip with a warning.
        kind: the format of the matrices, if they are quantised.

    Returns:
        The content of config.json.
    """
    name = entry_of(model).name
    if name in DIALECTS:
        fields = DIALECTS[name].write(model.config)
    else:
        fields = {"model_type": name, OWN: VERSION, **model.config.to_dict()}
    stored = {QUANTIZATION: {"quant_method": METHOD, "format": kind, "version": VERSION}} if kind else {}
    return {**fields, "dtype": dtype, **stored}


def publish(model: Model, name: str) -> str:
    """Return the name of a tensor in files.

    Args:
        model: of a class of the line.
        name: of the tensor in the model.
    """
    dialect = DIALECTS.get(entry_of(model).name)
    return dialect.publish(name) if dialect else name


def _read_own(name: str, raw: Mapping[str, Any]) -> Config:
    """Read our own layout."""
    if raw.get(OWN) != VERSION:
        raise LongscanError(
            f"{OWN}: expected version {VERSION} of the layout of a {name}, got {raw.get(OWN)!r}: this file "
            "is of another program, or another longscan. Update it, or make the model again."
        )
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")  # for what generates elsewhere
    known = ("model_type", OWN, "dtype", QUANTIZATION, *ends)
    return MODELS[name].config.from_dict({key: value for key, value in raw.items() if key not in known})
