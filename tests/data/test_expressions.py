"""Parity and arithmetic: what is asked is what Python computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor

import pytest
import torch

from longscan.data.expressions import DEPTH, OPERATORS, arithmetic, brackets, parity
from longscan.data.synthetic import IGNORED, Examples
from longscan.errors import UsageError

TEXT = "01234" + OPERATORS + "()"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parity() -> None:
    examples = parity(50, seeded(), length=20)
    assert examples.ids.shape == (50, 20)
    for bits, sums in zip(examples.ids.tolist(), examples.targets.tolist(), strict=True):
        assert sums == [reduce(xor, bits[: n + 1]) for n in range(20)]
    assert 0.4 < examples.ids.double().mean() < 0.6


def test_a_sum_has_any_modulus() -> None:
    examples = parity(50, seeded(), vocab_size=3, length=20)
    assert set(examples.ids.flatten().tolist()) == {0, 1, 2}
    assert torch.equal(examples.targets[:, -1], examples.ids.sum(1) % 3)


def test_some_sequences_are_all_zeros_or_nearly_none() -> None:
    shares = (parity(500, seeded(), length=20, uneven=True).ids != 0).double().mean(1)
    assert (shares <= 0.1).sum() > 25
    assert (shares >= 0.9).sum() > 25
    even = (parity(500, seeded(), length=20).ids != 0).double().mean(1)
    assert (even <= 0.1).sum() + (even >= 0.9).sum() < 10


@pytest.mark.parametrize("length", [1, 2, 3, 5, 20, 61])
@pytest.mark.parametrize(("make", "vocab_size"), [(arithmetic, 8), (brackets, 10)])
def test_values_are_those_of_python(make: Callable[..., Examples], vocab_size: int, length: int) -> None:
    examples = make(40, seeded(), vocab_size=vocab_size, length=length)
    assert examples.ids.shape == examples.targets.shape == (40, length - (length % 2 == 0))
    for ids, targets in zip(examples.ids.tolist(), examples.targets.tolist(), strict=True):
        text = "".join(TEXT[token] for token in ids)
        assert targets[-1] == eval(text) % 5
        for end, target in enumerate(targets):
            if text[end] in OPERATORS + "(":
                assert target == IGNORED
            else:
                assert target == eval(text[_start(text, end) : end + 1]) % 5


def _start(text: str, end: int) -> int:
    """Return where the innermost brackets that are open after `end` begin, or 0."""
    depth = 0
    for position in range(end, -1, -1):
        depth += (text[position] == ")") - (text[position] == "(")
        if depth < 0:
            return position + 1
    return 0


def test_brackets_nest() -> None:
    deepest, opened = 0, 0
    for ids in brackets(100, seeded(), length=41).ids.tolist():
        depth = 0
        for token in ids:
            depth += (token == TEXT.index("(")) - (token == TEXT.index(")"))
            assert 0 <= depth <= DEPTH
            deepest, opened = max(deepest, depth), opened + (token == TEXT.index("("))
        assert depth == 0
    assert deepest == DEPTH
    assert opened > 100


@pytest.mark.parametrize(
    ("make", "vocab_size", "words"),
    [(parity, 1, "vocab_size of 2"), (arithmetic, 4, "vocab_size of 5"), (brackets, 6, "vocab_size of 7")],
)
def test_impossible_sizes(make: Callable[..., Examples], vocab_size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(3, seeded(), vocab_size=vocab_size)
    with pytest.raises(UsageError, match="length of 1 or more"):
        make(3, seeded(), length=0)
