"""What fine-tuning teaches: who wrote a passage, asked and answered as a chat.

No published table stands behind this. The shipped model was trained to continue these books, and has never
answered a question. It learns to from a few hundred passages of each author, by LoRA and with all weights,
and is asked about others. The baseline is TF-IDF with logistic regression on the same passages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from longscan.core.files import atomic_write
from longscan.core.random import RandomStream
from longscan.data.labeled_texts import Example
from longscan.data.text_files import read_text
from longscan.errors import LongscanError
from longscan.evaluation.classification import tfidf
from longscan.reproduce.accuracy_table import finish, show
from longscan.reproduce.experiment import Plan, minutes, seeded
from longscan.training.checkpoints import Checkpoints
from longscan.training.finetune import FinetuneRun
from longscan.training.finetune_config import FinetuneConfig

__all__ = ["FILES", "MODEL", "SOURCE", "run", "show"]

AUTHORS = {
    "austen.txt.xz": "Jane Austen",
    "moby_dick.txt.xz": "Herman Melville",
    "shakespeare.txt.xz": "William Shakespeare",
    "sotu.txt.xz": "A president",
    "web_bible.txt.xz": "The Bible",
}
FILES = tuple(AUTHORS)
SOURCE = "Each is the text of one author; empty lines part its paragraphs."
MODEL = "longscan-tiny-en"
SEEDS = (0, 1, 2)  # of --full
WORDS = 40  # of a passage
TRAIN, TEST = 600, 60  # passages of each author
HELD_OUT = 0.1  # the end of each text

SHARED: dict[str, Any] = {"epochs": 2.0, "seq_len": 1024, "eval_every": 40, "samples": 0}
SYSTEMS: dict[str, dict[str, Any]] = {
    "LoRA": {"lr": 1e-3},
    "all weights": {"method": "full", "lr": 1e-3},
}
MEASURES = {"before": "before", "accuracy": "after"}
NOTES = (
    "measured:  right answers to 300 questions about passages of 40 words, from the last tenth of each text;",
    "           an answer is right if greedy decoding gives it to the last token; by chance 20 of 100",
    "before:    the shipped model, which was trained to continue these texts and not to answer",
    "tf-idf:    of words and pairs of words, with logistic regression; five folds choose its C",
)


def run(plan: Plan) -> dict[str, Any]:
    """Return the share of right answers before and after fine-tuning.

    Args:
        plan: where, and how much.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    passages = {file: _passages(plan.file(file), plan.quick) for file in AUTHORS}
    paths = []
    for index, part in enumerate(("train", "test")):
        rows = [_row(text, AUTHORS[file]) for file in AUTHORS for text in passages[file][index]]
        paths.append(plan.out / f"authors-{part}.jsonl")
        atomic_write(paths[-1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS if plan.full else SEEDS[:1]:
        for name, settings in SYSTEMS.items():
            data = {"data": [str(paths[0])], "valid": [str(paths[1])], "model": plan.model, "seed": seed}
            config = FinetuneConfig.from_dict({**SHARED, **settings, **data})
            directory = plan.train(seeded(f"authors-{config.method}", seed), config, FinetuneRun)
            results.setdefault(name, []).append({**_measured(directory), "seed": seed})
    try:
        results["tf-idf"] = [_baseline(passages)]
    except LongscanError as error:
        plan.notify(f"no tf-idf: {error}")
    return finish(plan, results, MEASURES, {}, None if plan.full else "one seed", NOTES)


def _passages(path: Path, quick: bool) -> tuple[list[str], list[str]]:
    """Return passages of a text to learn, and of its end to be asked about."""
    text = "".join(read_text(path))
    paragraphs = [words[:WORDS] for part in text.split("\n\n") if len(words := part.split()) >= WORDS]
    cut = int((1 - HELD_OUT) * len(paragraphs))
    chosen = []
    for index, (some, most) in enumerate(((paragraphs[:cut], TRAIN), (paragraphs[cut:], TEST))):
        order = RandomStream(0, index).permutation(len(some))[: 8 if quick else most]
        if len(order) < 2:
            raise LongscanError(f"{path}: expected paragraphs of {WORDS} words or more. {SOURCE}")
        chosen.append([" ".join(some[i]) for i in order])
    return chosen[0], chosen[1]


def _row(text: str, author: str) -> dict[str, Any]:
    """Return a question and its answer."""
    asked = {"role": "user", "content": f"Who wrote this? {text}"}
    return {"messages": [asked, {"role": "assistant", "content": f"{author}."}]}


def _measured(directory: Path) -> dict[str, Any]:
    """Return what a run has measured before its first step and after its last one."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    exact = [record["valid_exact"] for record in records if "valid_exact" in record]
    newest = Checkpoints(directory / "checkpoints").directories()[0]
    trained = load_file(newest / "model.safetensors").values()  # of an adapter only itself
    return {
        "before": 100 * exact[0],
        "accuracy": 100 * exact[-1],
        "parameters": sum(tensor.size for tensor in trained),
        "minutes": minutes(directory),
    }


def _baseline(passages: dict[str, tuple[list[str], list[str]]]) -> dict[str, Any]:
    """Return the accuracy of TF-IDF with logistic regression, trained here."""
    started = time.perf_counter()
    train, test = (
        [Example(AUTHORS[file], text, None, file) for file, parts in passages.items() for text in parts[i]]
        for i in range(2)
    )
    predicted: Sequence[int] = tfidf(train, test, sorted(AUTHORS.values()))
    truth = [sorted(AUTHORS.values()).index(example.label) for example in test]
    right = sum(a == b for a, b in zip(predicted, truth, strict=True))
    took = round((time.perf_counter() - started) / 60, 1)
    return {"accuracy": 100 * right / len(test), "parameters": 0, "minutes": took, "seed": 0}
