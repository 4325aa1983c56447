"""Several models side by side: `longscan classify train DATA --model a --model b`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stand_ins import ctrl_c

Cli = Callable[..., Any]
SIZES = ("--steps", 3, "--d-model", 8, "--n-layers", 1, "--threads", 1, "--eval-every", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short series of two classes."""
    path, draw = tmp_path_factory.mktemp("comparison") / "series.npz", np.random.default_rng(0)
    np.savez(path, x=draw.standard_normal((40, 12, 2)).astype(np.float32), y=np.arange(40) % 2)
    return path


def command(data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("classify", "train", data, "--model", "s4d", "--model", "lstm", "--out", out, *SIZES, *more)


def test_one_table_and_one_figure(cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli(*command(data, tmp_path))
    assert done.code == 0, done.err
    head, *rows, note = done.out.splitlines()
    assert head.split() == ["system", "accuracy", "macro-F1", "seeds", "parameters", "minutes"]
    assert [row.split()[0] for row in rows] == ["s4d", "lstm"]
    assert note == "measured: 4 held-out sequences"
    report = json.loads((tmp_path / "comparison.json").read_text())
    for name in ("s4d", "lstm"):
        last = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][-1]
        assert report["runs"][name][0]["accuracy"] == pytest.approx(100 * last["valid_accuracy"])
    assert (tmp_path / "comparison.png").stat().st_size > 1000

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert cli(*command(data, tmp_path)).out == done.out
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained or measured again


def test_the_same_command_resumes(cli: Cli, data: Path, tmp_path: Path) -> None:
    whole = cli(*command(data, tmp_path / "whole"))
    with ctrl_c("stderr", "step 1/3", at=2):  # of the second model
        done = cli(*command(data, tmp_path / "stopped"))
    assert (done.code, done.out) == (130, "")
    assert (tmp_path / "stopped/lstm").exists()
    assert done.err.endswith("stopped after step 1; the same command resumes\n")
    again = cli(*command(data, tmp_path / "stopped"))
    assert again.code == 0, again.err
    assert again.out == whole.out
    models = [tmp_path / name / "lstm/model/model.safetensors" for name in ("whole", "stopped")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_other_settings_and_other_data_are_refused(cli: Cli, data: Path, tmp_path: Path) -> None:
    assert cli(*command(data, tmp_path)).code == 0
    done = cli(*command(data, tmp_path, "--lr", 0.5))
    assert done.code == 1
    assert "was trained with lr = 0.003, this experiment has 0.5. Name another --out." in done.err
    other = tmp_path / "other.npz"
    other.write_bytes(data.read_bytes())
    done = cli(*command(other, tmp_path))
    assert done.code == 1
    assert f"was trained on {data}; expected the data of this command, {other}" in done.err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--model", "bert"], 2, "several --model: expected each one of"),
        (["--resume", "x"], 2, "the same command resumes"),
        (["--seq-len", "0"], 2, "--seq-len"),
        (["--option", "d_state=4"], 2, "d_state"),
    ],
    ids=["bert", "resume", "value", "option"],
)
def test_misuse(cli: Cli, data: Path, tmp_path: Path, more: list[str], code: int, message: str) -> None:
    done = cli(*command(data, tmp_path / "out", *more))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on(cli: Cli, tmp_path: Path) -> None:
    done = cli("classify", "train", "--model", "s4d", "--model", "lstm", "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "nothing to train on" in done.err


def test_numbers_are_not_compared(cli: Cli, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((40, 12, 2)).astype(np.float32), draw.standard_normal(40).astype(np.float32)
    np.savez(tmp_path / "numbers.npz", x=x, y=y)
    done = cli(*command(tmp_path / "numbers.npz", tmp_path / "out"))
    assert done.code == 1
    assert "expected labels that are classes, got numbers" in done.err
    assert not (tmp_path / "out").exists()


def test_models_of_images_are_compared_too(cli: Cli, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "dots.npz", x=draw.integers(0, 255, (40, 16, 16), np.uint8), y=np.arange(40) % 2)
    names = ("--model", "vit", "--model", "resnet")
    size = ("--steps", 2, "--batch-size", 4, "--image-size", 16, "--threads", 1, "--eval-every", 0)
    done = cli("classify", "train", tmp_path / "dots.npz", *names, "--out", tmp_path / "runs", *size)
    assert done.code == 0, done.err
    head, *rows, note = done.out.splitlines()
    assert head.split() == ["system", "accuracy", "macro-F1", "seeds", "parameters", "minutes"]
    assert [row.split()[0] for row in rows] == ["vit", "resnet"]
    assert note == "measured: the last step's model on the held-out images"
    report = json.loads((tmp_path / "runs/comparison.json").read_text())
    for name in ("vit", "resnet"):
        last = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert report["runs"][name][0]["accuracy"] == pytest.approx(100 * last["valid_top1"])
    assert (tmp_path / "runs/comparison.png").stat().st_size > 1000
    assert (
        cli("classify", "train", tmp_path / "dots.npz", *names, "--out", tmp_path / "runs", *size).out
        == done.out
    )


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        (("vit", "s4d"), (), "several --model: expected all models of images; got s4d."),
        (("s4d", "vit"), (), "several --model: expected no model of images among them; got vit."),
        (("vit", "nonsense"), (), "several --model: expected each one of resnet, vit, "),
        (("vit", "vim"), ("--from", "a.pth"), "several --model and --from: expected one of them, got both."),
        (("vit", "vim"), ("--pooling", "last"), "--pooling: vit, vim have no such setting. Leave it out."),
        (("vit", "vim"), ("--frames", 4), "--frames: vit classifies images."),
    ],
)
def test_models_that_do_not_go_together(
    cli: Cli, tmp_path: Path, models: tuple[str, ...], flags: tuple[object, ...], message: str
) -> None:
    named = [word for name in models for word in ("--model", name)]
    done = cli("classify", "train", tmp_path / "x.npz", *named, "--out", tmp_path / "out", *flags)
    assert done.code == 2
    assert message in " ".join(done.err.split())
