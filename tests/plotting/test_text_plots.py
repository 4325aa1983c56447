"""Figures of a text: visible tokens, wrapped lines, thinned labels, letters that are no formulas."""

from __future__ import annotations

import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from longscan.plotting.style import HIGHLIGHT
from longscan.plotting.text import plot_matrices, plot_states, plot_steps
from longscan.plotting.tokens import cells, explained
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe
from longscan.tokenizers.words import visible

pytest.importorskip("matplotlib")


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    nodes = root.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(node.itertext()).replace("\u00a0", " ") for node in nodes]


def test_every_token_is_visible() -> None:
    tokenizer = ByteTokenizer()
    tokens = visible(tokenizer, tokenizer.encode("a b\n\t\r\x07é你"))
    assert tokens == ["a", " ", "b", "↵", "⇥", "␍", "·", "·", "é", "·", "·", "你"]
    assert visible(tokenizer, [tokenizer.eos_id, 97, 0xFF]) == ["#256", "a", "·"]
    joined = train_bpe(["he said\n\nno " * 9], 300)
    ids = joined.encode("he said\n\nno")
    assert "".join(visible(joined, ids)) == "he said↵↵no"
    assert len(visible(joined, ids)) == len(ids)


def test_lines_break_after_line_breaks_and_between_tokens() -> None:
    found = list(cells(["one", " two", ".↵x", "你好", " four", "y" * 30], columns=10))
    assert [(cell.token, cell.line, cell.column, cell.width, cell.text) for cell in found] == [
        *((0, 0, 0, 3, "one"), (1, 0, 3, 4, " two"), (2, 0, 7, 2, ".↵")),
        *((2, 1, 0, 1, "x"), (3, 1, 1, 4, "你好"), (4, 1, 5, 5, " four")),
        (5, 2, 0, 10, "y" * 9 + "…"),
    ]


def test_signs_are_explained_where_they_stand() -> None:
    assert explained(["a", " b"]) == ""
    assert explained(["#1", "a", "#1"]).replace("\u00a0", " ") == "#1 special token"
    meanings = explained(["a", "↵", " ", "·"]).replace("\u00a0", " ")
    assert meanings == "↵ line break, ␣ space, · part of a character"


def test_black_is_legible_on_every_colour_of_a_text() -> None:
    def luminance(colour: str) -> float:  # of WCAG 2
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert min((luminance(colour) + 0.05) / 0.05 for colour in HIGHLIGHT) > 7


def test_a_text_is_no_formula(tmp_path: Path) -> None:
    tokens = ["$5", " and", " $6_", "a^b", " %", " \\frac"]
    steps = torch.rand(2, 6) + 0.01
    plot_steps(steps, [1, 4], tokens, None, "mean", tmp_path / "a.svg", "title")
    shown = texts(tmp_path / "a.svg")
    assert "$5 and $6_a^b % \\frac" in shown
    assert {"$5", "$6_", "a^b", "\\frac", "1", "4"} <= set(shown)
    plot_matrices({"": (torch.rand(6, 6), "")}, tokens, tmp_path / "a.svg", "title")
    assert texts(tmp_path / "a.svg").count("$6_") == 2


@pytest.mark.parametrize("n", [1, 2, 65, 300])
def test_labels_of_long_texts_are_thinned(tmp_path: Path, n: int) -> None:
    tokens = [f" w{index}" for index in range(n)]
    plot_states(torch.rand(3, n), torch.ones(3, 3), [0, 1, 2], tokens, tmp_path / "a.svg", "title", "note")
    labels = [text for text in texts(tmp_path / "a.svg") if text.startswith("w")]
    every = -(-n // 64)
    expected = [f"w{index}" for index in range(0, n, every)]
    assert labels == (expected if every == 1 else [f"{label}  {label[1:]}" for label in expected])


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_constant_values_can_be_drawn(tmp_path: Path, value: float) -> None:
    steps, tokens = torch.full((2, 3), value), ["a", "b", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_steps(steps, [0, 1], tokens, 1, "mean", tmp_path / "a.png", "title")
        plot_states(steps, torch.full((2, 3), torch.inf), [0, 1], tokens, tmp_path / "b.png", "title", "")
        plot_matrices({"": (steps[:, :2], "")}, tokens[:2], tmp_path / "c.png", "title")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}
