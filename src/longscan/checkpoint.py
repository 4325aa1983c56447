"""Model directories: find, load, save and convert them.

A directory holds config.json, weights and, usually, a tokenizer, in one of two layouts. Hugging Face:
safetensors, one file or shards, which transformers and others read too. Official: pytorch_model.bin, as the
authors of Mamba published theirs. Loading is strict: every tensor is there, in its shape, none is left over.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from longscan.config import nearest
from longscan.errors import LongscanError
from longscan.files import atomic_directory, read_json, write_json
from longscan.layouts import read_config, to_huggingface, to_official
from longscan.models import MODELS, LanguageModel, LanguageModelConfig, MambaConfig, ModelEntry
from longscan.tokenizer import Tokenizer, load_tokenizer
from longscan.weights import find_weights, read_weights, some

__all__ = ["Layout", "convert", "fingerprint", "load", "resolve", "save", "shipped"]

Layout = Literal["hf", "official"]

ASSETS = Path(__file__).parent / "assets"
SHARD_SIZE = "5GB"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"

# what is fetched from a hub repository, which often holds the same weights in other formats too
WANTED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
WANTED_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
WANTED_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]

# the authors' repositories name this tokenizer in their text and do not hold it
OFFICIAL, OFFICIAL_TOKENIZER = "state-spaces/mamba-", "EleutherAI/gpt-neox-20b"


def load(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Load a model and its tokenizer.

    Args:
        name_or_dir: see `resolve`.
        revision: branch, tag or commit of a hub repository.
        offline: whether to use only what the hub's cache holds; HF_HUB_OFFLINE=1 does the same.
        dtype: of the weights; None keeps that of the file. The recurrence (A_log, D, dt_proj.bias) stays
            float32 at least.

    Returns:
        model: ready to run, in evaluation mode.
        tokenizer: None if there is none beside the model.

    Raises:
        LongscanError: no such model, or a file that is damaged, unsafe, or does not fit the others.
    """
    directory = resolve(name_or_dir, revision=revision, offline=offline)
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
    if tokenizer is None and str(name_or_dir).startswith(OFFICIAL):
        tokenizer = _official_tokenizer(offline)
    path = directory / "config.json"
    raw = read_json(path)
    try:
        name, config = read_config(raw, tokenizer.vocab_size if tokenizer else None)
    except LongscanError as error:
        raise LongscanError(f"{path}: {error}") from error
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise LongscanError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}. "
            "They do not belong together: put the right tokenizer.json there, or remove this one."
        )
    tensors = MODELS[name].rename(read_weights(directory))
    return _assemble(directory, MODELS[name], config, tensors, dtype), tokenizer


