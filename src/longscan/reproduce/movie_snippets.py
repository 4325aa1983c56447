"""What pre-training is worth: is a sentence about a film kind or unkind (Pang and Lee 2005)?

MiniLM (Wang et al. 2020), a BERT of six layers that was trained on a billion pairs of sentences, is
fine-tuned on 8,584 snippets of reviews. Beside it stands what there was before: counted words and logistic
regression.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import typer

from longscan.checkpoints.load import load
from longscan.core.files import atomic_write
from longscan.data.labeled_texts import Example, frame_examples, number_labels, read_examples
from longscan.data.sentence_pairs import read_lines
from longscan.errors import LongscanError
from longscan.evaluation.classification import score, tfidf
from longscan.inference.bert import predict
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan
from longscan.training.text_classifier import ClassifyConfig, ClassifyRun

__all__ = ["FILES", "MODEL", "SOURCE", "run", "show"]

FILES = ("movie_snippets.tsv.xz",)
SOURCE = "It is a table of train, valid or test; pos or neg; a rating; and the sentence; tab-separated."
COLUMNS = 4
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SEEDS = (0, 1, 2)  # of --full
QUICK_TEXTS = 40

SHARED: dict[str, Any] = {"seq_len": 64, "epochs": 3.0, "lr": 5e-5, "eval_every": 100, "save_every": 100}
MEASURES = {"accuracy": "accuracy"}
NOTES = ("measured:  963 held-out sentences; TF-IDF of words and pairs of words, five folds choose its C",)


def run(plan: Plan) -> dict[str, Any]:
    """Fine-tune the one, count for the other, and measure both.

    Args:
        plan: where, and how much.

    Returns:
        The results.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    paths = {part: plan.out / f"movie-snippets-{part}.tsv" for part in ("train", "valid", "test")}
    rows = [line.split("\t") for line in read_lines(plan.files / FILES[0])]
    for number, row in enumerate(rows, 1):
        if len(row) != COLUMNS:
            where = f"{plan.files / FILES[0]}, line {number}"
            raise LongscanError(f"{where}: expected {COLUMNS} columns, got {len(row)}. {SOURCE}")
    for part, path in paths.items():
        chosen = [f"{row[1]}\t{row[-1]}\n" for row in rows if row[0] == part]
        atomic_write(path, "".join(chosen[:QUICK_TEXTS] if plan.quick else chosen))
    train, test = (read_examples([paths[part]]) for part in ("train", "test"))
    found: dict[str, list[dict[str, Any]]] = {"minilm": [], "tf-idf": []}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        data = {"data": [str(paths["train"])], "valid": [str(paths["valid"])]}
        config = ClassifyConfig.from_dict({**SHARED, **data, "model": plan.model, "seed": seed})
        directory = plan.train("movie-snippets" + (f"-seed{seed}" if seed else ""), config, ClassifyRun)
        model = load(directory / "model", "classifier").model
        found["minilm"].append(
            plan.remember(directory, model, f"{len(test)}", partial(_measure, directory, test))
        )
    try:
        found["tf-idf"].append(_count(train, test))
    except LongscanError as error:
        typer.echo(f"no tf-idf: {error}", err=True)
        del found["tf-idf"]
    reduced = None if plan.full else "one seed"
    return finish(plan, found, MEASURES, {}, reduced, NOTES)


def _measure(directory: Path, test: list[Example]) -> dict[str, float]:
    """Measure a fine-tuned model."""
    found = load(directory / "model", "classifier")
    truth = number_labels(test, found.model.config.labels)
    framed = frame_examples(found.tokenizer, test, SHARED["seq_len"])
    scores = predict(found.model, found.tokenizer, framed)
    return {"accuracy": 100 * score(truth, scores.argmax(1).tolist()).accuracy}


def _count(train: list[Example], test: list[Example]) -> dict[str, Any]:
    """Do it with words and pairs of words that are counted."""
    started, labels = time.perf_counter(), sorted({example.label for example in train})
    said = tfidf(train, test, labels)
    accuracy = 100 * score(number_labels(test, labels), said).accuracy
    minutes = round((time.perf_counter() - started) / 60, 1)
    return {"accuracy": accuracy, "parameters": 0, "minutes": minutes, "seed": 0}
