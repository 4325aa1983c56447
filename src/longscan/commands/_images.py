"""`longscan classify evaluate` and `predict` for models of images, and of clips."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import typer
from PIL import Image
from torch import Tensor

from longscan.checkpoints.formats.own import model_name
from longscan.checkpoints.hub import resolve
from longscan.checkpoints.load import load
from longscan.checkpoints.open import check_kind, open_source
from longscan.commands._input import read_stdin
from longscan.core.config import count
from longscan.core.files import read_json
from longscan.core.text_table import lay_out
from longscan.data.archives import has_suffix
from longscan.data.clips import read_clips
from longscan.data.image_files import SUFFIXES, file_paths, image_paths, is_animated, read_image
from longscan.data.image_folders import group_clips, is_part
from longscan.data.images import read_images
from longscan.data.labelled import Labelled
from longscan.data.video_files import SUFFIXES as VIDEOS
from longscan.data.video_files import is_video
from longscan.data.videos import NPZ, clip_of_files, open_clip
from longscan.errors import LongscanError
from longscan.evaluation.images import TOP, match_labels, measure_images
from longscan.inference.images import Input, classify_images, frames_of, to_pixels
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig
from longscan.plotting.confusion import plot_confusion
from longscan.plotting.style import check_out

__all__ = ["architecture", "evaluate_images", "is_image_model", "predict_images"]

CLIPS = f"a folder of frames, {', '.join((*VIDEOS, NPZ))} or an animated image"
WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")  # files of published image models


def is_image_model(model: str) -> bool:
    """Return whether a directory, a file or a hub repository holds an image classifier.

    Args:
        model: its name.

    Raises:
        LongscanError: there is no such model.
    """
    path = Path(model)
    if not path.exists():
        path = resolve(model)  # on the hub
    path /= "config.json"
    if path.is_file():
        name = model_name(read_json(path).get("model_type"))
        return isinstance(name, str) and name in MODELS and MODELS[name].kind == "image"
    return has_suffix(model, *WEIGHTS)


def architecture(model: str) -> str:
    """Return the name in MODELS of an image classifier.

    Args:
        model: its directory, hub id or file.
    """
    source = open_source(model, None, offline=False)
    check_kind(source, "image")
    return source.name


def evaluate_images(
    model: str, files: Sequence[Path], figure: Path | None, as_json: bool, /, **loading: Any
) -> None:
    """Print the metrics of a model on labelled images, or clips; see `classify evaluate`.

    Args:
        model: its directory, hub id or file. A model of videos reads clips.
        files: see `read_images` and `read_clips`.
        figure: file for the confusion matrix, if any.
        as_json: whether to print JSON.
        loading: `model` and `image_size` of `load`.
    """
    if figure is not None:
        check_out(figure, "--figure")
    classifier = load(model, "image", **loading)
    clips = frames_of(classifier.config) > 0
    data: Labelled[Any] = read_clips(files, split="test") if clips else read_images(files, split="test")
    data, what = match_labels(data, classifier), "clip" if clips else "image"
    found = measure_images(classifier, data)
    assert found is not None  # nothing stops it
    labels = _labels(classifier.config)
    rows = {labels[n]: row for n, row in found.scores.classes.items()}
    if as_json:
        fields = ("precision", "recall", "f1", f"{what}s")
        report = {
            "model": model,
            f"{what}s": len(data),
            "loss": found.loss,
            "top1": found.top1,
            "top5": found.top5,
            "macro_f1": found.scores.macro_f1,
            "classes": {label: dict(zip(fields, row, strict=True)) for label, row in rows.items()},
        }
        typer.echo(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        top5 = f" · top-5 {found.top5:.4f}" if len(labels) > TOP else ""
        scores = f"top-1 {found.top1:.4f}{top5} · macro-F1 {found.scores.macro_f1:.4f}"
        typer.echo(f"{scores} · {count(len(data), what)}")
        table: list[tuple[str, ...]] = [("precision", "recall", "F1", f"{what}s", "class")]
        for label, (*shares, n) in rows.items():
            table.append((*(f"{share:.4f}" for share in shares), f"{n:,}", label))
        typer.echo("\n".join(lay_out(table, ">>>><")))
    if figure is not None:
        plot_confusion(found.confusion, labels, figure)
        typer.echo(f"figure: {figure}", err=True)


def predict_images(model: str, arguments: Sequence[str], as_json: bool, /, **loading: Any) -> None:
    """Print the predictions of a model for images, or clips; see `classify predict`.

    Args:
        model: its directory, hub id or file. A model of videos reads clips.
        arguments: files, and folders, which are searched; the lines of stdin if there are none.
        as_json: whether to print JSON.
        loading: `model` and `image_size` of `load`.

    Raises:
        LongscanError: there is no image, or clip, in a folder.
        typer.Exit: files are none or damaged; the others were classified.
    """
    arguments = arguments or [line for line in read_stdin() if line.strip()]
    if not arguments:
        return
    classifier = load(model, "image", **loading)
    clips, channels = frames_of(classifier.config), classifier.config.in_channels
    opener = partial(_clip, model, classifier.config) if clips else partial(_image, model, channels)
    sources = list(_clips(arguments) if clips else _paths(arguments))
    labels, opened, failed = _labels(classifier.config), deque[Path](), list[Path]()
    for batch in classify_images(classifier, _openers(sources, opener, opened, failed)):
        for row in batch:
            path, probabilities, best = opened.popleft(), row.exp(), int(row.argmax())
            if as_json:
                every = dict(zip(labels, probabilities.tolist(), strict=True))
                line = {"name": str(path), "label": labels[best], "probabilities": every}
                typer.echo(json.dumps(line, ensure_ascii=False))
            else:
                name = " ".join(str(path).splitlines())
                typer.echo(f"{labels[best]}\t{probabilities[best]:.4f}\t{name}")
    if failed:
        raise typer.Exit(1)


class _Source(NamedTuple):
    """What is to be classified: a file, or a folder of frames."""

    path: Path
    frames: tuple[str, ...] = ()  # image files in the folder


def _openers(
    sources: Iterable[_Source], opener: Callable[[_Source], Input], opened: deque[Path], failed: list[Path]
) -> Iterator[Callable[[int], Input]]:
    """Yield what returns an image or a clip, for each that can be opened; errors are printed."""
    for source in sources:
        try:
            item = opener(source)
        except LongscanError as error:
            typer.echo(f"error: {error}", err=True)
            failed.append(source.path)
            continue
        opened.append(source.path)
        yield partial(_same, item)


def _same(item: Input, channels: int) -> Input:
    """Return an image or a clip that is open already."""
    return item


def _image(model: str, channels: int, source: _Source) -> Image.Image:
    """Return an image; that of an animation only the first frame counts is printed."""
    name = str(source.path)
    if is_video(name):
        raise LongscanError(f"{name} is a video: {model} classifies images. Extract a frame of it.")
    animated, image = is_animated(source.path, name), read_image(source.path, name, channels)
    if animated:
        typer.echo(f"{name}: of several frames the first is classified", err=True)
    return image


def _clip(model: str, config: VisionConfig, source: _Source) -> Tensor:
    """Return the frames of a clip that a model sees; that there are too few is printed."""
    path, name = source.path, str(source.path)
    if not (source.frames or is_part(path.name)):
        raise LongscanError(f"{name}: expected a clip ({CLIPS}), as {model} classifies videos.")
    files = source.frames
    clip = clip_of_files(files, lambda file: path / file, name) if files else open_clip(path, name)
    if clip.n_frames < (n := frames_of(config)):
        typer.echo(f"{name}: {clip.n_frames} frames, of which some are repeated to make {n}", err=True)
    return to_pixels(clip, config)


def _clips(arguments: Sequence[str]) -> Iterator[_Source]:
    """Yield the clips that arguments name: files, folders of frames, and folders of such."""
    for argument in arguments:
        root = Path(argument)
        if not root.is_dir():
            yield _Source(root)
            continue
        groups = group_clips(file_paths(root, is_part), root.joinpath, root)
        if not groups:
            raise LongscanError(f"{root}: expected clips there ({CLIPS}), got none.")
        for name, files in groups.items():
            yield _Source(root / name, tuple(file.rpartition("/")[2] for file in files))


def _paths(arguments: Sequence[str]) -> Iterator[_Source]:
    """Yield the image files that arguments name."""
    for argument in arguments:
        path = Path(argument)
        if not path.is_dir():
            yield _Source(path)
            continue
        names = image_paths(path)
        if not names:
            raise LongscanError(f"{path}: expected images there ({', '.join(SUFFIXES)}), got none.")
        yield from (_Source(path / name) for name in names)


def _labels(config: VisionConfig) -> tuple[str, ...]:
    """Return the names of the classes; their indices, if they have none."""
    return config.labels or tuple(map(str, range(config.n_classes)))
