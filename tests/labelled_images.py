"""Labelled images that tests make: bars and discs, in arrays and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("across", "down", "disc")


def bars(n: int, size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, size, size) of horizontal bars, vertical bars and discs on noise; and classes (n,)."""
    draw = np.random.default_rng(seed)
    truth = np.arange(n) % 3
    images = np.empty((n, size, size), np.uint8)
    for number, label in enumerate(truth):
        image = Image.fromarray(draw.integers(0, 60, (size, size), np.uint8))
        at = int(draw.integers(2, size - 6))
        box = {0: (1, at, size - 2, at + 2), 1: (at, 1, at + 2, size - 2), 2: (at, at, at + 5, at + 5)}[
            int(label)
        ]
        pen = ImageDraw.Draw(image)
        (pen.ellipse if label == 2 else pen.rectangle)(box, fill=int(draw.integers(150, 255)))
        images[number] = np.asarray(image)
    return images, truth


def write_folder(folder: Path, n: int = 12, size: int = 16, mode: str = "RGB") -> Path:
    """A folder of PNG files, in a folder for each class."""
    for number, (pixels, label) in enumerate(zip(*bars(n, size), strict=True)):
        (folder / LABELS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(folder / LABELS[label] / f"{number:03}.png")
    return folder


def write_npz(path: Path, n: int = 96, **arrays: Any) -> Path:
    x, y = bars(n)
    np.savez(path, **{"x": x, "y": y, "labels": np.array(LABELS), **arrays})
    return path
