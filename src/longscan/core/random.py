"""Data order: a function of the seed and the epoch, on one documented random stream.

The stream of (seed, number) is the sequence of 64-bit words that the counter-based generator Philox 4x64-10
(Salmon et al. 2011) yields for the key (seed, number), from counter 1 on. NumPy guarantees these raw words
across versions, but not the results of `Generator.permutation` or `uniform`, so those are defined here.
Numbers from 0 are epochs, those from IMAGES the images of each epoch, those from STEPS steps, those from
CLIPS the clips of each epoch, and HELD_OUT is for the train-validation split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from longscan.core.checks import check_range
from longscan.errors import UsageError

__all__ = ["HELD_OUT", "STEPS", "VERSION", "EpochOrder", "RandomStream", "clip_stream", "image_stream"]

VERSION = 2  # of the data order; 2 changed sentence pairs and masked pairs
IMAGES = 2**62
STEPS = 2**63
CLIPS = 2**63 + 2**62
HELD_OUT = 2**64 - 1

T = TypeVar("T")


class RandomStream:
    """A stream of random numbers that is the same with every version of NumPy and Python.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        number: of the stream: an epoch, STEPS + a step, or HELD_OUT; see `image_stream` too.

    Raises:
        UsageError: the seed is out of range.
    """

    def __init__(self, seed: int, number: int) -> None:
        check_range("seed", seed, least=0, most=2**64 - 1, error=UsageError)
        self._bits = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))

    def raw(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the next words of the stream, (count,)."""
        return self._bits.random_raw(count)

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """Return 0 to count - 1 in random order, (count,): the argsort of as many words."""
        return self.raw(count).argsort(kind="stable")

    def uniform(self, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Return numbers from [0, 1) in this shape: the upper 53 bits of one word each."""
        raw = self.raw(math.prod(shape)) >> np.uint64(11)
        return raw.reshape(shape).astype(np.float64) * 2.0**-53

    def random(self) -> float:
        """Return one number from [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def below(self, limit: int) -> int:
        """Return a whole number from 0 to limit - 1."""
        return int(self.random() * limit)

    def heads(self, coins: int) -> int:
        """Return the number of heads among `coins` fair coins: the set bits of as few words as hold them."""
        words = self.raw(-(-coins // 64)).astype("<u8").tobytes()
        return (int.from_bytes(words, "little") & ((1 << coins) - 1)).bit_count()


def image_stream(seed: int, epoch: int, index: int) -> RandomStream:
    """Return the stream for the augmentation of an image, independent of those of all others.

    Args:
        seed: of the run.
        epoch: from 0, below 2**30.
        index: of the image, from 0, below 2**32.
    """
    return RandomStream(seed, IMAGES + (epoch << 32) + index)


def clip_stream(seed: int, epoch: int, index: int) -> RandomStream:
    """Return the stream that chooses the frames of a clip, whose augmentation has its `image_stream`.

    Args:
        seed: of the run.
        epoch: from 0, below 2**30 - 1.
        index: of the clip, from 0, below 2**32.
    """
    return RandomStream(seed, CLIPS + (epoch << 32) + index)


class EpochOrder(Generic[T]):
    """The data order of each epoch, computed on demand.

    Args:
        seed: of the run.
        make: returns the order of an epoch, given its random stream.
    """

    def __init__(self, seed: int, make: Callable[[RandomStream], T]) -> None:
        self._seed, self._make = seed, make
        self._orders: dict[int, T] = {}  # of the last two epochs, as a batch may span both

    def __getitem__(self, epoch: int) -> T:
        """Return the order of an epoch, from 0: a function of the seed and the epoch alone."""
        if epoch not in self._orders:
            order = self._make(RandomStream(self._seed, epoch))
            self._orders = {key: value for key, value in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]
