"""What each step from recurrence to attention gains on Multi30k (Elliott et al. 2016), English to German.

The claim of Bahdanau et al. (2014), figure 2, is that without attention long sentences suffer, and with it
they don't. That of Vaswani et al. (2017) is that attention alone is better still. Both are tested on image
captions, at sizes that train within the hour on two cores.
"""

from __future__ import annotations

from typing import Any

from longscan.data.sentence_pairs import read_pairs
from longscan.reproduce.bleu_table import finish, measure, table
from longscan.reproduce.experiment import NO_RESULT, Plan, seeded
from longscan.training.translation import TranslateConfig, TranslateRun

__all__ = ["FILES", "PUBLISHED", "SOURCE", "SYSTEMS", "run", "show"]

FILES = tuple(f"{part}.{side}.gz" for part in ("train", "val", "test_2016_flickr") for side in ("en", "de"))
SOURCE = "They are in data/task1/raw of the repository multi30k/dataset."
SEEDS = (0, 1, 2)  # of --full

SHARED: dict[str, Any] = {
    "tokenizer": "bpe",
    "vocab_size": 5000,
    "preset": "multi30k",
    "batch_tokens": 2500,
    "label_smoothing": 0.1,
    "clip": 1.0,
    "eval_every": 400,
    "bleu_sentences": 200,
    "save_every": 200,
    "average": 5,
}
RECURRENT: dict[str, Any] = {"epochs": 12.0, "lr": 1.5e-3, "warmup": 200}
SYSTEMS: dict[str, dict[str, Any]] = {
    "seq2seq": RECURRENT,
    "bahdanau": RECURRENT,
    "luong": RECURRENT,
    "transformer": {"epochs": 16.0, "lr": 1e-3, "warmup": 400},
}
PUBLISHED = {
    "seq2seq": "13.8 (a)",
    "bahdanau": "28.30 (a)",
    "transformer": "36.52 (a), 41.0 (b)",
}
NOTES = (
    "published (a): bentrevett/pytorch-seq2seq, notebooks 1, 3 and 6: German to English, lower case, words",
    "published (b): Wu et al. 2021 (arXiv:2105.14462), Transformer-tiny: English to German, tokenised text",
    "measured: English to German, cased, one BPE for both sides, sacrebleu on plain text, beam 5, mean of",
    "          the last 5 checkpoints; all of them on test_2016_flickr, 1,000 sentences",
)


def settings(model: str, plan: Plan, seed: int) -> TranslateConfig:
    """Return the training settings of a system.

    Args:
        model: its name.
        plan: where the data are.
        seed: of the run.
    """
    sides = {
        "source": "train.en.gz",
        "target": "train.de.gz",
        "valid_source": "val.en.gz",
        "valid_target": "val.de.gz",
    }
    paths = {name: str(plan.files / file) for name, file in sides.items()}
    return TranslateConfig.from_dict({**SHARED, **SYSTEMS[model], **paths, "model": model, "seed": seed})


def run(plan: Plan) -> dict[str, Any]:
    """Return the BLEU of the four systems, trained here.

    Args:
        plan: where, and how much.
    """
    test = read_pairs(*(plan.files / f"test_2016_flickr.{side}.gz" for side in ("en", "de")))
    results: dict[str, list[dict[str, Any]]] = {model: [] for model in SYSTEMS}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for model in SYSTEMS:
            run_name = seeded(f"multi30k-{model}", seed)
            directory = plan.train(run_name, settings(model, plan, seed), TranslateRun)
            results[model].append(measure(plan, directory, test, "13a"))
    reduced = NO_RESULT if plan.quick else None if plan.full else "one seed"
    return finish(plan, results, {"reduced": reduced, "published": PUBLISHED, "notes": list(NOTES)})


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    lines = table(report, PUBLISHED)
    if report["reduced"]:
        lines.append(f"reduced: {report['reduced']}")
    lines += NOTES
    lines.append("BLEU by words in the source sentence:")
    for name, rows in report["runs"].items():
        buckets = "  ".join(f"{row['words']}: {row['bleu']:.1f}" for row in rows[0]["by_length"])
        lines.append(f"  {name:12} {buckets}")
    return "\n".join(lines)
