"""The curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longscan.plotting.training import plot_losses


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("n_valid", [0, 3])
def test_plot_losses(tmp_path: Path, suffix: str, n_valid: int) -> None:
    pytest.importorskip("matplotlib")
    records: list[dict[str, Any]] = [{"step": step, "loss": 5 / step} for step in range(1, 200)]
    records += [{"step": step, "valid_loss": 3 / step, "right": 0.5} for step in range(1, n_valid + 1)]
    plot_losses(records, tmp_path / f"loss{suffix}", "nats per text", "accuracy", {"right": "accuracy"})
    content = (tmp_path / f"loss{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(content) > 5000


def test_the_panels_say_what_they_measure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    records += [{"step": 5, "valid_loss": 0.9, "valid_accuracy": 0.75}]
    plot_losses(records, tmp_path / "a.svg", "nats per text", "accuracy", {"valid_accuracy": "accuracy"})
    drawn = (tmp_path / "a.svg").read_text()
    assert ">loss (nats per text)<" in drawn
    assert ">validation accuracy<" in drawn
    assert ">lowest validation loss 0.900 at step 5<" in drawn
    assert "nats per token" not in drawn
    assert ">2.5<" not in drawn
