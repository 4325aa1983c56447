"""Clips: short videos whose frames are decoded when they are needed.

A clip is a folder of frames, an array in an .npz file, an animated GIF, PNG or WebP, or a video file. A model
sees n of its frames, one of each of n segments of equal length (Wang et al. 2016, arXiv 1608.00859): the
middle one for evaluation, a random one in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from longscan.core.random import RandomStream
from longscan.data.archives import has_suffix, read_npz
from longscan.data.augmentation import central_crop, to_tensor
from longscan.data.image_files import count_frames, from_array, open_stream, read_frames, read_image
from longscan.data.video_files import check_video, index_video, is_video, video_frames
from longscan.errors import LongscanError

__all__ = [
    "Clip",
    "array_clip",
    "check_clip",
    "choose_frames",
    "clip_of_files",
    "clip_tensor",
    "is_clip_file",
    "natural",
    "open_clip",
]

NPZ = ".npz"
FRAMES = "frames"  # the array of a clip in an .npz file
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Clip:
    """A clip whose frames are not decoded yet.

    Attributes:
        name: of it, for messages.
        n_frames: how many it has.
        decode: (positions, ascending; channels) -> these frames, of mode RGB or L.
    """

    name: str
    n_frames: int
    decode: Callable[[Sequence[int], int], Iterator[Image.Image]]

    def frames(self, positions: Sequence[int], channels: int) -> Iterator[Image.Image]:
        """Yield some of the frames, one at a time.

        Args:
            positions: which, ascending; a position may be repeated.
            channels: 3 for RGB, 1 for greyscale.

        Raises:
            LongscanError: a frame is damaged, or has another size than the first.
        """
        size = None
        for position, frame in zip(positions, self.decode(positions, channels), strict=True):
            if size not in (None, frame.size):
                raise LongscanError(
                    f"{self.name}: expected frames of one size, {size[0]} × {size[1]}, got {frame.width} × "
                    f"{frame.height} for frame {position:,}. Resize it."
                )
            size = frame.size
            yield frame


def choose_frames(n_frames: int, n: int, stream: RandomStream | None = None) -> list[int]:
    """Return the positions of n frames, one of each of n segments; those of a short clip are repeated.

    Args:
        n_frames: of the clip.
        n: frames to choose.
        stream: randomness; the middle of each segment if None.
    """
    shifts = [0.5] * n if stream is None else [stream.random() for _ in range(n)]
    return [min(n_frames - 1, int((segment + shift) * n_frames / n)) for segment, shift in enumerate(shifts)]


def clip_tensor(clip: Clip, n: int, channels: int, size: int, crop: float) -> Tensor:
    """Return n frames of a clip for evaluation, (channels, n, size, size) uint8.

    Args:
        clip: the clip.
        n: frames.
        channels: 3 or 1.
        size: see `central_crop`.
        crop: likewise.
    """
    frames = clip.frames(choose_frames(clip.n_frames, n), channels)
    return torch.stack([to_tensor(central_crop(frame, size, crop)) for frame in frames], 1)


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return the sort key of a name in which numbers count as such: frame2 comes before frame10."""
    parts = [(digits.lstrip("0"), text) for digits, text in re.findall(r"([0-9]+)|([^0-9]+)", name)]
    return [(1, 0, text) if text else (0, len(digits), digits) for digits, text in parts], name


def is_clip_file(name: str | Path) -> bool:
    """Return whether a name is that of a video file or an .npz file."""
    return is_video(name) or has_suffix(name, NPZ)


def check_clip(source: Path | bytes, name: str) -> None:
    """Raise unless a file is a clip, as far as its header says; an .npz file is not read.

    Args:
        source: the file, or its content.
        name: of it, for messages.

    Raises:
        LongscanError: it is something else.
    """
    if is_video(name):
        check_video(source, name)
    elif not has_suffix(name, NPZ):
        _animation(source, name)


def open_clip(source: Path | bytes, name: str) -> Clip:
    """Return the clip in a file.

    Args:
        source: the file, or its content.
        name: of it; its suffix says what it is.

    Raises:
        LongscanError: it is something else, is damaged, or has one frame only.
    """
    if has_suffix(name, NPZ):
        return _npz(source, name)
    if not is_video(name):
        n_frames = _animation(source, name)
        return Clip(name, n_frames, lambda positions, c: read_frames(source, name, positions, c))
    index = index_video(source, name)
    n_frames = _several(len(index.times), name)

    def decode(positions: Sequence[int], channels: int) -> Iterator[Image.Image]:
        for frame in video_frames(source, name, index, positions):
            yield frame if channels == 3 else frame.convert("L")

    return Clip(name, n_frames, decode)


def clip_of_files(files: Sequence[str], get: Callable[[str], Path | bytes], name: str) -> Clip:
    """Return the clip whose frames are image files.

    Args:
        files: their names, in any order.
        get: name -> the file, or its content.
        name: of the clip, the folder.

    Raises:
        LongscanError: there is one file only.
    """
    ordered = sorted(files, key=natural)
    _several(len(ordered), name)

    def decode(positions: Sequence[int], channels: int) -> Iterator[Image.Image]:
        for position in positions:
            file = ordered[position]
            yield read_image(get(file), f"{name}/{file.rpartition('/')[2]}", channels)

    return Clip(name, len(ordered), decode)


def array_clip(frames: npt.NDArray[np.uint8], name: str) -> Clip:
    """Return the clip of an array.

    Args:
        frames: (n_frames, height, width) or (n_frames, height, width, 1, 3 or 4).
        name: of it, for messages.

    Raises:
        LongscanError: it has one frame only.
    """
    n_frames = _several(len(frames), name)
    return Clip(name, n_frames, lambda positions, c: (from_array(frames[n], c) for n in positions))


def _several(n_frames: int, name: str) -> int:
    """Return the number of frames of a clip; raise if there is no more than one."""
    if n_frames < 2:
        raise LongscanError(f"{name}: expected a clip of two frames or more, got {n_frames}.")
    return n_frames


def _animation(source: Path | bytes, name: str) -> int:
    """Return the number of frames of an animated image; raise for a still one."""
    n_frames = count_frames(source, name)
    if n_frames < 2:
        raise LongscanError(
            f"{name} is a still image: expected a clip, which is a folder of frames, an .npz file, an "
            "animated image or a video file."
        )
    return n_frames


def _npz(source: Path | bytes, name: str) -> Clip:
    """Return the clip in an .npz file."""
    if isinstance(source, Path):
        open_stream(source, name).close()  # with an error that names it
    arrays = read_npz(source, name)
    frames = arrays.get(FRAMES, next(iter(arrays.values())) if len(arrays) == 1 else None)
    if frames is None:
        got = ", ".join(sorted(arrays)) or "nothing"
        raise LongscanError(f"{name}: expected the array {FRAMES}, or only one array; got {got}.")
    if (
        frames.dtype != np.uint8
        or frames.ndim not in (3, 4)
        or 0 in frames.shape
        or frames.shape[3:] not in [(), *((c,) for c in CHANNELS)]
    ):
        raise LongscanError(
            f"{name}: expected frames (n_frames, height, width) or (n_frames, height, width, channels) of "
            f"bytes, with 1, 3 or 4 channels; got {frames.dtype} {frames.shape}."
        )
    return array_clip(frames, name)
