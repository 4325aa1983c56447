"""Labelled sequences: the files they come from, batches, parts and tables."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labeled_files import RATE, sounds, tone, write_npz, write_wav
from longscan.data.labeled_sequences import Sequences, read_sequences
from longscan.errors import LongscanError, UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sounds(tmp_path_factory.mktemp("sounds"))


# files


def test_npz_of_signals_with_lengths(tmp_path: Path) -> None:
    x = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    found = read_sequences([write_npz(tmp_path / "a.npz", x=x, y=[7, 10], lengths=[4, 2])])
    assert found.labels == ("7", "10")
    assert (found.d_input, found.n_outputs, found.lengths.tolist()) == (3, 2, [4, 2])
    assert [row.tolist() for row in found.rows] == [x[0].tolist(), x[1, :2].tolist()]
    assert found.truth.tolist() == [0, 1]


def test_npz_in_parts(tmp_path: Path) -> None:
    x = np.zeros((3, 5), np.float32)
    path = write_npz(tmp_path / "a.npz", x_train=x, y_train=[0, 1, 1], x_test=x[:2], y_test=[1, 0])
    assert [len(read_sequences([path], split=split)) for split in ("train", "test")] == [3, 2]
    assert read_sequences([path]).d_input == 1
    with pytest.raises(LongscanError, match="expected arrays x and y, or x_valid and y_valid; got x_test"):
        read_sequences([path], split="valid")


def test_images_are_read_pixel_by_pixel(tmp_path: Path) -> None:
    x = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    found = read_sequences([write_npz(tmp_path / "a.npz", x=x, y=["cat", "dog"])])
    assert found.values[:, 0] == pytest.approx(np.arange(12) / 255)
    assert (found.lengths.tolist(), found.labels) == ([6, 6], ("cat", "dog"))


def test_npz_with_times(tmp_path: Path) -> None:
    x = np.arange(2 * 4, dtype=np.float32).reshape(2, 4)
    times = np.array([[5, 6, 8, 9], [1, 1.5, 0, 0]])  # behind the end there may be anything
    path = write_npz(tmp_path / "a.npz", x_train=x, y_train=[0, 1], len_train=[4, 2], times_train=times)
    found = read_sequences([path, path])
    assert found.times is not None
    assert found.times.tolist() == 2 * [5, 6, 8, 9, 1, 1.5]
    assert found.gap == pytest.approx(4.5 / 4)
    for some, expected in (
        (found.select([1, 0]), [1, 1.5, 5, 6, 8, 9]),
        (found.thinned(2), 2 * [5, 8, 1]),
        (found.cut(1), 2 * [5, 1]),
        (found.select([]), []),
    ):
        assert some.times is not None
        assert some.times.tolist() == expected
        assert len(some.values) == some.lengths.sum() == len(expected)
    assert found.cut(1).gap is None
    padded = found.batch([1, 0])[3]
    assert padded is not None
    assert padded.tolist() == [[1, 1.5, 0, 0], [5, 6, 8, 9]]
    found.save(tmp_path / "b.npz")
    assert np.array_equal(read_sequences([tmp_path / "b.npz"]).times, found.times)
    plain = write_npz(tmp_path / "c.npz", x=x, y=[0, 1])
    with pytest.raises(LongscanError, match="signals of 1 channels, each with its time, with labels as in"):
        read_sequences([path, plain])


def write_times(path: Path, *times: Any) -> None:
    write_npz(path, x=np.zeros((len(times), 3)), y=[0] * len(times), times=times)


def test_tokens_and_numbers(tmp_path: Path) -> None:
    found = read_sequences([write_npz(tmp_path / "a.npz", x=np.array([[1, 2], [0, 5]]), y=[0.5, 1.5])])
    assert (found.d_input, found.values.tolist()) == (0, [1, 2, 0, 5])
    assert (found.labels, found.truth.tolist(), found.n_outputs) == ((), [[0.5], [1.5]], 1)


def test_texts_are_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("good\tah\nbad\tö\n", encoding="utf-8")
    found = read_sequences([tmp_path / "a.tsv"])
    assert [row.tolist() for row in found.rows] == [[97, 104], [0xC3, 0xB6]]
    assert (found.labels, found.truth.tolist(), found.names[1][-2:]) == (("bad", "good"), [1, 0], ":2")


def test_folders_and_tars_of_sounds(data: Path, tmp_path: Path) -> None:
    found = read_sequences([data])
    assert (found.labels, found.rate, len(found)) == (("high", "low"), RATE, 24)
    assert found.names[0].endswith("high/0.wav")
    assert found.rows[0][:, 0] == pytest.approx(tone(9.0, 50), abs=1e-4)
    for name in ("3_ann_0.wav", "3_bob_0.wav", "12_ann_0.wav"):
        write_wav(tmp_path / "flat" / name, tone(3.0, 20))
    with tarfile.open(tmp_path / "flat.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "flat", "inside")
    for place in (tmp_path / "flat", tmp_path / "flat.tar.xz"):
        assert read_sequences([place]).labels == ("3", "12")
        assert read_sequences([place], pattern=r"_(\w+)_\d").labels == ("ann", "bob")
    assert read_sequences([tmp_path / "flat" / "12_ann_0.wav"]).labels == ("12",)


def test_what_is_saved_is_read_again(data: Path, tmp_path: Path) -> None:
    found = read_sequences([data])
    found.save(tmp_path / "a.npz")
    again = read_sequences([tmp_path / "a.npz"])
    for name in ("values", "lengths", "truth"):
        assert np.array_equal(getattr(found, name), getattr(again, name))
    assert (again.labels, again.names, again.rate) == (found.labels, found.names, found.rate)


def corrupt(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 no zip")


def write_nan(path: Path) -> None:
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = np.nan
    write_npz(path, x=x, y=[0, 1, 1])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (corrupt, "is no .npz file"),
        (write_nan, r"a\.npz:1: the signal has NaN or infinite numbers, 1 samples"),
        (lambda path: write_npz(path, a=[1]), "expected arrays x and y, or x_train and y_train; got a"),
        (lambda path: write_npz(path, x=[[1.0]], y=[0, 1]), r"as many y and lengths as x \(1\), got 2"),
        (lambda path: write_npz(path, x=[[1.0]], y=[0], lengths=[2]), "expected lengths from 1 to 1, got"),
        (lambda path: write_npz(path, x=[[-1]], y=[0]), "expected tokens from 0 on, got -1"),
        (lambda path: write_npz(path, x=[["a"]], y=[0]), "expected numbers x"),
        (lambda path: write_npz(path, x=np.array([[{}]]), y=[0]), "no .npz file of plain arrays"),
        (
            lambda path: write_npz(path, x=np.zeros((1, 2, 2, 2)), y=[0]),
            r"expected x \(n, seq_len, d_input\)",
        ),
        (
            lambda path: write_times(path, [1, 2]),
            r"expected a time of each step, \(1, 3\), got int64 \(1, 2\)",
        ),
        (
            lambda path: write_times(path, [5, 6, 7], [1, 3, 3]),
            r"a\.npz:1: expected seconds that increase, got 3 after 3 at step 2",
        ),
        (lambda path: write_times(path, [np.nan, 2, 3]), "got nan at step 0"),
        (lambda path: write_times(path, [1, np.inf, np.inf]), "got inf after 1 at step 1"),
        (
            lambda path: write_npz(path, values=[1]),
            "expected arrays x and y, or x_train and y_train; got values",
        ),
    ],
    ids=[
        "zip",
        "nan",
        "names",
        "counts",
        "lengths",
        "tokens",
        "texts",
        "objects",
        "axes",
        "few-times",
        "same-time",
        "nan-time",
        "inf-time",
        "own",
    ],
)
def test_bad_arrays(write: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    with pytest.raises(LongscanError, match=words):
        read_sequences([tmp_path / "a.npz"])


def test_bad_sounds(data: Path, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=r"expected \.wav files there, found none"):
        read_sequences([tmp_path])
    with pytest.raises(UsageError, match="no regular expression"):
        read_sequences([data], pattern="(")
    with pytest.raises(UsageError, match="expected a group"):
        read_sequences([data], pattern="low")
    with pytest.raises(LongscanError, match=r"high/0\.wav has no label: it does not match '\(low\)'"):
        read_sequences([data], pattern="(low)")
    write_wav(tmp_path / "slow" / "a_1.wav", tone(3.0, 20, 50), 50)
    with pytest.raises(LongscanError, match="at 50 samples per second"):
        read_sequences([data, tmp_path / "slow"])
    write_wav(tmp_path / "slow" / "b_1.wav", tone(3.0, 20, 50), 25)
    with pytest.raises(LongscanError, match="expected sounds of one rate"):
        read_sequences([tmp_path / "slow"])
    (tmp_path / "slow" / "a_1.wav").write_bytes(b"RIFF, but not much of it")
    with pytest.raises(LongscanError, match=r"a_1\.wav"):
        read_sequences([tmp_path / "slow"])
    (tmp_path / "a.tar").write_bytes(b"nothing of the kind")
    with pytest.raises(LongscanError, match="is no tar"):
        read_sequences([tmp_path / "a.tar"])


# batches and parts


def test_batches_are_padded_behind(data: Path) -> None:
    found = read_sequences([data])
    x, lengths, truth, times = found.batch([3, 0, 12])
    assert times is None
    assert x.shape == (3, lengths.max(), 1)
    assert truth.tolist() == [0, 0, 1]
    for row, number in zip(x, [3, 0, 12], strict=True):
        signal = torch.from_numpy(found.rows[number])
        assert torch.equal(row[: len(signal)], signal)
        assert not row[len(signal) :].any()


def test_every_class_is_held_out_alike(data: Path) -> None:
    train, valid = read_sequences([data]).divide(0.25)
    assert (len(train), len(valid)) == (18, 6)
    assert np.bincount(valid.truth).tolist() == [3, 3]
    assert not set(train.names) & set(valid.names)


def test_half_the_rate_and_the_beginning(data: Path) -> None:
    found = read_sequences([data])
    half = found.thinned(2)
    assert half.rate == RATE / 2
    assert all(np.array_equal(a, b[::2]) for a, b in zip(half.rows, found.rows, strict=True))
    assert int(found.cut(52).lengths.max()) == 52
    assert found.cut(None) is found


def test_low_passed_is_what_a_lower_rate_can_hold(tmp_path: Path) -> None:
    """A wave below the limit stays, one above is gone; channels and rows don't mix."""
    time = np.arange(400)
    slow, fast = np.sin(2 * np.pi * 0.1 * time), np.sin(2 * np.pi * 0.35 * time)  # the limit is 0.25
    x = np.stack([np.stack([slow + fast, slow], 1), np.stack([fast, 0 * slow], 1)]).astype(np.float32)
    found = read_sequences([write_npz(tmp_path / "a.npz", x=x, y=[0, 1], lengths=[400, 5])]).low_passed(2)
    assert found.lengths.tolist() == [400, 5]
    whole, short = found.rows
    middle = slice(50, -50)
    assert whole.dtype == np.float32
    assert np.abs(whole[middle] - slow[middle, None]).max() < 0.01
    assert np.abs(short[:, 1]).max() == 0


