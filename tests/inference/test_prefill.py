"""Reading in chunks, from a stored prefix, and back again: all of it bit for bit."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longscan.checkpoints.hub import ASSETS
from longscan.data.documents import split
from longscan.errors import LongscanError, UsageError
from longscan.inference.prefill import CHUNK, encode, read
from longscan.inference.prefix_cache import PrefixCache
from longscan.inference.snapshots import Snapshots
from longscan.models import LanguageModel, Llama, LlamaConfig, Mamba, MambaConfig, State
from longscan.models.common.quantization import quantize_model
from longscan.tokenizers.bpe import load_tokenizer
from stand_ins import instead, watched

VOCAB = 61


@pytest.fixture(scope="module", params=["float32", "int4", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param)


@pytest.fixture(scope="module", params=["float32", "int4"])
def constant(request: pytest.FixtureRequest) -> Mamba:
    """A model whose state has one size."""
    model = make(request.param)
    assert isinstance(model, Mamba)
    return model


def make(kind: str) -> LanguageModel:
    draw = torch.Generator().manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(d_model=64, n_layers=2, vocab_size=VOCAB, n_heads=4, max_positions=12_000)
        return Llama(config, draw).eval()
    model = Mamba(MambaConfig(d_model=64, n_layers=2, vocab_size=VOCAB, d_state=8), draw).eval()
    if kind != "float32":
        quantize_model(model, kind)
    return model


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(first: State, second: State) -> bool:
    pairs = zip(first.used().named_tensors(), second.used().named_tensors(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


# reading


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_reading_is_the_forward_pass(model: LanguageModel, length: int) -> None:
    ids = text(length)
    logits, state = read(model, ids)
    with torch.no_grad():  # where gradients are recorded, quantised weights are multiplied as float32
        expected = model(torch.tensor([ids]))
    torch.testing.assert_close(logits, expected.logits[0, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.layers[1], expected.state.layers[1], rtol=1e-4, atol=1e-4)


def test_the_bits_do_not_depend_on_where_reading_went_on(model: LanguageModel) -> None:
    ids = text(4 * CHUNK + 50)
    logits, state = read(model, ids)
    for cut in (CHUNK, 3 * CHUNK, 4 * CHUNK):
        before = read(model, ids[:cut])[1]
        kept = before.clone()
        again, after = read(model, ids[cut:], before, cut)
        assert torch.equal(again, logits)
        assert same(after, state)
        assert same(before, kept)
    halfway = read(model, ids[:300])[1]  # within a chunk: the numbers, not the bits
    torch.testing.assert_close(read(model, ids[300:], halfway, 300)[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, torch.tensor, lambda ids: array("q", ids), lambda ids: np.array(ids, np.uint16)],
    ids=["list", "tuple", "numpy", "tensor", "array", "uint16"],
)
def test_tokens_come_in_many_forms(model: LanguageModel, kind: Callable[[list[int]], Any]) -> None:
    ids = text(2 * CHUNK + 3)
    assert torch.equal(read(model, kind(ids))[0], read(model, ids)[0])
    cache = PrefixCache(model)
    cache.read(ids)
    assert cache.find(kind(ids))[0] == 2 * CHUNK


def test_boundaries_and_progress(model: LanguageModel) -> None:
    ids, steps, told = text(2 * CHUNK), list[tuple[int, State]](), list[tuple[int, int]]()
    start = 2 * CHUNK + 100
    _, state = read(
        model,
        ids,
        read(model, text(start))[1],
        start,
        progress=lambda done, total: told.append((done, total)),
        boundary=lambda position, state: steps.append((position, state.clone())),
    )
    assert [position for position, _ in steps] == [3 * CHUNK, 4 * CHUNK]
    assert told == [(CHUNK - 100, 2 * CHUNK), (2 * CHUNK - 100, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK)]
    rest = read(model, ids[2 * CHUNK - 100 :], steps[1][1], 4 * CHUNK)[1]
    assert same(rest, state)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens to process"),
        ([1, VOCAB], f"token id: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ([-1], "got -1"),
        ([2**70], "token ids: expected whole numbers"),
        (["a"], "token ids: expected whole numbers"),
        ([1.5], r"a row of whole numbers, got float32 \(1,\)"),
        ([[1], [2]], r"got int64 \(2, 1\)"),
        (torch.ones(2, dtype=torch.bool), "got bool"),
    ],
    ids=["none", "beyond", "negative", "huge", "words", "fractions", "rows", "truth"],
)
def test_what_cannot_be_read_is_refused(model: LanguageModel, ids: Any, message: str) -> None:
    for reader in (lambda: read(model, ids), lambda: Snapshots(model).read(ids)):
        with pytest.raises(LongscanError, match=message):
            reader()
    with pytest.raises(LongscanError, match=message):
        PrefixCache(model).read(ids)


def test_a_state_of_several_rows_cannot_read_one_text(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="state of 1 row and a position of 0 or more, got 2 rows at 0"):
        read(model, [1], model.init_state(2))
    with pytest.raises(ValueError, match="got 1 rows at -1"):
        read(model, [1], None, -1)


def test_a_long_text_is_encoded_in_pieces() -> None:
    tokenizer = load_tokenizer(ASSETS / "longscan-tiny-en")
    long = "It was a bright morning;\n\n  the Captain   had not\nspoken. " * 40
    texts = ["", long, "short", "   ", "x" * 900, " \n" * 400, long[:-1] + "\n"]
    expected = [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in encode(tokenizer, texts)] == expected
    assert "".join(split(long, 100)) == long
    assert max(map(len, split(long, 100))) <= 200
    spy, lengths = watched(tokenizer)
    assert [ids.tolist() for ids in encode(spy, texts[:4], piece_size=100)] == expected[:4]
    assert [ids.tolist() for ids in encode(spy, texts[6:], piece_size=100)] == expected[6:]
    assert max(lengths) <= 200
    for text in texts[4:6]:  # nowhere to cut: any tokens of the text will do
        ids = encode(tokenizer, [text], piece_size=100)[0]
        assert tokenizer.decode(ids.tolist()) == text
    assert all(ids.dtype == np.int64 for ids in encode(tokenizer, texts, piece_size=100))


# the prefix cache


def test_the_cache_changes_nothing_but_the_work(model: LanguageModel) -> None:
    first = text(3 * CHUNK + 40)
    second = first[: 2 * CHUNK + 10] + text(CHUNK, seed=1)
    expected = [read(model, ids) for ids in (first, second, first)]
    lengths, told = list[int](), list[tuple[int, int]]()

    def prefill(ids: Tensor, state: State) -> tuple[Tensor, State]:
        lengths.append(ids.shape[1])
        return model.prefill(ids, state)

    cache = PrefixCache(instead(model, prefill=prefill))
    for ids, (logits, state) in zip((first, second, first), expected, strict=True):
        found = cache.read(ids, lambda done, total: told.append((done, total)))
        assert torch.equal(found[0], logits)
        assert same(found[1], state)
        model.step(torch.tensor([1]), found[1])  # the caller's to overwrite
    assert sum(lengths) == len(first) + (len(second) - 2 * CHUNK) + 40
    assert told[-1] == (len(first), len(first))
    assert (cache.lookups, cache.hits, cache.hit_tokens) == (3, 2, 5 * CHUNK)


def test_the_longest_prefix_leaves_a_token_to_read(model: LanguageModel) -> None:
    cache, ids = PrefixCache(model), text(2 * CHUNK)
    assert cache.find(ids) == (0, None)
    cache.read(ids)
    assert cache.count == 2
    assert cache.find(ids)[0] == CHUNK
    n, state = cache.find([*ids, 1])
    assert n == 2 * CHUNK
    assert state is not None
    model.step(torch.tensor([1]), state)  # a copy
    assert torch.equal(cache.read([*ids, 1])[0], read(model, [*ids, 1])[0])
    assert cache.find(ids[:CHUNK]) == (0, None)
    assert cache.find([]) == (0, None)
    assert cache.find([*ids[:CHUNK], 7])[0] == CHUNK
    assert cache.find([ids[0] ^ 1, *ids[1:], 1]) == (0, None)
    cache.clear()
    assert (cache.count, cache.nbytes) == (0, 0)
    assert cache.find([*ids, 1]) == (0, None)


def test_what_was_not_used_for_longest_goes_first(constant: Mamba) -> None:
    size = constant.init_state(1).nbytes
    cache = PrefixCache(constant, max_bytes=3 * size)
    a, b, c, d = (text(CHUNK + 1, seed) for seed in range(4))
    for ids in (a, b, c):
        cache.read(ids)
    assert cache.nbytes == 3 * size
    cache.read(a)
    cache.read(d)
    assert [cache.find(ids)[0] for ids in (a, b, c, d)] == [CHUNK, 0, CHUNK, CHUNK]
    assert cache.nbytes == 3 * size
    nothing = PrefixCache(constant, max_bytes=0)
    nothing.read(a)
    assert nothing.count == 0


def test_a_long_text_leaves_room_for_others(constant: Mamba) -> None:
    size = constant.init_state(1).nbytes
    cache, other, long = PrefixCache(constant, max_bytes=8 * size), text(CHUNK + 1, 1), text(20 * CHUNK)
    cache.read(other)
    logits = cache.read(long)[0]
    assert cache.find(other)[0] == CHUNK
    assert [cache.find(long[:n])[0] // CHUNK for n in (6 * CHUNK, 12 * CHUNK, 20 * CHUNK)] == [5, 10, 15]
    assert cache.find([*long, 1])[0] == 20 * CHUNK
    assert torch.equal(cache.read(long)[0], logits)


def test_states_may_lie_further_apart(model: LanguageModel) -> None:
    cache, ids = PrefixCache(model, every=2 * CHUNK), text(5 * CHUNK)
    logits = cache.read(ids)[0]
    assert cache.count == 2
    assert cache.find(ids)[0] == 4 * CHUNK
    assert torch.equal(cache.read(ids)[0], logits)
    state = read(model, ids[:CHUNK])[1]
    with pytest.raises(
        LongscanError, match=f"a prefix of {CHUNK} tokens: expected a multiple of {2 * CHUNK}"
    ):
        cache.store(ids[:CHUNK], state)
    near = PrefixCache(model)
    near.store(ids[:CHUNK], state)
    assert near.find(ids)[0] == CHUNK
    for every in (0, 100, CHUNK + 1):
        with pytest.raises(UsageError, match=f"every: expected a multiple of {CHUNK}, got {every}"):
            PrefixCache(model, every=every)
    with pytest.raises(UsageError, match="max_bytes"):
        PrefixCache(model, max_bytes=-1)


# snapshots


def written(model: LanguageModel, **options: Any) -> tuple[Snapshots, dict[int, tuple[Tensor, State]]]:
    """Read, write, read and write; return also what was seen at the end of each part and at every step."""
    snapshots, seen = Snapshots(model, **options), dict[int, tuple[Tensor, State]]()
    for part, (length, steps) in enumerate([(2 * CHUNK + 30, 70), (CHUNK + 200, 40)]):
        logits = snapshots.read(text(length, part))
        seen[snapshots.position] = logits.clone(), snapshots.state.clone()
        for _ in range(steps):
            logits = snapshots.step(int(logits[:VOCAB].argmax()))
            seen[snapshots.position] = logits.clone(), snapshots.state.clone()
    return snapshots, seen


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 16}, {"every": 10**9}, {"every": 1, "max_bytes": 10**5}, {"max_bytes": 0}],
    ids=["every-chunk", "every-16", "none", "thinned", "no-room"],
)
def test_going_back_is_exact(model: LanguageModel, options: dict[str, Any]) -> None:
    snapshots, seen = written(model, **options)
    for position in sorted(seen, reverse=True)[:: 40 if model.init_state(1).growth else 7]:
        logits = snapshots.back(position)
        assert snapshots.position == position
        assert logits is not None
        assert torch.equal(logits, seen[position][0])
        assert same(snapshots.state, seen[position][1])
    assert snapshots.back(0) is None
    assert snapshots.logits is None
    assert same(snapshots.state, model.init_state(1))


def test_the_text_goes_on_from_where_it_went_back(model: LanguageModel) -> None:
    snapshots, _ = written(model, every=32)
    ids = text(2 * CHUNK + 30, 0)
    snapshots.back(CHUNK + 9)  # in the middle of the first prompt
    expected, state = read(model, ids[: CHUNK + 9])
    assert torch.equal(snapshots.logits, expected)
    assert same(snapshots.state, state)
    other = text(CHUNK, 5)
    expected, state = read(model, other, state, CHUNK + 9)
    assert torch.equal(snapshots.read(other), expected)
    expected = model.step(torch.tensor([3]), state)[0][0]
    assert torch.equal(snapshots.step(3), expected)
    place = snapshots.position
    snapshots.step(4)
    assert torch.equal(snapshots.back(place), expected)


def test_a_text_may_begin_with_a_state(model: LanguageModel) -> None:
    ids = text(CHUNK + 30)
    state = read(model, ids[:40])[1]
    before = state.clone()
    snapshots = Snapshots(model, every=8, state=state, position=40)
    snapshots.read(ids[40:])
    logits = snapshots.step(1).clone()
    snapshots.step(2)
    assert torch.equal(snapshots.back(CHUNK + 31), logits)
    assert snapshots.back(40) is None
    assert same(state, before)
    assert same(snapshots.state, before)
    for position in (39, 41):
        with pytest.raises(LongscanError, match=f"position: expected 40 to 40, got {position}"):
            snapshots.back(position)


def test_snapshots_thin_out_towards_the_past(constant: Mamba) -> None:
    size = constant.init_state(1).nbytes
    snapshots = Snapshots(constant, every=4, max_bytes=12 * size)
    for token in text(1000):
        snapshots.step(token)
    assert snapshots.nbytes <= 12 * size
    positions = snapshots.positions
    assert len(positions) == 12
    for back in (1, 10, 100, 500, 900):
        position = 1000 - back
        nearest = max((each for each in positions if each < position), default=0)
        assert position - nearest <= max(4, 1.5 * back), positions


def test_a_failed_read_changes_nothing(model: LanguageModel) -> None:
    snapshots = Snapshots(model)
    logits = snapshots.read(text(CHUNK))
    for bad in (lambda: snapshots.read([*text(2 * CHUNK), VOCAB]), lambda: snapshots.step(VOCAB)):
        with pytest.raises(LongscanError, match="token id"):
            bad()
        assert (snapshots.position, snapshots.positions) == (CHUNK, (CHUNK,))
        assert torch.equal(snapshots.logits, logits)
    with pytest.raises(UsageError, match="every: expected 1 or more, got 0"):
        Snapshots(model, every=0)
