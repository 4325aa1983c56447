"""Labelled clips, decoded when they are needed: a folder for each class, an archive, or arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longscan.data.archives import has_suffix, read_npz
from longscan.data.image_files import is_animated
from longscan.data.image_folders import ARCHIVES, ImageFiles, image_files
from longscan.data.images import class_names, pixel_arrays
from longscan.data.labelled import Labelled, join
from longscan.data.videos import NPZ, Clip, array_clip, check_clip, clip_of_files, open_clip
from longscan.errors import LongscanError, UsageError

__all__ = ["Clips", "read_clips"]


@dataclass(frozen=True, eq=False)
class Clips(Labelled[Clip]):
    """Labelled clips, decoded on demand."""


def read_clips(paths: Sequence[str | Path], *, split: str = "train", check: bool = False) -> Clips:
    """Return the labelled clips of files and folders.

    Args:
        paths: any of
            folders with a folder for each class, nested as those of `read_images`. In them, a clip is a video
            file, an .npz file, an animated GIF, PNG or WebP, or a folder of still images, its frames;
            .zip and tar archives of such a folder;
            .npz files of x, (n, n_frames, height, width) or (n, n_frames, height, width, channels) bytes,
            and y and the rest as those of images.
        split: which part is meant, if there are several.
        check: whether to open each clip, so that what is none is noticed at once; .npz files are not read.

    Returns:
        The clips, in the order of their names or that of the file.

    Raises:
        LongscanError: a file is something else, or damaged; there is a class without clips, or no class.
        UsageError: there are no paths.
        OSError: a file can't be read.
    """
    if not paths:
        raise UsageError("nothing to read: name folders of clips, a folder in each for every class.")
    return join([_read(Path(path), split, check) for path in paths])


def _read(path: Path, split: str, check: bool) -> Clips:
    """Read one file or folder."""
    if has_suffix(path, NPZ):
        return _npz(path, split)
    if path.is_dir() or has_suffix(path, *ARCHIVES):
        return _files(path, image_files(path, split, clips=True), check)
    if not path.exists():
        raise LongscanError(f"{path}: no such file or folder.")
    raise LongscanError(
        f"{path}: expected a folder, .zip or tar with a folder for each class, or an .npz file."
    )


def _files(path: Path, found: ImageFiles, check: bool) -> Clips:
    """Return the clips of a folder or an archive."""
    full = [str(path / name) for name in found.names]

    def decode(number: int, channels: int) -> Clip:
        name = found.names[number]
        if name in found.frames:
            return clip_of_files(found.frames[name], found.get, full[number])
        return open_clip(found.get(name), full[number])

    for number, name in enumerate(found.names) if check else ():
        if files := found.frames.get(name):
            decode(number, 3)
            is_animated(found.get(files[0]), str(path / files[0]))  # which fails if it is no image
        else:
            check_clip(found.get(name), full[number])
    return Clips(
        decode, np.arange(len(full)), np.array(found.truth), found.labels, full, content=found.content
    )


def _npz(path: Path, split: str) -> Clips:
    """Read arrays."""
    arrays = read_npz(path)
    x, truth, labels = pixel_arrays(path, arrays, split, class_names(arrays), clips=True)
    full = [f"{path}:{number}" for number in range(len(x))]
    array_clip(x[0], full[0])
    return Clips(
        decode=lambda number, channels: array_clip(x[number], full[number]),
        index=np.arange(len(x)),
        truth=truth,
        labels=labels,
        names=full,
        size=(int(x.shape[2]), int(x.shape[3])),
        channels=1 if x.shape[4:] in ((), (1,)) else 3,
        content=hashlib.sha256(np.ascontiguousarray(x).data).hexdigest(),
    )
