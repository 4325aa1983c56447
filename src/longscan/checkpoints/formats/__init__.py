"""The layouts of checkpoints, one file each, and which of them a config.json has.

Published models have the layout of transformers, Mamba that of its authors too, sequence classifiers one of
their own; all others have longscan's own. A file of tensors alone, as authors of vision models publish, is
known by its tensors. Quantised weights are a variant of any layout in safetensors: config.json names the
format, and each stored matrix stands beside its scales (`...in_proj.weight`, `...in_proj.scale`). All else in
such a file is float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, cast

from longscan.checkpoints.formats import official
from longscan.checkpoints.formats.base import QUANTIZATION, BareFormat, Format
from longscan.checkpoints.formats.own import model_name, own
from longscan.checkpoints.formats.sequence_classifier import MODEL_TYPE as SEQUENCE
from longscan.core.config import Config, nearest
from longscan.core.lazy import LazyMapping
from longscan.errors import LongscanError
from longscan.models import MODELS, Model, ModelKind, entry_of
from longscan.models.common.quantization import KINDS
from longscan.ops import Kind

__all__ = [
    "BARE",
    "FORMATS",
    "HYBRIDS",
    "OFFICIAL",
    "BareFormat",
    "Format",
    "StoredKind",
    "config_fields",
    "find_format",
    "format_of",
    "kind_of_model",
    "name_of_model",
    "read_config",
    "read_format",
]

StoredKind: TypeAlias = ModelKind | Literal["sequence"]

METHOD, VERSION = "longscan", 1  # of quantised weights: the quant_method by which others know them

# model_type of others -> the model that is ours with other options
VARIANTS = {"falcon_mamba": "mamba"}
# models of others whose names resemble ours
OTHERS = ("llama4", "llama4_text", "mllama", "roberta", "distilbert", "albert")


def _format(name: str) -> Format:
    """Import the published layout of a model."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}").FORMAT)


def _official(name: str) -> Format:
    """Import the layout in which a model's authors publish it."""
    if name == "mamba":
        return official.FORMAT
    return cast(Format, importlib.import_module(f"{__name__}.{name}").OFFICIAL)


def _bare(name: str) -> BareFormat:
    """Import the layout of a model whose authors publish a file of tensors alone."""
    return cast(BareFormat, importlib.import_module(f"{__name__}.{name}").BARE)


#: by the name of the model, as config.json has it
FORMATS: Mapping[str, Format] = LazyMapping(
    {
        **{name: partial(own, name) for name in MODELS},
        **{name: partial(_format, name) for name in ("bert", "llama", "mamba", "mamba2", "zamba2")},
        SEQUENCE: partial(_format, "sequence_classifier"),
    }
)
#: the authors' own layouts, by the name of the model
OFFICIAL: Mapping[str, Format] = LazyMapping(
    {name: partial(_official, name) for name in official.LAYERS.values()}
)
#: of the families of hybrids, by the model_type of their config.json
HYBRIDS: Mapping[str, Format] = LazyMapping(
    {
        name: partial(_format, name)
        for name in ("falcon_h1", "granitemoehybrid", "bamba", "nemotron_h", "jamba")
    }
)
#: by the name of the model, in the order in which they are tried
BARE: Mapping[str, BareFormat] = LazyMapping(
    {name: partial(_bare, name) for name in ("vmamba", "vim", "videomamba", "vit")}
)


def find_format(raw: Mapping[str, Any]) -> tuple[str, Format]:
    """Return which model a config.json describes, and in which layout.

    Args:
        raw: its content.

    Returns:
        The model's name in FORMATS, and the layout.

    Raises:
        LongscanError: it describes no model that is here.
    """
    if "model_type" not in raw:
        if "d_model" in raw:
            stated = official.LAYERS[official.layer_of(raw)]
            return stated, OFFICIAL[stated]
        raise LongscanError(
            "neither a Hugging Face configuration (no model_type) nor an official Mamba one (no d_model)."
        )
    stated = raw["model_type"]
    name = model_name(VARIANTS.get(stated, stated) if isinstance(stated, str) else stated)
    if isinstance(name, str) and name in FORMATS:
        return name, FORMATS[name]
    if isinstance(name, str) and name in HYBRIDS:
        return "hybrid", HYBRIDS[name]
    if isinstance(name, str) and name in OTHERS:
        raise LongscanError(f"model_type: {name!r} is another model, which is not computed here.")
    raise LongscanError(f"model_type: no model called {name!r}{nearest(str(name), MODELS)}")