def test_labels_are_numbered_as_the_model_does(data: Path) -> None:
    found = read_sequences([data])
    assert found.labelled(["low", "mid", "high"]).truth.tolist() == [2] * 12 + [0] * 12
    with pytest.raises(LongscanError, match="the label 'low' was not in the training data"):
        found.labelled(["high", "mid"])
    with pytest.raises(LongscanError, match="expected numbers to predict, got labels"):
        found.labelled([])


# tables


def read_csv(path: Path, text: str) -> Sequences:
    path.write_bytes(text.encode())
    return read_sequences([path])


def test_a_table_of_steps(tmp_path: Path) -> None:
    text = "\ufeffid,time,Label,x,y\r\na,0,up,1,2\r\na,0.5,up,3,4\r\n7,1,down,5,6\r\n\r\n"
    found = read_csv(tmp_path / "a.csv", text)
    assert [row.tolist() for row in found.rows] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert (found.labels, found.truth.tolist(), found.d_input) == (("down", "up"), [1, 0], 2)
    assert found.times is not None
    assert found.times.tolist() == [0, 0.5, 1]
    assert found.names == (f"{tmp_path / 'a.csv'}: id a", f"{tmp_path / 'a.csv'}: id 7")


@pytest.mark.parametrize(
    "text",
    ["up,1,2,3\ndown,4,5,\n", "t0,label,t1,t2\n1,up,2,3\n4,down,5,\n", 'label,,,\n"up",1,2,3\ndown, 4 ,5\n'],
    ids=["bare", "header", "quoted"],
)
def test_a_table_of_sequences(text: str, tmp_path: Path) -> None:
    found = read_csv(tmp_path / "a.CSV", text)
    assert [row[:, 0].tolist() for row in found.rows] == [[1, 2, 3], [4, 5]]
    assert (found.labels, found.truth.tolist(), found.times) == (("down", "up"), [1, 0], None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no numbers behind a label: expected a header with id"),
        ("label,a\n", "holds no sequence: expected a header with id"),
        ("id,label,a\n", "holds no sequence"),
        ("id,label,time\n1,a,2\n", "no channel in the columns"),
        ("id,label,x\n1,a,2\n2,a,3\n1,a,4\n", r"a\.csv:4: id '1' occurred before: sort the rows"),
        ("id,label,x\n1,a,2\n1,b,3\n", r"a\.csv:3: id '1' was 'a' before, now 'b'"),
        ("id,label,x\n1,a\n", r"a\.csv:2: expected 3 columns, got 2"),
        ("id,label,x\n1,,2\n", r"a\.csv:2: expected a label, got an empty one"),
        ("id,label,time,x\n1,a,2,1\n1,a,2,1\n", "expected seconds that increase, got 2 after 2"),
        ("time,value\n0,1\n", r"a\.csv:1: not a number: 'value'; expected a header with id"),
        ("a,1\nb,nan\n", r"a\.csv:2: expected a finite number, got 'nan'"),
        ("a,1\nb,1,2\n", r"a\.csv:2: expected at most 2 columns, got 3"),
        ("a,1\nb,,2\n", r"a\.csv:2: expected at most 2 columns"),
        ("a,1,2\nb,,2\n", r"a\.csv:2: not a number: ''"),
        ('a,"1\nb,2\n', "no row of a table"),
    ],
)
def test_tables_of_something_else(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=words):
        read_csv(tmp_path / "a.csv", text)
