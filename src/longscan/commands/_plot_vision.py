"""`longscan plot scan`, `erf` and `activation`, and `attention` for models of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from PIL import Image
from torch import Tensor

from longscan.checkpoints.load import load
from longscan.commands._images import is_image_model
from longscan.commands._options import FigureOut
from longscan.core.config import brief, count, nearest
from longscan.data.augmentation import central_crop, to_tensor
from longscan.data.image_files import image_paths, read_image
from longscan.errors import LongscanError, UsageError
from longscan.evaluation.receptive_field import area, receptive_field
from longscan.inference.hidden_attention import LayerScans, attention_rows, layer_scans, scan_layers
from longscan.inference.images import normalise
from longscan.models import MODELS, entry_of
from longscan.models.common.vision import VisionModel
from longscan.ops import ScanMode, scan_pattern
from longscan.plotting.style import check_out
from longscan.plotting.vision import path_titles, plot_fields, plot_maps, plot_paths

__all__ = ["activation", "attention_of_image", "erf", "scan", "scans_images"]

SHOWN = 480  # pixels of an image in a figure, at most
MAX_SIZE = 1024
OF_VIDEOS = ("spatial_first", "temporal_first", "spatiotemporal")
MAX_MODELS = 12

ImageModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a published .pth file, or the name of a model or preset for random weights.",
    ),
]
ImageFile = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")]
Layer = Annotated[int, typer.Option(help="Layer, from 0; the last is -1.")]
Size = Annotated[
    int | None, typer.Option(help="Height and width of the input, in pixels; default: those of training.")
]
Seed = Annotated[int, typer.Option(help="Seed of random weights.")]


class Named(NamedTuple):
    """A model, what a figure calls it, and whether its weights are random."""

    model: VisionModel
    title: str
    random: bool


def scan(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="An image file; several are the frames of a video.")
    ],
    mode: Annotated[
        ScanMode,
        typer.Option(help=f"The scan; {', '.join(OF_VIDEOS[:-1])} and {OF_VIDEOS[-1]} are for videos."),
    ] = "cross",
    grid: Annotated[int, typer.Option(help="Patches along the shorter side.")] = 8,
    window: Annotated[int, typer.Option(help="Side of the windows of the window scan, in patches.")] = 4,
    out: FigureOut = Path("scan.png"),
) -> None:
    """The paths of a scan over an image or a video: colour is the step, arrows the direction.

    Raises:
        UsageError: a number makes no sense, or the figure has no format.
        LongscanError: a file is no image, or can't be read or written; or frames differ in size.
    """
    check_out(out)
    for flag, value, most in (("grid", grid, 32), ("window", window, 32)):
        if not 1 <= value <= most:
            raise UsageError(f"--{flag}: expected 1 to {most} patches, got {value}.")
    if len(images) > 16:
        raise UsageError(f"IMAGE: expected at most 16 frames, got {len(images)}.")
    if mode in OF_VIDEOS and len(images) == 1:
        raise UsageError(f"--mode {mode}: expected the frames of a video, several images, got 1.")
    frames = [read_image(image, str(image), 3) for image in images]
    sizes = list(dict.fromkeys(frame.size for frame in frames))
    if len(sizes) > 1:
        got = ", ".join(f"{width} × {height}" for width, height in sizes)
        raise LongscanError(f"IMAGE: expected frames of one size, got {got}.")
    shorter = min(sizes[0])
    columns, rows = (max(1, min(64, round(grid * side / shorter))) for side in sizes[0])
    shape = (rows, columns) if len(frames) == 1 else (len(frames), rows, columns)
    pattern = scan_pattern(shape, mode, window=window)
    title = f"{mode}: {count(len(pattern.order), 'path')} over {' × '.join(map(str, shape))} patches"
    plot_paths([_shown(frame) for frame in frames], pattern, out, title)
    typer.echo(f"wrote {out}")


def erf(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODELS",
            help="Directories, published .pth files, or names of models or presets for random weights.",
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image file or a directory, repeatable; default: Gaussian noise."),
    ] = None,
    n: Annotated[int, typer.Option(help="Number of images, at most.")] = 16,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Draw each trained model with random weights too.")
    ] = False,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights and noise.")] = 0,
    out: FigureOut = Path("erf.png"),
) -> None:
    """The effective receptive field: how much each pixel changes the centre of the last feature map.

    The absolute gradient, averaged over images, on a logarithmic scale.

    Raises:
        UsageError: a number makes no sense, or the figure has no format.
        LongscanError: a model or an image can't be read.
    """
    check_out(out)
    if not 1 <= n <= 10_000:
        raise UsageError(f"--n: expected 1 to 10,000 images, got {n:,}.")
    if len(models) > MAX_MODELS // (1 + untrained):
        raise UsageError(
            f"MODELS: expected at most {MAX_MODELS} panels, got {len(models) * (1 + untrained)}."
        )
    paths = list(_files(image or ()))[:n]
    fields: dict[str, Tensor] = {}
    for name in models:
        trained = _named(name, seed)
        for model, title, _ in (
            (_untrained(trained, seed), trained) if untrained and not trained.random else (trained,)
        ):
            field = receptive_field(model, _inputs(model, paths, n, size, seed))
            share = brief(100 * area(field), 2)
            typer.echo(f"{title}: half of the gradient lies in {share} % of the pixels")
            fields[f"{title}\nhalf in {share} % of the pixels"] = field
    what = count(len(paths), "image") if paths else f"{count(n, 'image')} of Gaussian noise"
    plot_fields(fields, out, f"mean over {what}")
    typer.echo(f"wrote {out}")


def activation(
    model: ImageModel,
    image: ImageFile,
    layer: Layer = -1,
    size: Size = None,
    seed: Seed = 0,
    out: FigureOut = Path("activation.png"),
) -> None:
    """The time step Δ of a layer for each patch of an image, along each path: where the scan stores.

    A large Δ stores the patch and resets the state; a small one leaves the state as it is.

    Raises:
        UsageError: there is no such layer, a number makes no sense, or the figure has no format.
        LongscanError: the model doesn't scan images, or a file can't be read or written.
    """
    check_out(out)
    scans, pixels, name = _scans(model, image, layer, size, seed)
    steps = scans.by_position(scans.dt.mean(2))  # (n_paths, n)
    maps = dict(zip(_titles(scans), scans.maps(steps), strict=True))
    plot_maps(pixels, {"input": maps}, out, f"Δ of {name}", "Δ, mean over channels")
    typer.echo(f"wrote {out}")


def attention_of_image(
    model: str, image: Path, layer: int, queries: Sequence[str], size: int | None, seed: int, out: Path
) -> None:
    """Draw the hidden attention of a layer; see `plot attention`.

    Args:
        model: see `ImageModel`.
        image: the file.
        layer: its index.
        queries: "row,column" of patches, or "class"; none: the class token, or else the central patch.
        size: of the input, in pixels.
        seed: of random weights.
        out: the figure.

    Raises:
        UsageError: there is no such layer or query.
        LongscanError: the model doesn't scan images, or a file can't be read or written.
    """
    check_out(out)
    scans, pixels, name = _scans(model, image, layer, size, seed)
    rows, columns = scans.grid
    chosen = list(queries) or (["class"] if scans.classes else [f"{rows // 2},{columns // 2}"])
    found = {query: _position(query, scans) for query in dict.fromkeys(chosen)}
    alpha = attention_rows(scans, list(found.values()))  # (n_paths, n_queries, d_inner, n)
    every = alpha.sum(0, keepdim=True)
    maps = scans.maps(torch.cat([alpha, every] if len(alpha) > 1 else [alpha]).abs().mean(2))
    parts = [*_titles(scans), "all paths"]
    panels = {
        _title(query): dict(zip(parts, maps[:, number], strict=False)) for number, query in enumerate(found)
    }
    marks = {}
    for query in found:
        if query != "class":
            row, column = map(int, query.split(","))
            marks[_title(query)] = (row, column)
    plot_maps(pixels, panels, out, f"hidden attention of {name}", "|α|, mean over channels", marks)
    typer.echo(f"wrote {out}")


def scans_images(name: str) -> bool:
    """Return whether a name is that of a model of images, a preset of one, its directory or its file.

    Args:
        name: as a user gives it.
    """
    return _preset(name) is not None or is_image_model(name)


def _preset(name: str) -> tuple[str, str] | None:
    """Return the model and the preset that a name means, if any; a model's name alone is its tiny preset."""
    for entry in MODELS.values():
        if entry.kind == "image" and (name == entry.name or (name != "tiny" and name in entry.presets)):
            return entry.name, "tiny" if name == entry.name else name
    return None


