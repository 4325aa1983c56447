"""Accuracy, macro-F1 and losses of classifiers, and the TF-IDF baseline beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from longscan.core.optional import require
from longscan.data.labeled_sequences import Sequences
from longscan.data.labeled_texts import (
    Example,
    number_labels,
    read_whole,
)
from longscan.data.synthetic import IGNORED, Examples
from longscan.inference.sequences import answers
from longscan.models import LanguageModel
from longscan.models.sequence_classifier import SequenceModel

__all__ = ["Scores", "accuracy", "measure", "score", "tfidf"]


def tfidf(train: Sequence[Example], test: Sequence[Example], labels: Sequence[str]) -> list[int]:
    """Classify with what there was before: word and word-pair counts, and a linear model of them.

    Args:
        train: what to learn from; five of its folds choose how much to regularise.
        test: what to classify.
        labels: the classes.

    Returns:
        The numbers of the classes.

    Raises:
        LongscanError: scikit-learn is not installed, or a label is not among `labels`.
    """
    names = "feature_extraction.text", "linear_model", "model_selection"
    text, linear, selection = (require("scikit-learn", "baselines", f"sklearn.{name}") for name in names)
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    counts = words.fit_transform([read_whole(example) for example in train])
    search = selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), {"C": [0.1, 1, 10, 100]}, cv=5)
    search.fit(counts, number_labels(train, labels))
    answers: list[int] = search.predict(words.transform([read_whole(example) for example in test])).tolist()
    return answers


def measure(model: SequenceModel, data: Sequences, rows: int = 32) -> dict[str, float]:
    """Measure a model on labelled sequences.

    Args:
        model: of the same labels.
        data: the sequences.
        rows: read at a time.

    Returns:
        loss, and of classes accuracy and macro_f1, of numbers the root mean square of the error.
    """
    found, truth = answers(model, data, rows), torch.from_numpy(data.truth)
    loss = model.loss(found, truth).item()
    if not model.config.labels:
        return {"loss": loss, "rmse": loss**0.5}
    scores = score(data.truth.tolist(), found.argmax(1).tolist())
    return {"loss": loss, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


class Scores(NamedTuple):
    """How well texts were classified.

    Attributes:
        accuracy: share of right answers.
        macro_f1: mean F1 over the classes that occur, in truth or among the answers.
        classes: number of the class -> precision, recall, F1, and how many there are.
    """

    accuracy: float
    macro_f1: float
    classes: dict[int, tuple[float, float, float, int]]


def score(truth: Sequence[int], answers: Sequence[int]) -> Scores:
    """Score answers.

    Args:
        truth: numbers of classes, at least one.
        answers: what the classifier says.

    Returns:
        The scores; what would be 0 / 0 is 0.
    """
    right = Counter(a for a, b in zip(truth, answers, strict=True) if a == b)
    there, said = Counter(truth), Counter(answers)
    classes = {}
    for number in sorted({*there, *said}):
        precision = right[number] / said[number] if said[number] else 0.0
        recall = right[number] / there[number] if there[number] else 0.0
        f1 = 2 * right[number] / (there[number] + said[number])
        classes[number] = (precision, recall, f1, there[number])
    mean = sum(f1 for _, _, f1, _ in classes.values()) / len(classes)
    return Scores(right.total() / len(truth), mean, classes)


@torch.inference_mode()
def accuracy(model: LanguageModel, examples: Examples, chunk_size: int = 4096) -> float:
    """Measure how many answers are right.

    Args:
        model: in any mode, which it keeps.
        examples: sequences of any length, read in memory that does not grow with it but for attention.
        chunk_size: tokens read at a time.

    Returns:
        The share of targets at which the most likely token is the right one.
    """
    training, vocab_size = model.training, model.config.vocab_size
    model.eval()
    state, right = None, 0
    for start in range(0, examples.ids.shape[1], chunk_size):
        ids, targets = (part[:, start : start + chunk_size].to(model.device) for part in examples)
        hidden, state = model.backbone(ids, state)
        asked = targets != IGNORED
        if bool(asked.any()):
            said = model.head(hidden[asked])[:, :vocab_size].argmax(1)
            right += int((said == targets[asked]).sum())
    model.train(training)
    return right / int((examples.targets != IGNORED).sum())
