"""The soak test, small: it holds, and what would not hold ends with status 1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longscan.bench.suites import soak


def test_nothing_is_lost_or_mixed_up(cli: Any) -> None:
    done = cli("bench", "serve", "--soak", 60, "--threads", 1, "--json")
    assert done.code == 0, done.err
    [suite] = json.loads(done.out)["suites"]
    checks = {row["check"]: row for row in suite["rows"] if "check" in row}
    assert len(checks) == 9
    assert all(row["holds"] for row in checks.values())
    assert checks["requests with an outcome"]["value"] == "60 of 60"
    kinds = {row["kind"]: row for row in suite["rows"] if "kind" in row}
    assert sum(row["requests"] for kind, row in kinds.items() if kind != soak.FLOOD) == 60
    assert kinds[soak.FLOOD]["requests"] == soak.PARTS * soak.BURST
    assert sum(row["requests"] > 0 for row in kinds.values()) >= 6


def test_a_violation_ends_with_status_1(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "GROWTH", -(10**9))
    monkeypatch.setattr(soak, "PARTS", 3)
    done = cli("bench", "serve", "--soak", 6, "--threads", 1)
    assert done.code == 1
    assert "VIOLATED" in done.out
    assert "1 of 9 checks failed: resident set, growth after the warm-up" in done.err


@pytest.mark.parametrize("more", [("--repeats", 2), ("ops",), ("--quick",), ("--precision", "int4")])
def test_misuse(cli: Any, more: tuple[object, ...]) -> None:
    done = cli("bench", "serve", "--soak", 5, *more)
    assert done.code == 2
    assert "--soak: expected the suite serve alone" in done.err
