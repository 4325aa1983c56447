"""The order of the data: the same for a seed and an epoch with every version of NumPy and Python."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from longscan.core.random import HELD_OUT, STEPS, EpochOrder, RandomStream
from longscan.data.batching import shuffled
from longscan.data.sentence_pairs import Batches, IdPairs
from longscan.errors import UsageError


def philox(seed: int, number: int) -> Iterator[int]:
    """The words of Philox 4x64-10 for the key (seed, number), as Salmon et al. (2011) define it."""
    mask = 2**64 - 1
    for counter in range(1, 100):
        block, key = [counter, 0, 0, 0], [seed, number]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * block[0], 0xCA5A826395121157 * block[2]
            block = [
                *((second >> 64) ^ block[1] ^ key[0], second & mask),
                *((first >> 64) ^ block[3] ^ key[1], first & mask),
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        yield from block


@pytest.mark.parametrize(("seed", "number"), [(0, 0), (7, 3), (2**64 - 1, 1), (5, STEPS + 12), (0, HELD_OUT)])
def test_the_stream_is_philox_4x64_10(seed: int, number: int) -> None:
    assert RandomStream(seed, number).raw(10).tolist() == list(islice(philox(seed, number), 10))


def test_numbers_are_made_of_words() -> None:
    words = list(islice(philox(1, 2), 20))
    stream = RandomStream(1, 2)
    assert stream.permutation(5).tolist() == sorted(range(5), key=words[:5].__getitem__)
    assert stream.uniform((1, 2)).tolist() == [[(word >> 11) / 2**53 for word in words[5:7]]]
    assert stream.random() == (words[7] >> 11) / 2**53
    assert stream.below(10) == words[8] * 10 >> 64
    assert stream.heads(0) == 0
    assert stream.heads(3) == (words[9] & 7).bit_count()
    assert stream.heads(70) == words[10].bit_count() + (words[11] & 63).bit_count()
    assert stream.raw(1).tolist() == words[12:13]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed: int) -> None:
    with pytest.raises(UsageError, match=r"seed: expected 0 to 2\*\*64 - 1"):
        RandomStream(seed, 0)


def test_an_epoch_is_ordered_once() -> None:
    made: list[int] = []

    def make(stream: RandomStream) -> list[int]:
        made.append(int(stream.raw(1)[0]))
        return stream.permutation(4).tolist()

    orders = EpochOrder(3, make)
    first, second = orders[0], orders[1]
    assert (orders[0], orders[1], len(made)) == (first, second, 2)  # a batch may span both
    assert (orders[7], orders[0], len(made)) == (EpochOrder(3, make)[7], first, 4)


def pairs(n: int = 12) -> IdPairs:
    lengths = np.arange(n) % 5 + 1
    ids = np.repeat(np.arange(n) + 10, lengths).astype(np.int32)
    return IdPairs(ids, lengths.cumsum(), ids, lengths.cumsum())


def test_the_orders_are_the_ones_that_runs_are_made_with() -> None:
    """Of windows and of masked pairs see test_data and test_masking."""
    assert shuffled([3, 1, 2, 5, 4, 9, 7], 2, RandomStream(1, 2)) == [[5], [3, 6], [0, 4], [1, 2]]
    batches = Batches(pairs(), batch_tokens=12, seed=4)
    assert [(batches.batch(step).source[:, 0] - 10).tolist() for step in range(2 * len(batches))] == [
        *([0, 10, 6, 5], [7, 9], [4], [1, 11, 3], [2, 8]),
        *([10, 11, 5, 0], [7, 8], [3, 9], [1, 6, 2], [4]),
    ]
