"""Labelled sequences: the files they come from, what may be wrong there, the run and the verbs on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import wave
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.data.labeled_sequences import BYTES, Sequences, read_sequences
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.classification import measure
from longscan.inference.sequences import answers
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun
from stand_ins import PowerCut

Cli = Callable[..., Any]
RATE = 100


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def tone(pitch: float, length: int, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(length) / rate)


def sounds(directory: Path, rate: int = RATE, n: int = 12) -> Path:
    """Low and high tones of different lengths, in a folder for each class."""
    for number in range(n):
        for label, pitch in (("low", 3.0), ("high", 9.0)):
            write_wav(
                directory / label / f"{number}.wav", tone(pitch, (50 + number) * rate // RATE, rate), rate
            )
    return directory


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


# the run


FLAGS = {
    "model": "s4d",
    "d_model": 8,
    "option": ["d_state=8", "dt_min=0.01"],
    "steps": 20,
    "batch_size": 8,
    "lr": 2e-2,
    "warmup": 2,
    "dropout": 0.1,
    "save_every": 5,
    "eval_every": 10,
    "threads": 1,
    "valid_fraction": 0.25,
}


@pytest.fixture(scope="module")
def config(data: Path) -> SequencesConfig:
    return SequencesConfig.from_dict({**FLAGS, "data": [str(data)]})


@pytest.fixture(scope="module")
def whole(config: SequencesConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert SequencesRun.begin(config, directory).step == 20
    return directory


def test_it_learns(whole: Path, data: Path) -> None:
    model = load(whole / "model", "sequence")
    found = measure(model, read_sequences([data]).labelled(model.config.labels))
    assert found["accuracy"] == found["macro_f1"] == 1.0
    assert found["loss"] < 0.3
    assert model.config.rate == RATE
    records = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    assert [record["valid_accuracy"] for record in records if "valid_accuracy" in record][-1] == 1.0


@pytest.mark.parametrize("after", [3, 7])
def test_a_stopped_run_goes_on_bit_for_bit(
    after: int, config: SequencesConfig, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)classify train --resume"):
        SequencesRun.begin(config, tmp_path / "run", PowerCut(after))
    assert SequencesRun.resume(tmp_path / "run").step == 20
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


def test_the_verbs(cli: Cli, data: Path, tmp_path: Path) -> None:
    flags = ("--model", "s4d", "--d-model", 4, "--option", "d_state=4", "--steps", 2, "--threads", 1)
    done = cli("classify", "train", data, *flags, "--bidirectional", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert not re.search(r"24 sequences(?!/s)", done.err)  # some are held out
    assert re.match(r"trained 2 steps · accuracy [\d.]+% on held-out sequences · try: ", done.out)
    assert "sequences of 50 to 61 steps × 1 channel, 2 classes" in done.err
    assert cli("classify", "train", "--resume", tmp_path / "run").code == 0
    model = tmp_path / "run" / "model"
    done = cli("classify", "evaluate", model, data)
    assert done.out.startswith("accuracy ")
    assert done.out.endswith("· 24 sequences\n")
    assert json.loads(cli("classify", "evaluate", model, data, "--json").out)["sequences"] == 24
    lines = cli("classify", "predict", model, data).out.splitlines()
    assert len(lines) == 24
    assert {line.split("\t")[0] for line in lines} <= {"low", "high"}
    shown = json.loads(cli("classify", "predict", model, data, "--json").out.splitlines()[0])
    assert sum(shown["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speeds of one wave, seen at random times: only who knows the times can tell them apart."""
    draw = np.random.default_rng(0)
    times = np.sort(4 * draw.random((48, 6)), 1)
    y = np.arange(48) % 2
    return write_npz(
        tmp_path_factory.mktemp("uneven") / "a.npz", x=np.sin((1 + y[:, None]) * times), y=y, times=times
    )


