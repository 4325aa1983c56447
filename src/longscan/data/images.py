"""Labelled images, decoded when they are needed: a folder for each class, an archive, or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from longscan.data.archives import has_suffix, read_npz
from longscan.data.image_files import from_array, is_animated, read_image
from longscan.data.image_folders import ARCHIVES, ImageFiles, image_files
from longscan.data.labeled_arrays import parse_labels
from longscan.data.labelled import Labelled, join
from longscan.errors import LongscanError, UsageError

__all__ = ["Images", "class_names", "pixel_arrays", "read_images"]

NPZ = ".npz"
NAMES = ("labels", "classes", "label_names")  # what the array of the names of the classes may be called
CHANNELS = (1, 3, 4)  # of arrays: greyscale, RGB, and RGB with alpha


@dataclass(frozen=True, eq=False)
class Images(Labelled[Image.Image]):
    """Labelled images, decoded on demand."""

    def image(self, number: int, channels: int | None = None) -> Image.Image:
        """Return an image; see `item`."""
        return self.item(number, channels)


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
    return join([_read(Path(path), split, check) for path in paths])


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


def class_names(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
    """Return the array with the names of the classes, if there is one."""
    return next((arrays[key] for key in NAMES if key in arrays), None)


def _npz(path: Path, split: str) -> Images:
    """Read arrays, of pixels or of encoded images."""
    arrays = read_npz(path)
    names = class_names(arrays)
    if {f"{split}_jpeg", f"{split}_offsets", f"{split}_labels"} <= arrays.keys():
        return _encoded(path, arrays, split, names)
    x, truth, labels = pixel_arrays(path, arrays, split, names)
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


def pixel_arrays(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    split: str,
    names: npt.NDArray[Any] | None,
    *,
    clips: bool = False,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Return pixels, class indices and names of classes in an .npz file of images, or of clips.

    Args:
        path: of the file, for messages.
        arrays: what it holds.
        split: which part is meant, if there are several.
        names: of the classes, if the file has them.
        clips: whether the pixels have an axis of frames.

    Raises:
        LongscanError: it holds something else.
    """
    tail = "" if "x" in arrays else f"_{split}"
    if f"x{tail}" not in arrays or f"y{tail}" not in arrays:
        got = ", ".join(sorted(arrays)) or "nothing"
        raise LongscanError(f"{path}: expected arrays x and y, or x_{split} and y_{split}; got {got}.")
    x, what = arrays[f"x{tail}"], "clips" if clips else "images"
    axes, least = ("n, n_frames, height, width", 4) if clips else ("n, height, width", 3)
    colours = [(), *((c,) for c in CHANNELS)]
    photos = clips and x.ndim == least and x.shape[-1] in CHANNELS
    if x.dtype != np.uint8 or x.ndim < least or 0 in x.shape or x.shape[least:] not in colours or photos:
        remedy = "If the channels come first: x.transpose(0, 2, 3, 1)."
        if clips:
            remedy = "For images leave out --frames."
        elif x.dtype == np.uint8 and x.ndim == least + 2:
            remedy = "For clips name the frames of the model's input, such as --frames 8."
        raise LongscanError(
            f"{path}: expected {what} x ({axes}) or ({axes}, channels) of bytes, with "
            f"1, 3 or 4 channels; got {x.dtype} {x.shape}. {remedy}"
        )
    truth, labels = _truth(path, arrays[f"y{tail}"], len(x), names)
    return x, truth, labels


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
