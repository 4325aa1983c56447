"""Accuracy and F1."""

from __future__ import annotations

import numpy as np
import pytest

from longscan.evaluation.classification import score


def test_scores() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth, answers = draw.integers(0, 4, (2, 12)).tolist()
        found = score(truth, answers)
        assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, answers))
        assert found.macro_f1 == pytest.approx(
            metrics.f1_score(truth, answers, average="macro", zero_division=0)
        )


def test_scores_by_hand() -> None:
    found = score([0, 0, 1, 2], [0, 1, 1, 1])
    assert found.accuracy == 0.5
    assert found.classes == {
        0: (1.0, 0.5, pytest.approx(2 / 3), 2),
        1: (pytest.approx(1 / 3), 1.0, 0.5, 1),
        2: (0.0, 0.0, 0.0, 1),
    }
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.5) / 3)