def read_config(raw: Mapping[str, Any], tokenizer_size: int | None = None) -> tuple[str, Config]:
    """Return which model a config.json describes, and its sizes.

    Args:
        raw: its content, of any layout.
        tokenizer_size: ids of the tokenizer beside it, see `Format.read`.

    Returns:
        The model's name in FORMATS, and its Config.

    Raises:
        LongscanError: a field is missing, unknown, out of range, or means another model.
    """
    name, layout = find_format(raw)
    return name, layout.read(raw, tokenizer_size)


def read_format(raw: Mapping[str, Any]) -> Kind | None:
    """Return the format of quantised weights that a config.json names.

    Args:
        raw: its content.

    Returns:
        The format, the narrowest that a matrix of the file has; None if it says nothing.

    Raises:
        LongscanError: the weights were quantised by others, or in a way that is not known here.
    """
    if QUANTIZATION not in raw:
        return None
    stated = raw[QUANTIZATION]
    if not isinstance(stated, dict):
        raise LongscanError(f"{QUANTIZATION}: expected an object {{...}}, got {stated!r}.")
    if stated.get("quant_method") != METHOD:
        raise LongscanError(
            f"{QUANTIZATION}: expected the quant_method {METHOD!r}, got {stated.get('quant_method')!r}: "
            "these weights were quantised by another program. Take the original model, then "
            "`longscan quantize` it."
        )
    if stated.get("version") != VERSION:
        raise LongscanError(
            f"{QUANTIZATION}: expected version {VERSION}, got {stated.get('version')!r}: these weights were "
            "written by another longscan. Update it, or quantise the original model again."
        )
    if unknown := [name for name in stated if name not in ("quant_method", "format", "version")]:
        raise LongscanError(f"{QUANTIZATION}: unknown field {', '.join(map(repr, unknown))}.")
    for kind in KINDS:
        if kind == stated.get("format"):
            return kind
    choices = ", ".join(map(repr, KINDS))
    raise LongscanError(f"{QUANTIZATION}: expected a format among {choices}, got {stated.get('format')!r}.")


def config_fields(model: Model, layout: Format, dtype: str, kind: Kind | None = None) -> dict[str, Any]:
    """Return the content of a model's config.json.

    Args:
        model: of a class that FORMATS knows.
        layout: of the file.
        dtype: of most weights, such as "float32". With "int8" and "uint8" transformers refuses the weights;
            an unknown quant_method alone it would skip with a warning.
        kind: the format of the matrices, if they are quantised.
    """
    fields = layout.write(model.config)
    name = name_of_model(model)
    if name == SEQUENCE or (name in OFFICIAL and layout is OFFICIAL[name]):  # they have no such fields
        return fields
    stored = {QUANTIZATION: {"quant_method": METHOD, "format": kind, "version": VERSION}} if kind else {}
    return {**fields, "dtype": dtype, **stored}


def name_of_model(model: Model) -> str:
    """Return the name of a model in FORMATS.

    Args:
        model: of a class that is there.
    """
    from longscan.models.sequence_classifier import SequenceModel  # imports all language models

    return SEQUENCE if isinstance(model, SequenceModel) else entry_of(model).name


def format_of(model: Model) -> Format:
    """Return the layout in which a model is saved: that of its family, if it is a hybrid of one.

    Args:
        model: of a class that FORMATS knows.
    """
    name = name_of_model(model)
    family = getattr(model.config, "family", name) if name == "hybrid" else name
    return HYBRIDS[family] if family in HYBRIDS else FORMATS[name]


def kind_of_model(name: str) -> StoredKind:
    """Return what a model is for.

    Args:
        name: in FORMATS.
    """
    return "sequence" if name == SEQUENCE else MODELS[name].kind
