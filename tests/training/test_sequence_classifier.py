"""Classifiers of sequences: the run, the verbs and the model's directory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from labeled_files import RATE, sounds, write_npz
from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.data.labeled_sequences import BYTES, Sequences, read_sequences
from longscan.errors import LongscanError
from longscan.evaluation.classification import measure
from longscan.inference.sequences import answers
from longscan.training.sequence_classifier import SequencesConfig, SequencesRun
from stand_ins import PowerCut

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sounds(tmp_path_factory.mktemp("sounds"))


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
        (2, "got who/bert for a.npz", ("train", "a.npz", "--model", "who/bert", *out)),
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
