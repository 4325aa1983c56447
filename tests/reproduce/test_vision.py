"""`reproduce vision` and `resolution`: which images they train and test on, and what they measure."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from labelled_images import bars
from longscan.checkpoints.load import load
from longscan.data.images import read_images
from longscan.evaluation.images import measure_images
from longscan.models import MODELS
from longscan.reproduce import resolution, vision
from longscan.reproduce.experiment import Plan

Cli = Callable[..., Any]
TINY: dict[str, dict[str, Any]] = {
    "vmamba": {"d_model": [4, 6], "n_blocks": [1, 1]},
    "resnet": {"d_model": [4, 6], "n_blocks": [1, 1]},
}
CHARACTERS = {  # one of them is in both archives
    "images_background_small1.zip": ["Greek/character01", "Greek/character02", "Korean/character01"],
    "images_background_small2.zip": ["Greek/character02", "Tagalog/character01"],
}


def png(number: int, drawer: int) -> bytes:
    """A drawing that says which character it is, and by whom."""
    pixels = np.full((12, 12), 255, np.uint8)
    pixels[0, 0], pixels[1, 1] = number, drawer
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images in the layouts of all files, in folders."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "arrays").mkdir()
    x, y = bars(60, 28)
    np.savez(
        directory / "arrays" / "fashion_mnist_15k.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30]
    )
    arrays: dict[str, Any] = {"classes": np.array(["across", "down", "disc"])}
    for split, n in {"train": 60, "test": 24}.items():
        encoded = []
        for pixels in bars(n, 32)[0]:
            file = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(file, "jpeg")
            encoded.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = np.arange(n) % 3
    np.savez(directory / "arrays" / "cifar10_jpeg.npz", **arrays)
    numbers = sorted({name for names in CHARACTERS.values() for name in names})
    for archive, names in CHARACTERS.items():
        with zipfile.ZipFile(directory / archive, "w") as file:
            for name in names:
                for drawer in range(1, 21):
                    number = numbers.index(name)
                    path = f"{archive.removesuffix('.zip')}/{name}/{number:04}_{drawer:02}.png"
                    file.writestr(path, png(number, drawer))
    return directory


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(vision.MODELS):
        if name in TINY:
            monkeypatch.setitem(vision.MODELS, name, TINY[name])
        else:
            monkeypatch.delitem(vision.MODELS, name)


def test_vision_and_resolution(cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--data", data, "--out", tmp_path, "--quick", "--threads", 1)
    done = cli("reproduce", "vision", *flags)
    assert done.code == 0, done.err
    assert "reduced: a few steps only: no result" in done.out
    report = json.loads((tmp_path / "vision.json").read_text())
    assert list(report["systems"]) == [f"{task} {model}" for task in vision.SETS for model in TINY]
    assert (tmp_path / "vision.png").stat().st_size > 1000
    for system in report["systems"]:
        assert system in done.out

    # what is measured is the model at these sizes, on the test images
    directory = tmp_path / "quick-vision-fashion-vmamba" / "model"
    test = read_images([data / "arrays" / "fashion_mnist_15k.npz"], split="test")
    test = test.select(np.linspace(0, 29, 20).astype(int))
    for name, size in {"smaller": 24, "accuracy": 32, "larger": 48}.items():
        model = load(directory, "image")
        model.resize(size)
        scores = measure_images(model, test)
        assert scores is not None
        assert report["runs"]["fashion vmamba"][0][name] == pytest.approx(100 * scores.top1)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/state.json")}
    assert len(times) == len(report["systems"])
    sizes: list[int] = []

    def measured(model: Any, *arguments: Any) -> Any:
        sizes.append(model.config.image_size)
        return measure_images(model, *arguments)

    monkeypatch.setattr(resolution, "measure_images", measured)
    done = cli("reproduce", "resolution", *flags)
    assert done.code == 0, done.err
    assert "ms per image" in done.out
    found = json.loads((tmp_path / "resolution.json").read_text())
    assert list(found["rows"]) == list(TINY)
    assert sizes == [64, 96] * len(TINY)
    for rows in found["rows"].values():
        assert list(rows) == ["64", "96"]
        for row in rows.values():
            assert row["images"] == 20
            assert 0 <= row["accuracy"] <= 100
            assert 0 < row["range"][0] <= row["ms"] <= row["range"][1]
    for model, rows in found["rows"].items():  # the same size, the same images: the same accuracy
        assert rows["64"]["accuracy"] == report["runs"][f"omniglot {model}"][0]["accuracy"]
    assert (tmp_path / "resolution.png").stat().st_size > 1000
    again = cli("reproduce", "resolution", *flags, "--json")
    assert json.loads(again.out)["rows"] == found["rows"]
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was trained again


def test_omniglot_is_divided_by_who_drew(data: Path, tmp_path: Path) -> None:
    plan = Plan(name="vision", data=data, out=tmp_path / "runs")
    labels = ("Greek/character01", "Greek/character02", "Korean/character01", "Tagalog/character01")
    for split, drawers in {"train": range(1, 16), "test": range(16, 21)}.items():
        found = vision.images(plan, "omniglot", split)
        assert found.labels == labels
        assert len(found) == len(labels) * len(drawers)  # what is in both archives counts once
        seen = set()
        for number in range(len(found)):
            pixels = np.asarray(found.image(number))
            assert pixels[0, 0] == found.truth[number]
            seen.add((int(pixels[0, 0]), int(pixels[1, 1])))
        assert seen == {(label, drawer) for label in range(len(labels)) for drawer in drawers}


def test_the_models_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    counts = []
    for name, sizes in vision.MODELS.items():
        fields = dict.fromkeys(["image_size"], 32) | {"n_classes": 10} | sizes
        fields |= {} if name == "resnet" else {"patch_size": 4}
        counts.append(MODELS[name].cls(MODELS[name].config.from_dict(fields)).num_parameters())
    assert max(counts) < 1.1 * min(counts)


@pytest.mark.parametrize(("power", "sides"), [(1.0, (256, 512, 1024)), (1.7, (64, 256, 384, 1024))])
def test_the_exponent_is_that_of_the_pixels(power: float, sides: tuple[int, ...]) -> None:
    rows = {str(side): {"ms": 3e-4 * (side * side) ** power if side >= 256 else 1e9} for side in sides}
    assert resolution.exponent(rows) == pytest.approx(power)
    assert resolution.exponent({"256": {"ms": 1.0}, "512": {"ms": 4.0}}) is None


def test_missing_files_are_named(cli: Cli, tmp_path: Path) -> None:
    done = cli("reproduce", "vision", "--data", tmp_path, "--out", tmp_path / "runs")
    assert done.code == 1
    assert "expected fashion_mnist_15k.npz, cifar10_jpeg.npz, images_background_small1.zip" in done.err


def test_an_archive_of_other_images_is_refused(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "FILES", (*vision.FILES[:2], "other.zip"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a/character01/first.png", png(0, 1))
    for name in vision.FILES[:2]:
        (tmp_path / name).write_bytes((data / "arrays" / name).read_bytes())
    monkeypatch.setattr(vision, "SETS", {"omniglot": vision.SETS["omniglot"]})
    done = cli("reproduce", "vision", "--data", tmp_path, "--out", tmp_path / "runs", "--quick")
    assert done.code == 1
    assert "expected names such as 0108_01.png, got" in done.err
