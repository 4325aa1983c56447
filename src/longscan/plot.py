"""`longscan plot`: where a translator looks, what positions are, how long sentences fare; and loss curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from longscan import plot_memory
from longscan.checkpoint import load_translator
from longscan.drawing import (
    BLUE,
    COLOURS,
    DIVERGING,
    MARKERS,
    SEQUENTIAL,
    VERMILION,
    Out,
    check_out,
    new_figure,
    save_figure,
    tidy,
)
from longscan.errors import LongscanError, UsageError
from longscan.files import read_json
from longscan.models.transformer import sinusoids
from longscan.pairs import rows
from longscan.translation import translate
from longscan.words import group

__all__ = ["commands", "plot_bleu", "plot_losses", "plot_positions", "plot_weights"]


def plot_losses(
    metrics: Iterable[Mapping[str, Any]],
    path: str | Path,
    unit: str = "nats per token",
    score: str = "",
    scores: Mapping[str, str] | None = None,
) -> None:
    """Draw the curves of a training run.

    Args:
        metrics: the records of `metrics.jsonl`: `loss` and `valid_loss` make the upper panel.
        path: the file to write; its suffix, .png, .svg or .pdf, chooses the format.
        unit: of both losses.
        score: what the axis of the lower panel says.
        scores: other keys with a name for each, which make the lower panel; without them there is none.

    Raises:
        LongscanError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    records = list(metrics)
    lines = {name: line for key, name in (scores or {}).items() if (line := _points(records, key))}
    figure = new_figure(7.0, 6.0 if lines else 3.5)
    panels = figure.subplots(2 if lines else 1, 1, sharex=True, squeeze=False)[:, 0]
    losses, valid = _points(records, "loss"), _points(records, "valid_loss")
    if len(losses) > 50:
        panels[0].plot(*_columns(losses), color=BLUE, alpha=0.3, linewidth=0.8, label="training, each step")
        panels[0].plot(*_columns(_smooth(losses)), color=BLUE, linewidth=1.6, label="training, smoothed")
    else:  # too few to smooth; a single one is a dot
        dot = "." if len(losses) == 1 else ""
        panels[0].plot(*_columns(losses), color=BLUE, linewidth=1.6, marker=dot, label="training")
    panels[0].set_ylabel(f"loss ({unit})")
    if valid:
        step, best = min(valid, key=lambda point: point[1])
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.6}
        panels[0].plot(*_columns(valid), color=VERMILION, label="validation", **style)
        title = f"lowest validation loss {best:.3f} at step {step:,}"
        panels[0].set_title(title, fontsize="medium", loc="right")
    for number, (name, line) in enumerate(lines.items()):
        style = {"color": COLOURS[(number + 1) % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        panels[1].plot(*_columns(line), label=name, markersize=3, linewidth=1.6, **style)
        panels[1].set_ylabel(f"validation {score}")
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        tidy(panel)
        if len(panel.lines) > 1:
            panel.legend(frameon=False)
    save_figure(figure, Path(path))


def plot_weights(
    panels: Mapping[str, Tensor], source: Sequence[str], target: Sequence[str], path: Path, title: str = ""
) -> None:
    """Draw attention weights with the words on the axes.

    Args:
        panels: a title and the weights (n_target, n_source) of each panel.
        source: what is looked at.
        target: what looks.
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    width, height = 1.2 + 0.32 * len(source), 1.2 + 0.26 * len(target)
    figure = new_figure(max(4.0, columns * width + 0.8), max(2.5, lines * height + 0.4))
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.suptitle(title, fontsize="medium")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for place, (ax, (name, weights)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = ax.imshow(weights.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        ax.set_title(name, fontsize="small")
        ax.set_xticks(range(len(source)), source, rotation=60, ha="right", fontsize="small")
        ax.set_yticks(
            range(len(target)), target if place % columns == 0 else [""] * len(target), fontsize="small"
        )
        if place >= len(panels) - columns:
            ax.set_xlabel("looked at")
        if place % columns == 0:
            ax.set_ylabel("looking")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    save_figure(figure, path)


def plot_positions(d_model: int, length: int, path: Path) -> None:
    """Draw the Transformer's positional encodings and what their dot products tell about distance.

    Args:
        d_model: their width.
        length: positions.
        path: the file to write.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    table = sinusoids(0, length, d_model)
    products = table @ table.mT / (d_model / 2)  # a vector with itself gives d_model / 2
    figure = new_figure(13.0, 4.0)
    left, middle, right = figure.subplots(1, 3)
    image = left.imshow(
        table.numpy(), cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    left.set(title="encodings: sine, cosine, sine, ...", xlabel="component", ylabel="position")
    figure.colorbar(image, ax=left)
    image = middle.imshow(products.numpy(), cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
    middle.set(title="dot products, over $d_{model}/2$", xlabel="position", ylabel="position")
    figure.colorbar(image, ax=middle)
    for place, colour, marker in zip((0, length // 4, length // 2), COLOURS, MARKERS, strict=False):
        distances = [other - place for other in range(length)]
        right.plot(
            distances, products[place], color=colour, marker=marker, markevery=max(1, length // 12),
            markersize=4, linewidth=1.2, label=f"from position {place}",
        )  # fmt: skip
    right.set(
        title="one curve: only the distance counts",
        xlabel="distance",
        ylabel="dot product, over $d_{model}/2$",
    )
    tidy(right)
    right.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def plot_bleu(reports: Mapping[str, Mapping[str, Any]], path: Path, note: str = "") -> None:
    """Draw BLEU against the length of the source, a line for each system (Bahdanau et al., figure 2).

    Args:
        reports: a name and what `translate evaluate --json` says of each.
        path: the file to write.
        note: see `save_figure`.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    figure = new_figure(7.0, 4.5)
    ax = figure.subplots()
    ticks: dict[float, str] = {}
    for place, (name, report) in enumerate(reports.items()):
        points = report["by_length"]
        x = [point["mean_words"] for point in points]
        ticks |= {
            value: f"{point['words']}\nn={point['sentences']:,}"
            for value, point in zip(x, points, strict=True)
        }
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
        }
        ax.plot(
            x, [point["bleu"] for point in points], label=f"{name} ({report['bleu']:.1f} on all)", **style
        )
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize="small")
    ax.set(xlabel="words in the source sentence", ylabel="BLEU")
    ax.set_ylim(bottom=0)
    tidy(ax)
    ax.legend(frameon=False)
    save_figure(figure, path, note)


def alignment(
    model: Annotated[str, typer.Argument(help="A translator's directory.")],
    sentence: Annotated[str, typer.Argument(help="What to translate.")],
    target: Annotated[str | None, typer.Option(help="Its translation; the model's own if not given.")] = None,
    layer: Annotated[int | None, typer.Option(help="Of a Transformer; the last one if not given.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show the tokens instead of words.")] = False,
    out: Out = Path("alignment.png"),
) -> None:
    """Where a translator looked for each word that it wrote.

    Of a Transformer the mean over the heads of a layer; `plot attention` shows each.

    Raises:
        UsageError: there is no such layer, or the figure has no format.
        LongscanError: the model has no attention, or a file can't be read or written.
    """
    check_out(out)
    weights, sides = _look(model, sentence, target, pieces)
    name = _pick(weights, "cross", layer)
    plot_weights({name: weights[name].mean(0)}, *sides["cross"], out, Path(model).resolve().parent.name)
    typer.echo(f"wrote {out}")


def attention(
    model: Annotated[str, typer.Argument(help="A translator's directory.")],
    sentence: Annotated[str, typer.Argument(help="What to translate.")],
    target: Annotated[str | None, typer.Option(help="Its translation; the model's own if not given.")] = None,
    part: Annotated[
        Literal["encoder", "decoder", "cross"],
        typer.Option(help="Source at source, target at target, or target at source."),
    ] = "cross",
    layer: Annotated[int | None, typer.Option(help="The last one if not given.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show the tokens instead of words.")] = False,
    out: Out = Path("attention.png"),
) -> None:
    """Where each head of a translator looks.

    Raises:
        UsageError: there is no such part or layer, or the figure has no format.
        LongscanError: the model has no attention, or a file can't be read or written.
    """
    check_out(out)
    weights, sides = _look(model, sentence, target, pieces)
    name = _pick(weights, part, layer)
    panels = {f"head {number}": head for number, head in enumerate(weights[name])}
    plot_weights(panels, *sides[part], out, f"{name} of {Path(model).resolve().parent.name}")
    typer.echo(f"wrote {out}")


def positions(
    d_model: Annotated[int, typer.Option(help="Width of the encodings.")] = 128,
    length: Annotated[int, typer.Option(help="Positions.")] = 100,
    out: Out = Path("positions.png"),
) -> None:
    """The sinusoids that tell where a word stands.

    Raises:
        UsageError: a number makes no sense, or the figure has no format.
    """
    check_out(out)
    if d_model < 2 or d_model % 2:
        raise UsageError(f"--d-model: expected an even number of 2 or more, got {d_model}.")
    if not 2 <= length <= 5000:
        raise UsageError(f"--length: expected 2 to 5,000, got {length:,}.")
    plot_positions(d_model, length, out)
    typer.echo(f"wrote {out}")


def bleu(
    files: Annotated[list[Path], typer.Argument(help="What `translate evaluate --json` printed.")],
    out: Out = Path("bleu.png"),
) -> None:
    """BLEU against the length of the source, by file.

    Raises:
        UsageError: the figure has no format.
        LongscanError: a file is something else.
    """
    check_out(out)
    reports = {file.stem: read_json(file) for file in files}
    for file, report in zip(files, reports.values(), strict=False):
        if not {"by_length", "bleu"} <= report.keys():
            raise LongscanError(f"{file}: expected what `longscan translate evaluate --json` prints.")
    plot_bleu(reports, out)
    typer.echo(f"wrote {out}")


commands = {
    "alignment": alignment,
    "attention": attention,
    "positions": positions,
    "bleu": bleu,
    **plot_memory.commands,
}


def _look(
    name: str, sentence: str, target: str | None, pieces: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[list[str], list[str]]]]:
    """Return the weights (n_heads, n_looking, n_looked_at), and of each part the words on both axes."""
    model, tokenizer = load_translator(name)
    if target is None:
        target = translate(model, tokenizer, [sentence])[0].text
    ids = [tokenizer.encode(text.strip()) for text in (sentence, target)]
    if not ids[0]:
        raise UsageError("SENTENCE: expected some words, got none.")
    with torch.no_grad():
        found = model(rows(ids[:1], bos=False), rows(ids[1:], bos=True)[:, :-1], return_weights=True).weights
    if not found:
        raise LongscanError(f"{name} has no attention to look at: it is a {type(model).__name__}.")
    source, written = (group(tokenizer, side, pieces) for side in ids)
    sides = {"encoder": (source, source), "decoder": (written.read(), written), "cross": (source, written)}
    weights = {}
    for key, tensor in found.items():
        looked_at, looking = sides[key.split(".")[0]]
        # a word gets what its pieces get, and looks as its pieces do on average
        weights[key] = looking.matrix(mean=True) @ tensor[0].float() @ looked_at.matrix(mean=False).mT
    return weights, {part: (one.words, other.words) for part, (one, other) in sides.items()}


def _pick(weights: Mapping[str, Tensor], part: str, layer: int | None) -> str:
    """Return the name of the weights of a layer."""
    names = [name for name in weights if name.split(".")[0] == part]
    if not names:
        known = ", ".join(dict.fromkeys(name.split(".")[0] for name in weights))
        raise UsageError(f"--part: this model has {known} attention, no {part}.")
    if layer is not None and not -len(names) <= layer < len(names):
        raise UsageError(f"--layer: expected 0 to {len(names) - 1}, got {layer}.")
    return names[-1 if layer is None else layer]


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return step and value of the records that have a key."""
    return [(record["step"], record[key]) for record in records if key in record]


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return points as the two lists that plotting takes."""
    return [x for x, _ in points], [y for _, y in points]


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the exponential moving average over a fiftieth of the points, fewer at the steep beginning."""
    smoothed: list[tuple[int, float]] = []
    for number, (step, value) in enumerate(points):
        new = 1 / max(1.0, min(len(points) / 50, number / 10))
        smoothed.append((step, (1 - new) * smoothed[-1][1] + new * value if smoothed else value))
    return smoothed
