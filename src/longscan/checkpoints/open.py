"""Open what `load` reads from, and check what kind of model it is."""

from __future__ import annotations

from pathlib import Path

from longscan.checkpoints.formats import StoredKind, kind_of_model
from longscan.checkpoints.formats.sequence_classifier import EXPECTED, TRAIN
from longscan.checkpoints.hub import resolve
from longscan.checkpoints.source import ModelDirectory, Source
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS

__all__ = ["check_kind", "open_source", "stored_kind"]

ARTICLES = {
    "language": "a language model",
    "translation": "a translation model",
    "masked": "a masked language model such as BERT",
    "sequence": EXPECTED,
    "image": "an image classifier",
}


def open_source(
    name_or_dir: str | Path, revision: str | None, offline: bool, model: str | None = None
) -> Source:
    """Return what to read a model from.

    Args:
        name_or_dir: see `resolve`.
        revision: likewise.
        offline: likewise.
        model: name of an image model, where a file's tensors may be of several.

    Raises:
        UsageError: it is another model.
        LongscanError: there is no such model, or no such kind of model.
    """
    path = resolve(name_or_dir, revision=revision, offline=offline)
    source: Source
    if path.is_dir():
        source = ModelDirectory(path)
    elif path.is_file():
        source = _open_file(path, model)
    else:  # reading a pipe would never end
        raise LongscanError(f"{path}: expected a file or a directory.")
    if model not in (None, source.name):
        raise UsageError(f"model: {path} is a {source.name}, got {model!r}. Leave it out.")
    return source


def stored_kind(
    name_or_dir: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    model: str | None = None,
) -> StoredKind:
    """Return what a model is for, without loading it.

    Args:
        name_or_dir: see `resolve`.
        revision: see `resolve`.
        offline: see `resolve`.
        model: see `open_source`.

    Raises:
        LongscanError: as `open_source`.
    """
    return kind_of_model(open_source(name_or_dir, revision, offline, model).name)


def check_kind(source: Source, kind: str) -> None:
    """Raise if a model is of another kind.

    Args:
        source: of the model.
        kind: which it has to be.

    Raises:
        LongscanError: it is another one; the error names the verbs that accept it.
    """
    actual = kind_of_model(source.name)
    if actual == kind:
        return
    expected = ARTICLES[kind]
    if actual == "sequence":
        raise LongscanError(
            f"{source.path} classifies whole sequences and predicts no tokens: expected {expected}. "
            f"Try: longscan classify predict {source.path} ..."
        )
    verbs = f"Verbs for it: {', '.join(MODELS[source.name].verbs)}."
    remedy = f"{verbs} {TRAIN}" if kind == "sequence" else verbs
    model = f"{'an' if actual == 'image' else 'a'} {actual} model"
    raise LongscanError(f"{source.path} is a {source.name}, {model}; expected {expected}. {remedy}")


def _open_file(path: Path, model: str | None) -> Source:
    """Return what a file holds; the readers are imported for a file only."""
    if path.suffix == ".gguf":
        from longscan.checkpoints.gguf.model import GGUFFile

        return GGUFFile(path)
    from longscan.checkpoints.bare import BareFile

    return BareFile(path, model)
