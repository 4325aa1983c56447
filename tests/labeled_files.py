"""Small files of labelled sequences: arrays, and tones of two classes."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

RATE = 100


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(pitch: float, length: int, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(length) / rate)


def sounds(directory: Path, rate: int = RATE, n: int = 12) -> Path:
    """Low and high tones of different lengths, in a folder for each class."""
    for number in range(n):
        for label, pitch in (("low", 3.0), ("high", 9.0)):
            write_wav(
                directory / label / f"{number}.wav", tone(pitch, (50 + number) * rate // RATE, rate), rate
            )
    return directory
