"""Load a model and its tokenizer: from a directory, the hub or a GGUF file.

A directory holds config.json, weights and, usually, a tokenizer, in one of two layouts. Hugging Face:
safetensors, one file or shards, which transformers and others read too. Official: pytorch_model.bin, as the
authors of Mamba published theirs. Loading is strict: every tensor is there, in its shape, none is left over.

Quantised weights have the first layout, where config.json names the format and each stored matrix stands
beside its scales: `...in_proj.weight`, `...in_proj.scale`. All else in such a file is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from longscan import ops
from longscan.checkpoints.formats import read_config, read_format
from longscan.checkpoints.formats.sequence_classifier import is_sequence_model
from longscan.checkpoints.gguf.model import load_gguf
from longscan.checkpoints.hub import (
    OFFICIAL,
    OFFICIAL_TOKENIZER,
    find_tokenizer,
    official_tokenizer,
    resolve,
)
from longscan.checkpoints.weights import check_widths, read_weights, some
from longscan.core.config import Config
from longscan.core.files import read_json
from longscan.errors import LongscanError
from longscan.models import (
    MODELS,
    LanguageModel,
    LanguageModelConfig,
    Model,
    ModelKind,
    Translator,
)
from longscan.models.common.quantization import dequantized, kind_of, quantize_model, store_like
from longscan.models.common.quantization import precision as precision_of
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.bpe import load_tokenizer

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Layout",
    "Precision",
    "assemble",
    "blank_model",
    "dtype_name",
    "fingerprint",
    "load",
    "load_translator",
    "load_with_tokenizer",
    "read_model",
]


Layout = Literal["hf", "official"]

Precision = Literal["float32", "bf16", "int8", "int4"]

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def load(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
    precision: Precision | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Load a model and its tokenizer.

    Args:
        name_or_dir: see `resolve`.
        revision: branch, tag or commit of a hub repository.
        offline: whether to use only what the hub's cache holds; HF_HUB_OFFLINE=1 does the same.
        dtype: of the weights; None keeps that of the file. The recurrence (A_log, D, dt_proj.bias) stays
            float32 at least. It is not for quantised weights, which stay as they are.
        precision: how the matrices are held, whatever dtype says: "bf16", "int8" and "int4" quantise them
            on the way, for inference; "float32" undoes what was quantised. None leaves them as they come.
        tokenizer: a tokenizer.json, a directory or a hub id, in place of what is beside the model.

    Returns:
        model: ready to run, in evaluation mode.
        tokenizer: None if there is none beside the model.

    Raises:
        LongscanError: no such model, or a file that is damaged, unsafe, or does not fit the others; or the
            weights are quantised already, to another precision.
    """
    if precision not in (None, *get_args(Precision)):
        raise LongscanError(f"precision: expected {', '.join(get_args(Precision))}, got {precision!r}.")
    directory = resolve(name_or_dir, revision=revision, offline=offline)
    if directory.is_file():
        gguf, found = load_gguf(directory)
        if tokenizer is not None:
            found = find_tokenizer(tokenizer, offline)
            _check_ids(directory, found.vocab_size, gguf.config.vocab_size)
        return _at(gguf if kind_of(gguf) or not dtype else gguf.to(dtype), precision), found
    if tokenizer is not None:
        found = find_tokenizer(tokenizer, offline)
    elif (directory / "tokenizer.json").is_file():
        found = load_tokenizer(directory)
    else:
        found = official_tokenizer(offline) if str(name_or_dir).startswith(OFFICIAL) else None
    if precision:
        dtype = torch.float32 if precision == "float32" else None  # these formats round whatever there is
    model = read_model(directory, "language", found.vocab_size if found else None, dtype)
    assert isinstance(model, LanguageModel)
    return _at(model, precision), found


def load_translator(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Translator, Tokenizer]:
    """Load a translation model and its tokenizer.

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
    directory = resolve(name_or_dir, revision=revision, offline=offline)
    if directory.is_file() or not (directory / "tokenizer.json").is_file():
        raise LongscanError(
            f"{directory}: expected a model directory with the tokenizer.json of a translator."
        )
    _describe(directory, "translation", None)  # before anything is said about the tokenizer of another kind
    tokenizer = load_tokenizer(directory)
    model = read_model(directory, "translation", tokenizer.vocab_size, dtype)
    assert isinstance(model, Translator)
    return model, tokenizer


def read_model(
    directory: Path, kind: ModelKind, tokenizer_size: int | None, dtype: torch.dtype | None
) -> Model:
    """Read the model of a directory, strictly.

    Args:
        directory: with config.json and weights.
        kind: what the caller can use.
        tokenizer_size: ids of the tokenizer beside it, if there is one.
        dtype: of the weights; None keeps that of the file. Quantised weights stay as they are.

    Returns:
        The model, in evaluation mode.

    Raises:
        LongscanError: it is of another kind, or damaged, or does not fit the tokenizer.
    """
    name, config, stored = _describe(directory, kind, tokenizer_size)
    entry = MODELS[name]
    vocab_size = config.vocab_size  # type: ignore[attr-defined]  # every kind of model has one
    _check_ids(directory, tokenizer_size or 0, vocab_size)
    tensors = entry.rename(read_weights(directory, quantised=stored is not None))
    if stored:
        return _assemble_quantised(directory, entry.cls, config, tensors, stored)
    return assemble(directory, entry.cls, config, tensors, dtype)


def fingerprint(model: Model) -> str:
    """Return a short hash of the weights: a state or a cache made with others is of no use to this model.

    Args:
        model: on any device, in any type; another type is another fingerprint.
    """
    return model.fingerprint()


def _check_ids(directory: Path, tokenizer_size: int, vocab_size: int) -> None:
    """Insist that a model knows all ids of its tokenizer."""
    if tokenizer_size > vocab_size:
        raise LongscanError(
            f"{directory}: the tokenizer has {tokenizer_size:,} ids, the model {vocab_size:,}. "
            "They do not belong together: put the right tokenizer.json there, or remove this one."
        )


def _describe(
    directory: Path, kind: ModelKind, tokenizer_size: int | None
) -> tuple[str, Config, ops.Kind | None]:
    """Return the name, the sizes and the weights' format of a model directory; raise if of another kind."""
    path = directory / "config.json"
    raw = read_json(path)
    try:
        name, config = read_config(raw, tokenizer_size)
        stored = read_format(raw)
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    entry = MODELS[name]
    if entry.kind != kind:
        raise LongscanError(
            f"{directory} is a {name}, a {entry.kind} model; expected a {kind} model. Verbs for it: "
            f"{', '.join(entry.verbs)}."
        )
    return name, config, stored


