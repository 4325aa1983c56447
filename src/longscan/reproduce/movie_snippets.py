"""What pre-training is worth: the sentiment of sentences about films (Pang and Lee 2005).

MiniLM (Wang et al. 2020), a BERT of six layers that was trained on a billion pairs of sentences, is
fine-tuned on 8,584 snippets of reviews. The baseline is TF-IDF with logistic regression.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from longscan.checkpoints.load import load
from longscan.core.files import atomic_write
from longscan.data.labeled_texts import Example, frame_examples, number_labels, read_examples
from longscan.data.sentence_pairs import read_lines
from longscan.errors import LongscanError
from longscan.evaluation.classification import score, tfidf
from longscan.inference.bert import predict
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, seeded
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
    """Return the accuracies of the fine-tuned MiniLM and of TF-IDF.

    Args:
        plan: where, and how much.
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
    results: dict[str, list[dict[str, Any]]] = {"minilm": [], "tf-idf": []}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        data = {"data": [str(paths["train"])], "valid": [str(paths["valid"])]}
        config = ClassifyConfig.from_dict({**SHARED, **data, "model": plan.model, "seed": seed})
        directory = plan.train(seeded("movie-snippets", seed), config, ClassifyRun)
        model = load(directory / "model", "classifier").model
        measure = partial(_measure, directory, test)
        results["minilm"].append(plan.cached_measurement(directory, model, f"{len(test)}", measure))
    try:
        results["tf-idf"].append(_baseline(train, test))
    except LongscanError as error:
        plan.notify(f"no tf-idf: {error}")
        del results["tf-idf"]
    reduced = None if plan.full else "one seed"
    return finish(plan, results, MEASURES, {}, reduced, NOTES)


def _measure(directory: Path, test: list[Example]) -> dict[str, float]:
    """Return the accuracy of a fine-tuned model."""
    loaded = load(directory / "model", "classifier")
    truth = number_labels(test, loaded.model.config.labels)
    framed = frame_examples(loaded.tokenizer, test, SHARED["seq_len"])
    scores = predict(loaded.model, loaded.tokenizer, framed)
    return {"accuracy": 100 * score(truth, scores.argmax(1).tolist()).accuracy}


def _baseline(train: list[Example], test: list[Example]) -> dict[str, Any]:
    """Return the accuracy of TF-IDF with logistic regression, trained here."""
    started, labels = time.perf_counter(), sorted({example.label for example in train})
    predicted = tfidf(train, test, labels)
    accuracy = 100 * score(number_labels(test, labels), predicted).accuracy
    minutes = round((time.perf_counter() - started) / 60, 1)
    return {"accuracy": accuracy, "parameters": 0, "minutes": minutes, "seed": 0}
