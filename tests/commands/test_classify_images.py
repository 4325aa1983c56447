"""`longscan classify` with images: train, fine-tune, predict, evaluate, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import longscan
from conftest import Done
from labelled_images import bars, write_folder, write_npz
from longscan.checkpoints.load import load
from longscan.data.images import read_images
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.images import measure_images
from longscan.models import VMamba
from longscan.training.image_classifier import ImagesConfig, ImagesRun

Cli = Callable[..., Done]
SMALL = ("--set", "d_model=[8,16]", "--set", "n_blocks=[1,1]", "--set", "image_size=16", "--set", "crop=1.0")
STEPS = ("--steps", 3, "--batch-size", 8, "--threads", 1, "--save-every", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned bars and discs."""
    directory = tmp_path_factory.mktemp("trained")
    config = ImagesConfig(
        data=(str(write_folder(directory / "images", 120)),),
        option=("d_model=[8,16]", "n_blocks=[1,1]", "patch_size=2", "crop=1.0"),
        image_size=16,
        steps=60,
        batch_size=24,
        lr=2e-2,
        randaugment=0.0,
        crop_scale=0.6,
        eval_every=0,
        threads=1,
    )
    result = ImagesRun.begin(config, directory / "run", figures=False)
    assert result.scores["valid_top1"] > 0.8
    return directory / "run" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images", 24)


def no_traceback(done: Done, code: int) -> str:
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert "bug in longscan" not in done.err
    return done.err


# train


def test_train_from_the_command_line(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("classify", "train", folder, "--model", "vmamba", *SMALL, *STEPS, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "22 images of 3 classes at 16 × 16, 2 held out" not in done.err  # rounded down in each class
    assert "24 images of 3 classes at 16 × 16, 0 held out" in done.err
    assert f"longscan classify predict {tmp_path / 'run' / 'model'} IMAGE" in done.out
    again = cli("classify", "train", "--resume", tmp_path / "run", "--steps", 5)
    assert again.code == 0, again.err
    assert "trained 5 steps" in again.out
    trained = load(tmp_path / "run" / "model", "image")
    assert isinstance(trained, VMamba)
    assert trained.config.labels == ("across", "disc", "down")


def test_train_on_arrays_and_validate_on_others(cli: Cli, tmp_path: Path) -> None:
    train, valid = write_npz(tmp_path / "a.npz", 24), write_npz(tmp_path / "b.npz", 9)
    done = cli("classify", "train", train, "--valid", valid, "--model", "vmamba", *SMALL[:4], *STEPS,
               "--out", tmp_path / "run", "--image-size", 8)  # fmt: skip
    assert done.code == 0, done.err
    assert "24 images of 3 classes at 8 × 8, 9 held out" in done.err
    assert "on held-out images" in done.out
    config = load(tmp_path / "run" / "model", "image").config
    assert (config.in_channels, config.image_size) == (1, 8)


def test_an_animation_is_mentioned(cli: Cli, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 12)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "disc" / "a.gif", save_all=True, append_images=frames[1:])
    done = cli("classify", "train", folder, "--model", "vmamba", *SMALL, *STEPS, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert f"1 file, of which the first frame counts: {folder / 'disc' / 'a.gif'}" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "1,2"], "--columns: only for a BERT or the blocks of a language model"),
        (["--bidirectional"], "--bidirectional: only for the blocks of a language model"),
        (["--mixup", "nine"], "--mixup"),
        (["--mixup", "9"], "--mixup: expected 0 to 4"),
        (["--flip", "2"], "--flip: expected 0 to 1"),
        (["--image-size", "0"], "--image-size: expected 1 or more"),
        (["--preset", "giant"], "no preset 'giant'"),
        (["--model", "vmamba_tiny_s1l8"], "Try --model vmamba --preset vmamba_tiny_s1l8"),
        (["--from", "vim"], "vim is the name of a model, which comes without weights"),
        (["--set", "depth=3"], "no field 'depth'"),
        (["--from", "nowhere"], "nowhere"),
    ],
)
def test_impossible_flags(flags: list[str], message: str, cli: Cli, folder: Path, tmp_path: Path) -> None:
    model = () if "--model" in flags else ("--model", "vmamba")
    done = cli("classify", "train", folder, *model, *flags, "--out", tmp_path / "run")
    assert message in no_traceback(done, done.code)
    assert done.code in (1, 2)
    assert not (tmp_path / "run").exists()


