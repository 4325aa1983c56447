"""The experiment on clips: what the clips are, why single frames can't tell, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longscan.checkpoints.load import load
from longscan.core.random import RandomStream
from longscan.models import VideoMamba, VideoMambaConfig
from longscan.reproduce import video
from longscan.reproduce.video import TASKS, FrameAverage, draw_clips

Cli = Callable[..., Any]


@pytest.mark.parametrize("task", TASKS)
def test_counterparts_have_the_same_frames_and_another_label(task: str) -> None:
    x, y = draw_clips(task, 60, RandomStream(3, 0))
    assert x.shape == (60, 8, 24, 24)
    for one, other in zip(x[::2], x[1::2], strict=True):
        assert not np.array_equal(one, other)
        assert sorted(frame.tobytes() for frame in one) == sorted(frame.tobytes() for frame in other)
    assert (y[::2] != y[1::2]).all()
    assert set(y.tolist()) == set(range(len(TASKS[task])))
    again = draw_clips(task, 60, RandomStream(3, 0))
    assert np.array_equal(again[0], x)
    assert not np.array_equal(draw_clips(task, 60, RandomStream(4, 0))[0], x)


def test_labels_say_where_the_shape_goes() -> None:
    x, y = draw_clips("direction", 40, RandomStream(0, 0))
    rows, columns = np.mgrid[:24, :24]
    for clip, label in zip(x, y, strict=True):
        shape = clip > 100
        (y0, x0), (y1, x1) = (
            (float(rows[frame].mean()), float(columns[frame].mean())) for frame in (shape[2], shape[5])
        )
        name = TASKS["direction"][label]
        for word, move in (("right", x1 - x0), ("left", x0 - x1), ("down", y1 - y0), ("up", y0 - y1)):
            assert (move > 0.7) == (word in name.split()), (name, word, move)


def average(n_frames: int = 4) -> FrameAverage:
    config = VideoMambaConfig(
        d_model=8, n_layers=1, patch_size=4, image_size=8, n_classes=3, n_frames=n_frames, drop_path=0.0
    )
    return FrameAverage(config, torch.Generator().manual_seed(0)).double().eval()


def test_the_frame_average_is_the_mean_of_the_logits_in_any_order() -> None:
    model = average()
    clips = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits, single = model(clips), model.of_images()
    assert isinstance(single, VideoMamba)
    expected = torch.stack([single(clips[:, :, time]) for time in range(4)]).mean(0)
    assert torch.allclose(logits, expected, atol=1e-12)
    assert torch.allclose(model(clips[:, :, [3, 1, 0, 2]]), logits, atol=1e-12)


def test_the_experiment(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "N_TRAIN", 16)
    monkeypatch.setattr(video, "N_TEST", 16)
    monkeypatch.setitem(video.SHARED, "batch_size", 4)
    arguments = ("reproduce", "video", "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "reduced: a few steps only: no result" in done.out
    for word in (*video.SYSTEMS, "direction", "order", "at most 50"):
        assert word in done.out
    report = json.loads((tmp_path / "video.json").read_text())
    assert list(report["runs"]) == list(video.SYSTEMS)
    [row] = report["runs"]["frame average"]
    assert row["order"] == 50  # of each pair one
    assert row["direction"] <= 50
    assert (tmp_path / "video.png").stat().st_size > 1000
    single = load(tmp_path / "quick-order-frame-average" / "model", "image")
    assert single.config.to_dict()["n_frames"] == 0
    assert len({rows[0]["parameters"] for rows in report["runs"].values()}) == 2  # with positions in time

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert json.loads(cli(*arguments, "--json").out)["runs"] == report["runs"]
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained or measured again
