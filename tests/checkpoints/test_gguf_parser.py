"""GGUF headers: a valid one is understood, and whatever else a file may say is refused in a sentence."""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path

import pytest

import gguf_bytes as raw
from gguf_bytes import Entry
from longscan.checkpoints.gguf.parser import TYPES, check
from longscan.errors import LongscanError

META = list(raw.METADATA.items())
U64 = 2**64 - 1


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def head(version: int = 3, n_tensors: int = 0, n_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def test_a_valid_file_is_understood(tmp_path: Path) -> None:
    header = check(put(tmp_path, raw.mamba()))
    assert header.metadata["mamba.block_count"] == 1
    assert header.metadata["tokenizer.ggml.tokens"] == raw.TOKENS
    types = header.metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, array)
    assert types.tolist() == [3, *[1] * 7, 5, 5]
    assert header.tensors["blk.0.ssm_in.weight"].shape == (128, 32)
    assert all(info.begin % 32 == 0 for info in header.tensors.values())


def test_the_gguf_package_understands_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = put(tmp_path, raw.mamba(width=256, matrix=14))
    header, theirs = check(path), gguf.GGUFReader(path)
    assert set(header.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in header.metadata.items():
        ours = value.tolist() if isinstance(value, array) else value
        assert ours == theirs.fields[key].contents()
    assert len(theirs.tensors) == len(header.tensors)
    for tensor in theirs.tensors:
        info = header.tensors[tensor.name]
        assert info.type == tensor.tensor_type.name
        assert (info.begin, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {kind: sizes[kind] for kind in TYPES if kind in sizes} == TYPES


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    metadata = [*META, ("general.alignment", raw.u32(alignment))]
    header = check(put(tmp_path, raw.file(metadata, raw.entries(), alignment=alignment)))
    assert all(info.begin % alignment == 0 for info in header.tensors.values())


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = raw.mamba()
    last = max(info.begin + info.n_bytes for info in check(put(tmp_path, data)).tensors.values())
    for size in [*range(0, 1800, 7), last - 1]:
        with pytest.raises(LongscanError, match=r"shorter than|not a GGUF file"):
            check(put(tmp_path, data[:size]))


HUGE = 2**63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "other-format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "magic-alone": (b"GGUF", "shorter than any"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version-1": (head(1), "has version 1"),
    "version-9": (head(9), "has version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many-tensors": (head(n_tensors=HUGE), "tensors"),
    "more-tensors-than-bytes": (head(n_tensors=1000), "shorter than its header says"),
    "many-keys": (head(n_keys=U64), "keys"),
    "more-keys-than-bytes": (head(n_keys=1000), "shorter than its header says"),
    "long-key": (head(n_keys=1) + struct.pack("<Q", U64) + bytes(20), "expected at most 65,535"),
    "long-text": (raw.file([("a", struct.pack("<IQ", 8, 2**40))], []), "is 1,099,511,627,776 bytes long"),
    "wrapping-text": (raw.file([("a", struct.pack("<IQ", 8, U64 - 8))], []), "bytes long"),
    "text-past-the-end": (raw.file([("a", struct.pack("<IQ", 8, 5000))], []), "shorter than its header says"),
    "wrapping-array": (raw.file([("a", struct.pack("<IIQ", 9, 4, 2**62))], []), "elements in a"),
    "long-array": (raw.file([("a", struct.pack("<IIQ", 9, 0, 2**21 + 1))], []), "elements in a"),
    "array-past-the-end": (raw.file([("a", struct.pack("<IIQ", 9, 11, 2**20))], []), "shorter than"),
    "array-of-arrays": (raw.file([("a", struct.pack("<IIQ", 9, 9, 1) * 50)], []), "an array of arrays"),
    "array-of-nothing": (raw.file([("a", struct.pack("<IIQ", 9, 77, 1))], []), "unknown type 77"),
    "unknown-value": (raw.file([("a", struct.pack("<II", 13, 1))], []), "unknown type 13"),
    "no-bool": (raw.file([("a", struct.pack("<IB", 7, 2))], []), "expected 0 or 1"),
    "no-bools": (raw.file([("a", struct.pack("<IIQ", 9, 7, 2) + b"\1\2")], []), "neither true nor false"),
    "key-twice": (raw.file([("a", raw.u32(1)), ("a", raw.u32(2))], []), "the key a is there twice"),
    "no-utf-8-key": (raw.file([(b"\xff\xfe", raw.u32(1))], []), "not UTF-8"),
    "no-utf-8-value": (raw.file([("a", struct.pack("<I", 8) + raw.text(b"\xff"))], []), "not UTF-8"),
    "alignment-0": (raw.file([("general.alignment", raw.u32(0))], []), "power of two"),
    "alignment-48": (raw.file([("general.alignment", raw.u32(48))], []), "power of two"),
    "alignment-huge": (raw.file([("general.alignment", raw.u32(2**31))], []), "power of two"),
    "alignment-text": (raw.file([("general.alignment", raw.string("32"))], []), "power of two"),
    "no-dimensions": (raw.file([], [Entry("t", ())]), "has 0 dimensions"),
    "five-dimensions": (raw.file([], [Entry("t", (1,) * 5)]), "has 5 dimensions"),
    "a-million-dimensions": (
        head(n_tensors=1) + raw.text("t") + struct.pack("<I", 10**6) + bytes(100),
        "has 1,000,000 dimensions",
    ),
    "no-elements": (raw.file([], [Entry("t", (4, 0))]), "is empty"),
    "wrapping-shape": (raw.file([], [Entry("t", (2**32, 2**32))]), "shorter than its header says"),
    "huge-shape": (raw.file([], [Entry("t", (U64 - 31, U64, U64, U64), kind=2)]), "shorter than"),
    "unknown-type": (raw.file([], [Entry("t", (32,), kind=4)]), "unknown type 4"),
    "half-a-block": (raw.file([], [Entry("t", (48,), kind=8)]), "expected a multiple of 32"),
    "unaligned": (raw.file([], [Entry("t", (8,), offset=8, data=bytes(64))]), "expected a multiple of 32"),
    "huge-offset": (raw.file([], [Entry("t", (8,), offset=2**63)]), "shorter than its header says"),
    "wrapping-offset": (raw.file([], [Entry("t", (8,), offset=U64 - 31)]), "shorter than"),
    "overlap": (
        raw.file([], [Entry("t", (64,), data=bytes(256)), Entry("u", (8,), offset=224)]),
        "begins inside another",
    ),
    "same-place": (
        raw.file([], [Entry("t", (8,), data=bytes(32)), Entry("u", (8,), offset=0)]),
        "begins inside another",
    ),
    "tensor-twice": (
        raw.file([], [Entry("t", (8,), data=bytes(32)), Entry("t", (8,), data=bytes(32))]),
        "the tensor t is there twice",
    ),
    "cut-data": (raw.mamba()[:-200], "shorter than its header says"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(LongscanError) as caught:
        check(put(tmp_path, data))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "model.gguf"))
    assert words in message
    assert len(message) < 500


def test_endless_metadata_end(tmp_path: Path) -> None:
    path = put(tmp_path, head(n_keys=1) + raw.text("a") + struct.pack("<IQ", 8, 2**26 - 10))
    os.truncate(path, 2**30)  # a hole: it takes no room on the disk
    with pytest.raises(LongscanError, match="header is longer than 67,108,864 bytes"):
        check(path)


LONG = "\n" * 60_000


@pytest.mark.parametrize(
    "data",
    [
        raw.file([], [Entry(LONG, (8,), kind=4)]),
        raw.file([], [Entry(LONG, (8,)), Entry(LONG, (8,))]),
        raw.file([(LONG, struct.pack("<I", 13))], []),
        raw.file([(LONG, struct.pack("<II", 9, 13))], []),
        raw.file([(LONG, struct.pack("<IQ", 8, 2**40))], []),
        raw.file([(LONG, raw.u32(1)), (LONG, raw.u32(1))], []),
    ],
)
def test_a_long_name_is_shortened(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(LongscanError) as caught:
        check(put(tmp_path, data))
    assert len(str(caught.value)) < 500
    assert "\n\n" not in str(caught.value)
