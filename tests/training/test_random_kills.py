"""A few of the kills of `kill_at_random`, which does any number by hand."""

from __future__ import annotations

from pathlib import Path

from kill_at_random import kill_at_random
from processes import Parent


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    parent = Parent(tmp_path)
    try:
        counts = kill_at_random(parent, tmp_path, kills=3, seed=0)
    finally:
        parent.close()
    assert counts["kills"] == 3
    assert counts["runs"] >= 1