def _named(name: str, seed: int) -> Named:
    """Return a model by its directory, its file, or the name of a preset, with random weights then."""
    loaded: Any
    if chosen := _preset(name):
        entry = MODELS[chosen[0]]
        config = entry.config.from_dict(entry.presets[chosen[1]])
        loaded = entry.cls(config, generator=torch.Generator().manual_seed(seed)).eval()
        title = f"{f'{entry.name} tiny' if chosen[1] == 'tiny' else chosen[1]}, random weights"
    elif "/" not in name and not Path(name).exists():
        known = [entry.name for entry in MODELS.values() if entry.kind == "image"]
        raise LongscanError(
            f"no image model called {name!r}, and no such file or directory{nearest(name, known)}"
        )
    else:
        loaded, path = load(name, "image"), Path(name).resolve()
        title = path.parent.name if path.name == "model" else path.name
    fields = loaded.config.to_dict()
    if fields.get("n_frames") or fields["in_channels"] not in (1, 3):
        kind = "videos" if fields.get("n_frames") else f"{fields['in_channels']} channels"
        raise LongscanError(f"{name}: expected a model of RGB or greyscale images, got one of {kind}.")
    return Named(loaded, title, chosen is not None)


def _untrained(named: Named, seed: int) -> Named:
    """Return a model of the same sizes with random weights."""
    model: Any = entry_of(named.model).cls(named.model.config, generator=torch.Generator().manual_seed(seed))
    return Named(model.eval(), f"{named.title}, untrained", True)


