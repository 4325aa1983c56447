"""A cue far from its question: exact gradients learn it, truncated ones do not, also on short sequences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.data.synthetic import distant
from longscan.errors import UsageError
from longscan.reproduce import long_dependency
from longscan.reproduce.long_dependency import SHARED, DependencyConfig, DependencyRun


@pytest.mark.parametrize(("window", "loss"), [(0, 0.0), (64, math.log(2))], ids=["exact", "truncated"])
def test_exact_gradients_learn_what_truncated_ones_do_not(tmp_path: Path, window: int, loss: float) -> None:
    slow = ["d_state=4", "dt_min=1e-4", "dt_max=4e-4", "dt_init_floor=1e-4", "tie_embeddings=false"]
    sizes = {"length": 500, "chunk": 256, "rare": 1e-3, "steps": 400, "window": window, "threads": 1}
    config = DependencyConfig.from_dict({**SHARED, "option": slow, **sizes})
    result = DependencyRun.begin(config, tmp_path / "run", figures=False)
    assert result.valid == pytest.approx(loss, abs=0.1)
    assert (result.step < 400) == (loss == 0)  # it stops when it knows


def test_the_command(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(long_dependency, "QUICK_LENGTH", 3000)
    arguments = ("reproduce", "long-dependency", "--out", tmp_path, "--quick", "--threads", 1)
    done = cli(*arguments)
    assert done.code == 0, done.err
    for word in ("exact", "truncated", "3,000 tokens", "reduced: a few steps only: no result"):
        assert word in done.out
    assert (tmp_path / "long-dependency.png").stat().st_size > 1000
    report = json.loads((tmp_path / "long-dependency.json").read_text())
    losses = [report["runs"][name][0]["loss"] for name in ("exact", "truncated")]
    assert losses[0][0] == losses[1][0]  # the same model and sequences
    assert cli(*arguments).out == done.out


def test_its_sequences() -> None:
    ids, targets = distant(8, torch.Generator().manual_seed(0), 500, 0.1)
    assert ids.shape == targets.shape == (8, 502)
    assert ids[:, 0].tolist() == targets[:, -1].tolist() == [0, 1] * 4
    assert bool((targets[:, :-1] == -100).all())
    assert bool((ids[:, -1] == 5).all())
    assert set(ids[:, 1:-1].unique().tolist()) == {2, 3, 4}
    assert 0.05 < (ids[:, 1:-1] != 4).float().mean() < 0.15
    with pytest.raises(UsageError, match="even number of sequences"):
        distant(3, torch.Generator())