def test_videomamba_is_trained_on_images(cli: Cli, folder: Path, tmp_path: Path) -> None:
    train = ("classify", "train", folder, "--model", "videomamba", *STEPS, "--image-size", 16)
    done = cli(*train, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "videomamba is trained on single images, n_frames=0" in done.err
    assert load(tmp_path / "run" / "model", "image").config.to_dict()["n_frames"] == 0
    failed = cli(*train, "--set", "n_frames=4", "--out", tmp_path / "videos")
    assert "Try --frames 4 for clips" in no_traceback(failed, 2)


def test_without_a_model_the_error_says_what_images_need(cli: Cli, folder: Path, tmp_path: Path) -> None:
    error = no_traceback(cli("classify", "train", folder, "--out", tmp_path / "run"), 2)
    assert "for images that of an image model such as vmamba" in error


def test_the_help_lists_the_documented_names_first_and_small_data(cli: Cli) -> None:
    text = " ".join(cli("classify", "train", "--help").out.split())
    assert ("--from, --pretrained" in text, "--set, --option" in text) == (True, True)
    assert "Defaults in brackets below are those for texts" in text
    assert "--crop-scale 0.7 --randaugment 0 --ema 0.99 --lr 0.003" in text
    verbs = " ".join(cli("--help").out.split())
    assert "classifiers of texts, images or sequences" in verbs
    assert "attention, alignments, kernels, scans" in verbs


def test_top5_is_for_more_than_five_classes(cli: Cli, folder: Path, tmp_path: Path) -> None:
    x, _ = bars(36)
    six = tmp_path / "six.npz"
    np.savez(six, x=np.stack([x] * 3, 3), y=np.array(list("abcdef") * 6))
    for data, shown in ((folder, False), (six, True)):
        run = tmp_path / f"run-{shown}"
        done = cli(
            "classify", "train", data, "--valid", data, "--model", "vmamba", *SMALL, *STEPS, "--out", run
        )
        assert done.code == 0, done.err
        assert ("top-1" in done.err, "top-5" in done.err) == (True, shown)
        assert ("top-5" in cli("classify", "evaluate", run / "model", data).out) == shown


def test_flags_of_images_are_for_images(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("classify", "train", folder, "--model", "mamba", "--mixup", 1, "--out", tmp_path / "run")
    assert "--mixup: only for an image model" in no_traceback(done, 2)


# fine-tune


def test_fine_tuning_starts_from_a_model_with_other_classes_and_another_size(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    x, _ = bars(24)
    data = tmp_path / "two.npz"
    np.savez(data, x=np.stack([x] * 3, 3), y=np.array(["bright", "dark"] * 12))
    run = tmp_path / "run"
    done = cli("classify", "train", data, "--from", model, "--image-size", 24, "--drop-path", 0.2, *STEPS,
               "--lr", 1e-9, "--ema", 0, "--out", run)  # fmt: skip
    assert done.code == 0, done.err
    assert "head of 2 classes, trained from scratch" in done.err
    before, after = load(model, "image"), load(run / "model", "image")
    config = after.config
    assert (config.labels, config.image_size, config.drop_path) == (("bright", "dark"), 24, 0.2)
    assert (after.config.mean, after.config.crop) == (before.config.mean, 1.0)
    for name, weight in before.state_dict().items():
        if not name.startswith(before.head_name):
            torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-6, rtol=1e-6)
    again = cli("classify", "train", "--resume", run, "--steps", 4)
    assert again.code == 0, again.err


def test_the_head_stays_if_the_classes_do(cli: Cli, model: Path, folder: Path, tmp_path: Path) -> None:
    done = cli("classify", "train", folder, "--from", model, *STEPS, "--lr", 1e-9, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "from scratch" not in done.err
    before, after = (load(path, "image").head_layer.weight for path in (model, tmp_path / "run" / "model"))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "vmamba_tiny_s1l8"], "has its own sizes"),
        (["--set", "d_model=[4,8]"], "can't have other sizes"),
        (["--set", "depth=3"], "no field 'depth'"),
    ],
)
def test_what_fine_tuning_cannot_change(
    flags: list[str], message: str, cli: Cli, model: Path, folder: Path, tmp_path: Path
) -> None:
    done = cli("classify", "train", folder, "--from", model, *flags, *STEPS, "--out", tmp_path / "run")
    assert message in no_traceback(done, 2)
    assert not (tmp_path / "run").exists()


# predict


