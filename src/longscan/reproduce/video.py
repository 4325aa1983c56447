"""The order of frames: VideoMamba against the mean over single frames, on synthetic clips; reduced.

VideoMamba (Li et al. 2024) was measured on videos of human actions, many of which a single frame gives away.
Here every clip comes with its counterpart, which has the same frames in another order and another label. So
what looks at each frame by itself and takes the mean, as image classifiers do with videos, gives both the
same label and is right for one of the two at most: 50 %. There are two tasks:

    direction   a shape moves in one of eight directions; the counterpart is the clip backwards. Single frames
                tell its axis.
    order       a bar lies, another stands, each in one frame; which came first? Single frames tell nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.core.random import RandomStream
from longscan.data.clips import read_clips
from longscan.evaluation.images import measure_images
from longscan.models import MODELS, ModelEntry, VideoMamba, VideoMambaConfig
from longscan.models.common.vision import VisionModel
from longscan.models.vim import Vim
from longscan.plotting.clips import plot_clips
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, seeded
from longscan.training.image_classifier import ImagesConfig, ImagesRun

__all__ = ["FILES", "SOURCE", "FrameAverage", "draw_clips", "examples", "run", "show"]

FILES, SOURCE = (), ""
SEEDS = (0, 1, 2)  # of --full
N_FRAMES, SIZE, PATCH = 8, 24, 6
N_TRAIN, N_TEST = 3000, 1000  # clips of each task
STREAMS = {"train": 0, "test": 1}  # seeds
STEPS = 600
AXES = ((1, 0), (0, 1), (1, 1), (1, -1))  # of the motion, x to the right and y down
COMPASS = ("right", "down", "down right", "up right", "left", "up", "up left", "down left")
TASKS = {"direction": COMPASS, "order": ("lying first", "standing first")}

SHARED: dict[str, Any] = {
    "model": "videomamba",
    "frames": N_FRAMES,
    "steps": STEPS,
    "batch_size": 32,
    "lr": 3e-3,
    "warmup": 60,
    "clip": 1.0,
    "smoothing": 0.0,
    "crop_scale": 1.0,
    "flip": 0.0,
    "randaugment": 0.0,
    "ema": 0.0,
    "drop_path": 0.0,
    "valid_fraction": 0.0,
    "save_every": 100,
}
SYSTEMS: dict[str, tuple[str, ...]] = {  # the options of each
    "frame average": (),
    "spatial-first": ("scan_order=spatial",),
    "temporal-first": ("scan_order=temporal",),
    "spatiotemporal": ("scan_order=spatiotemporal_v1",),
}
AVERAGE = "frame average"
MEASURES = {"direction": "direction", "order": "order"}
NOTES = (
    "published: nothing on these tasks",
    f"measured:  {N_TEST:,} held-out clips of each task, each beside its counterpart with the same frames;",
    f"           {N_FRAMES} frames of {SIZE} × {SIZE}, {N_TRAIN:,} clips to train on, {STEPS} steps of 32;",
    "           2 layers of width 32; by chance 12.5 and 50; the frame average is VideoMamba on single",
    "           frames, trained and tested on the mean of their logits: at most 50 by construction, in both",
)


class FrameAverage(Vim):
    """VideoMamba on each frame by itself; the logits are the mean over the frames."""

    config: VideoMambaConfig

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the class token of every frame, (batch, n_frames, d_model).

        Args:
            images: (batch, in_channels, n_frames, height, width), normalised.
        """
        n_frames = images.shape[2]
        tokens = super().pool(super().forward_features(images.transpose(1, 2).flatten(0, 1)))
        return tokens.view(-1, n_frames, self.d_features)

    def pool(self, features: Tensor) -> Tensor:
        """Return the mean over the frames (batch, d_model), which the head makes the mean of the logits."""
        return features.mean(1)

    def of_images(self) -> VideoMamba:
        """Return the classifier of single frames."""
        with torch.device("meta"):
            model = VideoMamba(self.config.replace(n_frames=0))
        model.load_state_dict(self.state_dict(), assign=True)
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AverageConfig(ImagesConfig):
    """The settings of training a frame average."""

    @property
    def choice(self) -> Mapping[str, ModelEntry]:
        """VideoMamba's entry, with the class of the frame average."""
        return {"videomamba": dataclasses.replace(MODELS["videomamba"], cls=FrameAverage)}


class _VideoRun(ImagesRun):
    """Trains a VideoMamba."""

    @classmethod
    def again(cls, directory: Path) -> str:
        """Return the command that resumes a run."""
        return "the same command"


class _AverageRun(_VideoRun):
    """Trains a frame average."""

    settings = _AverageConfig

    def export(self, directory: Path) -> None:
        """Save the classifier of single frames."""
        save(cast(FrameAverage, self.model).of_images(), directory)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the systems, trained here.

    Args:
        plan: where, and how much.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for part, n in (("train", N_TRAIN), ("test", N_TEST)):
            if not (path := _path(plan, task, part)).is_file():
                x, y = draw_clips(task, n, RandomStream(STREAMS[part], 0))
                np.savez_compressed(path, x=x, y=y, labels=np.array(TASKS[task]))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for name in SYSTEMS:
            rows = {task: _train(plan, task, name, seed) for task in TASKS}
            one = rows["direction"]
            spent = sum(row["minutes"] for row in rows.values())
            accuracies = {task: row["accuracy"] for task, row in rows.items()}
            results[name].append({**one, **accuracies, "minutes": spent})
    reduced = "clips drawn here in place of videos, 2 layers" + ("" if plan.full else ", one seed")

    def draw(report: Mapping[str, Any], path: Path) -> None:
        plot_clips(report, {title: clip for task in TASKS for title, clip in examples(task)}, path)

    return finish(plan, results, MEASURES, {}, reduced, NOTES, draw=draw)


