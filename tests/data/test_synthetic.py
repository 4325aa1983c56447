"""Sequences made by rule: the rule holds, the seed decides, and accuracy counts what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longscan.data.synthetic import (
    IGNORED,
    Examples,
    adding,
    copying,
    distinct,
    induction,
    mqar,
    recall,
    selective,
)
from longscan.errors import UsageError
from longscan.evaluation.classification import accuracy
from small_models import build

MAKERS = [recall, induction, mqar, selective, copying]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answers(examples: Examples, row: int) -> list[int]:
    targets = examples.targets[row]
    return targets[targets != IGNORED].tolist()


def test_recall() -> None:
    examples = recall(200, seeded(), vocab_size=9, length=20)
    assert examples.ids.shape == examples.targets.shape == (200, 22)
    for row, ids in enumerate(examples.ids.tolist()):
        pairs = dict(zip(ids[:20:2], ids[1:20:2], strict=True))
        assert all(0 <= key < 4 <= value < 8 for key, value in pairs.items())
        assert all(pairs[key] == value for key, value in zip(ids[:20:2], ids[1:20:2], strict=True))
        assert ids[20] == 8
        assert answers(examples, row) == [pairs[ids[21]]]
    assert (examples.targets[:, :-1] == IGNORED).all()


def test_induction() -> None:
    examples = induction(200, seeded(), vocab_size=6, length=30)
    assert examples.ids.shape == (200, 31)
    for row, ids in enumerate(examples.ids.tolist()):
        place = ids.index(5)
        assert ids.count(5) == 2
        assert place < 29
        assert ids[30] == 5
        assert answers(examples, row) == [ids[place + 1]]
    assert {ids.index(5) for ids in examples.ids.tolist()} == set(range(29))


def test_mqar() -> None:
    examples = mqar(200, seeded(), vocab_size=20, length=30, pairs=5)
    assert examples.ids.shape == examples.targets.shape == (200, 30)
    gaps = []
    for ids, targets in zip(examples.ids.tolist(), examples.targets.tolist(), strict=True):
        values = dict(zip(ids[:10:2], ids[1:10:2], strict=True))
        assert len(values) == 5
        assert all(0 <= key < 10 <= value < 20 for key, value in values.items())
        queries = {position: answer for position, answer in enumerate(targets) if answer != IGNORED}
        assert sorted(ids[position] for position in queries) == sorted(values)
        assert all(values[ids[position]] == answer for position, answer in queries.items())
        assert all(ids[position] >= 10 for position in range(10, 30) if position not in queries)
        assert min(queries) >= 10
        gaps += [(position - 10) // 2 for position in queries]
    counts = [gaps.count(gap) for gap in range(10)]
    assert len(gaps) == sum(counts) == 1000
    assert counts[0] > counts[3] > counts[9] > 0


@pytest.mark.parametrize("make", [selective, copying])
def test_copying(make: Callable[..., Examples]) -> None:
    examples = make(100, seeded(), vocab_size=6, length=20, tokens=5)
    assert examples.ids.shape == (100, 25)
    fronts = 0
    for row, ids in enumerate(examples.ids.tolist()):
        kept = [token for token in ids[:20] if token != 4]
        assert kept == answers(examples, row)
        assert len(kept) == 5
        assert max(kept) < 4
        assert ids[20:] == [5] * 5
        fronts += ids[:5] == kept
    assert (examples.targets[:, :20] == IGNORED).all()
    assert fronts == (100 if make is copying else 0)


def test_adding() -> None:
    x, y = adding(50, seeded(), length=11)
    assert x.shape == (50, 11, 2)
    assert (x[..., 1].sum(1) == 2).all()
    assert (x[:, :5, 1].sum(1) == 1).all()
    assert torch.allclose((x[..., 0] * x[..., 1]).sum(1, keepdim=True), y)


@pytest.mark.parametrize("make", MAKERS)
def test_the_seed_decides(make: Callable[..., Examples]) -> None:
    one, same, other = make(4, seeded()), make(4, seeded()), make(4, seeded(1))
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one.ids, other.ids)


def test_everywhere_asks_for_the_next_token_and_for_the_answer() -> None:
    examples = recall(3, seeded())
    full = examples.everywhere()
    assert torch.equal(full.ids[:, 1:], full.targets[:, :-1])
    assert torch.equal(full.targets[:, -1], examples.targets[:, -1])


def test_distinct() -> None:
    examples = distinct(lambda n, draw: recall(n, draw, vocab_size=3, length=2), 1, seeded())
    assert len(examples.ids) == 1
    examples = distinct(lambda n, draw: induction(n, draw, vocab_size=3, length=4), 20, seeded())
    assert len({tuple(ids) for ids in examples.ids.tolist()}) == 20
    with pytest.raises(UsageError, match="expected 30 distinct sequences"):
        distinct(lambda n, draw: induction(n, draw, vocab_size=2, length=3), 30, seeded())


@pytest.mark.parametrize("name", ["mamba", "llama"])
@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_accuracy(name: str, chunk_size: int) -> None:
    """Against answers that are the model's own, half of them spoilt; read in chunks of any size."""
    model = build(vocab_size=9, name=name)
    examples = recall(8, seeded())
    said = model(examples.ids).logits[..., :9].argmax(-1)
    targets = torch.where(examples.targets == IGNORED, IGNORED, said)
    targets[:4] = torch.where(targets[:4] == IGNORED, IGNORED, (said[:4] + 1) % 9)
    model.train()
    assert accuracy(model, Examples(examples.ids, targets), chunk_size) == 0.5
    assert model.training


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (recall, {"vocab_size": 2}),
        (recall, {"length": 1}),
        (induction, {"vocab_size": 1}),
        (induction, {"length": 1}),
        (mqar, {"vocab_size": 14}),
        (mqar, {"length": 31}),
        (selective, {"length": 3, "tokens": 4}),
        (copying, {"vocab_size": 2}),
        (adding, {"length": 1}),
    ],
)
def test_no_room(make: Callable[..., Examples], sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{make.__name__}: expected a"):
        make(1, seeded(), **sizes)
