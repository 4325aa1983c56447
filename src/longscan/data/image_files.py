"""Decode image files to 8-bit RGB or greyscale, upright; refuse damaged and dangerous ones."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from longscan.data.archives import foreign, has_suffix, is_hidden
from longscan.errors import LongscanError

__all__ = [
    "SUFFIXES",
    "count_frames",
    "file_paths",
    "from_array",
    "image_paths",
    "is_animated",
    "is_image",
    "open_stream",
    "read_frames",
    "read_image",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# no others are tried: some of Pillow's formats start programs
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 2**27  # of an image; 400 MB once decoded
MAX_FRAME = 2**25  # of a frame of an animation
NO_IMAGE = f"no image ({', '.join(FORMATS)})"


def is_image(name: str | Path) -> bool:
    """Return whether a name is that of an image file, and not a hidden one.

    Args:
        name: relative to the folder or archive that is searched.
    """
    return has_suffix(name, *SUFFIXES) and not is_hidden(name)


def image_paths(folder: Path) -> list[str]:
    """Return the image files below a folder; see `file_paths`."""
    return file_paths(folder, is_image)


def file_paths(folder: Path, include: Callable[[str], bool]) -> list[str]:
    """Return files below a folder, sorted; links are followed, but no folder twice.

    Args:
        folder: the folder.
        include: whether a file of this name counts.

    Returns:
        Their paths relative to it, with "/".

    Raises:
        OSError: a folder below it can't be read.
    """
    names, seen = [], {os.path.realpath(folder)}
    for where, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
        new = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(where, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                new.append(name)
        folders[:] = new
        base = Path(where).relative_to(folder)
        names += [(base / name).as_posix() for name in files if include(name)]
    return sorted(names)


def read_image(source: Path | bytes, name: str, channels: int) -> Image.Image:
    """Return an image upright, in 8 bits: alpha over white, 16 bits rounded, of an animation the first frame.

    Args:
        source: the file, or its content.
        name: of it, for messages.
        channels: 3 for RGB, 1 for greyscale.

    Returns:
        The image, of mode RGB or L.

    Raises:
        LongscanError: it is no image, is damaged or cut short, has too many pixels or a colour space that has
            no conversion; or the file can't be read.
    """
    with _opened(source, name) as image:
        if image.mode == "I" and image.format == "TIFF":
            raise LongscanError(f"{name}: expected 8 or 16 bits a channel, got 32. Convert it.")
        with foreign(name, NO_IMAGE):
            image.load()
            upright = ImageOps.exif_transpose(image)
        return _convert(upright, name, channels)


def count_frames(source: Path | bytes, name: str) -> int:
    """Return the number of frames of an animation, 1 for a still image; the pixels are not decoded.

    Args:
        source: see `read_image`.
        name: likewise.

    Raises:
        LongscanError: see `is_animated`; or the frames of an animation have too many pixels.
    """
    with _opened(source, name) as image, foreign(name, NO_IMAGE):
        n = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
        if n > 1 and image.width * image.height > MAX_FRAME:
            raise LongscanError(
                f"{name}: expected frames of at most {MAX_FRAME:,} pixels, got {image.width:,} × "
                f"{image.height:,}. Make it smaller."
            )
        return n


def read_frames(
    source: Path | bytes, name: str, positions: Sequence[int], channels: int
) -> Iterator[Image.Image]:
    """Yield frames of an animation; see `read_image`.

    Args:
        source: see `read_image`.
        name: likewise.
        positions: of the frames, ascending.
        channels: see `read_image`.

    Raises:
        LongscanError: likewise.
    """
    with _opened(source, name) as image:
        for position in positions:
            with foreign(name, NO_IMAGE):
                image.seek(position)
                image.load()
            yield _convert(image.copy(), name, channels)


def is_animated(source: Path | bytes, name: str) -> bool:
    """Return whether an image has several frames or pages; the pixels are not decoded.

    Args:
        source: see `read_image`.
        name: likewise.

    Raises:
        LongscanError: the header is not that of an image of possible size; or the file can't be read.
    """
    with _opened(source, name) as image, foreign(name, NO_IMAGE):
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a photo's preview


def from_array(pixels: npt.NDArray[np.uint8], channels: int) -> Image.Image:
    """Return pixels as an image.

    Args:
        pixels: (height, width) or (height, width, 1, 3 or 4).
        channels: see `read_image`.
    """
    flat = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    return _convert(Image.fromarray(np.ascontiguousarray(flat)), "array", channels)


def open_stream(path: Path, name: str) -> BinaryIO:
    """Return an open file.

    Args:
        path: of it.
        name: of it, for messages.

    Raises:
        LongscanError: it can't be read, or is no regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise LongscanError(f"{name}: expected a file.")
        return open(path, "rb")
    except OSError as error:
        raise LongscanError(f"{name}: {error.strerror}.") from error


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """Yield an image whose pixels are not decoded yet."""
    stream: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open_stream(source, name)
    with stream, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of Pillow about odd metadata, and about sizes, which are checked here
        with foreign(name, NO_IMAGE):
            try:
                image = Image.open(stream, formats=FORMATS)
            except UnidentifiedImageError:
                raise LongscanError(f"{name} is {NO_IMAGE}, or is damaged.") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise LongscanError(
                    f"{name}: expected at most {MAX_PIXELS:,} pixels, got {image.width:,} × {image.height:,}."
                    " Make it smaller."
                )
            yield image


def _convert(image: Image.Image, name: str, channels: int) -> Image.Image:
    """Return an image in 8-bit RGB or greyscale."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _narrow(image, name).convert(mode)
    with foreign(name, "no image in colours that are known here"):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == mode else image.convert(mode)


def _narrow(image: Image.Image, name: str) -> Image.Image:
    """Return an image of 16 bits in 8; Pillow would cut off what is above 255."""
    values = np.asarray(image)
    if (clear := image.info.get("transparency")) is not None:  # a grey value that stands for no colour
        values = np.where(values == clear, 65535, values)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise LongscanError(f"{name}: expected 8 or 16 bits a channel, got mode {image.mode}. Convert it.")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _fail(error: OSError) -> None:
    """Raise, where os.walk would skip a folder."""
    raise error