def _at(model: LanguageModel, precision: Precision | None) -> LanguageModel:
    """Return the model at a precision."""
    if precision == "float32":
        return dequantized(model)
    if precision and precision != precision_of(model):
        quantize_model(model, precision)
    return model


def _assemble_quantised(
    directory: Path,
    cls: Callable[..., Model],
    config: Config,
    tensors: dict[str, Tensor],
    kind: ops.Kind,
) -> Model:
    """Build a model around stored tensors, for inference."""
    model = assemble(directory, cls, config, tensors, torch.float32, kind)
    if (found := precision_of(model)) != kind:
        raise LongscanError(
            f"{directory}: config.json says {kind}, the weights are {found}. Fetch both again."
        )
    return model.requires_grad_(False)


def assemble(
    directory: Path,
    cls: Callable[..., Model],
    config: Config,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    kind: ops.Kind | None = None,
) -> Model:
    """Build a model around tensors, strictly; each is copied once, out of its file.

    Args:
        directory: where they are from, for messages.
        cls: the model.
        config: its sizes.
        tensors: under our names; a head that repeats the embedding is taken out of them.
        dtype: of the weights; None keeps theirs.
        kind: the narrowest stored format among them, if they are quantised.

    Returns:
        The model, in evaluation mode.

    Raises:
        LongscanError: a tensor is missing, left over, or of another shape or type; or the sizes are absurd.
    """
    n_layers = config.to_dict().get("n_layers", 1)  # some have one that nobody counts
    if n_layers > len(tensors):  # before a loop over layers that do not exist
        raise LongscanError(
            f"{directory}: config.json says {n_layers:,} layers, {len(tensors)} tensors are there."
        )
    check_widths(directory, config.to_dict(), tensors)
    largest = max(tensors.values(), key=Tensor.numel, default=torch.empty(0))
    model = blank_model(directory, cls, config, dtype or largest.dtype)
    _drop_tied_head(directory, config, tensors)
    if kind:
        try:
            store_like(model, tensors)
        except LongscanError as error:
            raise LongscanError(f"{directory}: {error}") from error
    expected = model.state_dict()
    _check_fit(directory, expected, tensors, types=kind is not None)
    weights = {name: tensors[name].to(like.dtype, copy=True).contiguous() for name, like in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _drop_tied_head(directory: Path, config: Config, tensors: dict[str, Tensor]) -> None:
    """Drop a head that repeats the embedding, as others write it."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    tied = isinstance(config, LanguageModelConfig) and config.tie_embeddings
    if tied and embedding is not None and head is not None and embedding.shape == head.shape:
        if not torch.equal(embedding, head):
            raise LongscanError(
                f"{directory}: config.json says the head is the embedding, the file holds another {HEAD}. "
                "Set tie_word_embeddings (official: tie_embeddings) to false to use it."
            )
        del tensors[HEAD]


def blank_model(directory: Path, cls: Callable[..., Model], config: Config, dtype: torch.dtype) -> Model:
    """Build a model of shapes and types, without memory; which parameters stay wide is the model's affair."""
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can address
        raise LongscanError(f"{directory}: the sizes in config.json are impossible ({error}).") from error
    return model.to(dtype)


def _check_fit(
    directory: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, types: bool
) -> None:
    """Name everything that does not fit, in one error; also the types, where they tell what a tensor is."""
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
        "of another type": [
            f"{name} {dtype_name(tensor.dtype)} instead of {dtype_name(expected[name].dtype)}"
            for name, tensor in found.items()
            if types and name in expected and tensor.dtype != expected[name].dtype
        ],
    }
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LongscanError(
            "\n".join([f"{directory}: the weights are not those that config.json describes.", *lines])
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type as users know it."""
    return str(dtype).removeprefix("torch.")


def load_with_tokenizer(
    name: str,
    revision: str | None,
    offline: bool,
    precision: Precision | None = None,
    tokenizer: str | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """Load a model that is to read or write text; see `checkpoint.load`.

    Raises:
        LongscanError: as `load`; or the model classifies sequences, or has no tokenizer.
    """
    if is_sequence_model(name):
        raise LongscanError(
            f"{name} classifies whole sequences and predicts no tokens: expected a language model. "
            f"Try: longscan classify predict {name} ..."
        )
    model, found = load(name, revision=revision, offline=offline, precision=precision, tokenizer=tokenizer)
    if found is None:
        raise LongscanError(
            f"{name} has no tokenizer: put the tokenizer.json it was trained with beside its config.json, or "
            f"name one with --tokenizer. The authors' Mambas were trained with that of {OFFICIAL_TOKENIZER}."
        )
    return model, found