def test_times_reach_the_model(cli: Cli, uneven: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
    fields = {"model": "neural_ode", "n_layers": 1, "d_model": 16, "option": ["solver=midpoint"], "steps": 50}
    given = {**FLAGS, **fields, "batch_size": 36, "save_every": 30, "eval_every": 0, "data": [str(uneven)]}
    config = SequencesConfig.from_dict({**given, "dropout": 0.0})
    SequencesRun.begin(config, tmp_path / "run")
    model = load(tmp_path / "run" / "model", "sequence")
    sequences = read_sequences([uneven])
    assert model.config.gap == pytest.approx(read_sequences([tmp_path / "run/data/train.npz"]).gap)
    assert measure(model, sequences)["accuracy"] > 0.9
    assert measure(model, replace(sequences, times=np.tile(np.linspace(0, 4, 6), 48)))["accuracy"] < 0.8

    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)classify train --resume"):
        SequencesRun.begin(config, tmp_path / "stopped", PowerCut(40))
    SequencesRun.resume(tmp_path / "stopped")
    whole, again = (tmp_path / place / "model/model.safetensors" for place in ("run", "stopped"))
    assert whole.read_bytes() == again.read_bytes()

    assert cli("classify", "evaluate", tmp_path / "run" / "model", uneven).out.startswith("accuracy ")
    assert len(cli("classify", "predict", tmp_path / "run" / "model", uneven).out.splitlines()) == 48
    refused = cli("classify", "evaluate", tmp_path / "run" / "model", data)
    assert refused.code == 1
    assert "expected times as in the training data, got none" in refused.err


