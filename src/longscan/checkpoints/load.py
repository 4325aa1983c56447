"""Load a model: resolve its name, read its format, fit its tensors strictly to a blank model, assign them.

Every tensor is there, in its shape, and none is left over. All kinds of models, and all layouts of `formats`
and GGUF files, take this one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args, overload

import torch

from longscan import ops
from longscan.checkpoints.assemble import assemble
from longscan.checkpoints.hub import (
    OFFICIAL,
    OFFICIAL_TOKENIZER,
    find_tokenizer,
    official_tokenizer,
)
from longscan.checkpoints.open import check_kind, open_source
from longscan.checkpoints.source import ModelDirectory, Source, check_ids
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, LanguageModel, Model
from longscan.models.common.quantization import (
    ROUNDED,
    dequantized,
    kind_of,
    quantize_model,
    set_activation_bits,
)
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat_templates import DEFAULT

# what one kind of model needs is imported for that kind
if TYPE_CHECKING:
    from longscan.checkpoints.bert import HeadOptions, LoadedBert
    from longscan.models import Translator
    from longscan.models.bert import Head
    from longscan.models.common.vision import VisionModel
    from longscan.models.sequence_classifier import SequenceModel

__all__ = [
    "LoadKind",
    "Precision",
    "load",
    "load_bert",
    "load_translator",
    "load_with_tokenizer",
]


LoadKind: TypeAlias = Literal["language", "translation", "masked", "classifier", "sequence", "image"]
Precision: TypeAlias = Literal["float32", "bf16", "int8", "int4", "w8a8", "w4a8"]
Loaded: TypeAlias = (
    "tuple[LanguageModel, Tokenizer | None] | tuple[Translator, Tokenizer] | LoadedBert | SequenceModel"
    " | VisionModel"
)


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["language"] = "language",
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
    precision: Precision | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer | None]: ...


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["translation"],
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Translator, Tokenizer]: ...


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["masked"],
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
    head: HeadOptions | None = None,
) -> LoadedBert: ...


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["classifier"],
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> LoadedBert: ...


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["sequence"],
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> SequenceModel: ...


@overload
def load(
    name_or_dir: str | Path,
    kind: Literal["image"],
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
    model: str | None = None,
    image_size: int | None = None,
) -> VisionModel: ...


def load(
    name_or_dir: str | Path,
    kind: LoadKind = "language",
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
    precision: Precision | None = None,
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    head: HeadOptions | None = None,
    model: str | None = None,
    image_size: int | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name_or_dir: see `resolve`.
        kind: of the model: "language", "translation", "masked" (BERT), "classifier" (a BERT that classifies
            texts), "sequence" (a sequence classifier) or "image" (an image classifier).
        revision: branch, tag or commit of a hub repository.
        offline: whether to use only what the hub's cache holds; HF_HUB_OFFLINE=1 does the same.
        dtype: of the weights; None keeps that of the file. The recurrence (A_log, D, dt_proj.bias) stays
            float32 at least. Quantised weights stay as they are.
        precision: of a language model's matrices, whatever dtype says: "bf16", "int8" and "int4" quantise
            them on loading, for inference; "w8a8" and "w4a8" are int8 and int4 with activations of 8 bits in
            prefill; "float32" dequantises them. None leaves them as they are.
        tokenizer: for a language model, a tokenizer.json, a directory or a hub id, in place of its own.
        adapter: for a language model, a directory with a LoRA adapter in PEFT's files, or a run of `longscan
            finetune`: it is merged into the weights, or stands beside them if they are quantised.
        head: of a masked language model; None takes that of the checkpoint.
        model: name of an image classifier, such as "vim", where a file of weights may hold several.
        image_size: height and width in pixels to which an image classifier is resized; None: that of the
            model. A file of weights may not say it; a warning then says which is taken.

    Returns:
        The model, in evaluation mode. For "language" with its tokenizer, or None if it has none; for
        "translation" with its tokenizer, of both languages; for "masked" and "classifier" a `LoadedBert`;
        for "sequence" and "image" the model alone.

    Raises:
        UsageError: an option is none of this kind.
        LongscanError: no such model, or one of another kind; a file is damaged, unsafe, or does not fit the
            others; or the weights are quantised already, to another precision.
    """
    if kind not in get_args(LoadKind):
        hint = " A model of videos is of kind 'image'." if str(kind) == "video" else ""
        raise UsageError(f"kind: expected {', '.join(get_args(LoadKind))}, got {kind!r}.{hint}")
    for option, value, its_kind in (
        ("precision", precision, "language"),
        ("tokenizer", tokenizer, "language"),
        ("adapter", adapter, "language"),
        ("head", head, "masked"),
        ("model", model, "image"),
        ("image_size", image_size, "image"),
    ):
        if value is not None and kind != its_kind:
            raise UsageError(f"{option}: expected kind {its_kind!r}, got {kind!r}. Leave it out.")
    if precision not in (None, *get_args(Precision)):
        raise LongscanError(f"precision: expected {', '.join(get_args(Precision))}, got {precision!r}.")
    source = open_source(name_or_dir, revision, offline, model)
    check_kind(source, "masked" if kind == "classifier" else kind)
    if kind == "language":
        own = _tokenizer(source, name_or_dir, tokenizer, offline)
        found = _language_model(source, own, dtype, precision, adapter)
        if adapter is not None and own is not None:
            from longscan.checkpoints.adapter import template_of

            if (template := template_of(adapter)) is not None:
                own.chat_templates = {**own.chat_templates, DEFAULT: template}
        return found, own
    if kind == "image":
        from longscan.checkpoints.image import read_image_model

        return read_image_model(source, dtype, image_size)
    assert isinstance(source, ModelDirectory)  # other files hold language models and image classifiers
    if kind == "translation":
        return _translator(source, dtype)
    if kind == "sequence":
        return _sequence_model(source, dtype)
    from longscan.checkpoints.bert import HeadOptions, read_bert, read_classifier

    return (
        read_bert(source, head or HeadOptions(), dtype)
        if kind == "masked"
        else read_classifier(source, dtype)
    )


