"""`longscan bench evaluate`: tasks of lm-evaluation-harness on longscan and on the harness's own backend.

Both get the same files: weights, tokenizer, questions. The log-likelihoods of all requests are compared, with
each other and with their definition in float64.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longscan.bench.contenders import chat_model, questions
from longscan.bench.contenders.longscan import ready
from longscan.bench.contenders.questions import CHOICES, TASKS, Counts
from longscan.bench.measure import Contender, Measurement, Settings, faster
from longscan.bench.report import Ratio, Report, rate, rate_table, spread, table
from longscan.bench.suites.generate_contenders import SHAPES, tiny
from longscan.checkpoints.load import load_with_tokenizer
from longscan.checkpoints.save import save
from longscan.core.optional import remedy
from longscan.tokenizers.base import Tokenizer

__all__ = ["HF", "HF_BATCH", "OURS", "REFERENCE", "differences", "run"]

SHIPPED = "longscan-tiny-en"
BATCH = 8
OURS, HF, HF_BATCH, REFERENCE = "longscan", "lm-eval hf, batch 1", f"lm-eval hf, batch {BATCH}", "float64"
NEEDS, PEER_NEEDS = ("lm-eval",), ("lm-eval", "transformers", "accelerate")
PATIENCE = 20.0  # seconds of a first run, after which a peer is not run again
EQUAL = 1e-6  # relative difference of two log-likelihoods


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        title: what it is called.
        source: see `contenders.longscan.ready`.
        counts: of its questions.
    """

    title: str
    source: dict[str, Any] | str
    counts: Counts


SMALL = SHAPES["130m"]
FULL = (
    Model(
        SMALL.title, SMALL.model, Counts(endings=4, passage=1, last_word=4, documents=1, passage_words=600)
    ),
    Model(SHIPPED, SHIPPED, Counts(endings=20, passage=4, last_word=20, documents=4)),
)
LITTLE = Counts(
    endings=2, passage=1, last_word=2, documents=1, context=6, ending=3, passage_words=20, document=9
)
QUICK = (Model(tiny("130m").title, tiny("130m").model, LITTLE), Model(SHIPPED, SHIPPED, LITTLE))


def run(settings: Settings, quick: bool, models: Sequence[Model] | None = None) -> Report:
    """Return a report of speed and of how far log-likelihoods differ.

    Args:
        settings: of the benchmark.
        quick: small models and few questions, to see that it works.
        models: instead of the usual ones.
    """
    report = Report(suite="evaluate")
    needed = PEER_NEEDS if settings.peers else NEEDS
    report.notes += [remedy(package, "tasks") for package in needed if not settings.installed(package)]
    if not settings.installed("lm-eval"):
        return report
    for model in models or (QUICK if quick else FULL):
        with tempfile.TemporaryDirectory(prefix="longscan-bench-") as folder:
            settings.notify(f"evaluate: writing {model.title} and its questions")
            contenders = _contenders(model, Path(folder), settings)
            results = settings.compare(f"evaluate {model.title}", contenders, settings)
        _add(report, model, results)
    report.notes += [
        "Timed is the backend, from requests to log-likelihoods, tokenisation included; loading the model "
        "and the harness around it are not. On a CPU transformers has no fused kernel for Mamba: it loops "
        "over the steps of the scan. Its batches are padded to their longest request.",
        "Differences are the largest over all requests: of log-likelihoods a and b, natural logarithms, "
        "|a - b|; relative |a - b| / |b|. float64 is the definition: one pass over each whole request.",
    ]
    return report


def _contenders(model: Model, folder: Path, settings: Settings) -> list[Contender]:
    """Write a model and its questions, and return who answers them."""
    lm, tokenizer = ready(model.source), _tokenizer(model.source)
    made_up = partial(_words, vocab_size=tokenizer.vocab_size)
    text = made_up if isinstance(model.source, dict) else questions.english
    save(lm, folder / "model", tokenizer)
    (folder / "tasks").mkdir()
    questions.write(lm, tokenizer, text, model.counts, folder / "tasks")
    here = {"directory": str(folder / "model"), "folder": str(folder / "tasks"), "tasks": list(TASKS)}
    job = "longscan.bench.contenders.evaluate"
    peer = partial(Contender, job=f"{job}:hf", peer=True, patience=PATIENCE, packages=PEER_NEEDS)
    return [
        Contender(name=OURS, job=f"{job}:longscan", arguments=here, packages=NEEDS),
        peer(name=HF, arguments=here | {"batch_size": 1}),
        peer(name=HF_BATCH, arguments=here | {"batch_size": BATCH}),
        Contender(name=REFERENCE, job=f"{job}:definition", arguments=here, packages=NEEDS, patience=0.0),
    ]


def _tokenizer(source: dict[str, Any] | str) -> Tokenizer:
    """Return the tokenizer of a model: its own, or a made-up one of the vocabulary's size."""
    if isinstance(source, dict):
        return chat_model.tokenizer(source["vocab_size"])
    return load_with_tokenizer(source, None, True)[1]


def _words(n_words: int, seed: int, *, vocab_size: int) -> str:
    """Return a text of the made-up vocabulary, a token a word."""
    return chat_model.text(n_words, seed, vocab_size)


