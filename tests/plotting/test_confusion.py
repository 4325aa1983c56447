"""The confusion matrix: names on the axes, counts in the cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longscan.plotting.confusion import plot_confusion

pytest.importorskip("matplotlib")


def test_names_and_counts_are_drawn(tmp_path: Path) -> None:
    counts = torch.tensor([[41, 7, 0], [0, 52, 0], [0, 0, 0]])  # the last class does not occur
    plot_confusion(counts, ["cat", "dog", "owl"], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    for text in ("cat", "dog", "owl", "41", "7", "52", "predicted class", "true class"):
        assert f">{text}<" in drawn
    assert ">0<" not in drawn


@pytest.mark.parametrize("n", [1, 40, 200])
def test_many_classes_still_fit(n: int, tmp_path: Path) -> None:
    plot_confusion(torch.eye(n, dtype=torch.long) * 23, [f"class {i}" for i in range(n)], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert (">class 0<" in drawn) == (n <= 60)
    assert (">23<" in drawn) == (n <= 20)
