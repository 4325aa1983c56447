"""VMamba, Vim, a Vision Transformer and a ResNet of equal size, trained from scratch on small images.

The papers (arXiv 2401.10166, 2401.09417, 2010.11929, 1512.03385) train models of 5 to 90 million parameters
on 1.2 million photographs for days. Here each has about 270,000 parameters and sees about 100,000 images, the
same ones in the same order, of each of three sets: clothes (Fashion-MNIST), photographs (CIFAR-10, stored as
JPEG) and handwritten characters of many alphabets (Omniglot). What can be compared at this size: how well
they learn from little, how long it takes, and how the trained models bear images of another size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longscan.checkpoints.load import load
from longscan.core.files import atomic_file
from longscan.data.image_files import read_image
from longscan.data.image_folders import image_files
from longscan.data.images import Images, read_images
from longscan.errors import LongscanError
from longscan.evaluation.images import match_labels, measure_images
from longscan.plotting.style import COLOURS, new_figure, reduced_note, save_figure, tidy
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan
from longscan.training.image_classifier import ImagesConfig, ImagesRun

__all__ = ["FILES", "LABELS", "MODELS", "OMNIGLOT", "SETS", "SOURCE", "images", "run", "show", "trained"]

FILES = (
    "fashion_mnist_15k.npz",
    "cifar10_jpeg.npz",
    "images_background_small1.zip",
    "images_background_small2.zip",
)
SOURCE = (
    "The first is x_train, y_train, x_test, y_test of Fashion-MNIST; the second train_jpeg, train_offsets, "
    "train_labels and the same of test of CIFAR-10; the others are of the repository brendenlake/omniglot. "
    "They may be in folders there."
)


class ImageSet(NamedTuple):
    """A set of images, and how it is trained on.

    Attributes:
        title: of the figure.
        size: pixels of a training image's side.
        epochs: passes over the training images.
        fields: of ImagesConfig.
    """

    title: str
    size: int
    epochs: float
    fields: Mapping[str, Any]


SHARED: dict[str, Any] = {
    "batch_size": 64,
    "warmup": 200,
    "crop_scale": 0.6,
    "randaugment": 0.0,
    "smoothing": 0.1,
    "ema": 0.0,
    "drop_path": 0.0,
    "eval_every": 500,
    "save_every": 200,
}
SETS = {
    "fashion": ImageSet("Fashion-MNIST", 32, 10.0, {"valid_fraction": 0.05}),
    "cifar10": ImageSet("CIFAR-10, as JPEG", 32, 2.5, {"valid_fraction": 0.05}),
    # a character is another one when mirrored
    "omniglot": ImageSet("Omniglot", 64, 32.0, {"valid_fraction": 0.07, "flip": 0.0}),
}
# a patch, or the stride of the ResNet's first convolution, is larger where the images are: see `trained`
# VMamba: of three stages, with a last map of 2 x 2, it had 84.8 % on Fashion-MNIST at 32 pixels, 26.1 at 24
MODELS: dict[str, dict[str, Any]] = {
    "vmamba": {"d_model": [38, 76], "n_blocks": [2, 3]},
    "vim": {"d_model": 84, "n_layers": 4},
    "vit": {"d_model": 72, "n_layers": 4, "n_heads": 3},
    "resnet": {"d_model": [16, 32, 64], "n_blocks": [3, 3, 3]},
}
# the best of 1e-3, 2e-3 and 4e-3 on held-out images of CIFAR-10, after 250 steps; of a VMamba of three stages
LEARNING_RATES = {"vmamba": 2e-3, "vim": 4e-3, "vit": 2e-3, "resnet": 2e-3}
LABELS = {"vmamba": "VMamba", "vim": "Vim", "vit": "ViT", "resnet": "ResNet"}
PATCHES = 8  # of a row of a training image
FULL = 10  # times as many epochs
SIZES = {"smaller": 0.75, "accuracy": 1.0, "larger": 1.5}  # of test images, times that of training
MEASURES = {"accuracy": "accuracy", "smaller": "at 3/4 size", "larger": "at 3/2 size"}
TESTED = 16  # Omniglot: drawings of a character from this one on, of 20
OMNIGLOT = "vision-omniglot.npz"
NOTES = (
    "measured: the last step's model on the test images (5,000, 10,000 and 1,210) of 32 pixels a side, of",
    "          Omniglot 64; the other sizes without training again; minutes: of the training steps",
    "omniglot: 242 characters, 15 drawings of each to train on and to validate, five by others to test",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the accuracies of the models on the sets, at three sizes of the test images.

    Args:
        plan: where, and how much.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for task in SETS:
        test = images(plan, task, "test")
        for model in MODELS:
            directory = trained(plan, task, model)
            results[f"{task} {model}"] = [_measure(plan, directory, task, test)]
    epochs = ", ".join(f"{each.epochs * (FULL if plan.full else 1):g}" for each in SETS.values())
    reduced = f"0.26 to 0.29 million parameters, images of 32 and 64 pixels, {epochs} epochs, one seed"
    return finish(plan, results, MEASURES, {}, reduced, NOTES, draw=_plot)


def trained(plan: Plan, task: str, model: str) -> Path:
    """Return the directory of a model that was trained on a set.

    Args:
        plan: where, and how much.
        task: of `SETS`.
        model: of `MODELS`.
    """
    each, sizes = SETS[task], dict(MODELS[model])
    side = each.size // PATCHES  # of a patch
    sizes |= {"stride": side // 4} if model == "resnet" else {"patch_size": side}
    sizes |= {"crop": 1.0}
    fields = {**SHARED, **each.fields, "epochs": each.epochs * (FULL if plan.full else 1)}
    fields |= {
        "model": model,
        "lr": LEARNING_RATES[model],
        "image_size": each.size,
        "data": [str(_data(plan, task))],
    }
    fields |= {"option": [f"{name}={value}".replace(" ", "") for name, value in sizes.items()]}
    name = f"vision-{'full-' if plan.full else ''}{task}-{model}"
    return plan.train(name, ImagesConfig.from_dict(fields), ImagesRun)


def images(plan: Plan, task: str, split: str) -> Images:
    """Return the images of a set.

    Args:
        plan: where the data are; a few images if it is to be quick.
        task: of `SETS`.
        split: "train" or "test".
    """
    found = read_images([_data(plan, task)], split=split)
    return found.select(np.linspace(0, len(found) - 1, 20).astype(int)) if plan.quick else found


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the accuracies: a panel for each set, a group of bars for each size, a bar for each model."""
    figure = new_figure(11.0, 4.2)
    width = 0.8 / len(MODELS)
    for ax, (task, each) in zip(figure.subplots(1, len(SETS), sharey=True), SETS.items(), strict=True):
        for index, model in enumerate(MODELS):
            shift = (index - (len(MODELS) - 1) / 2) * width
            heights = [report["systems"][f"{task} {model}"][name]["mean"] for name in SIZES]
            positions = [x + shift for x in range(len(SIZES))]
            bars = ax.bar(positions, heights, 0.9 * width, color=COLOURS[index], label=LABELS[model])
            ax.bar_label(bars, fmt="%.0f", fontsize=7)
        sides = [round(each.size * factor) for factor in SIZES.values()]
        ticks = [f"{side}{', trained' if side == each.size else ''}" for side in sides]
        ax.set_xticks(range(len(SIZES)), ticks)
        ax.set(xlabel="pixels of a test image's side", ylim=(0, 105))
        ax.set_title(each.title)
        tidy(ax)
    figure.axes[0].set_ylabel("accuracy (%)")
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, frameon=False, loc="outside upper right", ncols=len(MODELS))
    save_figure(figure, path, reduced_note(report))


