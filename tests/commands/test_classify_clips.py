"""`longscan classify` with clips: train, resume, predict and evaluate, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Done
from labelled_clips import (
    moving,
    write_animation,
    write_arrays,
    write_class_folders,
    write_frames,
    write_video,
)
from labelled_images import write_folder
from longscan.checkpoints.load import load
from longscan.data.clips import read_clips
from longscan.evaluation.images import measure_images
from longscan.training.image_classifier import ImagesConfig, ImagesRun

Cli = Callable[..., Done]
SMALL = ("--model", "videomamba", "--frames", 4, "--set", "d_model=16", "--set", "n_layers=1")
STEPS = ("--image-size", 16, "--steps", 2, "--batch-size", 8, "--threads", 1, "--save-every", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("data") / "clips", 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned which way a square moves."""
    directory = tmp_path_factory.mktemp("trained")
    config = ImagesConfig(
        data=(str(write_arrays(directory / "clips.npz", 96)),),
        model="videomamba",
        frames=4,
        option=("d_model=16", "n_layers=1", "d_state=4"),
        steps=60,
        batch_size=16,
        lr=1e-2,
        flip=0.0,
        randaugment=0.0,
        crop_scale=1.0,
        ema=0.9,
        eval_every=0,
        threads=1,
    )
    assert ImagesRun.begin(config, directory / "run", figures=False).scores["valid_top1"] > 0.9
    return directory / "run" / "model"


def no_traceback(done: Done, code: int) -> str:
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert "bug in longscan" not in done.err
    return done.err


def test_train_and_resume(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("classify", "train", folder, *SMALL, *STEPS, "--valid", folder, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "12 clips of 2 classes at 4 × 16 × 16, 12 held out" in done.err
    assert "on held-out clips" in done.out
    assert f"longscan classify predict {tmp_path / 'run' / 'model'} CLIP" in done.out
    again = cli("classify", "train", "--resume", tmp_path / "run", "--steps", 3)
    assert again.code == 0, again.err
    assert "CLIP" in again.out
    assert load(tmp_path / "run" / "model", "image").config.to_dict()["n_frames"] == 4


def test_predict_every_kind_of_clip(cli: Cli, model: Path, tmp_path: Path) -> None:
    clips, _ = moving(4, seed=1)
    right, left = clips[0], clips[1]
    paths = [write_frames(tmp_path / "frames", right), write_animation(tmp_path / "a.gif", left)]
    np.savez(tmp_path / "a.npz", frames=right)
    paths.append(tmp_path / "a.npz")
    done = cli("classify", "predict", model, *paths)
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [(row[0], row[2]) for row in rows] == [
        (label, str(path)) for label, path in zip(("right", "left", "right"), paths, strict=True)
    ]
    line = json.loads(cli("classify", "predict", model, paths[0], "--json").out)
    assert (line["label"], line["name"]) == ("right", str(paths[0]))
    assert sum(line["probabilities"].values()) == pytest.approx(1)


def test_predict_a_video(cli: Cli, model: Path, tmp_path: Path) -> None:
    large = moving(2, seed=1)[0].repeat(4, 2).repeat(4, 3)
    paths = [write_video(tmp_path / name, clip) for name, clip in zip(("b.mp4", "a.mkv"), large, strict=True)]
    done = cli("classify", "predict", model, *paths)
    assert [line.split("\t")[0] for line in done.out.splitlines()] == ["right", "left"], done.err


def test_a_folder_of_clips_is_searched(cli: Cli, model: Path, folder: Path) -> None:
    done = cli("classify", "predict", model, folder)
    assert done.code == 0, done.err
    names = [Path(line.split("\t")[2]).relative_to(folder).as_posix() for line in done.out.splitlines()]
    assert len(names) == 12
    assert {"left/001", "left/003.npz", "left/005.png"} <= set(names)


def test_bad_clips_are_reported_and_the_others_classified(cli: Cli, model: Path, tmp_path: Path) -> None:
    clip = moving(1)[0][0]
    good, broken = write_frames(tmp_path / "good", clip), write_frames(tmp_path / "broken", clip)
    (broken / "frame2.png").write_bytes((broken / "frame2.png").read_bytes()[:50])
    (write_frames(tmp_path / "worse", clip) / "frame0.png").write_text("no image")
    Image.new("L", (9, 9)).save(tmp_path / "still.png")
    (tmp_path / "notes.txt").write_text("x")
    names = ("broken", "worse", "good", "still.png", "notes.txt", "nowhere.npz")
    done = cli("classify", "predict", model, *(tmp_path / name for name in names))
    error = no_traceback(done, 1)
    assert [line.split("\t")[2] for line in done.out.splitlines()] == [str(good)]
    assert "broken/frame2.png" in error
    assert "worse/frame0.png" in error
    assert "still.png is a still image: expected a clip" in error
    assert "notes.txt: expected a clip (a folder of frames, .mp4" in error
    assert "nowhere.npz" in error


def test_a_short_clip_is_mentioned(cli: Cli, model: Path, tmp_path: Path) -> None:
    short = write_frames(tmp_path / "short", moving(1, 2)[0][0])
    done = cli("classify", "predict", model, short)
    assert done.code == 0
    assert "short: 2 frames, of which some are repeated to make 4" in done.err


def test_evaluate(cli: Cli, model: Path, folder: Path) -> None:
    done = cli("classify", "evaluate", model, folder)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].endswith("12 clips")
    report = json.loads(cli("classify", "evaluate", model, folder, "--json").out)
    found = measure_images(load(model, "image"), read_clips([folder]))
    assert found is not None
    assert (report["clips"], report["classes"]["left"]["clips"]) == (12, 6)
    assert report["top1"] == pytest.approx(found.top1)
    assert found.top1 > 0.8


def test_a_video_is_no_image(cli: Cli, folder: Path, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", 12)
    done = cli("classify", "train", images, "--model", "vim", "--set", "d_model=16", *STEPS,
               "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    (tmp_path / "a.mp4").write_bytes(b"x")
    error = no_traceback(cli("classify", "predict", tmp_path / "run" / "model", tmp_path / "a.mp4"), 1)
    assert "a.mp4 is a video: " in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vmamba", "--frames", 4], "--frames: vmamba classifies images. Try --model videomamba"),
        (["--model", "videomamba", "--frames", 1], "--frames: expected 2 to 4,096, got 1"),
        (
            ["--model", "videomamba", "--frames", 10**12],
            "--frames: expected 2 to 4,096, got 1000000000000",
        ),
        (["--frames", 4], "--frames: only for an image model, --model vmamba or videomamba"),
    ],
)
def test_impossible_flags(flags: list[object], message: str, cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("classify", "train", folder, *flags, "--out", tmp_path / "run")
    assert message in no_traceback(done, 2)
    assert not (tmp_path / "run").exists()


def test_images_in_place_of_clips(cli: Cli, tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", 12)
    error = no_traceback(cli("classify", "train", images, *SMALL, *STEPS, "--out", tmp_path / "run"), 1)
    assert "is a still image and in no folder of frames" in error
    assert "for images leave out --frames" in error
