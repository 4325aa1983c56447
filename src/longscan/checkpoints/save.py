"""Save models, whole or not at all; convert them to another layout; quantise them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from longscan.checkpoints.assemble import blank_model
from longscan.checkpoints.formats import OFFICIAL, config_fields, format_of, name_of_model
from longscan.checkpoints.formats.base import TIED_HEAD
from longscan.checkpoints.formats.own import TAKEN
from longscan.checkpoints.gguf.model import GGUFType, save_gguf
from longscan.checkpoints.image import preprocessor_fields
from longscan.checkpoints.load import load
from longscan.checkpoints.onnx.export import save_onnx
from longscan.checkpoints.open import stored_kind
from longscan.checkpoints.weights import BARE_SUFFIXES, dtype_name, narrowed
from longscan.core.files import atomic_directory, write_json, writing
from longscan.errors import LongscanError, UsageError
from longscan.models import (
    LanguageModel,
    Model,
)
from longscan.models.common.quantization import (
    KINDS,
    dequantized,
    kind_of,
    quantize_model,
)
from longscan.models.common.vision import VisionModel
from longscan.ops import Kind
from longscan.ops.quant import STORED
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.special_tokens import IDS

__all__ = ["Layout", "check_new", "convert", "padding_ids", "quantize", "save"]


Layout: TypeAlias = Literal["hf", "official"]

MAX_SHARD_SIZE = "5GB"


def save(
    model: Model,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Save a model directory, whole or not at all, in its published layout if it has one.

    Args:
        model: what to save; if it is quantised, as it is.
        directory: created, or replaced if it is a model directory.
        tokenizer: saved beside the model.
        dtype: of the weights in the file; None keeps the model's. The recurrence stays float32 at least.
        max_shard_size: of a weight file, such as "5GB"; larger models are saved in several.

    Raises:
        LongscanError: the directory holds something else, or could not be written; or there is a dtype for a
            quantised model.
        OSError: likewise.
    """
    if Path(directory).is_file():
        raise LongscanError(f"{directory} is a file: expected the name of a directory.")
    _write(model, Path(directory), tokenizer, "hf", dtype, max_shard_size)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    layout: Layout = "hf",
    dtype: torch.dtype | None = None,
    gguf_type: GGUFType | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    model: str | None = None,
    image_size: int | None = None,
) -> Model:
    """Convert a language model or an image classifier to another layout or precision.

    Args:
        source: see `resolve`.
        destination: a new or empty directory, or a new file whose name ends in .gguf (language models) or
            .onnx (classifiers of images or videos, in float32; see `save_onnx`).
        layout: "hf" for safetensors, "official" for pytorch_model.bin and the authors' config.json.
        dtype: of the weights; None keeps that of the source. With a type, quantised weights become plain.
        gguf_type: of the matrices in a .gguf file, see `save_gguf`; not for a directory.
        tokenizer: see `load`.
        revision: see `load`.
        offline: see `load`.
        model: see `load`.
        image_size: see `load`.

    Returns:
        The model that was written.

    Raises:
        UsageError: as `load`.
        LongscanError: as `load` and `save`; or the destination is not empty.
        OSError: the destination cannot be written.
    """
    destination = check_new(destination)
    if destination.suffix in BARE_SUFFIXES and not destination.exists():
        raise UsageError(f"{destination}: expected the name of a directory, got that of a weights file.")
    where: dict[str, Any] = {"revision": revision, "offline": offline}
    kind = stored_kind(source, model=model, **where)
    converted: Model
    if kind == "image":
        _check_image_options(source, destination, dtype, tokenizer)
        where |= {"model": model, "image_size": image_size}
        converted, its_tokenizer = load(source, "image", dtype=dtype, **where), None
    else:
        _check_language_options(source, destination, image_size)
        converted, its_tokenizer = load(source, dtype=dtype, tokenizer=tokenizer, **where)
    if dtype and kind_of(converted):
        converted = dequantized(converted).to(dtype)
    if destination.suffix in (".gguf", ".onnx"):
        destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.suffix == ".gguf":
        assert isinstance(converted, LanguageModel)
        save_gguf(converted, destination, its_tokenizer, gguf_type, new=True)
    elif destination.suffix == ".onnx":
        assert isinstance(converted, VisionModel)
        save_onnx(converted, destination, new=True)
    else:
        _write(converted, destination, its_tokenizer, layout, None, new=True)
    return converted


def _check_image_options(
    source: str | Path, destination: Path, dtype: torch.dtype | None, tokenizer: str | Path | None
) -> None:
    """Raise if an image classifier can't be converted in this way."""
    if destination.suffix == ".gguf" or tokenizer is not None:
        option = "a tokenizer" if tokenizer is not None else destination.name
        raise LongscanError(
            f"{source} is an image classifier: expected a directory or an .onnx file and no more, got "
            f"{option}. GGUF files and tokenizers are for language models."
        )
    if destination.suffix == ".onnx" and dtype not in (None, torch.float32):
        raise UsageError(f"dtype: {destination.name} holds float32, got {dtype_name(dtype)}. Leave it out.")


