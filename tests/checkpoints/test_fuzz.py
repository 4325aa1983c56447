"""Files that strangers made: whatever is in them, reading one gives the thing or a clear error, and soon.

Some hundred files a test; `make test ARGS="tests/test_fuzz.py --hypothesis-profile=fuzz"` tries 20,000.
"""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf_bytes as raw
from longscan.checkpoints.gguf.model import save_gguf
from longscan.checkpoints.gguf.parser import check
from longscan.checkpoints.load import load
from longscan.errors import LongscanError
from longscan.models import LanguageModel, Llama, LlamaConfig, Mamba, MambaConfig, State
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe

EXAMPLES = max(250, settings.default.max_examples)  # the profile may ask for more
DEADLINE = 10_000  # milliseconds: a file of a few kB takes one or two
MEMORY = 64  # MB that reading one may take

fuzz = settings(max_examples=EXAMPLES, deadline=DEADLINE, suppress_health_check=list(HealthCheck))

# what breaks arithmetic: in the place of a length, a count, an offset
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32]),
    st.sampled_from([2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", params=["mamba", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    draw = torch.Generator().manual_seed(0)
    if request.param == "llama":
        return Llama(LlamaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=16), draw)
    return Mamba(MambaConfig(d_model=32, n_layers=1, vocab_size=16, d_state=2), draw)


def edits(size: int, head: int) -> st.SearchStrategy[list[tuple[str, int, int, bytes]]]:
    """Choose where to damage a file, mostly in its first bytes, and how."""
    places = st.one_of(st.integers(0, head), st.integers(0, size))
    hows = st.sampled_from(["word", "half", "bytes", "cut", "drop", "insert", "double"])
    return st.lists(st.tuples(hows, places, NUMBERS, st.binary(max_size=16)), min_size=1, max_size=4)


def damage(data: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """Do it."""
    changed = bytearray(data)
    for how, at, number, new in changes:
        match how:
            case "word" | "half":
                width = 8 if how == "word" else 4
                changed[at : at + width] = struct.pack("<Q", number)[:width]
            case "bytes":
                changed[at : at + len(new)] = new
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + number % 64]
            case "insert":
                changed[at:at] = new
            case "double":
                changed[at:at] = changed[at : at + number % 256]
    return bytes(changed)


def survive(read: Callable[[Path], Any], path: Path, data: bytes) -> None:
    path.write_bytes(data)
    message, before = "", memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about tokenizers of other kinds
        try:
            read(path)
        except LongscanError as error:
            message = str(error)
    assert memory(peak=True) - before < MEMORY * 1024
    assert not message or (message.startswith(str(path)) and len(message) < 2000)


def memory(peak: bool = False) -> int:
    """The memory of this process in kB, or its peak since the last call; 0 if nothing tells."""
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not marks.exists():
        return 0
    if not peak:
        marks.write_text("5")
    found = re.search(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+) kB", status.read_text())
    assert found
    return int(found[1])


# ---- GGUF

SMALL = raw.mamba()
SMALL_HEAD = len(SMALL) - sum(len(entry.data) + -len(entry.data) % 32 for entry in raw.entries())


@fuzz
@given(changes=edits(len(SMALL), SMALL_HEAD))
def test_damaged_gguf(changes: Any, folder: Path) -> None:
    survive(load, folder / "a.gguf", damage(SMALL, changes))


QUANTISED = raw.mamba(width=256, matrix=14)


@settings(fuzz, max_examples=EXAMPLES // 5)
@given(changes=edits(len(QUANTISED), SMALL_HEAD))
def test_damaged_k_quants(changes: Any, folder: Path) -> None:
    pytest.importorskip("gguf")
    survive(load, folder / "k.gguf", damage(QUANTISED, changes))


VALUES = st.one_of(
    NUMBERS.map(lambda n: struct.pack("<IQ", 10, n)),
    NUMBERS.map(lambda n: raw.u32(n % 2**32)),
    st.floats(width=32).map(raw.f32),
    st.text(max_size=20).map(raw.string),
    st.lists(st.text(max_size=5), max_size=12).map(raw.strings),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12).map(raw.numbers),
    st.sampled_from([raw.true(), raw.string("gpt2"), raw.string("llama"), raw.string("mamba")]),
    st.tuples(st.integers(0, 14), NUMBERS, st.binary(max_size=32)).map(
        lambda t: struct.pack("<IIQ", 9, t[0], t[1]) + t[2]
    ),
    st.tuples(st.integers(0, 14), st.binary(max_size=24)).map(lambda t: struct.pack("<I", t[0]) + t[1]),
)
KEYS = st.one_of(
    st.sampled_from([*raw.METADATA, "general.alignment", "split.count", "longscan.vocab_size"]),
    st.sampled_from(["tokenizer.huggingface.json", "longscan.tokenizers.bpe", "mamba.ssm.dt_b_c_rms"]),
    st.text(max_size=10),
)
DIMS = st.lists(st.one_of(st.sampled_from([1, 2, 4, 6, 10, 32, 64, 128, 256]), NUMBERS), max_size=6)


@st.composite
def structured(draw: Callable[..., Any]) -> bytes:
    """Write a file whose parts are well-formed and whose contents are not what they should be."""
    metadata = {**raw.METADATA, **draw(st.dictionaries(KEYS, VALUES, max_size=3))}
    for key in draw(st.lists(st.sampled_from(list(raw.METADATA)), max_size=1)):
        metadata.pop(key)
    entries = raw.entries()
    for index in draw(st.lists(st.integers(0, len(entries) - 1), max_size=3)):
        old = entries[index]
        entries[index] = raw.Entry(
            draw(st.sampled_from([old.name, old.name, "output.weight", "blk.1.ssm_d", "blk.0.ssm_d"])),
            tuple(draw(st.one_of(st.just(old.dims), st.permutations(old.dims), DIMS))),
            draw(st.one_of(st.just(old.kind), st.integers(0, 42))),
            draw(st.one_of(st.none(), st.integers(0, 400).map(lambda n: 32 * n), NUMBERS)),
            old.data,
        )
    return raw.file(list(metadata.items()), entries)


@fuzz
@given(data=structured())
def test_impossible_gguf(data: bytes, folder: Path) -> None:
    survive(load, folder / "b.gguf", data)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A file with a whole tokenizer in it, and where its tensors begin."""
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("written") / "a.gguf"
    tokenizer = ByteTokenizer() if request.param == "bytes" else train_bpe(["a b ab abc abcd dcba"] * 9, 300)
    config = MambaConfig(d_model=32, n_layers=1, vocab_size=304, d_state=2)
    save_gguf(Mamba(config, torch.Generator().manual_seed(0)), path, tokenizer, "Q8_0")
    return path.read_bytes(), min(info.begin for info in check(path).tensors.values())


@settings(fuzz, max_examples=EXAMPLES // 4)
@given(choice=st.data())
def test_damaged_tokenizers(choice: st.DataObject, written: tuple[bytes, int], folder: Path) -> None:
    data, head = written
    survive(load, folder / "t.gguf", damage(data, choice.draw(edits(len(data), head))))


# ---- states


@pytest.fixture(scope="module")
def state_file(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    _, state = model.prefill(torch.arange(9)[None])
    state.save(path, position=9, pending=[3], model=model)
    return path.read_bytes()


@fuzz
@given(choice=st.data())
def test_damaged_state(choice: st.DataObject, model: LanguageModel, state_file: bytes, folder: Path) -> None:
    head = 8 + int.from_bytes(state_file[:8], "little")
    data = damage(state_file, choice.draw(edits(len(state_file), head)))
    survive(lambda path: State.load(path, model), folder / "a.state", data)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8), st.just("F32"), st.just("I64")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz
@given(choice=st.data())
def test_impossible_state(
    choice: st.DataObject, model: LanguageModel, state_file: bytes, folder: Path
) -> None:
    length = int.from_bytes(state_file[:8], "little")
    header = json.loads(state_file[8 : 8 + length])
    for _ in range(choice.draw(st.integers(1, 3))):
        inner = [header, *(value for value in header.values() if isinstance(value, dict))]
        part = choice.draw(st.sampled_from(inner))
        names = st.one_of(st.sampled_from([*sorted(part), "x"]), st.text(max_size=8))
        part[choice.draw(names)] = choice.draw(JSON)
    text = json.dumps(header).encode()
    claim = choice.draw(st.one_of(st.just(len(text)), st.just(len(text)), NUMBERS))
    data = struct.pack("<Q", claim) + text + state_file[8 + length :]
    survive(lambda path: State.load(path, model), folder / "b.state", data)


def test_deep_json_in_a_state(model: LanguageModel, tmp_path: Path) -> None:
    text = b"[" * 100_000
    survive(lambda path: State.load(path, model), tmp_path / "a", struct.pack("<Q", len(text)) + text)
    (tmp_path / "b").write_bytes(struct.pack("<Q", 2**40))
    os.truncate(tmp_path / "b", 2**41)  # a hole: it takes no room on the disk
    with pytest.raises(LongscanError):
        State.load(tmp_path / "b", model)