def _measure(plan: Plan, directory: Path, task: str, test: Images) -> dict[str, Any]:
    """Return the accuracies of a model in percent, at each size."""
    model = load(directory / "model", "image")

    def score() -> dict[str, Any]:
        accuracies = {}
        for name, factor in SIZES.items():
            resized = load(directory / "model", "image")
            resized.resize(round(SETS[task].size * factor))
            scores = measure_images(resized, match_labels(test, resized), 100)
            assert scores is not None  # nothing stops it
            accuracies[name] = 100 * scores.top1
        return accuracies

    return plan.cached_measurement(directory, model, f"{len(test)}", score)


def _data(plan: Plan, task: str) -> Path:
    """Return the file of a set."""
    if task != "omniglot":
        return plan.file(FILES[list(SETS).index(task)])
    path = plan.out / OMNIGLOT
    if not path.is_file():
        plan.out.mkdir(parents=True, exist_ok=True)
        _write_omniglot([plan.file(name) for name in FILES[2:]], path)
    return path


def _write_omniglot(archives: list[Path], path: Path) -> None:
    """Write the characters of archives as arrays; what is in several counts once."""
    drawings: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    for archive in archives:
        files = image_files(archive, "train")
        for name in files.names:
            where = "/".join(Path(name).parts[-3:])  # alphabet, character, its number_drawer
            drawings[where] = np.asarray(read_image(files.get(name), f"{archive}/{name}", 1))
    names = sorted(drawings)
    labels = sorted({str(Path(name).parent) for name in names})
    parts: dict[str, Any] = {"labels": np.array(labels)}
    for split in ("train", "test"):
        chosen = [name for name in names if (_drawer(archives[0], name) >= TESTED) == (split == "test")]
        parts[f"x_{split}"] = np.stack([drawings[name] for name in chosen])
        parts[f"y_{split}"] = np.array([labels.index(str(Path(name).parent)) for name in chosen])
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **parts)


def _drawer(path: Path, name: str) -> int:
    """Return by whom a drawing is, from 1 to 20."""
    number = Path(name).stem.partition("_")[2]
    if not number.isdecimal():
        raise LongscanError(f"{path}: expected names such as 0108_01.png, got {name}. {SOURCE}")
    return int(number)