def load_translator(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Translator, Tokenizer]:
    """Load a translation model and its tokenizer: `load` of the kind "translation".

    Args:
        name_or_dir: see `resolve`.
        revision: see `load`.
        offline: see `load`.
        dtype: of the weights; None keeps that of the file.

    Returns:
        model: ready to run, in evaluation mode.
        tokenizer: for both languages.

    Raises:
        LongscanError: as `load`; or there is no tokenizer.
    """
    return load(name_or_dir, "translation", revision=revision, offline=offline, dtype=dtype)


def load_bert(
    name_or_dir: str | Path,
    head: Head | None = None,
    *,
    labels: Sequence[str] = (),
    generator: torch.Generator | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> LoadedBert:
    """Load a checkpoint of the BERT family and its tokenizer: `load` of the kind "masked".

    With and without the `bert.` prefix, with gamma and beta, safetensors or pickled tensors.

    Args:
        name_or_dir: see `resolve`.
        head: what is to stand on top; what the checkpoint has if None.
        labels: of a new classifier; those of the checkpoint if there are none.
        generator: randomness of the parts that the checkpoint lacks.
        revision: see `load`.
        offline: see `load`.

    Returns:
        Model, tokenizer, and what is not from the checkpoint.

    Raises:
        LongscanError: as `load`.
    """
    from longscan.checkpoints.bert import HeadOptions

    options = HeadOptions(head, labels, generator)
    return load(name_or_dir, "masked", head=options, revision=revision, offline=offline)


def load_with_tokenizer(
    name: str,
    revision: str | None,
    offline: bool,
    precision: Precision | None = None,
    tokenizer: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a language model that is to take or give text.

    Args:
        name: see `load`.
        revision: likewise.
        offline: likewise.
        precision: likewise.
        tokenizer: likewise.
        adapter: likewise.

    Raises:
        LongscanError: as `load`; or the model has no tokenizer.
    """
    model, own = load(
        name,
        revision=revision,
        offline=offline,
        precision=precision,
        tokenizer=tokenizer,
        adapter=adapter,
    )
    if own is None:
        raise LongscanError(
            f"{name} has no tokenizer: put the tokenizer.json it was trained with beside its config.json, or "
            f"name one with --tokenizer. The authors' Mambas were trained with that of {OFFICIAL_TOKENIZER}."
        )
    return model, own


def _tokenizer(
    source: Source, name_or_dir: str | Path, named: str | Path | None, offline: bool
) -> Tokenizer | None:
    """Return the tokenizer that a user names, the model's own, or that of the authors' models."""
    if named is not None:
        return find_tokenizer(named, offline)
    if (own := source.tokenizer()) is not None or not isinstance(source, ModelDirectory):
        return own
    return official_tokenizer(offline) if str(name_or_dir).startswith(OFFICIAL) else None


def _language_model(
    source: Source,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None,
    precision: Precision | None,
    adapter: str | Path | None,
) -> LanguageModel:
    """Return a language model at a precision."""
    if precision:
        dtype = torch.float32 if precision == "float32" else None  # these formats round whatever there is
    model = _model(source, tokenizer, torch.float32 if adapter is not None else dtype)
    assert isinstance(model, LanguageModel)
    if precision == "float32":
        model = dequantized(model)
    if adapter is not None:
        from longscan.checkpoints.adapter import apply_adapter

        apply_adapter(model, adapter)
        if dtype and not kind_of(model):
            model.to(dtype)
    if precision and precision != "float32":
        kind = cast(ops.Kind, ROUNDED.get(precision, precision))
        if kind != kind_of(model):
            quantize_model(model, kind)
        if precision in ROUNDED:
            set_activation_bits(model, 8)
    return model


def _translator(source: Source, dtype: torch.dtype | None) -> tuple[Translator, Tokenizer]:
    """Return a translator and its tokenizer."""
    from longscan.models import Translator

    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise LongscanError(
            f"{source.path}: expected a model directory with the tokenizer.json of a translator."
        )
    model = _model(source, tokenizer, dtype)
    assert isinstance(model, Translator)
    return model, tokenizer


def _model(source: Source, tokenizer: Tokenizer | None, dtype: torch.dtype | None) -> Model:
    """Return a model of MODELS that knows all ids of its tokenizer."""
    size = tokenizer.vocab_size if tokenizer else 0
    config = source.config(size or None)
    check_ids(source.path, size, config.to_dict()["vocab_size"])
    return assemble(source.path, MODELS[source.name].cls, config, source.weights(config), dtype)


def _sequence_model(source: ModelDirectory, dtype: torch.dtype | None) -> SequenceModel:
    """Return a sequence classifier."""
    from longscan.models.sequence_classifier import SequenceModel

    config = source.config()
    model = assemble(source.path, SequenceModel, config, source.weights(config), dtype)
    assert isinstance(model, SequenceModel)
    return model
