"""BLEU of several systems as a table: published beside measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longscan.core.text_table import lay_out

__all__ = ["minutes", "summary", "table"]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over the seeds, and the lowest and highest BLEU.

    Args:
        found: what `Plan.measure` gave, of one system.
    """
    bleu = [each["bleu"] for each in found]
    names = ("bleu", "chrf", "perplexity", "parameters", "minutes")
    means = {name: round(sum(each[name] for each in found) / len(found), 2) for name in names}
    return {**means, "bleu_range": [min(bleu), max(bleu)], "seeds": [each["seed"] for each in found]}


def table(report: Mapping[str, Any], published: Mapping[str, str]) -> list[str]:
    """Return lines: for each system what was published and what was measured.

    Args:
        report: of `Plan.finish`.
        published: system -> in a few words.
    """
    head = ("system", "published", "BLEU", "seeds", "chrF", "perplexity", "parameters", "minutes")
    rows = [head]
    for name, found in report["systems"].items():
        low, high = found["bleu_range"]
        spread = f" ({low:.1f}-{high:.1f})" if len(found["seeds"]) > 1 else ""
        numbers = (f"{found['bleu']:.2f}{spread}", f"{len(found['seeds'])}", f"{found['chrf']:.2f}")
        sizes = (
            f"{found['perplexity']:.2f}",
            f"{found['parameters'] / 1e6:.2f} M",
            f"{found['minutes']:.0f}",
        )
        rows.append((name, published.get(name, "-"), *numbers, *sizes))
    return lay_out(rows)


def minutes(directory: Path) -> float:
    """Return the time that a run's steps took, to a tenth of a minute."""
    seconds = 0.0
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        seconds = json.loads(line).get("seconds", seconds)
    return round(seconds / 60, 1)
