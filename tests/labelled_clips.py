"""Labelled clips that tests make: a bright bar that moves to the left or to the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

LABELS = ("left", "right")


def moving(n: int, frames: int = 6, size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clips (n, frames, size, size), by turns to the right and backwards; and classes (n,)."""
    draw = np.random.default_rng(seed)
    clips = draw.integers(0, 40, (n, frames, size, size)).astype(np.uint8)
    for number in range(0, n, 2):
        grey = int(draw.integers(200, 255))
        for time in range(frames):
            left = time * (size - 4) // (frames - 1)
            clips[number, time, :, left : left + 4] = grey
        if number + 1 < n:
            clips[number + 1] = clips[number, ::-1]
    return clips, 1 - np.arange(n) % 2


def write_frames(folder: Path, clip: np.ndarray) -> Path:
    """A folder of frame0.png, frame1.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for time, pixels in enumerate(clip):
        Image.fromarray(pixels).convert("RGB").save(folder / f"frame{time}.png")
    return folder


def write_animation(path: Path, clip: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(pixels).convert("RGB") for pixels in clip)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=40, **lossless)
    return path


def write_video(path: Path, clip: np.ndarray, codec: str = "libx264", **options: Any) -> Path:
    """A video of grey or RGB frames; key frames every eight."""
    av = pytest.importorskip("av", reason="the extra 'video' is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.gop_size = options.get("pix_fmt", "yuv420p"), 8
        for pixels in clip:
            rgb = np.stack([pixels] * 3, 2) if pixels.ndim == 2 else pixels
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_class_folders(folder: Path, n: int = 12, size: int = 16) -> Path:
    """Clips in a folder for each class: by turns a folder of frames, an .npz file and an animation."""
    for number, (clip, label) in enumerate(zip(*moving(n, size=size), strict=True)):
        place = folder / LABELS[label]
        place.mkdir(parents=True, exist_ok=True)
        match number // 2 % 3:
            case 0:
                write_frames(place / f"{number:03}", clip)
            case 1:
                np.savez(place / f"{number:03}.npz", frames=clip)
            case _:
                write_animation(place / f"{number:03}.png", clip)
    return folder


def write_arrays(path: Path, n: int = 24, **arrays: Any) -> Path:
    x, y = moving(n)
    np.savez(path, **{"x": x, "y": y, "labels": np.array(LABELS), **arrays})
    return path