def save(
    model: LanguageModel,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory in Hugging Face layout, whole or not at all.

    Args:
        model: what to save.
        directory: created, or replaced if it is a model directory.
        tokenizer: saved beside the model.
        dtype: of the weights in the file; None keeps the model's. The recurrence stays float32 at least.

    Raises:
        LongscanError: the directory holds something else, or could not be written.
        OSError: likewise.
    """
    _write(model, Path(directory), tokenizer, "hf", dtype)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    layout: Layout = "hf",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> LanguageModel:
    """Rewrite a model directory in another layout or precision.

    Args:
        source: see `resolve`.
        destination: a new or empty directory.
        layout: "hf" for safetensors, "official" for pytorch_model.bin and the authors' config.json.
        dtype: of the weights; None keeps that of the source.
        revision: see `load`.
        offline: see `load`.

    Returns:
        The model that was written.

    Raises:
        LongscanError: as `load` and `save`; or the destination is in use.
        OSError: the destination cannot be written.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise LongscanError(f"{destination} exists and is not an empty directory: choose another name.")
    model, tokenizer = load(source, revision=revision, offline=offline, dtype=dtype)
    _write(model, destination, tokenizer, layout, None)
    return model


def resolve(name_or_dir: str | Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """Find a model directory, fetching it if it lives on the Hugging Face hub.

    Args:
        name_or_dir: in this order, the name of a shipped model, a directory, or a hub id such as
            "state-spaces/mamba-130m-hf".
        revision: see `load`.
        offline: see `load`.

    Returns:
        A local directory with a config.json.

    Raises:
        LongscanError: there is no such model, it cannot be fetched, or the directory is no model directory.
    """
    name = str(name_or_dir)
    if name in shipped():
        return ASSETS / name
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise LongscanError(f"{path} is a file: name the directory that holds it and its config.json.")
    if isinstance(name_or_dir, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _fetch(name, revision, offline)
    raise LongscanError(
        f"no model called {name!r}, and no such directory{nearest(name, shipped())}\n"
        "A model of the Hugging Face hub is called owner/name, for example state-spaces/mamba-130m-hf."
    )


def shipped() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def fingerprint(model: LanguageModel) -> str:
    """Return a short hash of the weights: a state or a cache made with others is of no use to this model.

    Args:
        model: on any device, in any type; another type is another fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _checked(directory: Path) -> Path:
    """Return a directory that has a config.json, or say where it may be."""
    if (directory / "config.json").is_file():
        return directory
    if (directory / "model" / "config.json").is_file():
        raise LongscanError(f"{directory} is a training run: its model is {directory / 'model'}.")
    found = some(path.name for path in directory.iterdir())
    raise LongscanError(f"{directory} is not a model directory: expected config.json, found {found}.")


def _fetch(repository: str, revision: str | None, offline: bool) -> Path:
    """Fetch a model, its pickles only if it has no safetensors."""
    directory = _checked(_snapshot(repository, WANTED + WANTED_WEIGHTS, revision, offline))
    if not find_weights(directory):
        directory = _snapshot(repository, WANTED + WANTED_PICKLES, revision, offline)
    return directory


def _snapshot(repository: str, patterns: list[str], revision: str | None, offline: bool) -> Path:
    """Fetch files of a hub repository into the hub's cache, or find them there; explain what prevents it."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
        )
    except errors.GatedRepoError as error:
        raise LongscanError(
            f"{repository} is gated: ask for access on its page, then `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LongscanError(
            f"no directory {repository} here and no such model on the Hugging Face hub. "
            "Check the spelling; if it is private, `hf auth login` first."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LongscanError(f"{repository} has no revision {revision!r} on the Hugging Face hub.") from error
    except errors.LocalEntryNotFoundError as error:
        why = "not asked (offline)" if offline or hub.is_offline_mode() else "out of reach"
        raise LongscanError(
            f"no directory {repository} here, no copy from the Hugging Face hub, and the hub is {why}.\n"
            f"Fetch it once with a connection, or use a model that is shipped: {', '.join(shipped())}."
        ) from error
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        raise LongscanError(
            f"{repository} could not be fetched from the Hugging Face hub ({type(error).__name__}: {error})."
        ) from error


def _official_tokenizer(offline: bool) -> Tokenizer | None:
    """Fetch the tokenizer the published models were trained with; without it the model still computes."""
    try:
        return load_tokenizer(_snapshot(OFFICIAL_TOKENIZER, WANTED[2:], None, offline))
    except LongscanError as error:
        warnings.warn(f"the model has no tokenizer: {error}", stacklevel=3)
        return None


def _assemble(
    directory: Path,
    entry: ModelEntry,
    config: LanguageModelConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
) -> LanguageModel:
    """Build a model around the tensors; each is copied once, out of its file."""
    if config.n_layers > len(tensors):  # before a loop over layers that do not exist
        raise LongscanError(
            f"{directory}: config.json says {config.n_layers:,} layers, {len(tensors)} tensors are there."
        )
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    model = _blank(
        directory, entry, config, dtype or (torch.float32 if embedding is None else embedding.dtype)
    )
    if config.tie_embeddings and embedding is not None and head is not None and embedding.shape == head.shape:
        if not torch.equal(embedding, head):
            raise LongscanError(
                f"{directory}: config.json says the head is the embedding, the file holds another {HEAD}. "
                "Set tie_word_embeddings (official: tie_embeddings) to false to use it."
            )
        del tensors[HEAD]
    expected = model.state_dict()
    _check_fit(directory, expected, tensors)
    weights = {name: tensors[name].to(like.dtype, copy=True).contiguous() for name, like in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _blank(
    directory: Path, entry: ModelEntry, config: LanguageModelConfig, dtype: torch.dtype
) -> LanguageModel:
    """Build a model of shapes and types, without memory; which parameters stay wide is the model's affair."""
    try:
        with torch.device("meta"):
            model = entry.cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes whose product no machine can address
        raise LongscanError(f"{directory}: the sizes in config.json are impossible ({error}).") from error
    return model.to(dtype)


def _check_fit(directory: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Name everything that does not fit, in one error."""
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {some(names)}" for what, names in problems.items() if names]
        raise LongscanError(
            "\n".join([f"{directory}: the weights are not those that config.json describes.", *lines])
        )


def _write(
    model: LanguageModel,
    directory: Path,
    tokenizer: Tokenizer | None,
    layout: Layout,
    dtype: torch.dtype | None,
) -> None:
    """Write a model directory in either layout."""
    config = model.config
    if not isinstance(config, MambaConfig):
        raise LongscanError(f"{type(model).__name__} has no published layout to be saved in.")
    dtype = dtype or model.backbone.embedding.weight.dtype
    like = _blank(directory, MODELS["mamba"], config, dtype).state_dict()
    tensors = {
        name: tensor.detach().to("cpu", like[name].dtype) for name, tensor in model.state_dict().items()
    }
    with atomic_directory(directory, marker="config.json") as new:
        try:
            if layout == "official":
                write_json(new / "config.json", to_official(config))
                tensors.setdefault(HEAD, tensors[EMBEDDING])  # one storage: it takes no more room in the file
                torch.save(tensors, new / "pytorch_model.bin")
            else:
                eos_id = tokenizer.eos_id if tokenizer else None
                ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id)
                fields = to_huggingface(config, str(dtype).removeprefix("torch."))
                write_json(new / "config.json", {**fields, **ends})
                write_json(new / "generation_config.json", ends)
                _write_safetensors(tensors, new)
        except (SafetensorError, RuntimeError) as error:  # how the two libraries say that the disk is full
            raise LongscanError(f"{directory}: the weights could not be written ({error}).") from error
        if tokenizer:
            tokenizer.save(new)


def _write_safetensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors of our names under Hugging Face's, in shards if they are large."""
    from huggingface_hub import save_torch_state_dict

    theirs = {
        name.replace("backbone.embedding.", "backbone.embeddings."): tensor
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(theirs, directory, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
