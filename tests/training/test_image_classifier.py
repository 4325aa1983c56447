"""Training image classifiers: learning, resuming bit for bit, averaged weights, what follows from data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labelled_images import write_folder, write_npz
from longscan.core.progress import Display
from longscan.errors import LongscanError, UsageError
from stand_ins import PowerCut
from vision_models import ToyImagesConfig, ToyImagesRun


class Lines(Display):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def settings(data: Path, **changes: Any) -> ToyImagesConfig:
    small: dict[str, Any] = {
        "data": [str(data)],
        "steps": 12,
        "batch_size": 8,
        "accumulate": 2,
        "lr": 5e-3,
        "crop_scale": 0.5,
        "erase": 0.5,
        "mixup": 0.5,
        "cutmix": 1.0,
        "save_every": 2,
        "eval_every": 4,
        "threads": 1,
    }
    return ToyImagesConfig.from_dict({**small, **changes})


def metrics(directory: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images", 48)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert ToyImagesRun.begin(settings(data), directory, figures=False).stopped_by is None
    return directory


def test_it_learns(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "bars.npz", 150)
    plain = {"flip": 0.5, "randaugment": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
    config = settings(data, steps=60, accumulate=1, lr=2e-2, eval_every=0, **plain)
    result = ToyImagesRun.begin(config, tmp_path / "run", figures=False)
    assert result.scores["valid_top1"] > 0.85
    assert result.scores["valid_top5"] == 1.0
    assert 0 < result.scores["valid_macro_f1"] <= 1.0


@pytest.mark.parametrize("after", [1, 5, 10])
def test_a_stopped_run_goes_on_bit_for_bit(after: int, data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(LongscanError, match=r"the power is gone(?s:.*)classify train --resume"):
        ToyImagesRun.begin(settings(data), run, PowerCut(after), figures=False)
    assert ToyImagesRun.resume(run, figures=False).stopped_by is None
    assert metrics(run) == metrics(whole)
    for file in (
        "model/model.safetensors",
        *(f"checkpoints/step-000012/{n}.safetensors" for n in ("model", "optimizer")),
    ):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_run_resumes_with_the_same_images_only(data: Path, tmp_path: Path) -> None:
    copy = write_folder(tmp_path / "images", 48)
    with pytest.raises(LongscanError):
        ToyImagesRun.begin(settings(copy), tmp_path / "run", PowerCut(3), figures=False)
    next((copy / "disc").iterdir()).unlink()
    with pytest.raises(LongscanError, match="is not what"):
        ToyImagesRun.resume(tmp_path / "run", figures=False)


def test_an_image_that_breaks_meanwhile_is_named(tmp_path: Path) -> None:
    copy = write_folder(tmp_path / "images", 48)
    broken = sorted((copy / "down").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:-30])  # the header is intact
    with pytest.raises(LongscanError, match=rf"{broken.name}(?s:.*)resume"):
        ToyImagesRun.begin(settings(copy, valid_fraction=0.0), tmp_path / "run", figures=False)


# averaged weights


def test_the_average_is_exported_and_validated(whole: Path) -> None:
    exported = load_file(whole / "model" / "model.safetensors")
    last = load_file(whole / "checkpoints" / "step-000012" / "model.safetensors")
    kept = load_file(whole / "checkpoints" / "step-000012" / "optimizer.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, kept[f"{name}.average"])
    assert any(not torch.equal(weight, last[name]) for name, weight in exported.items())


def test_without_average_the_last_weights_are_exported(data: Path, tmp_path: Path) -> None:
    ToyImagesRun.begin(settings(data, ema=0.0, steps=2), tmp_path / "run", figures=False)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    assert exported.keys() == last.keys()
    assert all(torch.equal(weight, last[name]) for name, weight in exported.items())


# the model that comes of the data


def prepared(config: ToyImagesConfig, directory: Path, display: Display | None = None) -> ToyImagesRun:
    directory.mkdir(parents=True)
    (directory / "train.json").write_text("{}")
    run = ToyImagesRun(directory, config, display or Display(), figures=False)
    run.metrics.close()
    return run


def test_arrays_set_size_channels_mean_and_std(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "bars.npz", 30)
    run = prepared(settings(path), tmp_path / "run")
    config, x = run.model.config, np.load(path)["x"]
    assert (config.image_size, config.crop, config.in_channels) == (16, 1.0, 1)
    assert config.labels == ("across", "disc", "down")
    training = np.stack([np.asarray(run.train.image(n)) for n in range(len(run.train))]) / 255
    assert len(training) == len(x) - 3
    assert config.mean == pytest.approx((training.mean(),))
    assert config.std == pytest.approx((training.std(),))


def test_folders_take_the_size_of_the_preset_or_the_flag(data: Path, tmp_path: Path) -> None:
    run = prepared(settings(data), tmp_path / "one")
    assert (run.model.config.image_size, run.model.config.in_channels) == (16, 3)
    run = prepared(settings(data, image_size=24, drop_path=0.3), tmp_path / "two")
    assert (run.model.config.image_size, run.model.config.drop_path) == (24, 0.3)
    (part, n), *_ = run.batch(0)
    assert (tuple(part.images.shape), n, part.images.dtype) == ((8, 3, 24, 24), 8, torch.uint8)


def test_a_batch_depends_on_seed_and_step_alone(data: Path, tmp_path: Path) -> None:
    one, two = (prepared(settings(data), tmp_path / name) for name in ("one", "two"))
    two.batch(7)
    for (a, _), (b, _) in zip(one.batch(4), two.batch(4), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(one.loss(one.model, a), two.loss(two.model, b))
    first, later = one.batch(0), one.batch(one._steps)
    assert not torch.equal(first[0][0].images, later[0][0].images)


def test_an_epoch_has_each_image_once(data: Path, tmp_path: Path) -> None:
    run = prepared(settings(data), tmp_path / "run")
    seen = sum(len(part.truth) for step in range(run._steps) for part, _ in run.batch(step))
    classes = torch.cat([part.truth for step in range(run._steps) for part, _ in run.batch(step)])
    assert seen == len(run.train) == 45
    assert torch.equal(classes.sort().values, torch.from_numpy(np.sort(run.train.truth)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "expected one of toy, got the masked model bert"),
        ({"model": "tyo"}, "no model called 'tyo'; did you mean 'toy'"),
        ({"preset": "giant"}, "no preset 'giant'"),
        ({"d_model": 8}, "no field 'd_model'"),
        ({"option": ["in_channels=2"]}, r"expected 1 \(greyscale\) or 3"),
        ({"option": ["n_frames=4"]}, r"got 4\. Try --frames 4 for clips, n_frames=0 for images"),
        ({"mixup": 9.0}, "mixup: expected 0 to 4"),
        ({"ema": 1.0}, "ema: expected"),
        ({"crop_scale": 0.0}, "crop_scale: expected"),
        ({"device": "nowhere"}, "--device nowhere"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ToyImagesRun.begin(settings(data, **changes), tmp_path / "run", figures=False)
    assert not (tmp_path / "run").exists()


def test_one_class_is_no_task(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "one.npz", 9, y=np.zeros(9, int), labels=np.array(["all"]))
    with pytest.raises(LongscanError, match="two classes or more, all images are 'all'"):
        ToyImagesRun.begin(settings(data), tmp_path / "run", figures=False)


def test_a_label_of_the_validation_data_only(data: Path, tmp_path: Path) -> None:
    valid = write_npz(tmp_path / "valid.npz", 9, labels=np.array(["across", "down", "star"]))
    with pytest.raises(LongscanError, match="'star' was not in the training data"):
        ToyImagesRun.begin(settings(data, valid=[str(valid)]), tmp_path / "run", figures=False)


def test_a_killed_run_goes_on_bit_for_bit(data: Path, whole: Path, tmp_path: Path) -> None:
    """The process dies by SIGKILL, which nothing can catch."""
    run, tests = tmp_path / "run", Path(__file__).parents[1]
    program = (
        "import json, sys; from vision_models import *; "
        "ToyImagesRun.begin(ToyImagesConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], figures=False)"
    )
    slow = {**settings(data).to_dict(), "eval_every": 1, "log_every": 1}
    path = os.pathsep.join([str(tests), *sys.path])
    command = [sys.executable, "-c", program, json.dumps(slow), str(run)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        while not (run / "checkpoints" / "step-000002").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    ToyImagesRun.resume(run, {"eval_every": 4}, figures=False)
    for file in ("model", "optimizer"):
        name = f"checkpoints/step-000012/{file}.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
