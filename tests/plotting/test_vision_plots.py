"""Figures of images: panels, titles, arrows and colours."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from longscan.ops import scan_pattern
from longscan.plotting.vision import path_titles, plot_fields, plot_maps, plot_paths

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"
IMAGE = torch.zeros(12, 16, 3, dtype=torch.uint8)


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


def arrows(path: Path) -> list[int]:
    """The number of arrows of each panel."""
    root = ElementTree.parse(path).getroot()
    groups = [node for node in root.iter(f"{SVG}g") if node.get("id", "").startswith("Quiver")]
    return [sum(1 for _ in group.iter(f"{SVG}path")) for group in groups]


@pytest.mark.parametrize(
    ("mode", "n_arrows"),
    [
        ("unidirectional", [9]),
        ("bidirectional", [9, 9]),
        ("cross", [9, 8, 9, 8]),
        ("cascade", [9, 9, 8, 8]),
        ("zigzag", [11, 11, 11, 11]),
        ("window", [7, 6, 7, 6]),
        ("temporal_first", [8, 8]),
    ],
)
def test_an_arrow_between_neighbours(tmp_path: Path, mode: str, n_arrows: list[int]) -> None:
    out = tmp_path / "scan.svg"
    pattern = scan_pattern((3, 4), mode, window=2)  # type: ignore[arg-type]
    plot_paths([IMAGE], pattern, out, "the title")
    assert arrows(out) == n_arrows
    titles = path_titles(pattern.order, pattern.shape)
    assert len(set(titles)) == len(n_arrows)
    assert {"the title", "step", *titles} <= set(texts(out))


FOUR = ["rows", "columns", "rows reversed", "columns reversed"]


@pytest.mark.parametrize(
    ("shape", "mode", "names"),
    [
        ((3, 4), "unidirectional", FOUR[:1]),
        ((3, 4), "bidirectional", ["rows", "rows reversed"]),
        ((3, 4), "cross", FOUR),
        ((2, 2), "cross", FOUR),
        ((4, 3), "zigzag", FOUR),
        ((5, 6), "window", FOUR),
        ((3, 4), "cascade", ["rows", "rows reversed", "columns", "columns reversed"]),
        ((2, 3, 4), "spatial_first", ["spatial-first", "spatial-first reversed"]),
        ((2, 3, 4), "temporal_first", ["temporal-first", "temporal-first reversed"]),
    ],
)
def test_paths_have_names(shape: tuple[int, ...], mode: str, names: list[str]) -> None:
    pattern = scan_pattern(shape, mode, window=2)  # type: ignore[arg-type]
    assert path_titles(pattern.order, shape) == [f"path {k}: {name}" for k, name in enumerate(names)]


def test_frames_have_numbers(tmp_path: Path) -> None:
    out = tmp_path / "video.svg"
    plot_paths([IMAGE, IMAGE], scan_pattern((2, 2, 3), "spatiotemporal"), out, "")
    assert arrows(out) == [8, 0, 8, 0]
    numbers = [text for text in texts(out) if text.isdecimal()]
    assert all(numbers.count(str(step)) >= 4 for step in range(12))


def test_a_single_patch(tmp_path: Path) -> None:
    assert path_titles(scan_pattern((1, 1)).order, (1, 1))[3] == "path 3"
    plot_paths([IMAGE], scan_pattern((1, 1)), tmp_path / "one.png", "")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_fields(tmp_path: Path) -> None:
    out = tmp_path / "erf.svg"
    plot_fields({f"model {n}": torch.rand(8, 8) for n in range(5)}, out, "the note")
    assert {
        "the note",
        "gradient; the largest is 1",
        *(f"model {n}" for n in range(5)),
    } <= set(texts(out))


def test_maps_with_a_scale_each(tmp_path: Path) -> None:
    out = tmp_path / "maps.svg"
    maps = {"path 0": torch.tensor([[1.0, 2.0]]), "path 1": torch.tensor([[5.0, 7.5]])}
    plot_maps(IMAGE, {"input": maps}, out, "Δ", "the label")
    shown = " ".join(texts(out))
    assert all(words in shown for words in ("input", "path 0", "1 to 2", "path 1", "5 to 7.5", "the label"))


def test_maps_with_marks(tmp_path: Path) -> None:
    marked, plain = tmp_path / "marked.svg", tmp_path / "plain.svg"
    rows = {name: {"path 0": torch.rand(3, 4), "all paths": torch.rand(3, 4)} for name in ("one", "two")}
    plot_maps(IMAGE, rows, marked, "", "weight", {"one": (1, 2)})
    plot_maps(IMAGE, rows, plain, "", "weight", {})
    assert texts(marked).count("weight") == texts(plain).count("weight") == 2
    frames = [re.findall(r'd="([^"]*)"[^>]*stroke: #d55e00', path.read_text()) for path in (marked, plain)]
    assert (len(frames[0]), len(frames[1])) == (3, 0)  # on the image and on two maps of the first row
    corners = torch.tensor(
        [[float(x) for x in pair] for pair in re.findall(r"([\d.]+) ([\d.]+)", frames[0][1])]
    )
    image = re.findall(r'<image [^>]*width="([\d.]+)" height="([\d.]+)"', marked.read_text())[1]
    width, height = (corners.amax(0) - corners.amin(0)).tolist()
    assert width == pytest.approx(float(image[0]) / 4, rel=0.1)  # as large as a patch
    assert height == pytest.approx(float(image[1]) / 3, rel=0.1)
