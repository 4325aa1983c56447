"""A file of tensors without config.json, as authors of vision models publish: its tensors say what it is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longscan.checkpoints.formats import BARE, BareFormat
from longscan.checkpoints.pickles import SETTINGS, check_tensors, unpickle
from longscan.checkpoints.source import Source, Weights
from longscan.checkpoints.weights import dtype_name, read_safetensors, some
from longscan.core.config import Config
from longscan.errors import LongscanError
from longscan.tokenizers.base import Tokenizer

__all__ = ["BareFile"]

# where the checkpoint of a training run has its weights; published accuracies are those of "model"
ENTRIES = ("model", "state_dict", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")  # of what a model was wrapped in


class BareFile(Source):
    """A file of tensors: safetensors, or of torch.save.

    Args:
        path: of the file.
        model: name of the model, where the tensors may be of several; None: see `_format`.

    Raises:
        LongscanError: it is damaged, contains code, or its tensors are of no model that is here.
    """

    def __init__(self, path: Path, model: str | None = None) -> None:
        self.path = path
        self._entries, tensors = _read(path)
        tensors = _without_prefixes(path, tensors)
        self._format = _format(path, tensors, model)
        self.name, self.sized = self._format.name, self._format.sized
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.itemsize < 2:
                got = dtype_name(tensor.dtype)
                raise LongscanError(f"{path}: {name}: expected float32, float16 or bfloat16, got {got}.")
        try:
            self._tensors = self._format.rename(tensors)
        except LongscanError as error:
            raise LongscanError(f"{path}: {error}") from error
        where = f"the names and shapes in {self._entries[0]!r}" if self._entries else "their names and shapes"
        self._expected = f"those of the {self.name} that {where} describe"

    def tokenizer(self) -> Tokenizer | None:
        """Return None: there is none."""
        return None

    def config(self, tokenizer_size: int | None = None) -> Config:
        """Return what follows from names and shapes; see `Source.config`."""
        try:
            return self._format.infer(self._tensors)
        except LongscanError as error:
            raise LongscanError(f"{self.path}: {error}") from error

    def weights(self, config: Config) -> Weights:
        """Return views of the file; see `Source.weights`. A warning says which entry is taken."""
        if len(self._entries) > 1:
            others = ", ".join(map(repr, self._entries[1:]))
            warnings.warn(
                f"{self.path}: loads the weights in {self._entries[0]!r}, not {others}.", stacklevel=3
            )
        return Weights(self._tensors, mapped=True, expected=self._expected)


def _read(file: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return the entries of a training run that hold weights, and the tensors of the first."""
    if file.suffix == ".safetensors":
        return [], read_safetensors(file)
    content = unpickle(file, SETTINGS)
    entries = [name for name in ENTRIES if isinstance(content, dict) and isinstance(content.get(name), dict)]
    tensors = content[entries[0]] if entries else content
    check_tensors(file, tensors)
    return entries, tensors


def _format(path: Path, tensors: Mapping[str, Tensor], model: str | None) -> BareFormat:
    """Return the layout of tensors; of several models the one that the user or else the file's name says."""
    matching = [form for form in BARE.values() if form.matches(tensors)]
    if not matching:
        known = ", ".join(BARE)
        raise LongscanError(
            f"{path}: its tensors ({some(tensors)}) are those of no model that is known without a "
            f"config.json: {known}. If it has one, name the directory that holds both."
        )
    words = [model] if model else re.findall("[a-z]+", path.name.lower())
    named = matching if len(matching) == 1 else [form for form in matching if form.name in words]
    if len(named) == 1:
        return named[0]
    names = [form.name for form in matching]
    raise LongscanError(
        f"{path}: its tensors may be those of a {' or a '.join(names)}, and nothing in the file says which. "
        f"Choose with --model {names[0]} of classify or convert, in Python model={names[0]!r}; or rename it: "
        f"the name of the model in the file's name decides, such as {names[0]}_{path.name}."
    )


def _without_prefixes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names without prefixes of wrappers; two of one name are refused."""
    theirs: dict[str, str] = {}
    for name in tensors:
        first = theirs.setdefault(_unwrapped(name), name)
        if first != name:
            raise LongscanError(f"{path}: {first} and {name} are two tensors of one name. Keep one of them.")
    return {ours: tensors[name] for ours, name in theirs.items()}


def _unwrapped(name: str) -> str:
    """Return the name of a tensor without prefixes of wrappers."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
