"""Labelled images, decoded when they are needed: a folder for each class, an archive, or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from longscan.data.archives import has_suffix, read_npz
from longscan.data.image_files import from_array, is_animated, read_image
from longscan.data.image_folders import ARCHIVES, ImageFiles, image_files
from longscan.data.labeled_arrays import parse_labels
from longscan.data.labeled_texts import Example, divide, number_labels
from longscan.errors import LongscanError, UsageError

__all__ = ["Images", "read_images"]

NPZ = ".npz"
CHANNELS = (1, 3, 4)  # of arrays: greyscale, RGB, and RGB with alpha


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, decoded on demand.

    Attributes:
        decode: (index, channels) -> the image, for each of the stored ones.
        index: (n,) int64, which of the stored images these are.
        truth: (n,) int64 class indices.
        labels: names of the classes.
        names: of each stored image, for messages.
        size: (height, width) of all, if they are arrays.
        channels: 1 if all are greyscale arrays, else 3.
        animated: names of those with several frames, of which the first counts; if they were checked.
        content: a hash of all that is stored, of arrays and archives.
    """

    decode: Callable[[int, int], Image.Image]
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

    def image(self, number: int, channels: int | None = None) -> Image.Image:
        """Return an image, of mode RGB or L.

        Args:
            number: its index, from 0.
            channels: 3 or 1; `self.channels` if None.

        Raises:
            LongscanError: its file is damaged or has gone.
        """
        return self.decode(int(self.index[number]), channels or self.channels)

    def name(self, number: int) -> str:
        """Return the name of an image.

        Args:
            number: its index.
        """
        return self.names[int(self.index[number])]

    def select(self, numbers: Iterable[int]) -> Self:
        """Return some of the images.

        Args:
            numbers: their indices, in order.
        """
        chosen = np.fromiter(numbers, np.int64)
        return replace(self, index=self.index[chosen], truth=self.truth[chosen])

    def divide(self, share: float) -> tuple[Self, Self]:
        """Return training and validation images, stratified by class; see `labeled_texts.divide`.

        Args:
            share: fraction of each class to hold out, rounded down.
        """
        examples = [Example(str(label), "", None, str(n)) for n, label in enumerate(self.truth)]
        train, valid = divide(examples, share)
        return self.select(int(e.where) for e in train), self.select(int(e.where) for e in valid)

    def labelled(self, labels: Sequence[str]) -> Self:
        """Return the images with the class indices of a model.

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


def read_images(paths: Sequence[str | Path], *, split: str = "train", check: bool = False) -> Images:
    """Return the labelled images of files and folders.

    Args:
        paths: any of
            folders with a folder for each class, which may be nested in a folder, perhaps beside that of
            another split: train and test, val, valid or validation;
            .zip and tar archives of such a folder (a tar is read into memory, still compressed);
            .npz files of x, (n, height, width) or (n, height, width, channels) bytes, y, (n,), and perhaps
            labels, the names of the classes; with two parts x_train, y_train, x_test, y_test. Or of encoded
            images: train_jpeg, all bytes, train_offsets, (n + 1,), train_labels, (n,), and classes.
        split: which part is meant, if there are several.
        check: whether to open each file, so that what is no image is noticed at once.

    Returns:
        The images, in the order of their names or that of the file.

    Raises:
        LongscanError: a file is something else, or damaged; there is a class without images, or no class.
        UsageError: there are no paths.
        OSError: a file can't be read.
    """
    if not paths:
        raise UsageError("nothing to read: name folders of images, a folder in each for every class.")
    parts = [_read(Path(path), split, check) for path in paths]
    names = {label for part in parts for label in part.labels}
    labels = tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))
    parts = [part.labelled(labels) for part in parts]
    if len(parts) == 1:
        return parts[0]
    sizes, starts = {part.size for part in parts}, np.cumsum([0, *(len(part) for part in parts)])

    def decode(number: int, channels: int) -> Image.Image:
        which = int(np.searchsorted(starts, number, side="right")) - 1
        return parts[which].image(number - int(starts[which]), channels)

    return Images(
        decode=decode,
        index=np.arange(starts[-1]),
        truth=np.concatenate([part.truth for part in parts]),
        labels=labels,
        names=[part.name(number) for part in parts for number in range(len(part))],
        size=sizes.pop() if len(sizes) == 1 else None,
        channels=max(part.channels for part in parts),
        animated=tuple(name for part in parts for name in part.animated),
        content=" ".join(part.content for part in parts),
    )


def _read(path: Path, split: str, check: bool) -> Images:
    """Read one file or folder."""
    if has_suffix(path, NPZ):
        return _npz(path, split)
    if path.is_dir() or has_suffix(path, *ARCHIVES):
        return _files(path, image_files(path, split), check)
    if not path.exists():
        raise LongscanError(f"{path}: no such file or folder.")
    raise LongscanError(
        f"{path}: expected a folder, .zip or tar with a folder for each class, or an .npz file."
    )


def _files(path: Path, found: ImageFiles, check: bool) -> Images:
    """Return the images of a folder or an archive."""
    full = [str(path / name) for name in found.names]
    pairs = zip(found.names, full, strict=True) if check else ()
    animated = tuple(shown for name, shown in pairs if is_animated(found.get(name), shown))

    def decode(number: int, channels: int) -> Image.Image:
        return read_image(found.get(found.names[number]), full[number], channels)

    return Images(
        decode=decode,
        index=np.arange(len(full)),
        truth=np.array(found.truth),
        labels=found.labels,
        names=full,
        animated=animated,
        content=found.content,
    )


# arrays


def _npz(path: Path, split: str) -> Images:
    """Read arrays, of pixels or of encoded images."""
    arrays = read_npz(path)
    names = next((arrays[key] for key in ("labels", "classes", "label_names") if key in arrays), None)
    if {f"{split}_jpeg", f"{split}_offsets", f"{split}_labels"} <= arrays.keys():
        return _encoded(path, arrays, split, names)
    tail = "" if "x" in arrays else f"_{split}"
    if f"x{tail}" not in arrays or f"y{tail}" not in arrays:
        got = ", ".join(sorted(arrays)) or "nothing"
        raise LongscanError(f"{path}: expected arrays x and y, or x_{split} and y_{split}; got {got}.")
    x = arrays[f"x{tail}"]
    if (
        x.dtype != np.uint8
        or x.ndim not in (3, 4)
        or 0 in x.shape
        or x.shape[3:] not in [(), *((c,) for c in CHANNELS)]
    ):
        raise LongscanError(
            f"{path}: expected images x (n, height, width) or (n, height, width, channels) of bytes, with "
            f"1, 3 or 4 channels; got {x.dtype} {x.shape}. If the channels come first: "
            "x.transpose(0, 2, 3, 1)."
        )
    truth, labels = _truth(path, arrays[f"y{tail}"], len(x), names)
    channels = 1 if x.shape[3:] in ((), (1,)) else 3
    full = [f"{path}:{number}" for number in range(len(x))]
    return Images(
        decode=lambda number, channels: from_array(x[number], channels),
        index=np.arange(len(x)),
        truth=truth,
        labels=labels,
        names=full,
        size=(int(x.shape[1]), int(x.shape[2])),
        channels=channels,
        content=hashlib.sha256(np.ascontiguousarray(x).data).hexdigest(),
    )


def _encoded(
    path: Path, arrays: dict[str, npt.NDArray[Any]], split: str, names: npt.NDArray[Any] | None
) -> Images:
    """Return images that are encoded one after another in one array."""
    content, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
    flat = (
        content.dtype == np.uint8 and content.ndim == 1 and offsets.dtype.kind in "iu" and offsets.ndim == 1
    )
    if not flat or len(offsets) < 2 or int(offsets[0]) < 0 or int(offsets[-1]) > len(content):
        raise LongscanError(
            f"{path}: expected {split}_jpeg, all bytes, and {split}_offsets, where each image starts and the "
            f"last one ends; got {content.dtype} {content.shape} and {offsets.dtype} {offsets.shape}."
        )
    offsets = offsets.astype(np.int64)
    if (np.diff(offsets) <= 0).any():
        raise LongscanError(f"{path}: expected {split}_offsets that increase.")
    truth, labels = _truth(path, arrays[f"{split}_labels"], len(offsets) - 1, names)
    full = [f"{path}:{number}" for number in range(len(truth))]

    def decode(number: int, channels: int) -> Image.Image:
        return read_image(content[offsets[number] : offsets[number + 1]].tobytes(), full[number], channels)

    digest = hashlib.sha256(np.ascontiguousarray(content).data).hexdigest()
    return Images(decode, np.arange(len(truth)), truth, labels, full, content=digest)


def _truth(
    path: Path, y: npt.NDArray[Any], n: int, names: npt.NDArray[Any] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return class indices and names."""
    found = parse_labels(path, y, n)
    if not isinstance(found, list):
        raise LongscanError(
            f"{path}: expected y of classes, integers or texts; got {y.dtype}. Try y.astype(int)."
        )
    if names is not None and y.dtype.kind in "iu":
        if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names):
            raise LongscanError(
                f"{path}: expected labels, one name for each class; got {names.dtype} {names.shape}."
            )
        if min(map(int, found)) < 0 or max(map(int, found)) >= len(names):
            raise LongscanError(
                f"{path}: expected y from 0 to {len(names) - 1}, as there are {len(names)} labels."
            )
        return np.array([int(label) for label in found]), tuple(names.tolist())
    known = tuple(sorted(set(found)))
    index = {label: number for number, label in enumerate(known)}
    return np.array([index[label] for label in found]), known
