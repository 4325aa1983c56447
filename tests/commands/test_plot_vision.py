"""`longscan plot scan`, `erf`, `activation` and `attention` on the command line."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from longscan.checkpoints.save import save
from longscan.models import MODELS

pytest.importorskip("matplotlib")
Cli = Callable[..., Any]


def words_in(path: Path) -> set[str]:
    root = ElementTree.parse(path).getroot()
    return {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 45, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's model of greyscale images."""
    entry, path = MODELS["vmamba"], tmp_path_factory.mktemp("runs") / "digits" / "model"
    fields = {**entry.presets["tiny"], "in_channels": 1, "mean": [0.5], "std": [0.5]}
    save(entry.cls(entry.config.from_dict(fields), generator=torch.Generator().manual_seed(7)), path)
    return path


def test_scan(cli: Cli, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "scan.svg"
    done = cli("plot", "scan", picture, "--grid", 4, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"wrote {out}\n", "")
    assert {
        "cross: 4 paths over 4 × 6 patches",
        "path 0: rows",
        "path 3: columns reversed",
        "step",
    } <= words_in(out)
    done = cli("plot", "scan", picture, picture, "--mode", "temporal_first", "--grid", 2, "--out", out)
    assert done.code == 0, done.err
    assert "temporal_first: 2 paths over 2 × 2 × 3 patches" in words_in(out)


def test_erf(cli: Cli, picture: Path, directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "erf.svg"
    done = cli("plot", "erf", directory, "vim", "--untrained", "--n", 1, "--size", 16, "--out", out)
    assert done.code == 0, done.err
    *lines, last = done.out.splitlines()
    titles = ["digits, untrained", "digits", "vim tiny, random weights"]
    assert [line.split(": half of the gradient lies in ")[0] for line in lines] == titles
    assert last == f"wrote {out}"
    shown = words_in(out)
    assert "mean over 1 image of Gaussian noise" in shown
    assert {f"half in {line.split()[-5]} % of the pixels" for line in lines} <= shown
    done = cli("plot", "erf", directory, "--image", picture.parent, "--out", out)
    assert done.code == 0, done.err
    assert "mean over 1 image" in words_in(out)


def test_activation(cli: Cli, picture: Path, directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "activation.svg"
    done = cli("plot", "activation", directory, picture, "--layer", 1, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"wrote {out}\n", "")
    names = ("rows", "columns", "rows reversed", "columns reversed")
    shown = words_in(out)
    assert {"Δ of digits, layer 1", "input", *(f"path {k}: {name}" for k, name in enumerate(names))} <= shown
    ranges = [text for text in shown if re.fullmatch(r"[\d.e-]+ to [\d.e-]+", text)]
    assert len(ranges) == 4  # one a path
    assert any(text.startswith("Δ, mean over channels") for text in shown)
    done = cli("plot", "activation", "vim", picture, "--out", out)
    assert done.code == 0, done.err
    shown = words_in(out)
    assert "Δ of vim tiny, random weights, layer 1" in shown
    assert {text for text in shown if text.startswith("path")} == {"path 0: rows", "path 1: rows reversed"}


def test_attention(cli: Cli, picture: Path, directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "attention.svg"
    done = cli("plot", "attention", directory, picture, "--size", 24, "--layer", 0, "--out", out)
    assert (done.code, done.out, done.err) == (0, f"wrote {out}\n", "")
    expected = {
        "hidden attention of digits, layer 0",
        "query: patch 3,3",
        "path 3: columns reversed",
        "all paths",
    }
    assert expected <= words_in(out)
    done = cli("plot", "attention", "vim", picture, "--out", out)
    assert {"query: class token", "path 0: rows", "path 1: rows reversed"} <= words_in(out)
    done = cli("plot", "attention", "vim", picture, "--query", "0,1", "--query", "class", "--out", out)
    assert {"query: patch 0,1", "query: class token"} <= words_in(out)


def test_the_image_is_shown_with_all_its_pixels(cli: Cli, tmp_path: Path) -> None:
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 8), (300, 25))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    out = tmp_path / "attention.svg"
    done = cli("plot", "attention", "vim", tmp_path / "a.png", "--out", out)  # whose input has 16 pixels
    assert done.code == 0, done.err
    embedded = re.search(r'<image xlink:href="data:image/png;base64,([^"]+)"', out.read_text())
    assert embedded
    with Image.open(io.BytesIO(base64.b64decode(embedded[1]))) as first:
        assert np.asarray(first.convert("L")).std() > 50  # the input is grey all over


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["scan", "IMAGE", "--grid", "0"], 2, "--grid: expected 1 to 32 patches, got 0"),
        (["scan", "IMAGE", "--window", "99"], 2, "--window: expected 1 to 32"),
        (["scan", "no.png"], 1, "no.png: No such file"),
        (["scan", "TEXT"], 1, "no image (PNG, JPEG"),
        (["scan", "IMAGE", "OTHER"], 1, "expected frames of one size, got 45 × 30, 8 × 8"),
        (["scan", "IMAGE", "--mode", "temporal_first"], 2, "expected the frames of a video, several images"),
        (["scan", *["IMAGE"] * 17], 2, "expected at most 16 frames, got 17"),
        (["erf", "vmamba", "--n", "0"], 2, "--n: expected 1 to 10,000 images, got 0"),
        (["erf", *["vmamba"] * 13], 2, "MODELS: expected at most 12 panels, got 13"),
        (["erf", "vim", "--size", "3"], 2, "--size: expected 4 to 1024 pixels, got 3"),
        (["erf", "vim", "--image", "EMPTY"], 1, "--image: there is no image in"),
        (["erf", "mamba"], 1, "no image model called 'mamba', and no such file or directory"),
        (["erf", "videomamba"], 1, "expected a model of RGB or greyscale images, got one of videos"),
        (["activation", "vmamba", "IMAGE", "--layer", "3"], 2, "--layer: expected 0 to 2, got 3"),
        (["activation", "vmamba", "TEXT"], 1, "no image (PNG, JPEG"),
        (["attention", "vim", "IMAGE", "--query", "9,9"], 2, "from 0,0 to 7,7 or class, got '9,9'"),
        (["attention", "vmamba", "IMAGE", "--query", "class"], 2, "ROW,COLUMN from 0,0 to 3,3, got 'class'"),
        (["attention", "vim", "IMAGE", "--part", "cross"], 2, "--part, --pieces: these are for translators"),
        (
            ["attention", "longscan-tiny-en", "a", "--query", "0,0"],
            2,
            "--query, --size, --seed: these are for models of",
        ),
        (["scan", "IMAGE", "--out", "x.bmp"], 2, "--out: expected a name that ends in .png, .svg or .pdf"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_misuse(cli: Cli, picture: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "text.png").write_text("no pixels")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    files = {"IMAGE": picture, "TEXT": tmp_path / "text.png", "OTHER": tmp_path / "other.png"}
    files["EMPTY"] = tmp_path / "empty"
    given = [files.get(argument, argument) for argument in arguments]
    out = () if "--out" in arguments else ("--out", tmp_path / "x.png")
    done = cli("plot", *given, *out)
    assert (done.code, words in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(cli: Cli, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli("plot", "scan", picture, "--out", tmp_path / "x.png")
    assert (done.code, "figures need matplotlib: pip install 'longscan[plot]'" in done.err) == (1, True)
