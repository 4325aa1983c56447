"""Arrays and archives of labelled sequences as they come: odd, damaged, compressed."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeled_files import sounds, write_npz
from longscan.data.labeled_sequences import read_sequences
from longscan.errors import LongscanError

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sounds(tmp_path_factory.mktemp("sounds"))


# arrays and archives as they come


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (np.array([[3], [10], [3]]), ("3", "10")),
        (np.array([True, False, True]), ("False", "True")),
        (np.array([b"caf\xc3\xa9", b"dog", b"dog"]), ("café", "dog")),
        (np.array([["a "], ["b"], ["b"]]), ("a", "b")),
        (np.array([2**64 - 1, 0, 0], np.uint64), ("0", str(2**64 - 1))),
        (np.array([[0.5], [1], [2]], np.float16), ()),
        (np.array([0.0, 1.0, 2.0]), ()),  # floats are numbers, whole or not
    ],
    ids=["column", "bool", "bytes", "texts", "uint64", "numbers", "whole"],
)
def test_each_kind_of_label_has_its_meaning(y: np.ndarray, expected: tuple[str, ...], tmp_path: Path) -> None:
    found = read_sequences([write_npz(tmp_path / "a.NPZ.npz", x=np.zeros((3, 2)), y=y)])
    assert found.labels == expected
    if not expected:
        assert found.truth.tolist() == y.reshape(3, 1).tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": np.eye(3)}, r"has a 1 in each row: save the classes as y\.argmax\(1\)"),
        ({"y": np.eye(3, dtype=bool)}, r"y\.argmax\(1\)"),
        (
            {"y": np.array([[1, 2]] * 3)},
            r"expected y \(3,\) of labels, got int64 \(3, 2\). Numbers are floats",
        ),
        ({"y": np.array(1)}, r"expected y \(3,\), a label or number for each x, got int64 \(\)"),
        ({"y": np.zeros((3, 1, 1))}, r"got float64 \(3, 1, 1\)"),
        ({"y": np.zeros((3, 0))}, r"got float64 \(3, 0\)"),
        ({"y": [0, 1]}, r"as many y and lengths as x \(3\), got 2 y"),
        ({"y": [0.0, np.nan, 1]}, r"a\.npz:1: expected finite numbers y, got \[nan\]"),
        ({"y": [0.0, 1, 1e300]}, r"a\.npz:2: expected finite numbers y"),
        ({"y": np.array([1j] * 3)}, "expected y of labels or numbers, got complex128"),
        ({"y": np.array(["2020-01-01"] * 3, "datetime64[D]")}, "got datetime64"),
        ({"y": np.array(["a", " ", "b"])}, r"a\.npz:1: expected a label, got an empty one"),
        ({"y": np.array([b"a", b"\xff", b"b"])}, r"a\.npz:1: the label b'\\xff' is not UTF-8"),
        ({"y": np.array([None] * 3)}, "allow_pickle"),
        ({"lengths": [1, 2]}, r"got lengths int64 \(2,\)"),
        ({"lengths": [1.0, 2, 2]}, "They are whole numbers"),
        ({"lengths": np.array(2)}, r"got lengths int64 \(\)"),
        ({"lengths": [1, 2, 0]}, r"a\.npz:2: expected lengths from 1 to 2, got 0"),
        ({"x": np.array([[2**40, 1]] * 3)}, "expected tokens below 1,048,576, got 1,099,511,627,776"),
        ({"x": np.zeros((2**40, 0))}, "expected numbers x"),
        (
            {"values": np.array(1), "lengths": [2] * 3, "labels": "a", "names": "b"},
            "not as longscan writes it",
        ),
    ],
)
def test_each_odd_kind_is_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", **{"x": np.zeros((3, 2)), "y": [0, 1, 1], **arrays})
    with pytest.raises(LongscanError, match=words):
        read_sequences([tmp_path / "a.npz"])


def test_whole_floats_are_numbers_and_a_word_says_so(cli: Cli, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=np.zeros((20, 3, 1)), y=np.arange(20.0) % 2)
    done = cli("classify", "train", path, "--model", "s4d", "--steps", 1, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "y holds whole floats, taken as values: for classes save y.astype(int)" in done.err


def test_sounds_without_a_label_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "low", tmp_path / "low")
    shutil.copy(data / "low" / "0.wav", tmp_path / "_0.wav")
    with pytest.raises(LongscanError, match=r"_0\.wav has no label: it is in no folder, or begins with _"):
        read_sequences([tmp_path])


def test_an_array_under_the_name_of_an_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    for content in ((tmp_path / "a.npy").read_bytes(), b"", b"PK", b"\x93NUMPY\x01\x00\xff\xff{"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(LongscanError, match=r"is no \.npz file of plain arrays"):
            read_sequences([tmp_path / "a.npz"])


@pytest.mark.parametrize(
    "header", [b"{'descr': '<f8', 'shape': (1", b"[" * 5000, b"\0" * 80, b"{'descr': ((},"]
)
def test_headers_that_are_no_python(header: bytes, tmp_path: Path) -> None:
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", array)
    with pytest.raises(LongscanError, match=r"is no \.npz file of plain arrays"):
        read_sequences([tmp_path / "a.npz"])


def test_a_small_file_that_would_become_large(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1, 80 * 2**20), np.uint8), y=[0])
    with pytest.raises(LongscanError, match=r"expected at most 100 times its .* bytes, it claims"):
        read_sequences([tmp_path / "a.npz"])


def test_a_damaged_member_is_noticed(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=np.arange(1000.0)[None], y=[0])
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LongscanError, match=r"damaged \(Bad CRC-32"):
        read_sequences([path])


def write_tar(path: Path, folder: Path, compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression}") as tar:
        tar.add(folder, ".")
    return path


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_the_checksum_at_the_end_is_verified(compression: str, data: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / f"a.tar.{compression}", data, compression)
    assert len(read_sequences([path])) == 24
    content = bytearray(path.read_bytes())
    content[{"gz": -6, "xz": -20, "bz2": -3}[compression]] ^= 0x40  # in the checksum, behind all samples
    path.write_bytes(content)
    with pytest.raises(LongscanError, match="is no tar, or is damaged"):
        read_sequences([path])


def test_a_tar_is_read_to_its_end(data: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.TAR", data)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    broken = bytearray(whole)
    broken[last + 150] ^= 1  # the checksum of a header: tarfile takes it for the end
    for content in (
        broken,
        whole[:last],
        whole[: last + 100],
        whole + whole,
        whole[:last] + bytes(512) + whole,
    ):
        path.write_bytes(content)
        with pytest.raises(LongscanError, match=r"is no tar, or is damaged|has data after its end"):
            read_sequences([path])


def test_a_sparse_file_in_a_tar_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("low/0.wav")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"00000000000\0"
    header[398:410] = b"00000000000\0"
    header[483:495] = b"02000000000\0"  # 256 MB
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(LongscanError, match=r"is a sparse file. Pack the tar without --sparse"):
        read_sequences([tmp_path / "a.tar"])


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_link_in_a_tar_is_no_missing_sound(data: Path, tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", data, "")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("low/another.wav")
        info.type, info.linkname = kind, "low/0.wav"
        tar.addfile(info)
    with pytest.raises(LongscanError, match=r"another.wav is a link to low/0.wav. Pack .* --dereference"):
        read_sequences([path])


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["gnu", "pax"])
def test_a_tar_whose_header_claims_much(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 2**30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**12))
    with pytest.raises(LongscanError, match=r"a header claims 1,073,741,824 bytes"):
        read_sequences([tmp_path / "a.tar"])


def test_a_label_is_utf8(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    os.rename(tmp_path / "d" / "low", os.fsencode(tmp_path / "d") + b"/\xff")
    with pytest.raises(LongscanError, match=r"label of .* is not UTF-8: byte 0xFF"):
        read_sequences([tmp_path / "d"])


def test_images_whose_channels_come_first(tmp_path: Path) -> None:
    x = np.zeros((5, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(5))
    with pytest.raises(LongscanError, match=r"If the channels come first: x.transpose\(0, 2, 3, 1\)"):
        read_sequences([tmp_path / "a.npz"])
    np.savez(tmp_path / "a.npz", x=x.transpose(0, 2, 3, 1), y=np.arange(5))
    assert read_sequences([tmp_path / "a.npz"]).values.shape == (5 * 64, 3)


def test_hidden_files_are_left_out_and_suffixes_have_any_case(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / "low" / "0.wav").rename(tmp_path / "d" / "low" / "0.WAV")
    for name in ("low/._1.wav", ".trash/2.wav", "._high"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"\0\5\x16\7 of macOS")
    (tmp_path / "d" / "folder.wav").mkdir()
    tar = write_tar(tmp_path / "a.Tar.GZ", tmp_path / "d", "gz")
    for path in (tmp_path / "d", tar):
        assert len(read_sequences([path])) == 24
    assert len(read_sequences([tmp_path / "d" / "low" / "0.WAV"])) == 1
    (tmp_path / "._0.wav").write_bytes((data / "low" / "0.wav").read_bytes())
    assert len(read_sequences([tmp_path / "._0.wav"])) == 1  # named by itself it is meant
