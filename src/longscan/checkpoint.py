"""Model directories: find, load, save and convert them.

A directory holds config.json, weights and, usually, a tokenizer, in one of two layouts. Hugging Face:
safetensors, one file or shards, which transformers and others read too. Official: pytorch_model.bin, as the
authors of Mamba published theirs. Loading is strict: every tensor is there, in its shape, none is left over.

Quantised weights have the first layout, where config.json names the format and each stored matrix stands
beside its scales: `...in_proj.weight`, `...in_proj.scale`. All else in such a file is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from longscan import ops
from longscan.config import Config
from longscan.errors import LongscanError
from longscan.files import atomic_directory, read_json, write_json, writing
from longscan.gguf_files import GGUFType, load_gguf, save_gguf
from longscan.layouts import publish, read_config, read_format, to_official, write_config
from longscan.locate import OFFICIAL, find_tokenizer, official_tokenizer, resolve, shipped
from longscan.models import (
    MODELS,
    LanguageModel,
    LanguageModelConfig,
    MambaConfig,
    Model,
    ModelKind,
    Translator,
)
from longscan.models.layers import WeightOnly
from longscan.models.quantized import kind_of, quantize_model, store_like
from longscan.models.quantized import precision as precision_of
from longscan.ops.quant import STORED
from longscan.special_tokens import IDS
from longscan.tokenizer import Tokenizer, load_tokenizer
from longscan.weights import check_widths, read_weights, some

__all__ = [
    "Layout",
    "Precision",
    "assemble",
    "check_new",
    "convert",
    "dequantized",
    "fingerprint",
    "load",
    "load_translator",
    "read_model",
    "resolve",
    "save",
    "shipped",
]

Layout = Literal["hf", "official"]
ModelT = TypeVar("ModelT", bound=Model)
Precision = Literal["float32", "bf16", "int8", "int4"]

SHARD_SIZE = "5GB"
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


def save(
    model: Model,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory, whole or not at all, in Hugging Face layout if the model has one.

    Args:
        model: what to save; if it is quantised, as it is.
        directory: created, or replaced if it is a model directory.
        tokenizer: saved beside the model.
        dtype: of the weights in the file; None keeps the model's. The recurrence stays float32 at least.

    Raises:
        LongscanError: the directory holds something else, or could not be written; or there is a dtype for a
            quantised model.
        OSError: likewise.
    """
    _write(model, Path(directory), tokenizer, "hf", dtype)


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
) -> LanguageModel:
    """Rewrite a model in another layout or precision.

    Args:
        source: see `resolve`.
        destination: a new or empty directory, or a new file whose name ends in .gguf.
        layout: "hf" for safetensors, "official" for pytorch_model.bin and the authors' config.json.
        dtype: of the weights; None keeps that of the source. With a type, quantised weights become plain.
        gguf_type: of the matrices in a .gguf file, see `save_gguf`; not for a directory.
        tokenizer: see `load`.
        revision: see `load`.
        offline: see `load`.

    Returns:
        The model that was written.

    Raises:
        LongscanError: as `load` and `save`; or the destination is in use.
        OSError: the destination cannot be written.
    """
    destination = check_new(destination)
    model, found = load(source, revision=revision, offline=offline, dtype=dtype, tokenizer=tokenizer)
    if dtype and kind_of(model):
        model = dequantized(model).to(dtype)
    check_new(destination)  # again: another run may have written it meanwhile
    if destination.suffix == ".gguf":
        destination.parent.mkdir(parents=True, exist_ok=True)
        save_gguf(model, destination, found, gguf_type)
    else:
        _write(model, destination, found, layout, None)
    return model


def check_new(destination: str | Path) -> Path:
    """Insist that nothing is lost if a model is written to a directory.

    Args:
        destination: where to.

    Returns:
        The same.

    Raises:
        LongscanError: there is something else already.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise LongscanError(f"{destination} exists and is not an empty directory: choose another name.")
    return destination


@torch.no_grad()
def dequantized(model: ModelT) -> ModelT:
    """Return a model with plain float32 weights that computes the same.

    Args:
        model: quantised or not.

    Returns:
        A new model, which can be trained; the same one if nothing in it is quantised.
    """
    if kind_of(model) is None:
        return model
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, WeightOnly):
            tensors[f"{name}.weight"] = ops.dequantize(module.weight, module.scale)
            tensors.pop(f"{name}.scale", None)
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain.eval()


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
    model = _blank(directory, cls, config, dtype or largest.dtype)
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


def _blank(directory: Path, cls: Callable[..., Model], config: Config, dtype: torch.dtype) -> Model:
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
            f"{name} {_name(tensor.dtype)} instead of {_name(expected[name].dtype)}"
            for name, tensor in found.items()
            if types and name in expected and tensor.dtype != expected[name].dtype
        ],
    }
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LongscanError(
            "\n".join([f"{directory}: the weights are not those that config.json describes.", *lines])
        )


def _write(
    model: Model,
    directory: Path,
    tokenizer: Tokenizer | None,
    layout: Layout,
    dtype: torch.dtype | None,
) -> None:
    """Write a model directory in either layout."""
    config, kind = model.config, kind_of(model)
    if layout == "official" and not isinstance(config, MambaConfig):
        raise LongscanError(f"the official layout is Mamba's, this is a {type(model).__name__}: use hf.")
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if kind is None:
        dtype = dtype or model.dtype
        like = _blank(directory, type(model), config, dtype).state_dict()
        tensors = {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}
    elif dtype or layout == "official":
        place = f"a file of {_name(dtype)}" if dtype else "the official layout"
        raise LongscanError(
            f"the model is quantised ({kind}), and {place} has no place for that. "
            "Convert it to plain weights: `longscan convert --dtype float32`, in Python `dequantized(model)`."
        )
    else:
        dtype = STORED[kind]
    with atomic_directory(directory, marker="config.json") as new:
        with writing(directory):
            if isinstance(config, MambaConfig) and layout == "official":
                write_json(new / "config.json", to_official(config))
                tensors.setdefault(HEAD, tensors[EMBEDDING])  # one storage: it takes no more room in the file
                torch.save(tensors, new / "pytorch_model.bin")
            else:
                fields = write_config(model, _name(dtype), kind)
                if isinstance(model, LanguageModel):  # what generates elsewhere asks where a text ends
                    ends = tokenizer.special_ids if tokenizer else dict.fromkeys(IDS)
                    write_json(new / "generation_config.json", ends)
                    fields |= ends
                write_json(new / "config.json", fields)
                _write_safetensors({publish(model, name): tensor for name, tensor in tensors.items()}, new)
        if tokenizer:
            tokenizer.save(new)


def _write_safetensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, in shards if they are large."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), directory, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})


def _name(dtype: torch.dtype) -> str:
    """Name a type as users know it."""
    return str(dtype).removeprefix("torch.")
