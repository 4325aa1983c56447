"""Signals: every way of writing samples down, what damaged files say, other rates."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.data.signals import TESTS, make_signal, open_signal, white_noise
from longscan.data.wav import read_wav
from longscan.errors import LongscanError

KINDS = {(1, 8): "<u1", (1, 16): "<i2", (1, 24): "<i4", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
WAVE = np.stack([np.sin(np.arange(50) / 5), np.cos(np.arange(50) / 7)], 1) * 0.9  # two channels


def wav(
    code: int = 1,
    bits: int = 16,
    rate: int = 8000,
    extensible: bool = False,
    extra: bytes = b"",
    size: int = -1,
) -> bytes:
    """A WAV file of WAVE; `size` is what the header says of the samples, if not the truth."""
    if code == 3:
        data = WAVE.astype(KINDS[code, bits]).tobytes()
    elif bits == 8:
        data = np.round(WAVE * 128 + 128).astype(np.uint8).tobytes()
    else:
        numbers = np.round(WAVE * 2.0 ** (bits - 1)).astype(KINDS[code, bits])
        data = numbers.tobytes() if bits != 24 else numbers.reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
    width = 2 * bits // 8
    kind = struct.pack("<HHIIHH", 0xFFFE if extensible else code, 2, rate, rate * width, width, bits)
    if extensible:
        kind += struct.pack("<HHI", 22, bits, 3) + struct.pack("<H", code) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(kind)) + kind + extra
    chunks += b"data" + struct.pack("<I", len(data) if size < 0 else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize(
    ("code", "bits"), KINDS, ids=[f"{kind[1:]}-{bits}" for (_, bits), kind in KINDS.items()]
)
@pytest.mark.parametrize("extensible", [False, True], ids=["plain", "extensible"])
def test_wav_files(tmp_path: Path, code: int, bits: int, extensible: bool) -> None:
    content = wav(code, bits, extensible=extensible, extra=b"LIST" + struct.pack("<I", 3) + b"odd\0")
    samples, rate = read_wav(io.BytesIO(content), "it")
    assert (samples.shape, samples.dtype, rate) == ((50, 2), np.float32, 8000)
    step = 1e-7 if code == 3 else max(2.0 ** (1 - bits), 1e-7)
    assert np.abs(samples - WAVE).max() <= step
    path = tmp_path / "it.wav"
    path.write_bytes(content)
    signal = open_signal(path, channel=1)
    assert (signal.length, signal.rate) == (50, 8000)
    assert np.array_equal(signal.piece(7, 31).numpy(), samples[7:31, 1])
    assert np.array_equal(read_wav(path, "it")[0], samples)


def test_the_whole_of_an_unfinished_header() -> None:
    """Programs that stream write a size they don't know yet."""
    for size in (0, 0xFFFFFFFF):
        assert read_wav(io.BytesIO(wav(size=size)), "it")[0].shape == (50, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected a WAV file"),
        (b"ID3\4" * 9, "expected a WAV file"),
        (wav()[:30], "has no samples"),
        (wav()[:-10], "shorter than its header says"),
        (wav(size=1 << 30), "shorter than its header says"),
        (wav().replace(b"fmt ", b"fmx "), "does not say how its samples"),
        (wav().replace(struct.pack("<HH", 1, 2), struct.pack("<HH", 6, 2), 1), "found format 6 of 16 bits"),
        (wav(rate=0), "is damaged: 2 channels, 0 samples"),
    ],
    ids=["empty", "mp3", "header", "cut", "liar", "format", "law", "rate"],
)
def test_damaged_wav_files(content: bytes, words: str) -> None:
    with pytest.raises(LongscanError, match=words) as caught:
        read_wav(io.BytesIO(content), "my.wav")
    assert str(caught.value).startswith("my.wav")


