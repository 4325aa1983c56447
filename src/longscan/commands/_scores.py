"""The scores of a classifier of texts, as JSON or as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from longscan.core.config import count
from longscan.core.text_table import lay_out
from longscan.evaluation.classification import Scores

__all__ = ["print_scores", "report"]

FIELDS = ("precision", "recall", "f1", "texts")  # of a row of Scores.classes


def report(labels: Sequence[str], n_texts: int, scores: Scores, peer: Scores | None) -> dict[str, Any]:
    """Return the scores of a classifier, and of the TF-IDF baseline if there is one, as JSON values.

    Args:
        labels: of the classes.
        n_texts: their number.
        scores: of the classifier.
        peer: of the TF-IDF baseline, if there is one.
    """
    values: dict[str, Any] = {"texts": n_texts, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
    if peer is not None:
        values["tfidf"] = {"accuracy": peer.accuracy, "macro_f1": peer.macro_f1}
    classes = {labels[n]: dict(zip(FIELDS, row, strict=True)) for n, row in scores.classes.items()}
    return {**values, "classes": classes}


def print_scores(labels: Sequence[str], n_texts: int, scores: Scores, peer: Scores | None) -> None:
    """Print the same as a line or two and a table.

    Args:
        labels: of the classes.
        n_texts: their number.
        scores: of the classifier.
        peer: of the TF-IDF baseline, if there is one.
    """
    each = [(scores, count(n_texts, "text"))]
    each += [(peer, "TF-IDF + logistic regression")] if peer is not None else []
    for some, remark in each:
        typer.echo(f"accuracy {some.accuracy:.4f} · macro-F1 {some.macro_f1:.4f} · {remark}")
    table: list[tuple[str, ...]] = [("precision", "recall", "F1", "texts", "class")]
    for n, (*shares, n_of_class) in scores.classes.items():
        table.append((*(f"{share:.4f}" for share in shares), f"{n_of_class:,}", labels[n]))
    typer.echo("\n".join(lay_out(table, ">>>><")))
