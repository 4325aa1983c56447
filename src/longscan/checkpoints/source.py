"""What `load` reads from: a model directory here, a GGUF file in `gguf`, with one interface.

A directory holds config.json, weights and, usually, a tokenizer, in a layout of `formats`. The weights are
safetensors, one file or shards, or pytorch_model.bin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from longscan.checkpoints.formats import find_format, read_format
from longscan.checkpoints.weights import read_weights
from longscan.core.config import Config
from longscan.core.files import read_json
from longscan.errors import LongscanError
from longscan.ops import Kind
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.bpe import load_tokenizer

__all__ = ["ModelDirectory", "Source", "Weights", "check_ids"]


class Weights(NamedTuple):
    """The tensors of a model.

    Attributes:
        tensors: by our names; none repeats another one.
        kind: the narrowest stored format among them, if they are quantised.
        mapped: whether they are views of a file, which may change.
        expected: the tensors that they have to be, for messages.
    """

    tensors: dict[str, Tensor]
    kind: Kind | None = None
    mapped: bool = False
    expected: str = "those that config.json describes"


class Source(ABC):
    """A model on disk.

    Attributes:
        path: of the directory or the file.
        name: of the model, in FORMATS.
        sized: whether it says the image size of a model of images.
    """

    path: Path
    name: str
    sized = True

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that comes with the model, if there is one.

        Raises:
            LongscanError: it is damaged.
        """

    @abstractmethod
    def config(self, tokenizer_size: int | None = None) -> Config:
        """Return the sizes of the model.

        Args:
            tokenizer_size: ids of its tokenizer, see `Format.read`.

        Raises:
            LongscanError: one is missing, unknown, out of range, or means another model.
        """

    @abstractmethod
    def weights(self, config: Config) -> Weights:
        """Return the tensors of the model.

        Args:
            config: its sizes.

        Raises:
            LongscanError: they are damaged, or of a type that is not read.
        """


class ModelDirectory(Source):
    """A directory with config.json.

    Args:
        path: of the directory.

    Raises:
        LongscanError: config.json is damaged, or describes no model that is here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "config.json"
        self._raw = read_json(self._file)
        try:
            self.name, self.format = find_format(self._raw)
        except LongscanError as error:
            raise LongscanError(f"{self._file}: {error}") from error

    def tokenizer(self) -> Tokenizer | None:
        """Return what tokenizer.json describes; see `Source.tokenizer`."""
        return load_tokenizer(self.path) if (self.path / "tokenizer.json").is_file() else None

    def config(self, tokenizer_size: int | None = None) -> Config:
        """Return what config.json says; see `Source.config`."""
        try:
            return self.format.read(self._raw, tokenizer_size)
        except LongscanError as error:
            raise LongscanError(f"{self._file}: {error}") from error

    def weights(self, config: Config) -> Weights:
        """Return views of the files; see `Source.weights`."""
        try:
            kind = read_format(self._raw)
        except LongscanError as error:
            raise LongscanError(f"{self._file}: {error}") from error
        theirs = read_weights(self.path, quantised=kind is not None, buffers=self.format.buffers)
        try:
            tensors = self.format.incoming(theirs, config)
        except LongscanError as error:
            raise LongscanError(f"{self.path}: {error}") from error
        return Weights(tensors, kind, mapped=True)


def check_ids(path: str | Path, tokenizer_size: int, vocab_size: int) -> None:
    """Raise unless a model knows all ids of its tokenizer.

    Args:
        path: of the model.
        tokenizer_size: ids of the tokenizer; 0 if there is none.
        vocab_size: ids of the model.

    Raises:
        LongscanError: it does not.
    """
    if tokenizer_size > vocab_size:
        raise LongscanError(
            f"{path}: the tokenizer has {tokenizer_size:,} ids, the model {vocab_size:,}. "
            "They do not belong together: give the model the tokenizer.json it was trained with, or none."
        )
