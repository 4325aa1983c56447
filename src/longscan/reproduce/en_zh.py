"""English to Chinese on sentences of real software: help pages, handbooks, a game.

Nobody has published a result on these pairs; the experiment shows a Transformer that works after an hour of
one core, with its numbers and samples. Without --full it takes sentences of at most 20 English words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longscan.core.files import atomic_write
from longscan.data.sentence_pairs import read_lines, read_pairs
from longscan.reproduce.bleu_table import finish, measure, table
from longscan.reproduce.experiment import NO_RESULT, Plan
from longscan.training.translation import TranslateConfig, TranslateRun

__all__ = ["FILES", "SETTINGS", "SOURCE", "run", "show"]

FILES = ("train.tsv.xz", "valid.tsv.xz", "test.tsv.xz")
SOURCE = "Each is a table of English, Chinese and where the pair is from, tab-separated."
MAX_WORDS = 20
LEFT_OUT = "mediawiki"  # an origin whose licence keeps a model from being shared

SETTINGS: dict[str, Any] = {
    "tokenizer": "bpe",
    "vocab_size": 8000,
    "model": "transformer",
    "preset": "multi30k",
    "norm_first": True,
    "dropout": 0.1,
    "batch_tokens": 1250,  # with small steps, and the norm first, it learns from far fewer sentences
    "epochs": 12.0,
    "lr": 1e-3,
    "warmup": 800,
    "label_smoothing": 0.1,
    "clip": 1.0,
    "eval_every": 400,
    "bleu_sentences": 0,
    "save_every": 400,
    "average": 5,
}


def run(plan: Plan) -> dict[str, Any]:
    """Return the BLEU of the Transformer, trained here.

    Args:
        plan: where, and how much.
    """
    size = "full" if plan.full else "short"
    plan.out.mkdir(parents=True, exist_ok=True)
    tables = {name: plan.out / f"en-zh-{size}-{name}.tsv" for name in ("train", "valid", "test")}
    for name, path in tables.items():
        if not path.is_file():
            _select(plan.files / f"{name}.tsv.xz", path, None if plan.full else MAX_WORDS)
    paths = {"source": str(tables["train"]), "valid_source": str(tables["valid"])}
    config = TranslateConfig.from_dict({**SETTINGS, **paths})
    directory = plan.train(f"en-zh-{size}", config, TranslateRun)
    result = measure(plan, directory, read_pairs(tables["test"]), "zh")
    reduced = None if plan.full else f"sentences of at most {MAX_WORDS} English words, test too"
    if plan.quick:
        reduced = NO_RESULT
    return finish(plan, {"transformer": [result]}, {"reduced": reduced, "published": {}})


def show(report: dict[str, Any]) -> str:
    """Return the results as text.

    Args:
        report: of `run`.
    """
    lines = table(report, {})
    if report["reduced"]:
        lines.append(f"reduced: {report['reduced']}")
    result = report["runs"]["transformer"][0]
    lines += [f"BLEU: {result['bleu_signature']}", f"chrF: {result['chrf_signature']}"]
    for sample in result["samples"]:
        lines += ["", sample["source"], f"  → {sample['translation']}", f"  = {sample['reference']}"]
    return "\n".join(lines)


def _select(source: Path, target: Path, max_words: int | None) -> None:
    """Copy the pairs of the experiment."""
    chosen = []
    for line in read_lines(source):
        english, chinese, origin = [*line.split("\t"), ""][:3]
        if origin != LEFT_OUT and (max_words is None or len(english.split()) <= max_words):
            chosen.append(f"{english}\t{chinese}\n")
    atomic_write(target, "".join(chosen))