def _train(plan: Plan, task: str, name: str, seed: int) -> dict[str, Any]:
    """Return the test accuracy of a system on a task, trained now or earlier."""
    average = name == AVERAGE
    options = (f"patch_size={PATCH}", *SYSTEMS[name])
    fields = {**SHARED, "data": (str(_path(plan, task, "train")),), "option": options, "seed": seed}
    config = (_AverageConfig if average else ImagesConfig).from_dict(fields)
    directory = plan.train(
        seeded(f"{task}-{name.replace(' ', '-')}", seed), config, _AverageRun if average else _VideoRun
    )
    model = load(directory / "model", "image")
    if average:
        model = _averaged(model)

    def measure() -> dict[str, Any]:
        found = measure_images(model, read_clips([_path(plan, task, "test")]))
        assert found is not None  # nothing stops it
        return {"accuracy": 100 * found.top1}

    return plan.cached_measurement(directory, model, f"{N_TEST}", measure)


def _averaged(model: VisionModel) -> FrameAverage:
    """Return the frame average of a classifier of single frames."""
    with torch.device("meta"):
        average = FrameAverage(cast(VideoMambaConfig, model.config).replace(n_frames=N_FRAMES))
    average.load_state_dict(model.state_dict(), assign=True)
    return average


def _path(plan: Plan, task: str, part: str) -> Path:
    """Return the file of the clips of a task."""
    return plan.out / f"{task}-{part}.npz"


# the clips


def draw_clips(
    task: str, n: int, stream: RandomStream
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return clips of a task, each followed by its counterpart: the same frames in another order.

    Args:
        task: a key of TASKS.
        n: clips, an even number.
        stream: randomness.

    Returns:
        Pixels (n, N_FRAMES, SIZE, SIZE) and class indices (n,).
    """
    make = {"direction": _direction, "order": _order}[task]
    clips, truth = [], []
    for _ in range(n // 2):
        frames, label, order, other = make(stream)
        clips += [frames, frames[order]]
        truth += [label, other]
    return np.stack(clips), np.array(truth)


def examples(task: str) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Return a test clip of a task and its counterpart, each with its label.

    Args:
        task: a key of TASKS.
    """
    x, y = draw_clips(task, 2, RandomStream(STREAMS["test"], 0))
    return [(f"{task}: {TASKS[task][label]}", clip) for clip, label in zip(x, y, strict=True)]


_Drawn = tuple[npt.NDArray[np.uint8], int, list[int], int]  # frames, label, counterpart's order and label


def _direction(stream: RandomStream) -> _Drawn:
    """Return a shape that moves, and how to reverse it."""
    axis, kind, radius, grey = (least + stream.below(n) for least, n in ((0, 4), (0, 3), (3, 2), (140, 116)))
    dx, dy = AXES[axis]
    speed = 1 + 0.6 * stream.random()
    x, y = (SIZE / 3 + SIZE / 3 * stream.random() for _ in range(2))  # in the middle of the clip
    frames = _background(stream)
    for time, frame in enumerate(frames):
        way = speed * (time - (N_FRAMES - 1) / 2)
        at_x, at_y = x + dx * way, y + dy * way
        box = (at_x - radius, at_y - radius, at_x + radius, at_y + radius)
        image = Image.fromarray(frame)
        pen = ImageDraw.Draw(image)
        if kind == 0:
            pen.ellipse(box, fill=grey)
        elif kind == 1:
            pen.rectangle(box, fill=grey)
        else:
            pen.polygon([(at_x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=grey)
        frames[time] = np.asarray(image)
    return frames, axis, list(reversed(range(N_FRAMES))), axis + len(AXES)


def _order(stream: RandomStream) -> _Drawn:
    """Return a lying and a standing bar, each in one frame, and how to exchange these."""
    first, second = sorted(stream.permutation(N_FRAMES)[:2].tolist())
    grey = 140 + stream.below(116)
    frames = _background(stream)
    for time, (wide, high) in ((first, (6, 1)), (second, (1, 6))):
        x, y = (SIZE / 4 + SIZE / 2 * stream.random() for _ in range(2))
        image = Image.fromarray(frames[time])
        ImageDraw.Draw(image).rectangle((x - wide, y - high, x + wide, y + high), fill=grey)
        frames[time] = np.asarray(image)
    order = list(range(N_FRAMES))
    order[first], order[second] = second, first
    return frames, 0, order, 1


def _background(stream: RandomStream) -> npt.NDArray[np.uint8]:
    """Return noise, a part of which is the same in all frames, (N_FRAMES, SIZE, SIZE)."""
    still, moving = 60 * stream.uniform((SIZE, SIZE)), 20 * stream.uniform((N_FRAMES, SIZE, SIZE))
    return (still + moving).astype(np.uint8)
