"""Attention weights and position encodings as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longscan.data.sentence_pairs import rows
from longscan.models import Translator
from longscan.models.transformer import sinusoids
from longscan.plotting.style import (
    COLOURS,
    DIVERGING,
    MARKERS,
    SEQUENTIAL,
    new_figure,
    save_figure,
    tidy,
)
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.words import group

__all__ = ["Sides", "plot_positions", "plot_weights", "word_weights"]

Sides = tuple[list[str], list[str]]  # the words of keys and queries
LABEL = 24  # characters of a word on an axis, at most


def word_weights(
    model: Translator, tokenizer: Tokenizer, sentence: str, target: str, pieces: bool = False
) -> tuple[dict[str, Tensor], dict[str, Sides]]:
    """Return a translator's attention between words, by layer, and the words of each part.

    Args:
        model: the translator.
        tokenizer: its own.
        sentence: the source, not empty.
        target: its translation.
        pieces: whether to take each token as a word.

    Returns:
        Weights (n_heads, n_queries, n_keys) by names such as "cross.1", none of a model without attention;
        the keys and queries of "encoder", "decoder" and "cross".
    """
    ids = [tokenizer.encode(text.strip()) for text in (sentence, target)]
    with torch.no_grad():
        output = model(rows(ids[:1], bos=False), rows(ids[1:], bos=True)[:, :-1], return_weights=True)
    source, translation = (group(tokenizer, side, pieces) for side in ids)
    sides = {
        "encoder": (source, source),
        "decoder": (translation.read(), translation),
        "cross": (source, translation),
    }
    weights = {}
    for name, tensor in (output.weights or {}).items():
        keys, queries = sides[name.split(".")[0]]
        # a word receives the sum of what its tokens receive, and attends as they do on average
        weights[name] = queries.matrix(mean=True) @ tensor[0].float() @ keys.matrix(mean=False).mT
    return weights, {part: (keys.words, queries.words) for part, (keys, queries) in sides.items()}


def plot_weights(
    panels: Mapping[str, Tensor], source: Sequence[str], target: Sequence[str], path: Path, title: str = ""
) -> None:
    """Draw attention weights with the words on the axes.

    Args:
        panels: a title and the weights (n_target, n_source) of each panel.
        source: the keys: the words attended to. Very long words are cut.
        target: the queries: the words that attend.
        path: the file to write.
        title: of the figure.

    Raises:
        LongscanError: matplotlib is not installed.
    """
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    source, target = ([_shorten(word) for word in side] for side in (source, target))
    # the words of each axis stand beside the other one
    beside, below = (0.08 * max(0, max(map(len, side), default=0) - 8) for side in (target, source))
    width, height = 1.2 + 0.32 * len(source) + beside, 1.2 + 0.26 * len(target) + below
    figure = new_figure(max(4.0, columns * width + 0.8), max(2.5, lines * height + 0.4))
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.suptitle(title, fontsize="medium")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for index, (ax, (name, weights)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = ax.imshow(weights.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        ax.set_title(name, fontsize="small")
        ax.set_xticks(range(len(source)), source, rotation=60, ha="right", fontsize="small")
        ax.set_yticks(
            range(len(target)), target if index % columns == 0 else [""] * len(target), fontsize="small"
        )
        if index >= len(panels) - columns:
            ax.set_xlabel("keys")
        if index % columns == 0:
            ax.set_ylabel("queries")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    save_figure(figure, path)


def _shorten(word: str) -> str:
    """Return a word, cut if it is too long to label an axis."""
    return word if len(word) <= LABEL else word[: LABEL - 1] + "…"


def plot_positions(d_model: int, length: int, path: Path) -> None:
    """Draw the Transformer's positional encodings and how their dot products depend on distance.

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
    for index, colour, marker in zip((0, length // 4, length // 2), COLOURS, MARKERS, strict=False):
        distances = [other - index for other in range(length)]
        right.plot(
            distances, products[index], color=colour, marker=marker, markevery=max(1, length // 12),
            markersize=4, linewidth=1.2, label=f"from position {index}",
        )  # fmt: skip
    right.set(
        title="one curve: only the distance counts",
        xlabel="distance",
        ylabel="dot product, over $d_{model}/2$",
    )
    tidy(right)
    right.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