def _add(report: Report, model: Model, results: dict[str, Measurement]) -> None:
    """Add the rows, tables and ratios of a model."""
    rows = []
    for task in TASKS:
        n, parts = model.counts.of(task), [_part(one, task) for one in results.values()]
        speeds = [part for part in parts if part.name != REFERENCE]
        report.add(f"{model.title}: {task}", speeds, n, "questions/s", model=model.title, task=task)
        rows += [row | {"case": f"{task} ({n})"} for row in report.rows[len(report.rows) - len(speeds) :]]
        measured = faster({part.name: part for part in speeds}, OURS, HF, HF_BATCH) if speeds else math.nan
        what = f"{model.title}: {task}, faster than lm-eval's hf"
        report.ratios.append(Ratio(what=what, measured=measured, goal="≥ 3 ×"))
    report.notes += [f"{model.title}: {m.name}: {m.note}" for m in results.values() if m.note]
    report.tables.append(rate_table(f"{model.title}: questions/s (min–max)", rows, rate))
    report.tables.append(
        table(
            f"{model.title}: all questions",
            ["", "seconds (min–max)", "peak resident set of the process, MB"],
            (
                [name, spread(m.as_row(), float, ",.2f"), _memory(m)]
                for name, m in results.items()
                if name != REFERENCE
            ),
        )
    )
    _agree(report, model, {name: m for name, m in results.items() if m.details.get("tasks")})


def _part(whole: Measurement, task: str) -> Measurement:
    """Return the measurement of one task; its first run warms up, unless it is the only one."""
    found = whole.details.get("tasks", {}).get(task)
    if not found or not whole.seconds:
        return replace(whole, seconds=(), details={}, note="")
    seconds = found["seconds"]
    return replace(whole, seconds=tuple(seconds[1:] or seconds), details={"metric": found["value"]}, note="")


def _memory(measurement: Measurement) -> str:
    """Return the peak of the process as a cell."""
    return "–" if measurement.peak_bytes is None else f"{measurement.peak_bytes / 1e6:,.0f}"


def _agree(report: Report, model: Model, results: dict[str, Measurement]) -> None:
    """Add what the log-likelihoods of pairs of contenders have in common."""
    pairs = (
        (OURS, HF),
        (OURS, HF_BATCH),
        (HF_BATCH, HF),
        (OURS, REFERENCE),
        (HF, REFERENCE),
        (HF_BATCH, REFERENCE),
    )
    cells = []
    for one, other in pairs:
        if one not in results or other not in results:
            continue
        found = differences(results[one].details["tasks"], results[other].details["tasks"])
        report.rows.append(
            {
                "case": f"{model.title}: agreement",
                "contender": f"{one} / {other}",
                "model": model.title,
                "rate": None,
                "seconds": None,
                **found,
            }
        )
        cells.append(
            [
                f"{one} / {other}",
                f"{found['requests']:,}",
                f"{found['absolute']:.1e}",
                f"{found['relative']:.1e}",
                f"{found['same_greedy']:,} of {found['requests']:,}",
                f"{found['same_answers']:,} of {found['questions']:,}",
                f"{found['same_metrics']} of {len(TASKS)}",
            ]
        )
        if one == OURS and other in (HF, REFERENCE):
            what = f"{model.title}: log-likelihoods, largest relative difference from {other}"
            report.ratios.append(Ratio(what=what, measured=found["relative"], goal=f"≤ {EQUAL:.0e}", unit=""))
    if cells:
        columns = [
            "",
            "requests",
            "largest difference",
            "relative",
            "same greedy flag",
            "same choice",
            "same metric",
        ]
        report.tables.append(table(f"{model.title}: log-likelihoods", columns, cells))


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return how far the answers of two contenders differ.

    Args:
        one: task -> its "logprobs" and "greedy" flags, and "value" of the metric.
        other: the same of another.

    Returns:
        requests; absolute and relative, the largest difference of a log-likelihood, relative to that of the
        other; same_greedy, requests with the same flag; questions and same_answers, those with choices and
        the ones where both prefer the same; same_metrics, tasks whose metric agrees to 1e-6.
    """
    pairs = [
        pair for task in one for pair in zip(one[task]["logprobs"], other[task]["logprobs"], strict=True)
    ]
    flags = [pair for task in one for pair in zip(one[task]["greedy"], other[task]["greedy"], strict=True)]
    best = [
        (_best(one[task]["logprobs"], i), _best(other[task]["logprobs"], i))
        for task in ("endings", "passage")
        for i in range(0, len(one[task]["logprobs"]), CHOICES)
    ]
    return {
        "requests": len(pairs),
        "absolute": max(abs(a - b) for a, b in pairs),
        "relative": max(abs(a - b) / abs(b) if b else math.inf * abs(a - b) for a, b in pairs),
        "same_greedy": sum(a == b for a, b in flags),
        "greedy": sum(a for a, _ in flags),
        "questions": len(best),
        "same_answers": sum(a == b for a, b in best),
        "same_metrics": sum(math.isclose(one[t]["value"], other[t]["value"], rel_tol=EQUAL) for t in one),
    }


def _best(logprobs: Sequence[float], begin: int) -> int:
    """Return which of the answers from an index on is most likely."""
    part = logprobs[begin : begin + CHOICES]
    return max(range(CHOICES), key=part.__getitem__)