def _check_language_options(source: str | Path, destination: Path, image_size: int | None) -> None:
    """Raise if a language model can't be converted in this way."""
    if image_size is not None:
        raise UsageError(f"image_size: {source} is no image classifier. Leave it out.")
    if destination.suffix == ".onnx":
        raise LongscanError(
            f"{source} is no image classifier: expected one for {destination.name}. ONNX files of other "
            "models are not written. Choose a directory, or a .gguf file."
        )


def check_new(destination: str | Path) -> Path:
    """Return a destination where a model overwrites nothing.

    Args:
        destination: of the model.

    Raises:
        LongscanError: something is there already.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise LongscanError(f"{destination} exists and is not an empty directory: choose another name.")
    return destination


def _write(
    model: Model,
    directory: Path,
    tokenizer: Tokenizer | None,
    layout: Layout,
    dtype: torch.dtype | None,
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    new: bool = False,
) -> None:
    """Write a model directory in either layout."""
    config, kind = model.config, kind_of(model)
    name = name_of_model(model)
    if layout == "official" and name not in OFFICIAL:
        raise LongscanError(f"the official layout is Mamba's, this is a {type(model).__name__}: use hf.")
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if kind is None:
        dtype = dtype or model.dtype
        like = blank_model(directory, type(model), config, dtype).state_dict()
        tensors = {name: narrowed(name, tensor, like[name].dtype) for name, tensor in tensors.items()}
    elif dtype or layout == "official":
        place = f"a file of {dtype_name(dtype)}" if dtype else "the official layout"
        raise LongscanError(
            f"the model is quantised ({kind}), and {place} has no place for that. "
            "Convert it to plain weights: `longscan convert --dtype float32`, in Python `dequantized(model)`."
        )
    else:
        dtype = STORED[kind]
    form = OFFICIAL[name] if layout == "official" else format_of(model)
    with atomic_directory(directory, marker="config.json", new=new) as folder:
        with writing(directory):
            fields = config_fields(model, form, dtype_name(dtype), kind)
            published = form.outgoing(tensors, config)
            if layout == "official":
                head, embedding = form.theirs(TIED_HEAD.name), form.theirs(TIED_HEAD.original)
                published.setdefault(head, published[embedding])  # one storage: it takes no more room
                torch.save(published, folder / "pytorch_model.bin")
            else:
                if isinstance(model, LanguageModel):  # other programs look here for the end of a text
                    ends = tokenizer.special_ids if tokenizer else dict.fromkeys(IDS)
                    padding = {"suppress_tokens": padding_ids(model)} if padding_ids(model) else {}
                    write_json(folder / "generation_config.json", {**ends, **padding})
                    fields |= ends
                _write_safetensors(published, folder, max_shard_size)
            if isinstance(model, VisionModel) and len(model.input_shape) == 3 and name not in TAKEN:
                write_json(folder / "preprocessor_config.json", preprocessor_fields(model.config))
            write_json(folder / "config.json", fields)
        if tokenizer:
            tokenizer.save(folder)


def padding_ids(model: LanguageModel) -> list[int]:
    """Return the ids behind the vocabulary, which other programs must not sample: their rows are padding.

    Args:
        model: any.
    """
    return list(range(model.config.vocab_size, model.config.padded_vocab_size))


def _write_safetensors(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: str) -> None:
    """Save tensors, in shards if they are large."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), directory, max_shard_size=max_shard_size, metadata={"format": "pt"})


def quantize(
    source: str | Path,
    destination: str | Path,
    kind: Kind,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> LanguageModel:
    """Quantise the matrices of a model and save it, whole or not at all.

    Args:
        source: as `load` takes it.
        destination: a new or empty directory.
        kind: "bf16", "int8" or "int4".
        revision: see `load`.
        offline: see `load`.
        max_shard_size: see `save`.

    Returns:
        The model that was written.

    Raises:
        UsageError: there is no such format.
        LongscanError: as `load` and `save`; the model is quantised already, or its weights are not finite;
            or the destination is not empty.
        OSError: the destination cannot be written.
    """
    if kind not in KINDS:
        raise UsageError(f"format: expected {', '.join(KINDS)}, got {kind!r}.")
    destination = check_new(destination)
    model, tokenizer = load(source, revision=revision, offline=offline, dtype=None)
    try:
        quantize_model(model, kind)
    except LongscanError as error:
        raise LongscanError(f"{source}: {error}") from error
    _write(model, destination, tokenizer, "hf", None, max_shard_size, new=True)
    return model
