"""Resolve the name of a model: one that ships with the package, a path, or an id of the Hugging Face hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from longscan.checkpoints.weights import BARE_SUFFIXES, find_weights, some
from longscan.core.config import nearest
from longscan.core.files import find_directory
from longscan.errors import LongscanError
from longscan.models import MODELS, preset_owner
from longscan.tokenizers import chat_templates
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.bpe import load_tokenizer

__all__ = ["OFFICIAL", "OFFICIAL_TOKENIZER", "find_tokenizer", "official_tokenizer", "resolve", "shipped"]

ASSETS = Path(__file__).parent.parent / "assets"

# what is downloaded from a hub repository, which often holds the same weights in other formats too
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]
MODEL_FILES = ["config.json", "generation_config.json", *TOKENIZER_FILES, *chat_templates.FILES]
MODEL_FILES += ["vocab.txt", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
MODEL_FILES += ["config_sentence_transformers.json"]
SAFETENSORS_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
PICKLE_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]

# the authors' repositories name this tokenizer in their text and do not hold it
OFFICIAL, OFFICIAL_TOKENIZER = "state-spaces/mamba-", "EleutherAI/gpt-neox-20b"


def resolve(name_or_dir: str | Path, *, revision: str | None = None, offline: bool = False) -> Path:
    """Return the path of a model, downloaded first if it is on the Hugging Face hub.

    Args:
        name_or_dir: in this order, the name of a shipped model, a directory, a .gguf file, a file of weights
            that comes without config.json (.pth, .pt, .bin, .safetensors), or a hub id such as
            "state-spaces/mamba-130m-hf".
        revision: branch, tag or commit of a hub repository.
        offline: whether to use only what the hub's cache holds.

    Returns:
        A local directory with a config.json, or a file.

    Raises:
        LongscanError: there is no such model, it cannot be fetched, or the directory is no model directory.
    """
    name = str(name_or_dir)
    if not name.strip():
        raise LongscanError("the name of the model is empty: expected a directory, a file or a hub id.")
    if name in shipped():
        return ASSETS / name
    path = find_directory(Path(name).expanduser())
    if path.is_dir():
        return _checked(path)
    if path.suffix in (".gguf", *BARE_SUFFIXES) and path.exists():
        return path
    if path.suffix == ".onnx" and path.exists():
        raise LongscanError(
            f"{path} is for ONNX Runtime: expected the model that it was made from, a directory or a file."
        )
    if path.exists():
        raise LongscanError(f"{path} is a file: name the directory that holds it and its config.json.")
    if isinstance(name_or_dir, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _fetch(name, revision, offline)
    if owner := name if name in MODELS else preset_owner(name):
        what, preset = ("a model", "") if owner == name else (f"a preset of {owner}", f" --preset {name}")
        raise LongscanError(
            f"{name} is the name of {what}, which comes without weights: expected a directory or a file of "
            f"them. For a new model: --model {owner}{preset}."
        )
    raise LongscanError(
        f"no model called {name!r}, and no such directory{nearest(name, shipped())}\n"
        "A model of the Hugging Face hub is called owner/name, for example state-spaces/mamba-130m-hf."
    )


def shipped() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def official_tokenizer(offline: bool) -> Tokenizer | None:
    """Return the tokenizer that the published models were trained with; without it a model still computes.

    Args:
        offline: whether to use only what the hub's cache holds.

    Returns:
        None, after a warning, if it can't be fetched.
    """
    try:
        return load_tokenizer(_snapshot(OFFICIAL_TOKENIZER, TOKENIZER_FILES, None, offline))
    except LongscanError as error:
        warnings.warn(f"the model has no tokenizer: {error}", stacklevel=3)
        return None


def find_tokenizer(name_or_path: str | Path, offline: bool) -> Tokenizer:
    """Return a tokenizer that a user names.

    Args:
        name_or_path: a tokenizer.json, a directory with one, a shipped model, or a hub id.
        offline: whether to use only what the hub's cache holds.

    Raises:
        LongscanError: there is none, or it is damaged.
    """
    name = str(name_or_path)
    if name in shipped():
        return load_tokenizer(ASSETS / name)
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        path = _snapshot(name, TOKENIZER_FILES, None, offline)
    return load_tokenizer(path)


def _checked(directory: Path) -> Path:
    """Return a directory that has a config.json; if it has none, the error suggests where it may be."""
    if (directory / "config.json").is_file():
        return directory
    if (directory / "model" / "config.json").is_file():
        raise LongscanError(f"{directory} is a training run: its model is {directory / 'model'}.")
    found = some(path.name for path in directory.iterdir())
    hint = " Name the .gguf file itself." if any(directory.glob("*.gguf")) else ""
    raise LongscanError(f"{directory} is not a model directory: expected config.json, found {found}.{hint}")


def _fetch(repository: str, revision: str | None, offline: bool) -> Path:
    """Download a model, its pickles only if it has no safetensors."""
    directory = _checked(_snapshot(repository, MODEL_FILES + SAFETENSORS_FILES, revision, offline))
    if not find_weights(directory):
        directory = _snapshot(repository, MODEL_FILES + PICKLE_FILES, revision, offline)
    return directory


def _snapshot(repository: str, patterns: list[str], revision: str | None, offline: bool) -> Path:
    """Return the directory in the hub's cache with files of a repository, downloaded if need be."""
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