def test_an_ode_from_the_command_line(cli: Cli, data: Path, uneven: Path, tmp_path: Path) -> None:
    """Evenly sampled sounds need no times: at half the rate its clock runs twice as fast."""
    pytest.importorskip("torchdiffeq", reason="the extra 'ode' is not installed")
    flags = ("--model", "neural_ode", "--d-model", 4, "--n-layers", 1, "--threads", 1, "--steps", 1)
    options = ("--option", "solver=euler", "--option", "d_ode=3", "--bidirectional", "--seq-len", 9)
    done = cli("classify", "train", data, *flags, *options, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    model = load(tmp_path / "run" / "model", "sequence")
    assert (model.config.body_config.to_dict()["d_ode"], model.config.rate) == (3, RATE)
    slow = sounds(tmp_path / "slow", RATE // 2, 1)
    done = cli("classify", "evaluate", tmp_path / "run" / "model", slow)
    assert "time steps are 2 times as long" in done.err
    done = cli("classify", "train", uneven, *flags, "--valid", data, "--out", tmp_path / "mixed")
    assert done.code == 1
    assert "expected channels, rate and times as in" in done.err


def test_texts_and_numbers(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"{n % 2}\t{'xy'[n % 2] * 5}\n" for n in range(20)))
    flags = ("--model", "mamba", "--d-model", 4, "--steps", 1, "--threads", 1)
    done = cli("classify", "train", tmp_path / "a.tsv", *flags, "--out", tmp_path / "texts")
    assert done.out.endswith(f'try: longscan classify predict {tmp_path / "texts" / "model"} "..."\n')
    assert re.search(r"^step 1: accuracy [\d.]+%, macro-F1 [\d.]+$", done.err, re.MULTILINE)
    assert load(tmp_path / "texts" / "model", "sequence").config.body_config.vocab_size == BYTES
    x = np.random.default_rng(0).random((20, 6, 2), np.float32)
    path = write_npz(tmp_path / "a.npz", x=x, y=x.sum((1, 2)))
    done = cli("classify", "train", path, *flags, "--out", tmp_path / "numbers")
    assert done.out.endswith(f"try: longscan classify predict {tmp_path / 'numbers' / 'model'} FILE\n")
    assert re.search(r"^step 1: root mean square error [\d.]+$", done.err, re.MULTILINE)
    done = cli("classify", "evaluate", tmp_path / "numbers" / "model", path)
    assert done.out.startswith("root mean square error ")
    lines = cli("classify", "predict", tmp_path / "numbers" / "model", path).out.splitlines()
    assert len(lines) == 20
    assert float(lines[0].split("\t")[0]) < 100


def test_another_rate_is_another_time_step(cli: Cli, whole: Path, tmp_path: Path) -> None:
    """The same tones at half the rate: with time steps twice as long they are told apart all the same."""
    slow = sounds(tmp_path / "slow", RATE // 2)
    done = cli("classify", "evaluate", whole / "model", slow)
    assert done.out.startswith("accuracy 1.0000")
    assert "50 samples per second instead of 100: time steps are 2 times as long" in done.err


def test_a_body_without_time_refuses_another_rate(cli: Cli, data: Path, tmp_path: Path) -> None:
    flags = ("--model", "mamba", "--d-model", 4, "--steps", 1, "--threads", 1)
    assert cli("classify", "train", data, *flags, "--out", tmp_path / "run").code == 0
    done = cli("classify", "evaluate", tmp_path / "run" / "model", sounds(tmp_path / "slow", 50, 2))
    assert done.code == 1
    assert "the signals have 50 samples per second, the model was trained on 100" in done.err
    assert "resample the signal" in done.err


def test_misuse(cli: Cli, whole: Path, data: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    (tmp_path / "one.tsv").write_text("a\tx\na\ty\n")
    (tmp_path / "a.toml").write_text("model = [3]\n")
    (tmp_path / "b.toml").write_text('model = "who/bert"\ndata = 3\n')
    for code, words, arguments in (
        (2, "nothing to train on", ("train", "--model", "s4d", *out)),
        (2, "option: expected NAME=VALUE", ("train", data, "--model", "s4d", "--option", "d_state", *out)),
        (2, "has no field 'size'", ("train", data, "--model", "s4d", "--option", "size=3", *out)),
        (2, "s4d has no preset 'huge'", ("train", data, "--model", "s4d", "--preset", "huge", *out)),
        (2, "--d-model: only for the blocks of a language model", ("train", data, "--d-model", 4, *out)),
        (1, "expected two classes or more", ("train", tmp_path / "one.tsv", "--model", "s4d", *out)),
        (
            1,
            "expected 1 channels as in the training data, got tokens",
            ("evaluate", whole / "model", tmp_path / "one.tsv"),
        ),
        (2, "for sequences one of", ("train", tmp_path / "a.npz", "--model", "transformer", *out)),
        (2, "got the masked model bert", ("train", tmp_path / "a.npz", "--model", "bert", *out)),
        (2, "got who/bert for the sequences in a.npz", ("train", "a.npz", "--model", "who/bert", *out)),
        (1, "model: expected text, got [3]", ("train", "--config", tmp_path / "a.toml", *out)),
        (1, "data: expected a list of text, got 3", ("train", "--config", tmp_path / "b.toml", *out)),
        (2, "FILES: expected files of signals", ("predict", whole / "model")),
        (2, "--pairs: ", ("predict", whole / "model", "--pairs", data)),
        (2, "--seq-len: ", ("evaluate", whole / "model", data, "--seq-len", 9)),
    ):
        done = cli("classify", *arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert words in done.err
        assert not (tmp_path / "run").exists()


# the model's directory


def test_a_directory_round_trip(whole: Path, data: Path, tmp_path: Path) -> None:
    model = load(whole / "model", "sequence")
    save(model, tmp_path / "copy")
    sequences: Sequences = read_sequences([data])
    assert torch.equal(answers(load(tmp_path / "copy", "sequence"), sequences), answers(model, sequences))


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def deeper(directory: Path) -> None:
    raw = json.loads((directory / "config.json").read_text())
    edit(directory, body_config={**raw["body_config"], "n_layers": 10**9})


def shorter(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("head.bias")
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda directory: edit(directory, model_type="bert"), "expected a sequence model of version 1"),
        (lambda directory: edit(directory, longscan=2), "expected a sequence model of version 1"),
        (lambda directory: edit(directory, body="nobody"), "no language model called 'nobody'"),
        (lambda directory: edit(directory, color=1), "no field 'color'"),
        (deeper, "says 1,000,000,000 layers"),
        (shorter, "1 missing: head.bias"),
    ],
    ids=["kind", "version", "body", "field", "layers", "tensor"],
)
def test_damaged_directories(damage: Callable[[Path], None], words: str, whole: Path, tmp_path: Path) -> None:
    save(load(whole / "model", "sequence"), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(LongscanError, match=words):
        load(tmp_path / "model", "sequence")


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


def test_what_was_trained_on_texts_classifies_texts(cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "labels.tsv"
    table.write_text("".join(f"good\ta fine film {n}\nbad\ta dull film {n}\n" for n in range(6)))
    run = tmp_path / "run"
    flags = ["--model", "mamba", "--steps", 1, "--d-model", 8, "--n-layers", 1, "--threads", 1]
    done = cli("classify", "train", table, *flags, "--out", run)
    assert done.code == 0
    assert "trained 1 step ·" in done.out
    model = run / "model"
    from_file = cli("classify", "predict", model, table).out.splitlines()
    scores = [line.rsplit("\t", 1)[0] for line in from_file]
    texts = [line.split("\t")[1] for line in table.read_text().splitlines()]
    done = cli("classify", "predict", model, *texts)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [f"{s}\t{text}" for s, text in zip(scores, texts, strict=True)]
    assert cli("classify", "predict", model, stdin="\n".join(texts) + "\n").out == done.out
    one = json.loads(cli("classify", "predict", model, texts[0], "--json").out)
    assert (one["text"], sorted(one["probabilities"])) == (texts[0], ["bad", "good"])
    for argument, words in (("lables.tsv", "No such file"), (" ", "text 1 is empty")):
        done = cli("classify", "predict", model, argument)
        assert (done.code, done.out) == (1, "")
        assert words in done.err
