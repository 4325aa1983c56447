"""BLEU of several translators: measured, beside the published values, as a table and a figure by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load_translator
from longscan.core.text_table import lay_out
from longscan.data.sentence_pairs import TextPairs
from longscan.evaluation import translation
from longscan.plotting.style import reduced_note
from longscan.plotting.translation import plot_bleu
from longscan.reproduce.experiment import Plan
from longscan.training.run_directory import read_settings
from longscan.training.translation import TranslateRun

__all__ = ["finish", "measure", "summary", "table"]

QUICK_SENTENCES = 12
N_SAMPLES = 5
BEAM, LENGTH_PENALTY = 5, 0.6


def measure(plan: Plan, directory: Path, pairs: TextPairs, tokenize: str) -> dict[str, Any]:
    """Return the test results of a trained translator, cached in its run's directory.

    Args:
        plan: whether all pairs count.
        directory: the run's.
        pairs: sentences and their reference translations.
        tokenize: see `bleu.score`.

    Returns:
        What `translation.measure` gives, with a few samples instead of all translations; parameters,
        epochs, seed and minutes of the run.
    """
    model, tokenizer = load_translator(directory / "model")
    if plan.quick:
        pairs = pairs.select(range(QUICK_SENTENCES))

    def score() -> dict[str, Any]:
        result = translation.measure(model, tokenizer, pairs, BEAM, LENGTH_PENALTY, tokenize)
        translations = result.pop("translations")
        step = max(1, len(translations) // N_SAMPLES)
        samples = [
            {"source": pairs.source[i], "reference": pairs.target[i], "translation": translations[i]}
            for i in range(0, len(translations), step)
        ][:N_SAMPLES]
        epochs = read_settings(directory, TranslateRun.verb)["epochs"]
        return {**result, "samples": samples, "epochs": epochs}

    key = f"{tokenizer.fingerprint} {len(pairs.source)} {tokenize}"
    return plan.cached_measurement(directory, model, key, score)


def finish(plan: Plan, rows: Mapping[str, Sequence[dict[str, Any]]], notes: dict[str, Any]) -> dict[str, Any]:
    """Return the results, written with their figure.

    Args:
        plan: where to.
        rows: system -> what `measure` gave for each seed.
        notes: more entries of the report; "reduced" says how it is smaller than the published experiment.
    """
    report = {
        "experiment": plan.name,
        **notes,
        "machine": plan.machine,
        "systems": {name: summary(seeds) for name, seeds in rows.items()},
        "runs": {name: list(seeds) for name, seeds in rows.items()},
    }
    first = {name: seeds[0] for name, seeds in rows.items()}
    plan.save(report, lambda path: plot_bleu(first, path, reduced_note(report)))
    return report


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the seeds, and the lowest and highest BLEU.

    Args:
        rows: what `measure` gave for one system, a row per seed.
    """
    bleu = [row["bleu"] for row in rows]
    names = ("bleu", "chrf", "perplexity", "parameters", "minutes")
    means = {name: round(sum(row[name] for row in rows) / len(rows), 2) for name in names}
    return {**means, "bleu_range": [min(bleu), max(bleu)], "seeds": [row["seed"] for row in rows]}


def table(report: Mapping[str, Any], published: Mapping[str, str]) -> list[str]:
    """Return the lines of a table: a row per system, the published value beside the measured ones.

    Args:
        report: of `finish`.
        published: system -> the published BLEU, as text.
    """
    rows = [("system", "published", "BLEU", "seeds", "chrF", "perplexity", "parameters", "minutes")]
    for name, result in report["systems"].items():
        low, high = result["bleu_range"]
        spread = f" ({low:.1f}-{high:.1f})" if len(result["seeds"]) > 1 else ""
        rows.append(
            (
                name,
                published.get(name, "-"),
                f"{result['bleu']:.2f}{spread}",
                f"{len(result['seeds'])}",
                f"{result['chrf']:.2f}",
                f"{result['perplexity']:.2f}",
                f"{result['parameters'] / 1e6:.2f} M",
                f"{result['minutes']:.0f}",
            )
        )
    return lay_out(rows)
