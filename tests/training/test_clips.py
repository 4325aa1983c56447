"""Training on clips: it learns their order, resumes bit for bit, alters all frames alike, adapts models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelled_clips import moving, write_arrays, write_class_folders
from labelled_images import write_npz
from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.core.progress import Display
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, VideoMamba, VideoMambaConfig
from longscan.training.image_classifier import ImagesConfig, ImagesRun
from stand_ins import PowerCut

SMALL = ("d_model=16", "n_layers=1", "patch_size=4", "d_state=4")


def settings(data: Path, **changes: Any) -> ImagesConfig:
    small: dict[str, Any] = {
        "data": [str(data)],
        "model": "videomamba",
        "frames": 4,
        "image_size": 16,
        "option": SMALL,
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "lr": 5e-3,
        "crop_scale": 0.5,
        "erase": 0.5,
        "cutmix": 1.0,
        "mixup": 0.5,
        "ema": 0.9,
        "save_every": 2,
        "eval_every": 3,
        "threads": 1,
    }
    return ImagesConfig.from_dict({**small, **changes})


def prepared(config: ImagesConfig, directory: Path) -> ImagesRun:
    directory.mkdir(parents=True)
    (directory / "train.json").write_text("{}")
    run = ImagesRun(directory, config, Display(), figures=False)
    run.metrics.close()
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("data") / "clips", 24)


def test_it_learns_which_way_a_square_moves(tmp_path: Path) -> None:
    data = write_arrays(tmp_path / "clips.npz", 96)
    plain = {"flip": 0.0, "randaugment": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "crop_scale": 1.0}
    plain |= {"valid_fraction": 0.25, "accumulate": 1, "eval_every": 0}
    config = settings(data, **plain, steps=60, batch_size=16, lr=1e-2)
    result = ImagesRun.begin(config, tmp_path / "run", figures=False)
    assert result.scores["valid_top1"] > 0.9


def test_a_stopped_run_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ImagesRun.begin(settings(data), whole, figures=False).stopped_by is None
    with pytest.raises(LongscanError, match="the power is gone"):
        ImagesRun.begin(settings(data), run, PowerCut(3), figures=False)
    assert ImagesRun.resume(run, figures=False).stopped_by is None
    for file in ("model/model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def test_all_frames_are_cropped_flipped_and_altered_alike(tmp_path: Path) -> None:
    x, _ = moving(8)
    still = np.repeat(x[:, :1], 6, 1)  # the same frame six times
    run = prepared(
        settings(write_arrays(tmp_path / "a.npz", 8, x=still), valid_fraction=0.0), tmp_path / "run"
    )
    seen = [part.images for step in range(4) for part, _ in run.batch(step)]
    for images in seen:
        assert images.shape[1:] == (1, 4, 16, 16)
        assert (images == images[:, :, :1]).all()
    assert not torch.equal(seen[0], seen[2])


def test_frames_are_chosen_anew_in_each_epoch(data: Path, tmp_path: Path) -> None:
    plain = {"flip": 0.0, "randaugment": 0.0, "erase": 0.0, "crop_scale": 1.0, "valid_fraction": 0.0}
    run = prepared(settings(data, **plain), tmp_path / "run")
    once, again, later = (torch.stack([run._altered(n, epoch) for n in range(6)]) for epoch in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, later)


def test_the_model_follows_from_the_clips(data: Path, tmp_path: Path) -> None:
    run = prepared(settings(data, option=(*SMALL, "tubelet=2")), tmp_path / "run")
    config = run.model.config
    assert isinstance(config, VideoMambaConfig)
    assert (config.n_frames, config.tubelet, config.labels) == (4, 2, ("left", "right"))
    assert run.describe()[0] == "22 clips of 2 classes at 4 × 16 × 16, 2 held out"
    arrays = prepared(
        settings(write_arrays(tmp_path / "a.npz"), image_size=None), tmp_path / "two"
    ).model.config
    assert (arrays.image_size, arrays.crop, arrays.in_channels) == (16, 1.0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vmamba"}, "--frames: vmamba classifies images. Try --model videomamba"),
        ({"option": ("n_frames=8",)}, "--set n_frames: expected 4 as in --frames, got 8. Leave one out"),
        ({"frames": 1}, "frames: expected 2 to"),
        ({"option": ("tubelet=9",)}, "n_frames: expected at least one tubelet"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ImagesRun.begin(settings(data, **changes), tmp_path / "run", figures=False)
    assert not (tmp_path / "run").exists()


# from another model


def start(tmp_path: Path, name: str = "videomamba", **fields: Any) -> Path:
    """A new model, saved."""
    entry = MODELS[name]
    sizes = {**entry.presets["tiny"], "image_size": 16, "n_classes": 2, "labels": ("left", "right"), **fields}
    model = entry.cls(entry.config.from_dict(sizes), torch.Generator().manual_seed(0))
    save(model, tmp_path / "start")
    return tmp_path / "start"


def fine_tuned(data: Path, tmp_path: Path, first: Path, **changes: Any) -> VideoMamba:
    config = settings(data, pretrained=str(first), option=(), lr=1e-9, ema=0.0, steps=1, **changes)
    ImagesRun.begin(config, tmp_path / "run", figures=False)
    found = load(tmp_path / "run" / "model", "image")
    assert isinstance(found, VideoMamba)
    return found


def test_a_model_of_images_becomes_one_of_clips(data: Path, tmp_path: Path) -> None:
    """What never moves is classified as before."""
    images = start(tmp_path, n_frames=0)
    after, before = fine_tuned(data, tmp_path, images), load(images, "image")
    assert after.config.n_frames == 4
    weights = after.state_dict()
    assert weights.pop("temporal_pos_embedding").abs().max() < 1e-6
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(weights[name].view(weight.shape), weight, atol=1e-6, rtol=1e-6)
    (run := tmp_path / "run").joinpath("model").rename(tmp_path / "model")
    assert ImagesRun.resume(run, {"steps": 2}, figures=False).step == 2


def test_positions_in_time_are_interpolated(data: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model = load(start(tmp_path, n_frames=2), "image")
        assert isinstance(model, VideoMamba)
        model.temporal_pos_embedding.copy_(torch.tensor([0.0, 1.0])[None, :, None].expand(1, 2, 32))
        save(model, tmp_path / "ramp")
    found = fine_tuned(data, tmp_path, tmp_path / "ramp").temporal_pos_embedding
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(found[0, :, 0], expected, atol=1e-6, rtol=1e-6)


def test_a_model_of_clips_on_images(tmp_path: Path) -> None:
    images = write_npz(tmp_path / "bars.npz", 12)
    with pytest.raises(UsageError, match=r"classifies clips of 4 frames\. Add --frames 4"):
        fine_tuned(images, tmp_path, start(tmp_path), frames=None)


def test_another_model_of_images_on_clips(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a vim; clips, --frames, need a videomamba"):
        fine_tuned(data, tmp_path, start(tmp_path, "vim"), model="vim")