def _scans(name: str, path: Path, layer: int, size: int | None, seed: int) -> tuple[LayerScans, Tensor, str]:
    """Return the scans of a layer, the image as it is shown, and what a figure calls the layer."""
    model, title, _ = _named(name, seed)
    n_layers = len(scan_layers(model))
    if not -n_layers <= layer < n_layers:
        raise UsageError(f"--layer: expected 0 to {n_layers - 1}, got {layer}.")
    image = read_image(path, str(path), model.config.in_channels)
    side, crop = _size(model, size), model.config.crop
    scans = layer_scans(model, _input(model, central_crop(image, side, crop))[None], layer)
    sharp = max(side, min(SHOWN, round(crop * min(image.size))))  # the same crop, with all its pixels
    return scans, _shown(central_crop(image, sharp, crop)), f"{title}, layer {layer % n_layers}"


def _titles(scans: LayerScans) -> list[str]:
    """Return what a figure calls the paths of a layer."""
    patches = scans.maps(torch.arange(scans.order.shape[1])).flatten()
    steps = scans.order.argsort(1)[:, patches]  # of each patch, class tokens left out
    return path_titles(steps.argsort(1), scans.grid)


def _title(query: str) -> str:
    """Return what a figure calls a query."""
    return "query: class token" if query == "class" else f"query: patch {query}"


def _position(query: str, scans: LayerScans) -> int:
    """Return the position of a query among the tokens."""
    rows, columns = scans.grid
    if query == "class" and scans.classes:
        return scans.classes[0]
    row, _, column = query.partition(",")
    if row.strip().isdecimal() and column.strip().isdecimal() and int(row) < rows and int(column) < columns:
        return scans.position(int(row), int(column))
    also = " or class" if scans.classes else ""
    raise UsageError(
        f"--query: expected ROW,COLUMN from 0,0 to {rows - 1},{columns - 1}{also}, got {query!r}."
    )


# images


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield image files, and those of directories."""
    for path in paths:
        if path.is_dir():
            names = image_paths(path)
            if not names:
                raise LongscanError(f"--image: there is no image in {path}.")
            yield from (path / name for name in names)
        else:
            yield path


def _inputs(
    model: VisionModel, paths: Sequence[Path], n: int, size: int | None, seed: int
) -> Iterator[Tensor]:
    """Yield the inputs (in_channels, size, size) of files, or n of noise."""
    for path in paths:
        yield _input(model, _crop(model, path, size))
    draw, side = torch.Generator().manual_seed(seed), _size(model, size)
    for _ in range(0 if paths else n):
        yield torch.randn(model.config.in_channels, side, side, generator=draw)


def _size(model: VisionModel, size: int | None) -> int:
    """Return the side of the input."""
    least = int(model.config.to_dict().get("patch_size", 1))
    if size is not None and not least <= size <= MAX_SIZE:
        raise UsageError(f"--size: expected {least} to {MAX_SIZE} pixels, got {size}.")
    return size or model.config.image_size


def _crop(model: VisionModel, path: Path, size: int | None) -> Image.Image:
    """Return the central crop of a file, as the input of a model has it."""
    side, config = _size(model, size), model.config
    return central_crop(read_image(path, str(path), config.in_channels), side, config.crop)


def _input(model: VisionModel, image: Image.Image) -> Tensor:
    """Return the input (in_channels, height, width) of an image."""
    return normalise(to_tensor(image)[None], model.config)[0].to(model.dtype)


def _shown(image: Image.Image) -> Tensor:
    """Return an image as a figure shows it, (height, width, 3) bytes."""
    small = image.convert("RGB")
    small.thumbnail((SHOWN, SHOWN))
    return to_tensor(small).permute(1, 2, 0)