def test_predict_files_folders_and_stdin(cli: Cli, model: Path, folder: Path) -> None:
    names = sorted(folder.rglob("*.png"))
    done = cli("classify", "predict", model, folder / "disc", names[0])
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[2] for row in rows] == [*(str(name) for name in names if "disc" in str(name)), str(names[0])]
    assert sum(row[0] == "disc" for row in rows[:-1]) >= 6
    assert all(1 / 3 < float(row[1]) <= 1 for row in rows)
    piped = cli("classify", "predict", model, stdin="".join(f"{row[2]}\n" for row in rows))
    assert piped.out == done.out
    nothing = cli("classify", "predict", model, stdin="")
    assert (nothing.code, nothing.out) == (0, "")


def test_predict_as_json(cli: Cli, model: Path, folder: Path) -> None:
    done = cli("classify", "predict", model, folder, "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert len(rows) == 24
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["probabilities"].keys() == {"across", "disc", "down"}


def test_predict_says_that_one_frame_of_an_animation_counts(cli: Cli, model: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    done = cli("classify", "predict", model, tmp_path / "a.gif")
    assert done.code == 0
    assert "a.gif: of several frames the first is classified" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no image"), (b"<html>", "is no image"), (None, "No such file"), ("half", "truncated")],
)
def test_predict_names_what_is_no_image(
    content: bytes | str | None, message: str, cli: Cli, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    if content == "half":
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(stream, "PNG")
        content = stream.getvalue()[:500]
    if content is not None:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    error = no_traceback(cli("classify", "predict", model, path), 1)
    assert message in error
    assert "a.png" in error


def test_a_damaged_file_stops_no_other(cli: Cli, model: Path, folder: Path, tmp_path: Path) -> None:
    names = sorted(folder.rglob("*.png"))
    (tmp_path / "bad.png").write_bytes(names[0].read_bytes()[:60])
    given = [names[0], tmp_path / "bad.png", names[1], tmp_path / "none.png", *names[2:]]
    done = cli("classify", "predict", model, stdin="".join(f"{name}\n" for name in given))
    errors = no_traceback(done, 1).splitlines()
    assert [line.startswith("error: ") for line in errors] == [True, True]
    assert ("bad.png" in errors[0], "none.png: No such file" in errors[1]) == (True, True)
    assert done.out == cli("classify", "predict", model, *names).out


def test_a_bare_file_of_the_authors_classifies(cli: Cli, folder: Path, tmp_path: Path) -> None:
    entry = longscan.models.MODELS["vmamba"]
    sizes = {"d_model": (16, 32), "n_blocks": (1, 1), "n_classes": 3}
    fresh = entry.cls(entry.config.from_dict(sizes), torch.Generator().manual_seed(0))
    torch.save({"model": fresh.state_dict()}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"a.pth: its tensors do not say the image size"):
        done = cli("classify", "predict", tmp_path / "a.pth", folder / "disc")
    assert done.code == 0, done.err
    assert {line.split("\t")[0] for line in done.out.splitlines()} <= {"0", "1", "2"}
    done = cli("classify", "train", folder, "--from", tmp_path / "a.pth", "--image-size", 16, *STEPS,
               "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    config = load(tmp_path / "run" / "model", "image").config
    assert (config.image_size, config.crop, config.n_classes) == (16, 0.875, 3)


def test_a_bare_file_at_another_size(cli: Cli, folder: Path, tmp_path: Path) -> None:
    entry = longscan.models.MODELS["vmamba"]
    sizes = {"d_model": (16, 32), "n_blocks": (1, 1), "n_classes": 3, "image_size": 32}
    fresh = entry.cls(entry.config.from_dict(sizes), torch.Generator().manual_seed(0))
    torch.save(fresh.state_dict(), tmp_path / "a.pth")
    longscan.save(fresh, tmp_path / "model")
    verbs = (("predict", folder / "disc"), ("evaluate", folder))
    for verb, data in verbs:
        done = cli("classify", verb, tmp_path / "a.pth", data, "--image-size", 32)
        assert done.code == 0, done.err
        assert done.out == cli("classify", verb, tmp_path / "model", data).out
        other = cli("classify", verb, tmp_path / "model", data, "--image-size", 48, "--json")
        assert other.out != cli("classify", verb, tmp_path / "model", data, "--json").out
        error = no_traceback(cli("classify", verb, tmp_path / "model", data, "--model", "vim"), 2)
        assert "model is a vmamba, got 'vim'" in error


def test_fine_tuning_and_predicting_with_a_file_of_models_that_look_alike(
    cli: Cli, folder: Path, tmp_path: Path
) -> None:
    entry = longscan.models.MODELS["vim"]
    config = entry.config.from_dict({**entry.presets["tiny"], "n_classes": 3})
    torch.save(entry.cls(config, torch.Generator().manual_seed(0)).state_dict(), tmp_path / "best.pth")
    train = ("classify", "train", folder, "--from", tmp_path / "best.pth", *STEPS, "--out", tmp_path / "run")
    assert "--model vim" in no_traceback(cli(*train), 1)
    done = cli(*train, "--model", "vim")
    assert done.code == 0, done.err
    assert type(load(tmp_path / "run" / "model", "image")) is entry.cls
    for verb in ("predict", "evaluate"):
        done = cli("classify", verb, tmp_path / "best.pth", folder, "--model", "vim")
        assert done.code == 0, done.err


def test_predict_in_a_folder_without_images(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert "expected images there" in no_traceback(cli("classify", "predict", model, tmp_path), 1)


# evaluate


def test_evaluate(cli: Cli, model: Path, folder: Path, tmp_path: Path) -> None:
    figure = tmp_path / "confusion.png"
    done = cli("classify", "evaluate", model, folder, "--figure", figure)
    assert done.code == 0, done.err
    first, header, *rows = done.out.splitlines()
    assert first.startswith("top-1 ")
    assert "top-5" not in first  # of three classes it would always be 1
    assert first.endswith("24 images")
    assert header.split() == ["precision", "recall", "F1", "images", "class"]
    assert [row.split()[3:] for row in rows] == [["8", label] for label in ("across", "disc", "down")]
    with Image.open(figure) as image:
        assert image.width > 300
    report = json.loads(cli("classify", "evaluate", model, folder, "--json").out)
    found = measure_images(load(model, "image"), read_images([folder]))
    assert found is not None
    assert (report["images"], report["top5"]) == (24, 1.0)
    assert report["top1"] == pytest.approx(found.top1)
    assert report["loss"] == pytest.approx(found.loss)
    assert found.confusion.sum(1).tolist() == [8, 8, 8]
    assert found.confusion.trace().item() / 24 == pytest.approx(found.top1)
    assert report["classes"]["disc"]["recall"] == pytest.approx(found.confusion[1, 1].item() / 8)


def test_a_model_without_names_numbers_its_classes(cli: Cli, folder: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"d_model": (8, 16), "n_blocks": (1, 1), "image_size": 16, "n_classes": 3}
    entry = longscan.models.MODELS["vmamba"]
    longscan.save(
        entry.cls(entry.config.from_dict(config), torch.Generator().manual_seed(0)), tmp_path / "model"
    )
    done = cli("classify", "predict", tmp_path / "model", folder)
    assert {line.split("\t")[0] for line in done.out.splitlines()} <= {"0", "1", "2"}
    assert cli("classify", "evaluate", tmp_path / "model", folder).code == 0
    two = write_npz(tmp_path / "two.npz", 4, y=np.array([0, 1, 0, 1]), labels=np.array(["a", "b"]))
    error = no_traceback(cli("classify", "evaluate", tmp_path / "model", two), 1)
    assert "3 classes without names, expected as many in the data, got 2" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "2,3"], "--columns: does not apply"),
        (["--pattern", "x"], "--pattern: does not apply"),
        (["--seq-len", "9"], "--seq-len: does not apply"),
        (["--figure", "confusion.doc"], "--figure: expected a name that ends in .png"),
    ],
)
def test_evaluate_refuses_flags(flags: list[str], message: str, cli: Cli, model: Path, folder: Path) -> None:
    assert message in no_traceback(cli("classify", "evaluate", model, folder, *flags), 2)


def test_a_label_that_the_model_does_not_know(cli: Cli, model: Path, folder: Path, tmp_path: Path) -> None:
    other = write_npz(tmp_path / "a.npz", 9, labels=np.array(["across", "down", "star"]))
    error = no_traceback(cli("classify", "evaluate", model, other), 1)
    assert "the label 'star' was not in the training data" in error


def test_an_unknown_model_of_images(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    done = cli("classify", "train", tmp_path / "photos", "--model", "resnet50", "--out", tmp_path / "run")
    assert done.code == 2
    words = " ".join(done.err.split())
    assert "or for images one of resnet, vit, vim, vmamba, videomamba; got resnet50 for " in words


def test_what_loads_a_model_of_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"got 'video'\. A model of videos is of kind 'image'\."):
        longscan.load("anything", "video")  # type: ignore[call-overload]
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(LongscanError, match=r"a\.onnx is for ONNX Runtime: expected the model"):
        longscan.load(tmp_path / "a.onnx", "image")
