"""The state as an object: forks, views, rows, and the file that keeps it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from longscan.errors import LongscanError
from longscan.models import Mamba, MambaConfig, State
from stand_ins import instead


def small(seed: int = 0, **fields: Any) -> Mamba:
    config = MambaConfig(**{"d_model": 16, "n_layers": 2, "vocab_size": 13, "d_state": 4, **fields})
    return Mamba(config, torch.Generator().manual_seed(seed)).eval()


def after(model: Mamba, rows: int = 1, length: int = 9) -> State:
    ids = torch.randint(0, 13, (rows, length), generator=torch.Generator().manual_seed(1))
    return model.prefill(ids)[1]


def same(first: State, second: State) -> bool:
    pairs = zip(first.named_tensors(), second.named_tensors(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# the object


def test_a_fork_goes_its_own_way() -> None:
    model = small()
    state = after(model, 2)
    before, forked = state.clone(), state.fork(3)
    assert forked.batch_size == 6
    assert same(forked, state.select([0, 0, 0, 1, 1, 1]))
    alone = model.step(torch.tensor([5, 7]), state.clone())[0]
    logits, _ = model.step(torch.tensor([5, 1, 2, 7, 3, 4]), forked)
    torch.testing.assert_close(logits[[0, 3]], alone)
    assert same(state, before)
    assert same(state.fork(), state)
    with pytest.raises(ValueError, match="at least 1 copy, got 0"):
        state.fork(0)


def test_the_head_is_a_view() -> None:
    model = small()
    state = after(model, 3)
    before = state.clone()
    head = state.rows(2)
    assert head.batch_size == 2
    model.step(torch.tensor([1, 2]), head)
    assert same(state.rows(2), head)
    assert not same(head, before.rows(2))
    assert same(state.select([2]), before.select([2]))
    assert state.rows(0).batch_size == 0
    for n in (4, -1):
        with pytest.raises(ValueError, match=f"expected 0 to 3 rows, got {n}"):
            state.rows(n)


def test_a_row_is_overwritten_in_place() -> None:
    model = small()
    state, other = after(model, 3), after(model, 2, length=4)
    before, view = state.clone(), state.rows(3)
    state.copy_row_(1, other, 0)
    assert same(view, state)
    assert same(state.select([1]), other.select([0]))
    assert same(state.select([0, 2]), before.select([0, 2]))
    state.copy_row_(0, state, 2)
    assert same(state.select([0]), before.select([2]))
    with pytest.raises(IndexError):
        state.copy_row_(3, other, 0)


def test_a_state_knows_its_model_and_copies_do_not_copy_it() -> None:
    model = small()
    state = after(model)
    for kept in (
        model.init_state(2),
        model.prefill(torch.ones(1, 3, dtype=torch.long), state)[1],
        *(state.clone(), state.detach(), state.select([0]), state.fork(2), state.rows(1)),
    ):
        assert kept.model is model
    for bare in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert bare.model is None
        assert same(bare, state)


# the file


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_state_survives_in_a_file_bit_for_bit(tmp_path: Path, rows: int, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    state = after(model, rows)
    pending = [3, 12, 0] if rows == 1 else []
    state.save(tmp_path / "s", position=9, pending=pending)
    loaded = State.load(tmp_path / "s", model)
    assert same(loaded.state, state)
    assert loaded.state.layers[0].ssm.dtype == state.layers[0].ssm.dtype
    assert (loaded.position, loaded.pending, loaded.state.model) == (9, pending, model)
    assert type(loaded.state.layers[0]) is type(state.layers[0])
    ids = torch.arange(rows)
    assert torch.equal(model.step(ids, loaded.state)[0], model.step(ids, state)[0])


def test_the_file_is_plain_safetensors_written_whole(tmp_path: Path) -> None:
    model = small()
    state = after(model, 2)
    path = tmp_path / "s"
    path.write_text("older")
    state.rows(1).save(path, pending=torch.tensor([4]))
    tensors = load_safetensors(path.read_bytes())
    assert tensors["pending"].tolist() == [4]
    assert torch.equal(tensors["layers.1.conv"], state.layers[1].conv[:1])
    assert len(tensors["layers.0.ssm"]) == 1
    assert os.listdir(tmp_path) == ["s"]
    with pytest.raises(OSError, match="No such file"):
        state.save(tmp_path / "missing" / "s")


def test_another_process_continues_exactly(tmp_path: Path) -> None:
    model = small()
    logits, state = model.prefill(torch.arange(12)[None])
    token = int(logits[0, :13].argmax())
    state.save(tmp_path / "s", position=12, pending=[token])
    again = small()
    loaded = State.load(tmp_path / "s", again)
    expected = model.step(torch.tensor([token]), state)[0]
    assert torch.equal(again.step(torch.tensor(loaded.pending), loaded.state)[0], expected)


def test_what_is_not_worth_saving_is_refused(tmp_path: Path) -> None:
    model = small()
    state, path = after(model, 2), tmp_path / "s"
    with pytest.raises(LongscanError, match=r"no model attached: use state.save\(path, model=model\)"):
        State(state.layers).save(path)
    State(state.layers).save(tmp_path / "t", model=model)
    with pytest.raises(LongscanError, match="expected a state of one row, got 2"):
        state.save(path, pending=[1])
    with pytest.raises(LongscanError, match="at least one row, got 0"):
        state.select([]).save(path)
    with pytest.raises(LongscanError, match="position: expected the number of tokens consumed, got -1"):
        state.save(path, position=-1)
    for wrong in (13, -1):
        with pytest.raises(LongscanError, match=f"pending: expected token ids from 0 to 12, got {wrong}"):
            state.rows(1).save(path, pending=[1, wrong])
    state.layers[1].ssm[1, 0, 0] = torch.nan
    with pytest.raises(LongscanError, match="NaN or infinity"):
        state.save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: small(seed=1), r"other weights \(fingerprint '\w{16}', this model has '\w{16}'"),
        (lambda: small().double(), r"layers.0.conv to be F64 of shape \(rows, 3, 32\), got F32"),
        (lambda: small().bfloat16(), r"in the same precision"),
        (lambda: small(n_layers=3), r"expected Mamba of 3 layers, got 'Mamba' of '2'"),
        (lambda: small(d_model=32), r"\(rows, 3, 64\), got F32 \(1, 3, 32\)"),
        (lambda: small(d_state=8), r"layers.0.ssm to be F32 of shape \(rows, 32, 8\)"),
        (lambda: small(d_conv=2), r"layers.0.conv to be F32 of shape \(rows, 1, 32\)"),
    ],
    ids=["weights", "double", "precision", "layers", "width", "d_state", "d_conv"],
)
def test_the_state_of_another_model_is_refused(
    tmp_path: Path, other: Callable[[], Mamba], message: str
) -> None:
    after(small()).save(tmp_path / "s")
    with pytest.raises(LongscanError, match=message):
        State.load(tmp_path / "s", other())


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def put(key: str, field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[key].__setitem__(field, value)


SSM, META = "layers.0.ssm", "__metadata__"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other-format": (put(META, "format", "pt"), "is safetensors, but not a state"),
    "no-metadata": (lambda h: h.pop(META), "is safetensors, but not a state"),
    "metadata-list": (lambda h: h.update({META: []}), "header is malformed"),
    "later-version": (put(META, "version", "2"), "version '2', expected '1'"),
    "other-class": (put(META, "model", "S4" * 10**6), "got 'S4S4"),
    "layers-number": (put(META, "layers", 2), "expected Mamba of 2 layers, got 'Mamba' of 2\\."),
    "position-minus": (put(META, "position", "-1"), "its position is '-1'"),
    "position-long": (put(META, "position", "9" * 10**6), "its position is '9999"),
    "position-other-digits": (put(META, "position", "٣"), "its position is"),
    "position-missing": (lambda h: h[META].pop("position"), "its position is 'None'"),
    "missing": (lambda h: h.pop(SSM), "overlap or leave gaps"),
    "renamed": (lambda h: h.update({"x" * 99: h.pop(SSM)}), "'layers.0.ssm' is missing"),
    "extra": (
        lambda h: h.update(z={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        "'z' is unexpected",
    ),
    "no-pending": (lambda h: h.update({"q": h.pop("pending")}), "'pending' is missing"),
    "type": (put(SSM, "dtype", "F8"), "header is malformed"),
    "type-list": (put(SSM, "dtype", ["F32"]), "header is malformed"),
    "ints": (put(SSM, "dtype", "I64"), "header is malformed"),
    "no-shape": (lambda h: h[SSM].pop("shape"), "header is malformed"),
    "huge-shape": (put(SSM, "shape", [2**62, 2**62]), "header is malformed"),
    "many-dims": (put(SSM, "shape", [2] * 10**5), "header is malformed"),
    "zero-dims": (put(SSM, "shape", []), "header is malformed"),
    "wrapped": (put(SSM, "shape", [2**64 + 1, 32, 4]), "header is malformed"),
    "turned": (put(SSM, "shape", [1, 4, 32]), r"ssm to be F32 of shape \(rows, 32, 4\), got F32 \(1, 4"),
    "fraction": (put(SSM, "shape", [1.0, 32, 4]), "header is malformed"),
    "truth": (put(SSM, "shape", [True, 32, 4]), "header is malformed"),
    "text": (put(SSM, "shape", "132"), "header is malformed"),
    "negative": (put(SSM, "data_offsets", [-512, 0]), "header is malformed"),
    "far": (put(SSM, "data_offsets", [2**60, 2**60 + 512]), "overlap or leave gaps"),
    "overlap": (put(SSM, "data_offsets", [0, 512]), "overlap or leave gaps"),
    "three-offsets": (put(SSM, "data_offsets", [0, 512, 1]), "header is malformed"),
    "extra-field": (put(SSM, "more", 1), "header is malformed"),
    "list": (lambda h: h.update({SSM: []}), "header is malformed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_before_anything_is_made_of_it(tmp_path: Path, case: str) -> None:
    path, (change, message) = tmp_path / "s", HOSTILE[case]
    model = small()
    after(model).save(path)
    rewrite(path, change)
    empty = {0: model.init_state(0)}  # a state with rows is a KeyError
    bare = instead(model, init_state=empty.__getitem__, fingerprint=None)  # nor are the weights read
    with pytest.raises(LongscanError, match=message) as caught:
        State.load(path, bare)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 7, 8, 9, 300, -1])
def test_a_file_cut_short_is_told_from_others(tmp_path: Path, length: int) -> None:
    path, model = tmp_path / "s", small()
    after(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    message = "is not a state file" if 0 <= length < 8 else "shorter than its header says"
    with pytest.raises(LongscanError, match=message):
        State.load(path, model)
    path.write_bytes(whole + b"1234")
    with pytest.raises(LongscanError, match="4 bytes more"):
        State.load(path, model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "is not a state file"),
        (struct.pack("<Q", 5 << 20) + b" " * (5 << 20), "is not a state file"),
        (struct.pack("<Q", 10**6) + b"[" * 10**6, "header is malformed"),
        (struct.pack("<Q", 2) + b"[]", "header is malformed"),
        (struct.pack("<Q", 2) + b"{}", "not a state"),
        (struct.pack("<Q", 2) + b"\xff\xff", "header is malformed"),
        (struct.pack("<Q", 5002) + b'{"a":' + b"1" * 4996 + b"}", "header is malformed"),
        (b"GGUF" * 9, "is not a state file"),
    ],
    ids=["huge", "long", "nested", "list", "empty", "not-utf8", "digits", "gguf"],
)
def test_what_is_no_state_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(LongscanError, match=message):
        State.load(tmp_path / "s", small())


def test_other_things_than_state_files(tmp_path: Path) -> None:
    model = small()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(LongscanError, match="is safetensors, but not a state"):
        State.load(tmp_path / "model.safetensors", model)
    for nothing in (tmp_path, tmp_path / "nowhere", "/dev/zero"):
        with pytest.raises(LongscanError, match="no state file"):
            State.load(nothing, model)


def test_damaged_numbers_and_tokens_are_found(tmp_path: Path) -> None:
    path, model = tmp_path / "s", small()
    after(model).save(path, pending=[12])
    good = path.read_bytes()
    start = 8 + struct.unpack("<Q", good[:8])[0]
    entries = json.loads(good[8:start])
    for name, value, message in (
        (SSM, struct.pack("<f", float("nan")), "holds NaN or infinity"),
        (SSM, struct.pack("<f", float("-inf")), "holds NaN or infinity"),
        ("pending", struct.pack("<q", 13), "pending: expected token ids from 0 to 12, got 13"),
        ("pending", struct.pack("<q", -(2**63)), "pending: expected token ids from 0 to 12"),
    ):
        place = start + entries[name]["data_offsets"][0]
        path.write_bytes(good[:place] + value + good[place + len(value) :])
        with pytest.raises(LongscanError, match=message):
            State.load(path, model)
