"""`longscan classify evaluate` and `predict` for models of images."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from longscan.checkpoints.hub import resolve
from longscan.checkpoints.load import load
from longscan.checkpoints.open import check_kind, open_source
from longscan.commands._input import read_stdin
from longscan.core.config import count
from longscan.core.files import read_json
from longscan.core.text_table import lay_out
from longscan.data.archives import has_suffix
from longscan.data.image_files import SUFFIXES, image_paths, is_animated, read_image
from longscan.data.images import read_images
from longscan.errors import LongscanError
from longscan.evaluation.images import TOP, match_labels, measure_images
from longscan.inference.images import check_takes_images, classify_images
from longscan.models import MODELS
from longscan.models.common.vision import VisionConfig, VisionModel
from longscan.plotting.confusion import plot_confusion
from longscan.plotting.style import check_out

__all__ = ["architecture", "evaluate_images", "is_image_model", "predict_images"]

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
        name = read_json(path).get("model_type")
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
    """Print the metrics of a model on labelled images; see `classify evaluate`.

    Args:
        model: its directory, hub id or file.
        files: see `read_images`.
        figure: file for the confusion matrix, if any.
        as_json: whether to print JSON.
        loading: `model` and `image_size` of `load`.
    """
    if figure is not None:
        check_out(figure, "--figure")
    classifier = _load(model, **loading)
    data = match_labels(read_images(files, split="test"), classifier)
    found = measure_images(classifier, data)
    assert found is not None  # nothing stops it
    labels = _labels(classifier.config)
    rows = {labels[n]: row for n, row in found.scores.classes.items()}
    if as_json:
        fields = ("precision", "recall", "f1", "images")
        report = {
            "model": model,
            "images": len(data),
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
        typer.echo(f"{scores} · {count(len(data), 'image')}")
        table: list[tuple[str, ...]] = [("precision", "recall", "F1", "images", "class")]
        for label, (*shares, n) in rows.items():
            table.append((*(f"{share:.4f}" for share in shares), f"{n:,}", label))
        typer.echo("\n".join(lay_out(table, ">>>><")))
    if figure is not None:
        plot_confusion(found.confusion, labels, figure)
        typer.echo(f"figure: {figure}", err=True)


def predict_images(model: str, arguments: Sequence[str], as_json: bool, /, **loading: Any) -> None:
    """Print the predictions of a model for images; see `classify predict`.

    Args:
        model: its directory, hub id or file.
        arguments: image files, and folders, which are searched; the lines of stdin if there are none.
        as_json: whether to print JSON.
        loading: `model` and `image_size` of `load`.

    Raises:
        LongscanError: there is no image in a folder.
        typer.Exit: files are no images or damaged; the others were classified.
    """
    paths = list(_paths(arguments or [line for line in read_stdin() if line.strip()]))
    if not paths:
        return
    classifier = _load(model, **loading)
    labels, opened, failed = _labels(classifier.config), deque[Path](), list[Path]()
    for batch in classify_images(classifier, _openers(paths, classifier.config.in_channels, opened, failed)):
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


def _load(name: str, **loading: Any) -> VisionModel:
    """Return a classifier of images."""
    classifier = load(name, "image", **loading)
    check_takes_images(classifier.config, name)
    return classifier


def _openers(
    paths: Iterable[Path], channels: int, opened: deque[Path], failed: list[Path]
) -> Iterator[Callable[[int], Image.Image]]:
    """Yield what returns an image, for each file that can be opened; errors and animations are printed."""
    for path in paths:
        try:
            animated, image = is_animated(path, str(path)), read_image(path, str(path), channels)
        except LongscanError as error:
            typer.echo(f"error: {error}", err=True)
            failed.append(path)
            continue
        if animated:
            typer.echo(f"{path}: of several frames the first is classified", err=True)
        opened.append(path)
        yield partial(_same, image)


def _same(image: Image.Image, channels: int) -> Image.Image:
    """Return an image that is open already."""
    return image


def _paths(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the image files that arguments name."""
    for argument in arguments:
        path = Path(argument)
        if not path.is_dir():
            yield path
            continue
        names = image_paths(path)
        if not names:
            raise LongscanError(f"{path}: expected images there ({', '.join(SUFFIXES)}), got none.")
        yield from (path / name for name in names)


def _labels(config: VisionConfig) -> tuple[str, ...]:
    """Return the names of the classes; their indices, if they have none."""
    return config.labels or tuple(map(str, range(config.n_classes)))
