"""Labelled images or clips, decoded when they are needed: what both have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from longscan.data.labeled_texts import Example, divide, number_labels

__all__ = ["Labelled", "join"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Labelled(Generic[T]):
    """Labelled images or clips, decoded on demand.

    Attributes:
        decode: (index, channels) -> the image or clip, for each of the stored ones.
        index: (n,) int64, which of the stored ones these are.
        truth: (n,) int64 class indices.
        labels: names of the classes.
        names: of each stored one, for messages.
        size: (height, width) of all, if they are arrays.
        channels: 1 if all are greyscale arrays, else 3.
        animated: names of those with several frames, of which the first counts; if they were checked.
        content: a hash of all that is stored, of arrays and archives.
    """

    decode: Callable[[int, int], T]
    index: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    labels: tuple[str, ...]
    names: Sequence[str]
    size: tuple[int, int] | None = None
    channels: int = 3
    animated: tuple[str, ...] = ()
    content: str = ""

    def __len__(self) -> int:
        return len(self.index)

    def item(self, number: int, channels: int | None = None) -> T:
        """Return an image, of mode RGB or L, or a clip.

        Args:
            number: its index, from 0.
            channels: 3 or 1; `self.channels` if None.

        Raises:
            LongscanError: its file is damaged or has gone.
        """
        return self.decode(int(self.index[number]), channels or self.channels)

    def name(self, number: int) -> str:
        """Return the name of an image or clip.

        Args:
            number: its index.
        """
        return self.names[int(self.index[number])]

    def select(self, numbers: Iterable[int]) -> Self:
        """Return some of them.

        Args:
            numbers: their indices, in order.
        """
        chosen = np.fromiter(numbers, np.int64)
        return replace(self, index=self.index[chosen], truth=self.truth[chosen])

    def divide(self, share: float) -> tuple[Self, Self]:
        """Return training and validation data, stratified by class; see `labeled_texts.divide`.

        Args:
            share: fraction of each class to hold out, rounded down.
        """
        examples = [Example(str(label), "", None, str(n)) for n, label in enumerate(self.truth)]
        train, valid = divide(examples, share)
        return self.select(int(e.where) for e in train), self.select(int(e.where) for e in valid)

    def labelled(self, labels: Sequence[str]) -> Self:
        """Return the same with the class indices of a model.

        Args:
            labels: of the model.

        Raises:
            LongscanError: a label was not in the training data.
        """
        examples = [Example(self.labels[label], "", None, self.name(n)) for n, label in enumerate(self.truth)]
        return replace(self, truth=np.array(number_labels(examples, labels)), labels=tuple(labels))

    def fingerprint(self) -> str:
        """Return a hash of the names and labels, and of the content of arrays and archives, not of files."""
        digest = hashlib.sha256("\0".join([self.content, *self.labels]).encode())
        for number, label in enumerate(self.truth):
            name = PurePosixPath(self.name(number)).name  # the folder may move
            digest.update(f"{name}\0{label}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


L = TypeVar("L", bound=Labelled[Any])


def join(parts: Sequence[L]) -> L:
    """Return the images or clips of several sources, with class indices among all their labels.

    Args:
        parts: at least one.
    """
    names = {label for part in parts for label in part.labels}
    labels = tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))
    parts = [part.labelled(labels) for part in parts]
    if len(parts) == 1:
        return parts[0]
    sizes, starts = {part.size for part in parts}, np.cumsum([0, *(len(part) for part in parts)])

    def decode(number: int, channels: int) -> Any:
        which = int(np.searchsorted(starts, number, side="right")) - 1
        return parts[which].item(number - int(starts[which]), channels)

    return replace(
        parts[0],
        decode=decode,
        index=np.arange(starts[-1]),
        truth=np.concatenate([part.truth for part in parts]),
        names=[part.name(number) for part in parts for number in range(len(part))],
        size=sizes.pop() if len(sizes) == 1 else None,
        channels=max(part.channels for part in parts),
        animated=tuple(name for part in parts for name in part.animated),
        content=" ".join(part.content for part in parts),
    )