def test_tables(tmp_path: Path) -> None:
    expected = torch.tensor([1.0, -2.5, 1e3])
    texts = {
        "a.csv": "time,value\n0,1\n1,-2.5\n\n2,1e3\n",
        "b.csv": "\ufeff0, 1\n1, -2.5\n2, 1e3",
        "c.tsv": "# made by hand\n0\t1\n1\t-2.5\n2\t1e3\n",
        "d.txt": "0 1\n1   -2.5\n2 1e3\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        signal = open_signal(tmp_path / name, channel=1, rate=10.0)
        assert torch.equal(signal.piece(0, 3), expected), name
        assert (signal.length, signal.rate) == (3, 10.0)
    np.save(tmp_path / "e.npy", np.array([[0, 1], [1, -2.5], [2, 1e3]]))
    assert torch.equal(open_signal(tmp_path / "e.npy", channel=1).piece(0, 3), expected)
    np.save(tmp_path / "f.npy", np.array([1, -2, 3], np.int16))
    assert open_signal(tmp_path / "f.npy").piece(1, 3).tolist() == [-2, 3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "# by hand\ntime,value\n0,1\n1,2\n"),
        ("a.csv", "\n\ntime,value\r\n0,1\r\n1,2\r\n"),
        ("a.csv", "time,value\ns,mV\n0,1\n1,2\n"),
        ("a.csv", "\ufeff# by hand\n\ntime,value\n  # units\ns,mV\n\n0,1\n1,2\n"),
        ("a.csv", ",0\n0,1\n1,2\n"),
        ("a.CSV", ",value\r0,1\r1,2\r"),
        ("a.tsv", "\t0\n0\t1\n1\t2\n"),
        ("a.tsv", "\tvalue\n0\t1\n1\t2\t\n"),
        ("a.txt", "  time value\n  0    1\n  1    2\n"),
    ],
)
def test_headers_of_tables(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    signal = open_signal(tmp_path / name, channel=1)
    assert signal.piece(0, signal.length).tolist() == [1, 2]


def test_a_missing_first_number_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("value\nNA\n1\n")
    with pytest.raises(LongscanError, match=r"sample 0 \(0\.000 s\) is nan"):
        open_signal(tmp_path / "a.csv").piece(0, 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "a\nb\nc\n1\n", "line 3: expected numbers"),
        ("a.csv", "1" * 2**23, "line 1: expected less than 4,194,304 characters"),
        ("a.npy", "", "is not an npy file"),
        ("a.npy", "PK\3\4", "is not an npy file"),
        ("a.csv", "x\n1\ntwo\n", "line 3: expected numbers"),
        ("a.csv", "1,2\n3\n", "line 2: expected 2 columns, got 1"),
        ("a.csv", "x,y\n", "expected samples, found none"),
        ("a.npy", "hello", "is not an npy file"),
        ("a.mp3", "", "expected a file that ends in .wav"),
        ("a.wav", "hello", "expected a WAV file"),
    ],
    ids=["headers", "long", "nothing", "zip", "words", "ragged", "empty", "npy", "suffix", "wav"],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LongscanError, match=words):
        open_signal(tmp_path / name)


def test_arrays_that_are_no_signal(tmp_path: Path) -> None:
    for array in (np.zeros((2, 2, 2)), np.array(["a"]), np.array([1 + 1j])):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(LongscanError, match="expected an array of numbers"):
            open_signal(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(LongscanError, match="is not an npy file of numbers"):
        open_signal(tmp_path / "a.npy")


def test_misuse(tmp_path: Path) -> None:
    path = tmp_path / "it.wav"
    path.write_bytes(wav())
    with pytest.raises(LongscanError, match="channel from 0 to 1, got 2"):
        open_signal(path, channel=2)
    with pytest.raises(LongscanError, match="the file says 8,000 samples per second, not 44100"):
        open_signal(path, rate=44100)
    with pytest.raises(LongscanError, match="did you mean 'noise'"):
        open_signal("nois")
    with pytest.raises(FileNotFoundError):
        open_signal(tmp_path / "gone.wav")


def test_what_is_no_number_is_found(tmp_path: Path) -> None:
    for value, word in ((math.nan, "nan"), (math.inf, "inf")):
        array = np.ones(1000)
        array[700] = value
        np.save(tmp_path / "a.npy", array)
        signal = open_signal(tmp_path / "a.npy", rate=100.0)
        with pytest.raises(LongscanError, match=rf"sample 700 \(7.000 s\) is {word}"):
            list(signal.pieces())
    (tmp_path / "a.csv").write_text("1,2\n3,\n")
    with pytest.raises(LongscanError, match=r"sample 1 .* is nan"):
        list(open_signal(tmp_path / "a.csv", channel=1).pieces())


def test_pieces_are_the_whole() -> None:
    signal = replace(make_signal("chirp", 1000, 100.0), piece_size=64)
    starts, pieces = zip(*signal.pieces(), strict=True)
    assert starts == tuple(range(0, 1000, 64))
    assert torch.equal(torch.cat(pieces), signal.piece(0, 1000))
    assert next(iter(signal.pieces(start=990)))[1].shape == (10,)


@pytest.mark.parametrize("name", TESTS)
def test_signals_to_try_things_on(name: str) -> None:
    one, same, other = (make_signal(name, 500, 50.0, seed).piece(0, 500) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert 0.01 < one.square().mean() < 2
    assert torch.equal(one, other) == (name in ("chirp", "bursts"))


def test_noise_ends_at_its_band() -> None:
    noise = white_noise(4096, 30, generator=torch.Generator().manual_seed(0)).double()
    assert noise[0] == 0
    assert noise.std() == pytest.approx(0.5, rel=1e-3)
    power = torch.fft.rfft(noise - noise.mean()).abs().square()
    assert power[31:].sum() < 1e-9 * power.sum()
    assert (power[1:31] > 0).all()
